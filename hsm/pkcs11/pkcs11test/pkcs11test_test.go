package pkcs11test_test

import (
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

func TestSoftHSMTokensAreApart(t *testing.T) {
	first := pkcs11test.SoftHSM(t)
	second := first.Add(t, first.Label)
	if first.Serial == second.Serial || first.Slot(t) == second.Slot(t) {
		t.Fatalf("two tokens are one: %+v and %+v", first, second)
	}
	first.GenerateKey(t, "rsa:2048", "seal", "01")
	second.GenerateKey(t, "EC:prime256v1", "other", "02")
	second.WriteObject(t, "nitroseal", "cluster/item", []byte("value"))
	if listed := first.Tool(t, "--list-objects"); !strings.Contains(listed, "seal") || strings.Contains(listed, "other") {
		t.Errorf("the first token lists\n%s", listed)
	}
	listed := second.Tool(t, "--list-objects")
	for _, want := range []string{"other", "cluster/item", "nitroseal"} {
		if !strings.Contains(listed, want) {
			t.Errorf("the second token does not list %q:\n%s", want, listed)
		}
	}
	third := pkcs11test.SoftHSM(t)
	if listed := third.Tool(t, "--list-objects"); strings.Contains(listed, "seal") {
		t.Errorf("a new token is not empty:\n%s", listed)
	}
	if listed := first.Tool(t, "--list-objects"); !strings.Contains(listed, "seal") {
		t.Errorf("the first token lost its key to another test token:\n%s", listed)
	}
}
