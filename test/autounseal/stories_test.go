package autounseal

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// story is told of a seal server and a wrapping key that is nobody else's.
type story struct {
	name string
	tell func(t *testing.T, server SealServer, key string)
}

// stories can be told at the same time.
var stories = []story{ // the longest first
	{"three nodes go from Shamir's seal to an HSM's one by one, and never all rest", clusterFromShamir},
	{"three nodes join and come back after a power cut", powerCut},
	{"snapshots are saved and restored, those from before a rotation too", snapshots},
	{"another transit's seal becomes ours, and one key gives way to another", transitToTransit},
	{"a Vault restarts and follows a rotation by itself", rotation},
	{"Shamir's seal becomes an HSM's and is Shamir's again", shamirAndBack},
	{"a lease comes and goes, and what was sealed opens", leaseComesAndGoes},
	{"vault operator diagnose finds nothing wrong", diagnose},
	{"a seal's requests are answered by PUT and by POST", theWire},
}

// disasters harm the server.
var disasters = []story{
	{"everything loses power and the Vaults come up first", everythingIsDown},
	{"the server loses all but its HSM and the key records", serverIsLost},
}

// tale is a group of stories with what they need. Tales are prepared one after the other, as the environment of PKCS#11 tokens
// belongs to the whole process, and told at the same time.
type tale struct {
	name    string
	prepare func(t testing.TB) (tell func(t *testing.T))
}

func TestVaultsUnsealThemselvesByAnHSM(t *testing.T) {
	var tales []tale
	for _, hsm := range []struct {
		name string
		make func(t testing.TB) *HSM
	}{{"SoftHSM", newSoftHSM}, {"NetHSM", newNetHSM}} {
		tales = append(tales, tale{"a " + hsm.name, func(t testing.TB) func(*testing.T) {
			t.Helper()
			device := hsm.make(t)
			mount, serve := newMount(t, device), newServe(t, device)
			return func(t *testing.T) {
				t.Run("and the mount", func(t *testing.T) { t.Parallel(); tell(t, mount) })
				t.Run("and nitroseal serve", func(t *testing.T) { t.Parallel(); tell(t, serve) })
			}
		}})
	}
	tales = slices.Concat(serveTales, tales, mountTales) // the longest first
	told := make([]func(*testing.T), len(tales))
	for i, tale := range tales {
		told[i] = tale.prepare(t)
	}
	for i, tale := range tales {
		t.Run(tale.name, func(t *testing.T) {
			t.Parallel()
			told[i](t)
		})
	}
}

// tell tells all stories of a server.
func tell(t *testing.T, server SealServer) {
	t.Run("stories", func(t *testing.T) {
		for i, story := range stories {
			t.Run(story.name, func(t *testing.T) {
				t.Parallel()
				key := fmt.Sprintf("story-%d", i+1)
				server.AddKey(t, key)
				story.tell(t, server, key)
			})
		}
	})
	for i, story := range disasters {
		t.Run(story.name, func(t *testing.T) {
			key := fmt.Sprintf("disaster-%d", i+1)
			server.AddKey(t, key)
			story.tell(t, server, key)
		})
	}
}

func theWire(t *testing.T, server SealServer, key string) {
	const text = "a root key"
	seal := server.Seal(t, key)
	for _, method := range []string{http.MethodPut, http.MethodPost} {
		got := call(t, seal, method, path(seal, "encrypt"), vaulttest.Fields{"plaintext": vaulttest.Base64(text)})
		ciphertext, _ := got.Data["ciphertext"].(string)
		if got.Code != http.StatusOK || !strings.HasPrefix(ciphertext, "vault:v1:") || strings.Count(ciphertext, ":") != 2 {
			t.Fatalf("%s encrypt: %d %s", method, got.Code, got.Raw)
		}
		got = call(t, seal, method, path(seal, "decrypt"), vaulttest.Fields{"ciphertext": ciphertext})
		if got.Code != http.StatusOK || got.Data["plaintext"] != vaulttest.Base64(text) {
			t.Errorf("%s decrypt: %d %s", method, got.Code, got.Raw)
		}
	}
	another := seal
	another.Key = "another-cluster's"
	got := call(t, another, http.MethodPut, path(another, "encrypt"), vaulttest.Fields{"plaintext": vaulttest.Base64(text)})
	if got.Code != http.StatusForbidden {
		t.Errorf("the token serves another key: %d %s", got.Code, got.Raw)
	}
}

// rotation: a new version of the wrapping key reaches a Vault with its next unsealing. That old versions may not open any more
// proves that it has sealed everything anew.
func rotation(t *testing.T, server SealServer, key string) {
	seal := server.Seal(t, key)
	vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
	remember(t, vault, "secret", "kept")
	old := encrypts(t, seal, "before the rotation")
	restarts := func() {
		t.Helper()
		vault.Restart(t) // waits until it is unsealed, and gives no share
		recalls(t, vault, "secret", "kept")
		must(t, vault.SealHealthy(t))
	}
	restarts()

	server.Rotate(t, key)
	if now := encrypts(t, seal, "after"); !strings.HasPrefix(now, "vault:v2:") {
		t.Fatalf("encrypt seals with %.9s", now)
	}
	must(t, opens(t, seal, old, "before the rotation"))
	restarts()
	server.Minimum(t, key, 2)
	if opens(t, seal, old, "before the rotation") == nil {
		t.Error("a version below the minimum opens")
	}
	restarts()
	server.Minimum(t, key, 1)
	must(t, opens(t, seal, old, "before the rotation"))
	// The recovery key as well: it still makes a root token.
	vault.RecoversARootToken(t)
}

// powerCut: one node joins by retry_join, one by hand, and none is ever given a share.
func powerCut(t *testing.T, server SealServer, key string) {
	seal := server.Seal(t, key)
	cluster := vaulttest.StartCluster(t, 2, true, seal)
	first := cluster.Servers[0]
	first.Init(t)
	for _, s := range cluster.Servers[1:] {
		s.RootToken, s.RecoveryKey = first.RootToken, first.RecoveryKey
	}
	third := vaulttest.Start(t, vaulttest.Options{Join: first, Seals: []vaulttest.Seal{seal}})
	cluster.Servers = append(cluster.Servers, third)
	cluster.WaitUnsealed(t, vaulttest.Patience)
	cluster.WaitVoters(t)
	remember(t, first, "secret", "kept")

	for range 2 {
		cluster.Kill(t)
		cluster.Up(t)
		cluster.WaitUnsealed(t, vaulttest.Patience)
		recalls(t, cluster.Active(t), "secret", "kept")
	}
	// Who was a standby does the active node's work as well, with what another node has sealed.
	before := cluster.Active(t)
	before.StepDown(t)
	vaulttest.Eventually(t, vaulttest.Patience, "another node to be active", func() error { return isAnother(t, cluster, before) })
	recalls(t, cluster.Active(t), "secret", "kept")
}

// isAnother tells whether another node than that one is active.
func isAnother(t testing.TB, cluster *vaulttest.Cluster, before *vaulttest.Server) error {
	t.Helper()
	now, err := cluster.Leader(t)
	if now == before {
		err = errors.New("it is the same one still")
	}
	return err
}

func snapshots(t *testing.T, server SealServer, key string) {
	seal := server.Seal(t, key)
	vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
	remember(t, vault, "secret", "old")
	snapshot := vault.SaveSnapshot(t)
	remember(t, vault, "secret", "new")
	vault.RestoreSnapshot(t, snapshot, false)
	vault.WaitActive(t)
	recalls(t, vault, "secret", "old")
	vault.Restart(t)
	recalls(t, vault, "secret", "old")

	server.Rotate(t, key)
	vault.Restart(t)
	remember(t, vault, "secret", "newest")
	another := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
	another.RestoreSnapshot(t, snapshot, true)
	another.RootToken = vault.RootToken // it is that cluster now
	another.WaitActive(t)
	recalls(t, another, "secret", "old")
	another.Restart(t)
	recalls(t, another, "secret", "old")
}

func shamirAndBack(t *testing.T, server SealServer, key string) {
	vault := vaulttest.Start(t, vaulttest.Options{})
	remember(t, vault, "secret", "kept")
	seal := server.Seal(t, key)

	vault.Stop(t)
	vault.Migrate(t, seal)
	vault.WaitActive(t) // it is becoming active that migrates
	recalls(t, vault, "secret", "kept")
	vault.Restart(t)
	recalls(t, vault, "secret", "kept")

	seal.Disabled = true
	vault.Stop(t)
	vault.Migrate(t, seal)
	vault.WaitActive(t)
	vault.SetSeals()
	vault.Restart(t) // with what was the recovery key
	recalls(t, vault, "secret", "kept")
}

// clusterFromShamir: the standbys first, the active node last.
func clusterFromShamir(t *testing.T, server SealServer, key string) {
	cluster := vaulttest.StartCluster(t, 3, true)
	first := cluster.Servers[0]
	first.Init(t)
	for _, s := range cluster.Servers[1:] {
		s.RootToken, s.UnsealKey = first.RootToken, first.UnsealKey
		s.UnsealStandby(t)
	}
	cluster.WaitVoters(t)
	remember(t, first, "secret", "kept")
	seal := server.Seal(t, key)

	for _, standby := range cluster.Servers[1:] {
		standby.Stop(t)
		standby.Migrate(t, seal)
		recalls(t, cluster.Active(t), "secret", "kept")
	}
	// The first of them to become active migrates the cluster. Who was active then needs no key any more.
	first.StepDown(t)
	vaulttest.Eventually(t, vaulttest.Patience, "another node to be active", func() error { return isAnother(t, cluster, first) })
	first.Stop(t)
	first.SetSeals(seal)
	first.Up(t)
	cluster.WaitUnsealed(t, vaulttest.Patience)
	recalls(t, cluster.Active(t), "secret", "kept")
	cluster.Kill(t)
	cluster.Up(t)
	cluster.WaitUnsealed(t, vaulttest.Patience)
	recalls(t, cluster.Active(t), "secret", "kept")
}

func transitToTransit(t *testing.T, server SealServer, key string) {
	old := vaulttest.StartTransit(t)
	first := server.Seal(t, key)
	server.AddKey(t, key+"-next")
	second := server.Seal(t, key+"-next")

	vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{old}})
	remember(t, vault, "secret", "kept")
	for _, step := range []struct{ from, to vaulttest.Seal }{{old, first}, {first, second}, {second, old}} {
		step.from.Disabled = true
		vault.Stop(t)
		vault.Migrate(t, step.to, step.from)
		vault.WaitActive(t)
		vault.SetSeals(step.to)
		vault.Restart(t)
		recalls(t, vault, "secret", "kept")
		must(t, vault.SealHealthy(t))
	}
}

// leaseComesAndGoes: what is leased opens without a lease, and what is not opens with one.
func leaseComesAndGoes(t *testing.T, server SealServer, key string) {
	seal := server.Seal(t, key)
	strict := encrypts(t, seal, "strict")
	server.Lease(t, key, "10m")
	leased := sealsLeased(t, seal, true)
	vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
	remember(t, vault, "secret", "kept")
	must(t, opens(t, seal, strict, "strict"))
	must(t, opens(t, seal, leased, "x"))
	vault.Restart(t)
	recalls(t, vault, "secret", "kept")

	server.Lease(t, key, "0")
	sealsLeased(t, seal, false)
	must(t, opens(t, seal, leased, "x"))
	vault.Restart(t)
	recalls(t, vault, "secret", "kept")
	must(t, vault.SealHealthy(t))
}

// diagnose: with Vault stopped. The command tries the seal with a value of its own.
func diagnose(t *testing.T, server SealServer, key string) {
	vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{server.Seal(t, key)}})
	vault.Stop(t)
	command := exec.CommandContext(t.Context(), vaulttest.Tool(t, "vault"), "operator", "diagnose", "-config="+vault.ConfigFile())
	command.Env = []string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH")}
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	shown, err := command.CombinedOutput()
	const warnings = 2 // it has some about the listener and the folder of every test
	var ended *exec.ExitError
	if err != nil && (!errors.As(err, &ended) || ended.ExitCode() != warnings) {
		t.Errorf("vault operator diagnose: %v", err)
	}
	said := colours.ReplaceAllString(string(shown), "")
	for _, good := range []string{"Create Vault Server Configuration Seals", "Check Autounseal Encryption", "Finalize Transit Seal"} {
		if !strings.Contains(said, "[ success ] "+good) {
			t.Errorf("no success: %s", good)
		}
	}
	if t.Failed() || strings.Contains(said, "[ failure ]") {
		t.Errorf("it says\n%s", said)
	}
	vault.Resume(t)
}

// colours are what a terminal is told.
var colours = regexp.MustCompile("\x1b\\[[0-9;]*m")

// everythingIsDown: Vault ends at once where its seal does not answer, so somebody must start it again: systemd does.
func everythingIsDown(t *testing.T, server SealServer, key string) {
	vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{server.Seal(t, key)}})
	remember(t, vault, "secret", "kept")
	vault.Kill(t)
	server.Kill(t)
	vault.MustNotStart(t, "error parsing Seal configuration", "connection refused")
	server.Start(t)
	vault.Resume(t)
	recalls(t, vault, "secret", "kept")
}

// serverIsLost: also what was sealed in a lease, whose key the server had made, opens with the HSM and the key record alone.
func serverIsLost(t *testing.T, server SealServer, key string) {
	seal := server.Seal(t, key)
	vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
	remember(t, vault, "secret", "kept")
	server.Lease(t, key, "10m")
	server.Rotate(t, key)
	sealsLeased(t, seal, true)
	vault.Restart(t) // seals its root key anew, in the lease
	vault.Stop(t)
	server.Lose(t, key)
	vault.Resume(t)
	recalls(t, vault, "secret", "kept")
	server.Kill(t)
	server.Start(t)
	vault.Restart(t)
	recalls(t, vault, "secret", "kept")
}

// remember keeps a text in a Vault.
func remember(t testing.TB, vault *vaulttest.Server, name, text string) {
	t.Helper()
	mounts, err := vault.Client(t).Sys().ListMountsWithContext(t.Context())
	must(t, err)
	if mounts["kv/"] == nil {
		must(t, vault.Client(t).Sys().MountWithContext(t.Context(), "kv", &api.MountInput{Type: "kv"}))
	}
	must(t, vault.Client(t).KVv1("kv").Put(t.Context(), name, map[string]any{"text": text}))
}

// recalls fails the test where the Vault has another text.
func recalls(t testing.TB, vault *vaulttest.Server, name, text string) {
	t.Helper()
	vaulttest.Eventually(t, vaulttest.Patience, "the text", func() error {
		kept, err := vault.Client(t).KVv1("kv").Get(context.Background(), name)
		if err == nil && kept.Data["text"] != text {
			err = fmt.Errorf("it is %v, not %q", kept.Data, text)
		}
		return err
	})
}
