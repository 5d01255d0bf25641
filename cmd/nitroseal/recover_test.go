package main

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

func TestARecoveredValueIsNotShownOnATerminalUnasked(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	a := newApp(os.Stdin, terminal, os.Stderr)
	for name, test := range map[string]struct {
		out  recoveryOutput
		fine bool
	}{
		"to the terminal":                     {recoveryOutput{}, false},
		"to the terminal, named":              {recoveryOutput{file: "-"}, false},
		"a field to the terminal":             {recoveryOutput{field: "root"}, false},
		"to the terminal, at somebody's word": {recoveryOutput{show: true}, true},
		"to a file":                           {recoveryOutput{file: "secret"}, true},
		"to a folder":                         {recoveryOutput{dir: "secrets"}, true},
	} {
		if err := test.out.check(a); (err == nil) != test.fine {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNoRecoveredFieldLeadsOutOfItsFolder(t *testing.T) {
	material := envelope.Context{Use: envelope.UseMaterial}
	for _, name := range []string{".", "..", ".hidden"} {
		payload, err := custody.Fields{name: []byte("value"), "good": []byte("value")}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if fields, err := recoveredFields(material, payload); !errors.Is(err, errNoFields) {
			t.Errorf("the field %q: %v, %v", name, fields.Names(), err)
		}
	}
	payload, err := custody.Fields{"0a1b.0": []byte("value"), "facts": []byte("{}")}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if fields, err := recoveredFields(material, payload); err != nil || len(fields) != 2 {
		t.Errorf("the fields of a cluster: %v, %v", fields.Names(), err)
	}
}

// oneHSM is the only device of a keyring.
type oneHSM struct{ device hsm.Device }

func (o oneHSM) Device(context.Context, string) (hsm.Device, error) { return o.device, nil }

func TestWhatWasSealedInALeaseIsRecoveredByTheKeyRecord(t *testing.T) {
	device := hsmtest.NewMemory()
	device.AddRSA(t, "unseal", "01", 2048)
	newKey := func() (envelopeOf func(payload string) []byte, record keyring.KeyRecord) {
		records, err := file.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = records.Close() })
		keys := keyring.New(keyring.Config{Records: records, Devices: oneHSM{device}})
		t.Cleanup(func() { _ = keys.Close() })
		lease, yes := keyring.MinLease, true
		_, err = keys.Adopt(t.Context(), "prod", keyring.AdoptRequest{Device: "one", Label: "unseal"})
		if err == nil {
			_, err = keys.Configure(t.Context(), "prod", keyring.Settings{Lease: &lease, AcceptSingleHSM: &yes})
		}
		if err == nil {
			record, err = keys.Backup(t.Context(), "prod", "me")
		}
		if err != nil {
			t.Fatal(err)
		}
		return func(payload string) []byte {
			if err := keys.OpenLease(t.Context(), "prod"); err != nil {
				t.Fatal(err)
			}
			sealed, err := keys.Wrap(t.Context(), "prod", envelope.UseTransit, []byte(payload), nil)
			if err != nil || !sealed.Leased {
				t.Fatalf("sealed in a lease: %v, %v", sealed.Leased, err)
			}
			return sealed.Envelope
		}, record
	}
	seal, record := newKey()
	forge, _ := newKey() // another wrapping key of that name, over the same HSM key
	authOf := func() *envelope.Envelope {
		content, err := keyring.ReadKeyRecord(record.Record)
		if err != nil {
			t.Fatal(err)
		}
		auth, err := envelope.Parse(content.AuthEnvelopes[1])
		if err != nil {
			t.Fatal(err)
		}
		return auth
	}
	for _, test := range []struct {
		name  string
		raw   []byte
		auth  *envelope.Envelope
		spent int
		err   error
	}{
		{"by the key record", seal("secret"), authOf(), 2, nil},
		{"unauthenticated", seal("secret"), nil, 1, nil},
		{"a forged one by the key record", forge("secret"), authOf(), 2, envelope.ErrNotAuthentic},
		{"a forged one unauthenticated", forge("secret"), nil, 1, nil},
	} {
		sealed, err := envelope.Parse(test.raw)
		if err != nil {
			t.Fatal(err)
		}
		before := device.Operations()
		payload, err := (&recovery{}).open(t.Context(), device, sealed, test.auth)
		if !errors.Is(err, test.err) || err == nil && string(payload) != "secret" {
			t.Errorf("%s: %q, %v", test.name, payload, err)
		}
		if test.err != nil && !strings.Contains(err.Error(), "FORGED") {
			t.Errorf("%s: %v", test.name, err)
		}
		if spent := device.Operations() - before; spent != test.spent {
			t.Errorf("%s: %d operations, want %d", test.name, spent, test.spent)
		}
	}
}

func FuzzCutEnvelope(f *testing.F) {
	f.Add([]byte("nitroseal1 ABCDEFGHIJKLMNOPQRSTUVWXYZ 0011223344556677\n{\"protected\":"), "")
	f.Add([]byte("vault:v1:eyJwcm90ZWN0ZWQiOg=="), "")
	f.Add([]byte(`{"format":1,"items":[{"item":"unseal","envelope":{"protected":""}}]}`), "unseal")
	f.Fuzz(func(t *testing.T, text []byte, item string) {
		if raw, err := cutEnvelope(text, item); err == nil && len(raw) > len(text) {
			t.Errorf("%d bytes came out of %d", len(raw), len(text))
		}
	})
}
