package nethsm_test

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// Somebody imported a key that Go cannot use. It is no trouble of the node, and nobody else's.
func TestOddKeyKeepsNobodyFromOurs(t *testing.T) {
	for name, body := range map[string]string{
		"an even modulus": `{"type":"RSA","mechanisms":["RSA_Decryption_PKCS1"],"operations":0,"restrictions":{"tags":[]},` +
			`"public":{"modulus":"` + strings.Repeat("/", 340) + `AA==","publicExponent":"AQAB"}}`,
		"an exponent of 40 bits": `{"type":"RSA","mechanisms":["RSA_Decryption_OAEP_SHA256"],"operations":0,"restrictions":{"tags":[]},` +
			`"public":{"modulus":"` + strings.Repeat("/", 344) + `","publicExponent":"AQAAAAAB"}}`,
		"a point beside its curve": `{"type":"EC_P256","mechanisms":["ECDSA_Signature"],"operations":0,"restrictions":{"tags":[]},"public":{"data":"AAAA"}}`,
		"no mechanism":             `{"type":"Generic","mechanisms":[],"operations":0,"restrictions":{"tags":[]}}`,
	} {
		t.Run(name, func(t *testing.T) {
			h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
			device, ctx, admin := openDevice(t, deviceOn(h)), shortly(t), administrator(t, h)
			ours := generate(t, device, "seal")
			_, err := admin.GenerateKey(ctx, nethsm.NewKey{
				ID: "odd", Type: nethsm.TypeGeneric, Length: 128, Mechanisms: []nethsm.Mechanism{nethsm.AESEncryptionCBC},
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, node := range h.Nodes() {
				node.Inject(nethsmtest.Fault{Method: http.MethodGet, Path: "/keys/odd", Status: http.StatusOK, Body: []byte(body)})
			}
			for _, query := range []hsm.KeyQuery{{}, {Fingerprint: ours.Ref().Fingerprint}, {ID: "seal"}, {Label: ours.Ref().Label}} {
				if found, err := device.FindKeys(ctx, query); err != nil || len(found) != 1 || found[0].Ref() != ours.Ref() {
					t.Errorf("FindKeys(%v) = %v, %v; want our key", query, found, err)
				}
			}
			for _, query := range []hsm.KeyQuery{{ID: "odd"}, {Label: "odd"}} {
				if found, err := device.FindKeys(ctx, query); !errors.Is(err, hsm.ErrUnsupported) || errors.Is(err, hsm.ErrUnavailable) {
					t.Errorf("FindKeys(%v) = %v, %v; want ErrUnsupported", query, found, err)
				}
			}
			for _, node := range device.Nodes(ctx) {
				if node.Resting {
					t.Errorf("%s rests because of somebody's key: %v", node.URL, node.Err)
				}
			}
			if key, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "odd"}); !errors.Is(err, hsm.ErrExists) {
				t.Errorf("GenerateKey with its id = %v, %v; want ErrExists", key, err)
			}
			if err := device.DeleteKey(ctx, hsm.KeyRef{ID: "odd", Fingerprint: ours.Ref().Fingerprint}); !errors.Is(err, hsm.ErrKeyChanged) {
				t.Errorf("DeleteKey of it = %v, want ErrKeyChanged", err)
			}
		})
	}
}

// The label that a device shows for a key finds that key again, however long it is.
func TestKeyIsFoundByTheLabelThatIsShown(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx := openDevice(t, deviceOn(h)), shortly(t)
	for _, id := range []string{"a", strings.Repeat("b", 32), strings.Repeat("c", 33), strings.Repeat("d", 128)} {
		key, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: id})
		if err != nil {
			t.Fatal(err)
		}
		if found, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Label: key.Ref().Label}); err != nil || found.Ref() != key.Ref() {
			t.Errorf("FindKey by the label %q = %v, %v", key.Ref().Label, found, err)
		}
	}
}

// Names of clusters tend to differ in the middle.
func TestLongLabelsThatDifferInTheMiddleAreOfDifferentKeys(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx := openDevice(t, deviceOn(h)), shortly(t)
	label := func(place string) string { return fmt.Sprintf("nitroseal-the-bank-in-%s-production-cluster-v1", place) }
	made, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "north", Label: label("north")})
	if err != nil {
		t.Fatal(err)
	}
	if found, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Label: label("south")}); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("FindKey by another label = %v, %v; want ErrNotFound", found, err)
	}
	if _, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "south", Label: label("south")}); err != nil {
		t.Fatal(err)
	}
	if found, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Label: label("north")}); err != nil || found.Ref() != made.Ref() {
		t.Errorf("FindKey = %v, %v; want the key of that label alone", found, err)
	}
}
