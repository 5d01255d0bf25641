package test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestAWrongPINIsSentOnce(t *testing.T) {
	card := pkcs11test.Card(t)
	card.GenerateKey(t, "rsa:2048", "seal", "01")
	site := vaulttest.StartSite(t, vaulttest.SiteOptions{Token: &card.Token})
	const wrong = "000000"
	device := vaulttest.Fields{"type": "pkcs11", "module": card.Module, "token_label": card.Label, "pin": wrong}
	site.Write(t, "nitrokey/devices/hsm", device)
	adopt := vaulttest.Fields{"device": "hsm", "key_label": "seal"}

	refused := func(t *testing.T, mount string) {
		t.Helper()
		// Vault answers a request or two with an error of its own while it starts a killed plugin anew.
		vaulttest.Eventually(t, limit, "the plugin to refuse the PIN", func() error {
			_, err := site.Try(t, mount+"/keys/prod", adopt)
			switch {
			case err == nil:
				t.Fatal("a key was adopted with a wrong PIN")
			case strings.Contains(err.Error(), wrong):
				t.Errorf("the error shows the PIN: %v", err)
			case !strings.Contains(err.Error(), "PIN"):
				return err
			}
			return nil
		})
		if sent := card.WrongPINs(t); sent != 1 {
			t.Errorf("the card was sent %d wrong PINs", sent)
		}
	}
	refused(t, "nitrokey")
	refused(t, "nitrokey")
	t.Run("a restart does not forget it", func(t *testing.T) {
		site.Restart(t)
		refused(t, "nitrokey")
	})
	t.Run("nor does a SIGKILL", func(t *testing.T) {
		for _, plugin := range site.Plugins() {
			plugin.Kill(t)
		}
		refused(t, "nitrokey")
	})
	t.Run("nor another mount", func(t *testing.T) {
		site.Enable(t, "second", "")
		site.Write(t, "second/devices/hsm", device)
		refused(t, "second")
	})
	t.Run("an operator gives the right one", func(t *testing.T) {
		device["pin"] = card.PIN
		site.Write(t, "nitrokey/devices/hsm", device)
		// The token shows that a try is gone: nothing is sent without a person's word.
		if _, err := site.Try(t, "nitrokey/keys/prod", adopt); err == nil || !strings.Contains(err.Error(), "unbar") {
			t.Errorf("with a try gone, an unknown PIN was answered with %v", err)
		}
		site.Write(t, "nitrokey/devices/hsm/unbar", nil)
		site.Write(t, "nitrokey/keys/prod", adopt)
		site.MustUnwrap(t, "prod", site.Wrap(t, "prod", secret), secret)
		if sent := card.WrongPINs(t); sent != 1 {
			t.Errorf("the card was sent %d wrong PINs", sent)
		}
	})
}

func TestThePINMayComeFromAFile(t *testing.T) {
	site := vaulttest.StartSite(t, vaulttest.SiteOptions{})
	file := filepath.Join(site.SecretsDir, "pin")
	must(t, os.WriteFile(file, []byte(site.Token.PIN+"\n"), 0o600))
	site.Write(t, "nitrokey/devices/hsm", vaulttest.Fields{
		"type": "pkcs11", "module": site.Token.Module, "serial": site.Token.Serial, "pin_file": file,
	})
	site.AddKey(t, "prod", "hsm", "ecdh-p256")
	site.MustUnwrap(t, "prod", site.Wrap(t, "prod", secret), secret)
	shown := fmt.Sprint(site.Read(t, "nitrokey/devices/hsm"))
	if strings.Contains(shown, site.Token.PIN) {
		t.Errorf("the device shows the PIN: %s", shown)
	}
}

func TestATokenThatWasTakenAwayIsUsedAgainWithoutARestart(t *testing.T) {
	plug := pkcs11test.Unpluggable(t)
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: &plug.Token})
	plug.Unplug(t)
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusServiceUnavailable)
	site.Wrap(t, "prod", secret) // needs no token
	plug.Replug(t)
	eventuallyUnwraps(t, site, wrapped)
}

// A key sealed to two HSMs opens with either: the first is away, nobody was told, and nothing stops.
func TestTheSecondHSMOpensWhileTheFirstIsAway(t *testing.T) {
	first, second := pkcs11test.Unpluggable(t), pkcs11test.SoftHSM(t)
	second.GenerateKey(t, "rsa:2048", "spare", "51")
	site, older := newSite(t, vaulttest.SiteOptions{Token: &first.Token, Args: []string{"-pkcs11-module=" + second.Module}})
	site.Write(t, "nitrokey/devices/spare", vaulttest.Fields{
		"type": "pkcs11", "module": second.Module, "serial": second.Serial, "pin": second.PIN,
	})
	site.Write(t, "nitrokey/keys/prod/recipients", vaulttest.Fields{"device": "spare", "key_label": "spare"})
	wrapped := site.Wrap(t, "prod", secret)
	site.Write(t, "nitrokey/stores/own", vaulttest.Fields{"type": "vault"})
	putMaterial(t, site, "own", "eu", "shares")

	first.Unplug(t)
	site.MustUnwrap(t, "prod", wrapped, secret)
	openMaterial(t, site, "eu", "shares")
	site.MustUnwrap(t, "prod", site.Wrap(t, "prod", secret), secret)
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": older}, http.StatusServiceUnavailable) // sealed to the first only
	site.Restart(t)
	site.MustUnwrap(t, "prod", wrapped, secret)
	first.Replug(t)
	eventuallyUnwraps(t, site, older)
}

func TestTwoMountsShareAToken(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	site.Enable(t, "second", "")
	device := vaulttest.Fields{
		"type": "pkcs11", "module": site.Token.Module, "token_label": site.Token.Label, "pin": site.Token.PIN, "parallel": 8,
	}
	site.Write(t, "second/devices/hsm", device)
	label := "shared"
	site.Token.GenerateKey(t, "rsa:2048", label, "77")
	site.Write(t, "second/keys/prod", vaulttest.Fields{"device": "hsm", "key_label": label})
	answer := site.Write(t, "second/wrap/prod", vaulttest.Fields{"plaintext": vaulttest.Base64(secret)})
	site.MustUnwrap(t, "prod", wrapped, secret)
	if opened := site.Write(t, "second/unwrap/prod", vaulttest.Fields{"ciphertext": answer["ciphertext"]}); opened["plaintext"] != vaulttest.Base64(secret) {
		t.Errorf("the second mount opened %v", opened)
	}
	if plugins, hosts := len(site.Plugins()), len(site.Hosts()); plugins != 1 || hosts != 1 {
		t.Errorf("two mounts run %d plugins and %d module hosts", plugins, hosts)
	}

	// A wrong PIN at one mount harms that mount alone.
	device["pin"] = "111111"
	site.Write(t, "second/devices/hsm", device)
	if _, err := site.Try(t, "second/unwrap/prod", vaulttest.Fields{"ciphertext": answer["ciphertext"]}); err == nil {
		t.Error("a mount with a wrong PIN used the other mount's log-in")
	}
	site.MustUnwrap(t, "prod", wrapped, secret)
	must(t, site.Client(t).Sys().Unmount("second"))
	site.MustUnwrap(t, "prod", wrapped, secret)
}

func TestTwoVaultNodesShareAToken(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	// The second node has the same plugin file; what is registered comes to it through raft.
	second := vaulttest.Start(t, vaulttest.Options{Join: site.Server})
	second.Install(t, vaulttest.Build{}.Binary(t))
	second.WaitVoter(t)
	site.MustUnwrap(t, "prod", wrapped, secret)

	must(t, site.Client(t).Sys().StepDown())
	second.WaitActive(t)
	standby := *site
	standby.Server = second
	eventuallyUnwraps(t, &standby, wrapped)
	standby.MustUnwrap(t, "prod", standby.Wrap(t, "prod", secret), secret)
}

// Two Vaults that know nothing of each other, on one token: neither can see the other's locks.
func TestTwoIndependentVaultsShareAToken(t *testing.T) {
	first, wrapped := newSite(t, vaulttest.SiteOptions{})
	second := vaulttest.StartSite(t, vaulttest.SiteOptions{Token: first.Token})
	second.AddDevice(t, "hsm")
	second.Write(t, "nitrokey/keys/prod", vaulttest.Fields{"device": "hsm", "key_label": "nitroseal-prod-v1"})
	sites := map[string]*vaulttest.Site{"first": first, "second": second}
	sealed := map[string]string{"first": wrapped, "second": second.Wrap(t, "prod", secret)}
	for name, site := range sites {
		site.Write(t, "nitrokey/stores/token", vaulttest.Fields{"type": "object", "device": "hsm", "application": name})
	}

	const rounds = 4
	encoded := map[string]string{"a": vaulttest.Base64(secret)}
	failures := make(chan error)
	for name, site := range sites {
		client := site.Client(t)
		go func() { // ends with the last round
			var problems []error
			for i := range rounds {
				answer, err := client.Logical().Write("nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": sealed[name]})
				if err == nil && answer.Data["plaintext"] != vaulttest.Base64(secret) {
					err = fmt.Errorf("%s unwrapped %v", name, answer.Data)
				}
				problems = append(problems, err)
				_, err = client.Logical().Write(fmt.Sprintf("nitrokey/material/%s/item-%d", name, i),
					vaulttest.Fields{"key": "prod", "store": "token", "fields": encoded})
				problems = append(problems, err)
			}
			failures <- errors.Join(problems...)
		}()
	}
	for range sites {
		if err := <-failures; err != nil {
			t.Error(err)
		}
	}
	for name, site := range sites {
		for i := range rounds {
			answer := site.Write(t, fmt.Sprintf("nitrokey/material/%s/item-%d/open", name, i), nil)
			if got := answer["fields"].(map[string]any)["a"]; got != encoded["a"] {
				t.Errorf("%s opened item %d as %v", name, i, got)
			}
		}
	}
}
