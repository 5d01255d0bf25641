package openbao_test

import (
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/hashicorp/go-plugin"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestHowTheProcessBehaves(t *testing.T) {
	s := withToken(t, pkcs11test.SoftHSM(t))
	settings := s.stanza(t, "prod")

	t.Run("its log is hclog's JSON, one object a line, without a secret", func(t *testing.T) {
		bao := s.openBao(t)
		w := bao.configured(t, settings)
		const plaintext = "a root key that no log may hold"
		blob := w.mustEncrypt(t, plaintext, "an aad that no log may hold")
		w.opens(t, blob, "an aad that no log may hold", plaintext)
		_, _ = w.decrypt(t.Context(), blob, []byte("another aad that no log may hold")) // fails
		vaulttest.Eventually(t, vaulttest.Patience, "the background to say that it is done", func() error {
			if !strings.Contains(bao.log.String(), "seal ready") {
				return errors.New("it did not")
			}
			return nil
		})
		bao.stop()
		text := bao.log.String()
		for line := range strings.Lines(text) {
			var entry struct {
				Level     string `json:"@level"`
				Message   string `json:"@message"`
				Timestamp string `json:"@timestamp"`
			}
			if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Level == "" || entry.Message == "" || entry.Timestamp == "" {
				t.Errorf("no line of hclog's: %s", line)
			}
		}
		for _, word := range []string{"seal configured", "seal ready", "a call failed"} {
			if !strings.Contains(text, word) {
				t.Errorf("the log says nothing of %q", word)
			}
		}
		s.keepsSecrets(t, "the log", text)
		if strings.Contains(text, "no log may hold") {
			t.Error("the log holds what was sealed, or what it was bound to")
		}
	})

	t.Run("its memory is locked where -mlock asks for it", func(t *testing.T) {
		ordinary := s.openBao(t)
		ordinary.configured(t, settings).mustEncrypt(t, rootKey, aad) // its log-in is over: another one would not see the token meanwhile
		asked := newOpenBao(t, s.binary, append([]string{"-mlock"}, s.args...), s.env...)
		w := asked.configured(t, settings)
		w.opens(t, w.mustEncrypt(t, rootKey, aad), aad, rootKey)
		little, all := locked(t, ordinary.pid(t)), locked(t, asked.pid(t))
		if const1MiB := 1 << 10; little > const1MiB || all < 4*const1MiB {
			t.Errorf("%d KiB are locked without -mlock, %d KiB with it", little, all)
		}
	})

	t.Run("nobody inherits a descriptor that keeps others open", func(t *testing.T) {
		bao := s.openBao(t)
		w := bao.configured(t, settings)
		w.opens(t, w.mustEncrypt(t, rootKey, aad), aad, rootKey)
		pid := bao.pid(t)
		ofPlugin := descriptors(t, pid)
		shared := map[string]bool{ofPlugin["1"]: true, ofPlugin["2"]: true} // what OpenBao reads the end of the plugin from
		for number, target := range ofPlugin {
			if strings.HasPrefix(target, "socket:") {
				shared[target] = true
			}
			if strings.Contains(target, s.host.Dir) && !strings.Contains(target, "state") {
				t.Errorf("the plugin keeps %s open as %s", target, number)
			}
		}
		hosts := childrenOf(t, pid)
		if len(hosts) != 1 {
			t.Fatalf("the plugin has %d children, want one module host", len(hosts))
		}
		for number, target := range descriptors(t, hosts[0]) {
			if shared[target] {
				t.Errorf("the module host has the plugin's %s as its descriptor %s", target, number)
			}
		}
	})

	t.Run("it serves nobody without mutual TLS", func(t *testing.T) {
		bao := s.openBao(t)
		config := bao.config()
		config.AutoMTLS = false
		client := plugin.NewClient(config)
		defer client.Kill()
		if _, err := client.Client(); err == nil {
			t.Error("it serves in the clear")
		}
		client.Kill()
		if text := bao.log.String(); !strings.Contains(text, "gave no certificate") {
			t.Errorf("it does not say why: %s", text)
		}
	})

	t.Run("it offers itself as nothing but a seal", func(t *testing.T) {
		bao := s.openBao(t)
		config := bao.config()
		config.VersionedPlugins = map[int]plugin.PluginSet{
			protocol: {dispensedName: hostSide{}, "kms": hostSide{}}, protocol + 1: {dispensedName: hostSide{}},
		}
		client := plugin.NewClient(config)
		defer client.Kill()
		connection, err := client.Client()
		if err != nil {
			t.Fatalf("a server that knows a later protocol as well: %v", err)
		}
		if version := client.NegotiatedVersion(); version != protocol {
			t.Errorf("protocol %d was agreed on", version)
		}
		if err := connection.Ping(); err != nil {
			t.Errorf("the health check: %v", err)
		}
	})

	t.Run("to a person it explains both of its roles", func(t *testing.T) {
		out, err := exec.CommandContext(t.Context(), s.binary.Path).CombinedOutput()
		if err == nil {
			t.Error("it ended with 0")
		}
		for _, words := range []string{"vault plugin register", `plugin "kms" "nitrokey"`, "sha256sum = \"" + s.binary.SHA256 + "\""} {
			if !strings.Contains(string(out), words) {
				t.Errorf("it says nothing of %q:\n%s", words, out)
			}
		}
	})
}
