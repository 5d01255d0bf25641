package test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

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
	site.Write(t, "nitrokey/config", vaulttest.Fields{"request_timeout": "50s"})
	site.Write(t, "nitrokey/devices/hsm", vaulttest.Fields{"decrypt_timeout": "2s"})
	site.MustUnwrap(t, "prod", wrapped, secret)
	before := site.Hosts()
	card.Fault(t, pkcs11test.Freezes("C_Decrypt"))
	began := time.Now()
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusServiceUnavailable)
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("the answer took %s: it is the request's limit that ended the wait, not the operation's", took)
	}
	vaulttest.WaitGone(t, limit, before...)
	card.Mend(t, pkcs11test.Freezes("C_Decrypt"))
	eventuallyUnwraps(t, site, wrapped)
	after := site.Hosts()
	if len(before) != 1 || len(after) != 1 || before[0].PID == after[0].PID {
		t.Errorf("the module hosts were %v and are %v", before, after)
	}
}

func TestAModuleThatCrashesHarmsOnlyItsOperation(t *testing.T) {
	card := pkcs11test.Card(t)
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: &card.Token})
	site.Write(t, "nitrokey/devices/hsm", vaulttest.Fields{"parallel": 4})
	site.MustUnwrap(t, "prod", wrapped, secret)
	plugins := site.Plugins()

	client := site.Client(t)
	results := make(chan error)
	unwrap := func() { // ends with its answer, which is waited for below
		answer, err := client.Logical().Write("nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped})
		if err == nil && answer.Data["plaintext"] != vaulttest.Base64(secret) {
			err = fmt.Errorf("unwrapped %v", answer.Data)
		}
		results <- err
	}
	// Three are in the module when the fourth crashes it. Which one was it? The one that was inside longest, it is said.
	const unwraps = 4
	slow, earlier := pkcs11test.Slow(3*time.Second), card.Calls(t, "C_Decrypt")
	card.Fault(t, slow)
	for range unwraps - 1 {
		go unwrap()
	}
	pkcs11test.Until(t, "three are in the module", func() bool { return card.Calls(t, "C_Decrypt") == earlier+unwraps-1 })
	card.Fault(t, pkcs11test.CrashesOnce("C_Decrypt"))
	card.Mend(t, slow)
	go unwrap()
	failed := 0
	for range unwraps {
		if err := <-results; err != nil {
			failed++
			t.Logf("one of them: %v", err)
		}
	}
	if failed != 1 {
		t.Errorf("%d of %d concurrent operations failed with the one that crashed", failed, unwraps)
	}
	if after := site.Plugins(); len(after) != 1 || after[0].PID != plugins[0].PID {
		t.Errorf("the plugin was %v and is %v: it should not notice", plugins, after)
	}
	site.MustUnwrap(t, "prod", wrapped, secret)
}

// A process killed while the card makes a key has told nobody of it. The next one finds the intent, and ends with one key.
func TestAPluginKilledWhileTheCardMakesAKeyLeavesOneKey(t *testing.T) {
	card := pkcs11test.Card(t)
	site := vaulttest.StartSite(t, vaulttest.SiteOptions{Token: &card.Token})
	site.AddDevice(t, "hsm")
	card.Fault(t, pkcs11test.Freezes("C_GenerateKeyPair"))
	site.Write(t, "nitrokey/keys/prod", vaulttest.Fields{"device": "hsm", "generate": true, "algorithm": "rsa-2048"})
	pkcs11test.Until(t, "the card is making a key", func() bool { return card.Calls(t, "C_GenerateKeyPair") == 1 })

	before := site.Processes()
	for _, plugin := range site.Plugins() {
		plugin.Kill(t)
	}
	vaulttest.WaitGone(t, limit, before...)
	card.Mend(t, pkcs11test.Freezes("C_GenerateKeyPair"))
	vaulttest.Eventually(t, limit, "the key to be ready", func() error {
		key, err := site.Client(t).Logical().Read("nitrokey/keys/prod")
		if err == nil && (key == nil || key.Data["state"] != "ready") {
			err = fmt.Errorf("it is %+v", key)
		}
		return err
	})
	if made := hsmKeys(t, site); made != 1 {
		t.Errorf("the HSM holds %d keys", made)
	}
	site.MustUnwrap(t, "prod", site.Wrap(t, "prod", secret), secret)
}
