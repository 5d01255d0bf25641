package main

import (
	"errors"
	"os"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
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
