package test

import (
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// frozenSite has a card that answers no more, and an operation that waits for it.
func frozenSite(t *testing.T) (site *vaulttest.Site, card *pkcs11test.SmartCard, wrapped string) {
	t.Helper()
	card = pkcs11test.Card(t)
	site, wrapped = newSite(t, vaulttest.SiteOptions{Token: &card.Token})
	site.Write(t, "nitrokey/config", vaulttest.Fields{"request_timeout": "2s"})
	card.Fault(t, pkcs11test.Freezes("card"))
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusServiceUnavailable)
	if len(site.Hosts()) != 1 {
		t.Fatalf("the module hosts are %v; one should hang", site.Hosts())
	}
	site.Wrap(t, "prod", secret) // what needs no HSM goes on
	return site, card, wrapped
}

// While a module hangs, whatever is done to the plugin: Vault serves again, and the host that hangs does not stay.
func TestAHangingModuleHoldsUpNobody(t *testing.T) {
	for name, act := range map[string]func(t *testing.T, site *vaulttest.Site){
		"the plugin is killed": func(t *testing.T, site *vaulttest.Site) {
			t.Helper()
			for _, plugin := range site.Plugins() {
				plugin.Kill(t)
			}
		},
		"the plugin is reloaded": reload,
		"the plugin's file is replaced, and the plugin killed": func(t *testing.T, site *vaulttest.Site) {
			t.Helper()
			installed := filepath.Join(site.PluginDir, vaulttest.Name+"-"+vaulttest.DefaultVersion)
			must(t, os.Rename(installed, installed+".old"))
			site.Install(t, vaulttest.Build{}.Binary(t))
			for _, plugin := range site.Plugins() {
				plugin.Kill(t)
			}
		},
		"Vault is sealed and unsealed": func(t *testing.T, site *vaulttest.Site) {
			t.Helper()
			site.Seal(t)
			site.Unseal(t)
		},
	} {
		t.Run(name, func(t *testing.T) {
			site, card, wrapped := frozenSite(t)
			before := site.Processes()
			act(t, site)
			vaulttest.Eventually(t, limit, "Vault to serve what needs no HSM", func() error {
				_, err := site.Try(t, "nitrokey/wrap/prod", vaulttest.Fields{"plaintext": "aGk="})
				return err
			})
			vaulttest.WaitGone(t, limit, before...)
			card.Mend(t, pkcs11test.Freezes("card"))
			eventuallyUnwraps(t, site, wrapped)
		})
	}
}

func TestAHostThatHangsIsEndedAtItsOwnLimit(t *testing.T) {
	card := pkcs11test.Card(t)
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: &card.Token})
	site.Write(t, "nitrokey/devices/hsm", vaulttest.Fields{"decrypt_timeout": "2s"})
	card.Fault(t, pkcs11test.Freezes("C_Decrypt"))
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusServiceUnavailable)
	card.Mend(t, pkcs11test.Freezes("C_Decrypt"))
	eventuallyUnwraps(t, site, wrapped)
}

func TestAModuleThatCrashesHarmsOnlyItsOperation(t *testing.T) {
	card := pkcs11test.Card(t)
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: &card.Token})
	plugins := site.Plugins()
	card.Fault(t, pkcs11test.CrashesOnce("C_Decrypt"))
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusServiceUnavailable)
	site.MustUnwrap(t, "prod", wrapped, secret)
	if after := site.Plugins(); len(after) != 1 || after[0].PID != plugins[0].PID {
		t.Errorf("the plugin was %v and is %v: it should not notice", plugins, after)
	}
}
