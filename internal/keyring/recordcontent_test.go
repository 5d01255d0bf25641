package keyring

import (
	"bytes"
	"errors"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func TestAKeyRecordIsReadWithoutAKeyring(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "rsa"}}); err != nil {
		t.Fatal(err)
	}
	backup := f.backup()
	content, err := ReadKeyRecord(append([]byte(" \n"), backup.Record...))
	if err != nil {
		t.Fatal(err)
	}
	if content.Name != "prod" || content.SHA256 != backup.SHA256 || len(content.AuthEnvelopes) != 2 {
		t.Errorf("it tells %s of %s, %d envelopes", content.SHA256, content.Name, len(content.AuthEnvelopes))
	}
	for number, raw := range content.AuthEnvelopes {
		if parsed, err := envelope.Parse(raw); err != nil || parsed.Context().Differs(authContext("prod", number)) != nil {
			t.Errorf("version %d: %v", number, err)
		}
	}
	for name, raw := range map[string][]byte{
		"nothing":           nil,
		"another document":  []byte(`{"type":"another"}`),
		"an unknown member": bytes.Replace(backup.Record, []byte(`{"type"`), []byte(`{"more":1,"type"`), 1),
		"something behind":  append(bytes.Clone(backup.Record), 'x'),
	} {
		if _, err := ReadKeyRecord(raw); !errors.Is(err, ErrRecordMalformed) {
			t.Errorf("%s: %v, want ErrRecordMalformed", name, err)
		}
	}
}
