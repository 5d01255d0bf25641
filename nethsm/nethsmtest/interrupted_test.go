package nethsmtest_test

import (
	"bytes"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// What the conformance test does to a NetHSM of somebody's is tried on the double, as its owner would run it: in a process
// of its own, which is refused, interrupted and killed.

// owner runs TestConformance against a double.
func owner(t *testing.T, h *nethsmtest.HSM, environment ...string) (run *exec.Cmd, said *bytes.Buffer) {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, h.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	said = &bytes.Buffer{}
	run = exec.CommandContext(t.Context(), self, "-test.run=^TestConformance$")
	run.Env = append(append(os.Environ(), "NITROSEAL_NETHSM_URL="+h.URLs()[0], "NITROSEAL_NETHSM_CA="+ca), environment...)
	run.Stdout, run.Stderr = said, said
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = run.Process.Kill() }) // ended long ago, but where this test failed
	return run, said
}

func asAdministrator(t *testing.T) []string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "admin")
	if err := os.WriteFile(file, []byte(nethsmtest.AdminPassphrase+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"NITROSEAL_NETHSM_ADMIN=" + nethsmtest.AdminUser, "NITROSEAL_NETHSM_ADMIN_PASSWORD_FILE=" + file}
}

// busy waits until the run has made things of all kinds.
func busy(t *testing.T, h *nethsmtest.HSM, key string) {
	t.Helper()
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); <-ticker.C {
		for _, id := range h.KeyIDs() {
			if id == key {
				return
			}
		}
	}
	t.Fatalf("the run never made key %s", key)
}

func TestARunThatIsInterruptedCleansUp(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	for _, id := range []string{"0123456789abcdef0123", "nitroseal", "app"} {
		if _, _, err := h.AddKey(nethsmtest.Key{ID: id, Type: "Generic"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.AddUser("0123456789abcdef0123", "Operator", "SomebodysPassphrase"); err != nil {
		t.Fatal(err)
	}
	keys, users := h.KeyIDs(), h.UserNames()
	same := func(when string) {
		t.Helper()
		if diff := cmp.Diff(keys, h.KeyIDs()) + cmp.Diff(users, h.UserNames()); diff != "" {
			t.Errorf("what was there before, and %s: %s", when, diff)
		}
	}
	run, said := owner(t, h, asAdministrator(t)...)
	busy(t, h, "nitroseal-test-ed1")
	if err := run.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := run.Wait(); err == nil {
		t.Errorf("a run that was interrupted says that all is well: %s", said)
	}
	same("after Ctrl-C")

	// One that is killed cannot clean up; the next one does it, before anything else.
	run, _ = owner(t, h, asAdministrator(t)...)
	busy(t, h, "nitroseal-test-ed1")
	if err := run.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = run.Wait() // killed
	if left := len(h.KeyIDs()) + len(h.UserNames()) - len(keys) - len(users); left < 6 {
		t.Fatalf("the run that was killed left only %d things", left)
	}
	h.Node(0).FailPath("/users", 500, 0) // nothing new comes into being
	run, _ = owner(t, h, asAdministrator(t)...)
	_ = run.Wait()
	h.Node(0).ClearFaults()
	if diff := cmp.Diff(keys, h.KeyIDs()); diff != "" {
		t.Errorf("where users could not be listed, keys were removed all the same, but for %s", diff)
	}
	run, said = owner(t, h, asAdministrator(t)...)
	busy(t, h, "nitroseal-test-rsa1")
	if err := run.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = run.Wait() // interrupted
	same("after two runs that were killed, and one that was ended: " + said.String())
}

func TestOnlyANetHSMFromTheFactoryIsErased(t *testing.T) {
	const may = "NITROSEAL_NETHSM_MAY_ERASE=yes"
	t.Run("one in use is left alone, even where it has the recording's passphrases", func(t *testing.T) {
		for _, state := range []nethsmtest.State{nethsmtest.Operational, nethsmtest.Locked, nethsmtest.Failed} {
			h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
			if _, _, err := h.AddKey(nethsmtest.Key{ID: "precious", Type: "Generic"}); err != nil {
				t.Fatal(err)
			}
			h.Node(0).SetState(state)
			run, said := owner(t, h, may)
			var failed *exec.ExitError
			if err := run.Wait(); !errors.As(err, &failed) || !strings.Contains(said.String(), "nothing was changed") {
				t.Errorf("%s: %v, saying %s", state, err, said)
			}
			for _, q := range h.Node(0).Requests() {
				if q.Method != http.MethodGet || q.User != "" {
					t.Errorf("%s: it was asked to %s %s as %q", state, q.Method, q.Path, q.User)
				}
			}
		}
	})
	t.Run("one that was taken back half-way has no passphrase that everybody knows", func(t *testing.T) {
		h := nethsmtest.Start(t, nethsmtest.Options{})
		run, said := owner(t, h, may)
		busy(t, h, "rsa1")
		if err := run.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		if err := run.Wait(); err == nil {
			t.Errorf("a run that was interrupted says that all is well: %s", said)
		}
		if state := h.Node(0).State(); state != nethsmtest.Unprovisioned {
			t.Errorf("it is left %s: %s", state, said)
		}
	})
	t.Run("without leave it is not even tried", func(t *testing.T) {
		h := nethsmtest.Start(t, nethsmtest.Options{})
		run, said := owner(t, h)
		if err := run.Wait(); err == nil || len(h.Node(0).Requests()) != 0 {
			t.Errorf("%v, %d requests: %s", err, len(h.Node(0).Requests()), said)
		}
	})
	t.Run("nothing is sent where everybody can read it", func(t *testing.T) {
		h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
		run, said := owner(t, h, append(asAdministrator(t), "NITROSEAL_NETHSM_URL="+strings.Replace(h.URLs()[0], "https", "http", 1))...)
		if err := run.Wait(); err == nil || !strings.Contains(said.String(), "https://") {
			t.Errorf("%v: %s", err, said)
		}
	})
}
