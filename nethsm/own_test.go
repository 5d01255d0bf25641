package nethsm_test

import (
	"bytes"
	"context"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// TestANetHSMOfYourOwn runs the conformance suite on a real NetHSM, of version 5 or later because of the labels. It makes
// keys and objects of its own, all called suite-…, and deletes them, also those that an earlier run left. A namespace of its own
// keeps it apart from everything else. Several nodes of one cluster are separated by commas.
//
//	NITROSEAL_NETHSM_URL=https://nethsm:8443 NITROSEAL_NETHSM_CA=$PWD/ca.pem \
//	NITROSEAL_NETHSM_OPERATOR=test~operator NITROSEAL_NETHSM_OPERATOR_PASSWORD_FILE=$PWD/operator \
//	NITROSEAL_NETHSM_ADMIN=test~admin NITROSEAL_NETHSM_ADMIN_PASSWORD_FILE=$PWD/admin \
//	  go test -count=1 -run TestANetHSMOfYourOwn -v -timeout 30m ./nethsm
//
// NITROSEAL_NETHSM_PIN, the SHA-256 of the certificate in hexadecimal, does instead of the CA.
func TestANetHSMOfYourOwn(t *testing.T) {
	environment := func(name string) string { return os.Getenv("NITROSEAL_NETHSM_" + name) }
	file := func(name string) []byte {
		t.Helper()
		if environment(name) == "" {
			return nil
		}
		text, err := os.ReadFile(environment(name))
		if err != nil {
			t.Fatal(err)
		}
		return bytes.TrimRight(text, "\r\n")
	}
	if environment("URL") == "" || environment("OPERATOR") == "" || environment("ADMIN") == "" {
		t.Skip("it runs where NITROSEAL_NETHSM_URL, _OPERATOR, _OPERATOR_PASSWORD_FILE, _ADMIN and _ADMIN_PASSWORD_FILE name a NetHSM")
	}
	config := nethsm.DeviceConfig{
		Options:       nethsm.Options{URLs: strings.Split(environment("URL"), ","), TLS: nethsm.TLS{CA: file("CA")}},
		Operator:      nethsm.Credentials{Username: environment("OPERATOR"), Password: file("OPERATOR_PASSWORD_FILE")},
		Administrator: &nethsm.Credentials{Username: environment("ADMIN"), Password: file("ADMIN_PASSWORD_FILE")},
		Objects:       true,
		Owner:         "test",
	}
	if pin := environment("PIN"); pin != "" {
		config.TLS.Pins = []string{pin}
	}
	manager := nethsm.NewManager(nil)
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	open := func(t *testing.T) hsm.Device {
		t.Helper()
		device, err := manager.Open(config)
		if err != nil {
			t.Fatal(err)
		}
		return device
	}
	sweep(t, config)
	t.Cleanup(func() { sweep(t, config) })
	hsmtest.TestDevice(t, open, hsmtest.Capabilities{
		Algorithms:      []hsm.Algorithm{hsm.RSA2048, hsm.RSA3072, hsm.RSA4096},
		DuplicateLabels: true, Objects: true, MaxObject: 63 << 10, Random: true,
	})
}

// made by the suite are the keys with such a label, and the objects of such an application.
var (
	suiteLabel   = regexp.MustCompile(`^suite-[0-9a-f]{16}$`)
	suiteCarrier = regexp.MustCompile(`^nitroseal-object\.suite-[0-9a-f]{16}x?\.\.`)
)

// sweep deletes what the suite made, and nothing of the owner's that is called a little like it.
func sweep(t *testing.T, config nethsm.DeviceConfig) {
	t.Helper()
	client, err := nethsm.New(config.Options)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	admin := client.As(*config.Administrator)
	ids, err := admin.Keys(ctx, nethsm.KeyFilter{})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		key, err := admin.Key(ctx, id)
		if err != nil || !suiteLabel.MatchString(key.Label) && !suiteCarrier.MatchString(id) {
			continue
		}
		if err := admin.DeleteKey(ctx, id); err != nil {
			t.Error(err)
		}
	}
}
