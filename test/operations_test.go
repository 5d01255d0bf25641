package test

import (
	"maps"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// What an HSM does for us is slow, so it is counted, by a spy that we did not write: OpenSC's pkcs11-spy.
func TestOpeningIsOneDecryptAndSealingIsNone(t *testing.T) {
	spy := pkcs11test.Spied(t, pkcs11test.SoftHSM(t))
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: &spy.Token})
	site.Write(t, "nitrokey/stores/own", vaulttest.Fields{"type": "vault"})

	// calls tells which functions were called meanwhile, and how often.
	calls := func(act func()) map[string]int {
		before := spy.Calls(t)
		act()
		after := maps.Clone(spy.Calls(t))
		for function, count := range before {
			if after[function] -= count; after[function] == 0 {
				delete(after, function)
			}
		}
		return after
	}
	for name, test := range map[string]struct {
		act      func()
		decrypts int
	}{
		"wrap":                            {func() { site.Wrap(t, "prod", secret) }, 0},
		"unwrap":                          {func() { site.MustUnwrap(t, "prod", wrapped, secret) }, 1},
		"keeping material of five fields": {func() { putMaterial(t, site, "own", "eu", "shares") }, 0},
	} {
		got := calls(test.act)
		if got["C_Decrypt"] != test.decrypts || got["C_Sign"]+got["C_DeriveKey"]+got["C_UnwrapKey"] != 0 {
			t.Errorf("%s: the module was called %v, want %d C_Decrypt", name, got, test.decrypts)
		}
		if test.decrypts == 0 && len(got) > 0 {
			t.Errorf("%s touched the HSM: %v", name, got)
		}
		t.Logf("%s: %v", name, got)
	}
	if got := calls(func() { openMaterial(t, site, "eu", "shares") }); got["C_Decrypt"] != 1 {
		t.Errorf("opening material of five fields: %v", got)
	}
}

// The same on a card, which counts what it does itself: a length query would cost an operation there.
func TestACardPerformsOneOperationForEachOpening(t *testing.T) {
	card := pkcs11test.Card(t)
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: &card.Token})
	site.Write(t, "nitrokey/stores/own", vaulttest.Fields{"type": "vault"})
	for _, step := range []struct {
		name       string
		act        func()
		operations int
	}{
		{"five wraps", func() {
			for range 5 {
				site.Wrap(t, "prod", secret)
			}
		}, 0},
		{"one unwrap", func() { site.MustUnwrap(t, "prod", wrapped, secret) }, 1},
		{"keeping material of five fields", func() { putMaterial(t, site, "own", "eu", "shares") }, 0},
		{"opening it", func() { openMaterial(t, site, "eu", "shares") }, 1},
	} {
		before := card.Operations(t)
		step.act()
		if got := card.Operations(t) - before; got != step.operations {
			t.Errorf("%s: the card performed %d operations, want %d", step.name, got, step.operations)
		}
	}
}
