package test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/internal/store/file"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

var updateSteps = flag.Bool("update-steps", false, "write the lists of steps in testdata/steps anew, after looking at each new one")

// Custody is killed after every single write and every single call of Vault that changes something, in init, rekey, rewrap
// and import: by SIGKILL, before the answer comes back. The next run must end with Vault unsealed and with nothing lost or
// doubled. The steps are those of the lists in testdata/steps: a step that is not listed fails the test, so that nobody adds
// one without thinking of a crash there.
//
// A process that dies just before a step has done what one has done that died just after the step before it: only reads lie
// in between. So the former is tried at the first step of each verb, where there is no step before, and at each call of
// Vault, where others may be under way.
func TestKilledAtEveryStep(t *testing.T) {
	yard := newYard(t)
	for _, verb := range []*crashVerb{initVerb, rekeyVerb, rewrapVerb, importVerb} {
		t.Run(verb.name, func(t *testing.T) { yard.killEverywhere(t, verb) })
	}
}

// crashVerb is a verb that is to be killed.
type crashVerb struct {
	name string
	// prepare makes the state that the verb begins with, in a lane that may have been used before.
	prepare func(t *testing.T, l *lane)
	// between is what happens after the crash and before the next run.
	between func(t *testing.T, l *lane)
	// check looks at what the next run has left.
	check func(t *testing.T, l *lane, told *outcome)
}

var initVerb = &crashVerb{
	name: verbInit,
	prepare: func(t *testing.T, l *lane) {
		t.Helper()
		l.vault.Anew(t)
		l.fresh(t)
		l.rotated = nil
	},
	between: func(*testing.T, *lane) {},
	check: func(t *testing.T, l *lane, told *outcome) {
		t.Helper()
		if live := l.liveTokens(t, told.shares(t)); live != 0 {
			t.Errorf("%d tokens live that nobody holds: the root token was to be revoked", live)
		}
	},
}

var rekeyVerb = &crashVerb{
	name: verbRekey,
	prepare: func(t *testing.T, l *lane) {
		t.Helper()
		if l.shares == nil { // else what the case before left is a fine beginning
			l.initialized(t)
		}
		l.token = l.root(t, l.shares)
	},
	// What restarts in the middle of a rekey must be unsealed as well.
	between: sealed,
	check: func(t *testing.T, l *lane, told *outcome) {
		t.Helper()
		before, now := l.shares, told.shares(t)
		for _, share := range now {
			if slices.ContainsFunc(before, func(old []byte) bool { return bytes.Equal(old, share) }) {
				t.Error("a share is one of those before")
			}
		}
		l.seal(t)
		if err := l.unseal(before); err == nil {
			t.Error("the shares before the rekey still open Vault")
		}
		if err := l.unseal(now); err != nil {
			t.Errorf("the shares do not open Vault: %v", err)
		}
		l.revoke(t)
		l.shares = now
	},
}

var rewrapVerb = &crashVerb{
	name: verbRewrap,
	prepare: func(t *testing.T, l *lane) {
		t.Helper()
		if l.rotated == nil { // with a second item
			l.base.KeepRoot = true
			l.initialized(t)
			l.mustRun(t, order{Verb: verbRotate})
			l.rotated = l.save(t)
		}
		l.restore(t, l.rotated)
		l.token = l.root(t, l.shares)
	},
	between: sealed,
	check: func(t *testing.T, l *lane, told *outcome) {
		t.Helper()
		for item, version := range told.Key {
			if version != 2 {
				t.Errorf("the item %s is sealed with version %d of the wrapping key", item, version)
			}
		}
		l.same(t, told)
		l.revoke(t)
	},
}

var importVerb = &crashVerb{
	name: verbImport,
	prepare: func(t *testing.T, l *lane) {
		t.Helper()
		if l.shares == nil {
			l.initialized(t)
		}
		l.base.KeepRoot = false
		l.fresh(t)
		l.token = l.root(t, l.shares)
		l.importing = l.shares
	},
	between: sealed,
	check: func(t *testing.T, l *lane, told *outcome) {
		t.Helper()
		l.same(t, told)
		l.revoke(t)
	},
}

// sealed restarts nothing, and has the same effect: Vault must be unsealed again.
func sealed(t *testing.T, l *lane) {
	t.Helper()
	l.seal(t)
}

// yard is what all cases share: one etcd, and for each lane a Vault, a token and a state directory with a wrapping key. A
// lane runs one case at a time, because processes that log in to one SoftHSM at a time disturb each other.
type yard struct {
	lanes chan *lane
	etcd  *etcdtest.Cluster
	// order has what all orders share.
	count int
	mu    sync.Mutex
}

func newYard(t *testing.T) *yard {
	t.Helper()
	y := &yard{lanes: make(chan *lane, 8), etcd: etcdtest.Start(t, 1)}
	for range min(runtime.NumCPU(), cap(y.lanes)) {
		y.lanes <- y.lane(t, vaulttest.Start(t, vaulttest.Options{Bare: true, Storage: vaulttest.InMem}))
	}
	return y
}

// lane is a place where one case runs at a time.
type lane struct {
	yard  *yard
	dir   string
	env   []string
	vault *vaulttest.Server // the first node
	base  order             // with what all orders of the lane share
	first string            // a state directory with a wrapping key, to be copied

	// The state of the case.
	shares    [][]byte // that open Vault; nil: it is to be initialised
	rotated   *saved   // after the rotation of the wrapping key
	token     string   // a root token of the test's own
	importing [][]byte
}

func (y *yard) lane(t *testing.T, nodes ...*vaulttest.Server) *lane {
	t.Helper()
	token := pkcs11test.SoftHSM(t)
	l := &lane{
		yard: y, vault: nodes[0], dir: t.TempDir(),
		env: []string{
			"SOFTHSM2_CONF=" + os.Getenv("SOFTHSM2_CONF"), "PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"),
			"TMPDIR=" + t.TempDir(), "GORACE=atexit_sleep_ms=20",
		},
		base: order{
			Module: token.Module, Serial: token.Serial, PIN: token.PIN,
			Endpoints: y.etcd.Endpoints, CA: y.etcd.CACert, Cert: y.etcd.ClientCert, Key: y.etcd.ClientKey,
		},
	}
	for _, node := range nodes {
		l.base.Nodes = append(l.base.Nodes, node.Address)
	}
	ca, err := os.ReadFile(l.vault.CAFile)
	must(t, err)
	l.base.NodeCA = ca
	l.first = filepath.Join(l.dir, "first")
	must(t, os.Mkdir(l.first, 0o700))
	l.base.StateDir, l.base.Prefix = l.first, "prepare"
	l.mustRun(t, order{Verb: verbPrepare})
	return l
}

// number is another one each time.
func (y *yard) number() int {
	y.mu.Lock()
	defer y.mu.Unlock()
	y.count++
	return y.count
}

// fresh gives the lane a new state directory with the wrapping key, and an empty etcd.
func (l *lane) fresh(t *testing.T) {
	t.Helper()
	l.base.StateDir = filepath.Join(l.dir, fmt.Sprintf("state-%d", l.yard.number()))
	l.base.Prefix = fmt.Sprintf("case/%d", l.yard.number())
	copyFolder(t, l.first, l.base.StateDir)
}

// saved is a state to return to.
type saved struct {
	dir    string
	values map[string][]byte // in etcd
}

func (l *lane) save(t *testing.T) *saved {
	t.Helper()
	s := &saved{dir: filepath.Join(l.dir, fmt.Sprintf("saved-%d", l.yard.number())), values: map[string][]byte{}}
	copyFolder(t, l.base.StateDir, s.dir)
	held := l.etcd(t)
	names, err := held.List(t.Context(), "")
	must(t, err)
	for _, name := range names {
		entry, err := held.Get(t.Context(), name)
		must(t, err)
		s.values[name] = entry.Value
	}
	return s
}

func (l *lane) restore(t *testing.T, s *saved) {
	t.Helper()
	l.fresh(t)
	must(t, os.RemoveAll(l.base.StateDir))
	copyFolder(t, s.dir, l.base.StateDir)
	held := l.etcd(t)
	for _, name := range slices.Sorted(maps.Keys(s.values)) {
		_, err := held.Put(t.Context(), name, s.values[name], store.NoRevision)
		must(t, err)
	}
}

func copyFolder(t *testing.T, from, to string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "cp", "-a", from, to).CombinedOutput()
	if err != nil {
		t.Fatalf("cp -a: %v\n%s", err, out)
	}
}

// etcd is the store of the lane's case.
func (l *lane) etcd(t *testing.T) store.Store {
	t.Helper()
	opened, err := etcd.Open(etcd.Config{
		Endpoints: l.base.Endpoints, Prefix: l.base.Prefix, CACert: l.base.CA, ClientCert: l.base.Cert, ClientKey: l.base.Key,
	})
	must(t, err)
	t.Cleanup(func() { _ = opened.Close() })
	return opened
}

// initialized gives the lane a Vault whose shares are in custody.
func (l *lane) initialized(t *testing.T) {
	t.Helper()
	initVerb.prepare(t, l)
	told := l.mustRun(t, order{Verb: verbInit, Finish: true})
	l.shares = told.shares(t)
}

// ran is how a worker ended.
type ran struct {
	*outcome // nil where it was killed
	steps    []string
	log      string
}

// run lets a worker do an order.
func (l *lane) run(t *testing.T, o order) ran {
	t.Helper()
	dir := filepath.Join(l.dir, fmt.Sprintf("worker-%d", l.yard.number()))
	must(t, os.Mkdir(dir, 0o700))
	full := l.base
	full.Verb, full.At, full.Before, full.AtName = o.Verb, o.At, o.Before, o.AtName
	full.Finish, full.TendFirst, full.Import = o.Finish, o.TendFirst, l.importing
	full.StepFile = filepath.Join(dir, "steps")
	path, err := full.write(dir)
	must(t, err)
	program, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(context.Background(), program) // it ends by itself, in minutes at most
	cmd.Env = append(slices.Clone(l.env), workerVariable+"="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out, log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &log
	err = cmd.Run()
	if strings.Contains(log.String(), "WARNING: DATA RACE") {
		t.Errorf("the race detector spoke up in a worker:\n%s", log.String())
	}
	done, readErr := full.stepsDone()
	must(t, readErr)
	r := ran{steps: done, log: log.String()}
	var failed *exec.ExitError
	if errors.As(err, &failed) && failed.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
		return r
	}
	if err != nil {
		t.Fatalf("the worker for %s: %v\n%s", o.Verb, err, log.String())
	}
	must(t, json.Unmarshal(out.Bytes(), &r.outcome))
	return r
}

// mustRun lets a worker do an order that must go well.
func (l *lane) mustRun(t *testing.T, o order) ran {
	t.Helper()
	r := l.run(t, o)
	if r.outcome == nil || r.Error != "" || r.Tend != "" {
		t.Fatalf("the worker for %s ended with %+v\n%s", o.Verb, r.outcome, r.log)
	}
	return r
}

// killEverywhere runs the cases of a verb.
func (y *yard) killEverywhere(t *testing.T, verb *crashVerb) {
	t.Helper()
	l := <-y.lanes
	verb.prepare(t, l)
	clean := l.mustRun(t, order{Verb: verb.name})
	compareSteps(t, verb.name, clean.steps)
	verb.between(t, l)
	told := l.mustRun(t, order{Verb: verbLook, Finish: true})
	l.orderly(t, told.outcome)
	verb.check(t, l, told.outcome)
	left := l.left(t)
	y.lanes <- l
	if t.Failed() {
		return
	}
	t.Logf("%d steps; they leave %q", len(clean.steps), left)

	for at, step := range clean.steps {
		for _, before := range []bool{false, true} {
			if before && at > 0 && !strings.HasPrefix(step, "vault") {
				continue
			}
			name := fmt.Sprintf("after step %d, %s", at+1, step)
			if before {
				name = fmt.Sprintf("before step %d, %s", at+1, step)
			}
			t.Run(strings.ReplaceAll(name, "/", "_"), func(t *testing.T) {
				t.Parallel()
				l := <-y.lanes
				defer func() {
					if t.Failed() {
						l.shares, l.rotated = nil, nil // whatever it is now, nobody builds on it
					}
					y.lanes <- l
				}()
				verb.prepare(t, l)
				l.killed(t, verb, order{Verb: verb.name, At: at + 1, Before: before}, len(clean.steps), left)
			})
		}
	}
}

// killed runs a verb of so many steps that is killed, and what comes next. left is what a run leaves that was not killed.
func (l *lane) killed(t *testing.T, verb *crashVerb, o order, last int, left []string) {
	t.Helper()
	first := l.run(t, o)
	defer func() {
		if t.Failed() {
			t.Logf("steps of the one that was killed:\n  %s\nits log:\n%s", strings.Join(first.steps, "\n  "), first.log)
		}
	}()
	if first.outcome != nil {
		t.Fatalf("it was not killed: %+v", first.outcome)
	}
	verb.between(t, l)
	second := l.run(t, order{Verb: verb.name, Finish: true, TendFirst: verb.name != verbInit && verb.name != verbImport})
	defer func() {
		if t.Failed() {
			t.Logf("log of the next run:\n%s", second.log)
		}
	}()
	switch {
	case second.outcome == nil:
		t.Fatal("the next run was killed, by somebody else")
	case exempt(first.steps, o.Before):
		if !second.Empty {
			t.Errorf("nobody holds the keys of this Vault, and the next run said %q", second.Error)
		}
		if status, err := l.vault.Anonymous(t).Sys().SealStatus(); err != nil || !status.Initialized {
			t.Errorf("Vault was touched: %+v, %v", status, err)
		}
		return
	case second.Done && verb == importVerb && o.At == last: // it had been done
	case second.Error != "":
		t.Fatalf("the next run: %s", second.Error)
	}
	l.orderly(t, second.outcome)
	verb.check(t, l, second.outcome)
	if now := l.left(t); !slices.Equal(now, left) {
		t.Errorf("it leaves\n  %q, want\n  %q", now, left)
	}
}

// exempt tells whether the process died in the one window that nobody can close: after sys/init, before the first durable
// write.
func exempt(done []string, before bool) bool {
	if before {
		done = done[:len(done)-1]
	}
	return len(done) > 0 && strings.HasSuffix(done[len(done)-1], "sys/init")
}

// orderly checks what must hold after any verb.
func (l *lane) orderly(t *testing.T, told *outcome) {
	t.Helper()
	if told.Tend != "" {
		t.Errorf("the nodes are not all unsealed: %s", told.Tend)
	}
	if len(told.Lag) > 0 {
		t.Errorf("not at rest: %q", told.Lag)
	}
	want := map[string]custody.State{"unseal": custody.StateCurrent}
	if l.base.KeepRoot {
		want["root"] = custody.StateCurrent
	}
	if _, rekeyed := told.Items["former"]; rekeyed {
		want["former"] = custody.StateCurrent
	}
	if !maps.Equal(told.Items, want) {
		t.Errorf("the items are %v, want %v", told.Items, want)
	}
	shares := told.shares(t)
	client := l.vault.Anonymous(t)
	status, err := client.Sys().SealStatus()
	must(t, err)
	if status.Sealed || status.N != crashShares || status.T != crashNeeded || len(shares) != crashShares {
		t.Errorf("Vault tells %+v; %d shares are kept", status, len(shares))
	}
	rekey, err := client.Sys().RekeyStatus()
	must(t, err)
	root, err := client.Sys().GenerateRootStatus()
	must(t, err)
	if rekey.Started || root.Started {
		t.Errorf("Vault is left with a rekey %+v or a root token %+v in progress", rekey, root)
	}
}

// setOfShares is what the facts of an item tell of a set.
type setOfShares struct {
	ID        string `json:"id"`
	State     string `json:"state"`
	Shares    int    `json:"shares"`
	Threshold int    `json:"threshold"`
}

// shares are those of the one set that is active. A second set, a set that is pending, a field too many fail the test.
func (o *outcome) shares(t *testing.T) [][]byte {
	t.Helper()
	var facts struct {
		Sets []setOfShares `json:"sets"`
	}
	must(t, json.Unmarshal(o.Facts, &facts))
	if len(facts.Sets) != 1 || facts.Sets[0].State != "active" || facts.Sets[0].Shares != crashShares || facts.Sets[0].Threshold != crashNeeded {
		t.Fatalf("the sets are %+v, want an active one", facts.Sets)
	}
	var shares [][]byte
	for _, name := range slices.Sorted(maps.Keys(o.Field)) {
		if !strings.HasPrefix(name, facts.Sets[0].ID+".") {
			t.Errorf("the field %s belongs to no set", name)
		}
		shares = append(shares, o.Field[name])
	}
	return shares
}

// same checks that the shares are those that the lane knows.
func (l *lane) same(t *testing.T, told *outcome) {
	t.Helper()
	inOrder := func(shares [][]byte) [][]byte { return slices.SortedFunc(slices.Values(shares), bytes.Compare) }
	if !slices.EqualFunc(inOrder(told.shares(t)), inOrder(l.shares), bytes.Equal) {
		t.Error("the shares are other ones")
	}
}

// left are the names of all that lies in the stores, without what is random in them.
func (l *lane) left(t *testing.T) []string {
	t.Helper()
	var all []string
	note := func(where string, held store.Store) {
		names, err := held.List(t.Context(), "")
		must(t, err)
		for _, name := range names {
			all = append(all, where+": "+plain(name))
		}
	}
	note("etcd", l.etcd(t))
	for _, name := range []string{"keyring", "material", "custody"} {
		folder, err := file.Open(filepath.Join(l.base.StateDir, name))
		must(t, err)
		note(name, folder)
	}
	// Gravestones of rehearsals, which have random names, may be several.
	slices.Sort(all)
	return slices.Compact(all)
}

// root makes a root token with shares, as people would: through Vault's own client, so it proves that the shares are right.
func (l *lane) root(t *testing.T, shares [][]byte) string {
	t.Helper()
	sys := l.active(t).Sys()
	status, err := sys.GenerateRootInit("", "")
	must(t, err)
	otp := status.OTP
	for _, share := range shares[len(shares)-crashNeeded:] {
		status, err = sys.GenerateRootUpdate(base64.StdEncoding.EncodeToString(share), status.Nonce)
		if err != nil {
			_ = sys.GenerateRootCancel()
			t.Fatalf("making a root token with the shares: %v", err)
		}
	}
	token, err := base64.RawStdEncoding.DecodeString(status.EncodedToken)
	must(t, err)
	for i := range token {
		token[i] ^= otp[i]
	}
	return string(token)
}

// active talks to the active node.
func (l *lane) active(t *testing.T) *api.Client {
	t.Helper()
	client := l.vault.Anonymous(t)
	leader, err := client.Sys().Leader()
	must(t, err)
	if leader.LeaderAddress != "" {
		must(t, client.SetAddress(leader.LeaderAddress))
	}
	return client
}

// liveTokens counts the tokens of Vault, but for the one that it makes to ask.
func (l *lane) liveTokens(t *testing.T, shares [][]byte) int {
	t.Helper()
	client := l.active(t)
	client.SetToken(l.root(t, shares))
	listed, err := client.Logical().List("auth/token/accessors")
	must(t, err)
	must(t, client.Auth().Token().RevokeSelf(""))
	return len(listed.Data["keys"].([]any)) - 1
}

// seal seals the node with the test's own token.
func (l *lane) seal(t *testing.T) {
	t.Helper()
	client := l.active(t)
	client.SetToken(l.token)
	must(t, client.Sys().Seal())
}

func (l *lane) revoke(t *testing.T) {
	t.Helper()
	client := l.active(t)
	client.SetToken(l.token)
	must(t, client.Auth().Token().RevokeSelf(""))
	l.token = ""
}

// unseal gives Vault shares, as people would.
func (l *lane) unseal(shares [][]byte) error {
	config := api.DefaultConfig()
	if err := config.ConfigureTLS(&api.TLSConfig{CACert: l.vault.CAFile}); err != nil {
		return err
	}
	config.Address = l.vault.Address
	client, err := api.NewClient(config)
	if err != nil {
		return err
	}
	var status *api.SealStatusResponse
	for _, share := range shares[:crashNeeded] {
		if status, err = client.Sys().Unseal(base64.StdEncoding.EncodeToString(share)); err != nil {
			return err
		}
	}
	if status.Sealed {
		return errors.New("still sealed")
	}
	return nil
}

// compareSteps compares the steps of a run with those that somebody has looked at.
func compareSteps(t *testing.T, verb string, done []string) {
	t.Helper()
	path := filepath.Join("testdata", "steps", verb)
	if *updateSteps {
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(strings.Join(done, "\n")+"\n"), 0o644))
	}
	listed, err := os.ReadFile(path)
	must(t, err)
	if want := strings.Split(strings.TrimSuffix(string(listed), "\n"), "\n"); !slices.Equal(done, want) {
		t.Fatalf("the steps of %s are\n  %s\nand those listed in %s are\n  %s\nA new step needs a thought: what does a crash after it leave? "+
			"Then run go test ./test -run TestKilledAtEveryStep -args -update-steps",
			verb, strings.Join(done, "\n  "), path, strings.Join(want, "\n  "))
	}
}
