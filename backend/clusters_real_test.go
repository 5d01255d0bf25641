package backend

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// newPlayed is a mount, with the real custodian, and a cluster of playing nodes.
func newPlayed(t *testing.T, kind nodetest.Kind, count int) (*mount, []*nodetest.Node) {
	t.Helper()
	m, _ := newKeeping(t)
	m.read("keys/prod/backup").ok(t)
	m.write("keys/prod", fields{"accept_single_hsm": true}).ok(t)
	authority := nodetest.NewAuthority(t)
	var nodes []*nodetest.Node
	var addresses []string
	for range count {
		played := nodetest.Start(t, nodetest.Options{Kind: kind, Authority: authority})
		nodes, addresses = append(nodes, played), append(addresses, played.Address())
	}
	m.write("clusters/prod", fields{
		"nodes": strings.Join(addresses, ","), "ca_cert": string(authority.PEM), "key": "prod", "store": "files",
	}).ok(t)
	return m, nodes
}

// tickOnce lets Vault's timer tick, and waits until the mount has done what that brought.
func (m *mount) tickOnce(t *testing.T) {
	t.Helper()
	if err := m.tick(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	m.jobs.wait()
}

func TestAClusterIsInitialisedKeptAndUnsealed(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Raft, 3)
	got := m.write("clusters/prod/init", nil).want(t, http.StatusOK)
	if got.text("initialized") != "true" || got.text("kind") != "unseal" || got.text("items") != "[unseal]" || got.text("root_revoked") != "true" {
		t.Errorf("init = %v", got.data)
	}
	if tokens := nodes[0].Tokens(); tokens != 0 {
		t.Errorf("%d tokens live", tokens)
	}
	again := m.write("clusters/prod/init", nil).want(t, http.StatusOK)
	if again.text("initialized") != "false" {
		t.Errorf("init again = %v", again.data)
	}
	await(t, "all nodes to be unsealed", func() bool { return m.write("clusters/prod/unseal", nil).ok(t).text("unsealed") == "true" })

	status := m.read("clusters/prod/status").want(t, http.StatusOK)
	material, _ := status.data["material"].(map[string]any)
	kept, _ := material["unseal"].(map[string]any)
	if kept["error"] != "" || kept["store"] != "files" || kept["key"] != "prod" || len(status.data["nodes"].(map[string]any)) != 3 || status.text("held") != "[]" {
		t.Errorf("status = %v", status.data)
	}

	m = m.remount() // and the watch of a new process begins at once
	for _, one := range nodes {
		one.Restart()
	}
	await(t, "the watch to unseal all", func() bool {
		m.tickOnce(t)
		return !nodes[0].Sealed() && !nodes[1].Sealed() && !nodes[2].Sealed()
	})
	m.write("clusters/prod/rekey", fields{"shares": 3, "threshold": 2}).want(t, http.StatusOK)
	for _, one := range nodes {
		one.Restart()
	}
	await(t, "the new keys to unseal all", func() bool { return m.write("clusters/prod/unseal", nil).text("unsealed") == "true" })
}

// No answer and no log line holds a share or a token, whatever is asked and whatever goes wrong.
func TestClustersShowNoShareAndNoToken(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	var log bytes.Buffer
	m.logger = NewLogger(hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Trace}))
	var answers []reply
	write := func(path string, data fields) { answers = append(answers, m.write(path, data)) }
	read := func() {
		for _, path := range []string{"clusters/prod", "clusters/prod/status", "health", "material/prod/unseal"} {
			answers = append(answers, m.read(path))
		}
	}
	write("clusters/prod/init", nil)
	read()
	shares := nodes[0].Shares()
	nodes[0].Restart()
	nodes[0].Break("sys/unseal", 1, nodetest.Answer(http.StatusInternalServerError, 0, "internal error"))
	write("clusters/prod/unseal", nil)
	write("clusters/prod/unseal", nil)
	write("clusters/prod/root", fields{"pgp_key": alicePublic(t)})
	write("clusters/prod/rekey", fields{"shares": 3, "threshold": 2})
	read()
	nodes[0].Break("sys/rekey/update", 1, nodetest.Cut)
	write("clusters/prod/rekey", fields{"shares": 3, "threshold": 2})
	read()
	shares = append(shares, nodes[0].Shares()...)
	if len(shares) < 8 {
		t.Fatalf("%d shares", len(shares))
	}
	raw, err := json.Marshal(answers)
	if err != nil {
		t.Fatal(err)
	}
	for _, answer := range answers {
		raw = append(raw, answer.message+strings.Join(answer.warnings, " ")...)
		for _, value := range answer.data {
			text, _ := json.Marshal(value)
			raw = append(raw, text...)
		}
	}
	for _, share := range shares {
		for _, spelling := range []string{hex.EncodeToString(share), base64.StdEncoding.EncodeToString(share), string(share)} {
			if bytes.Contains(raw, []byte(spelling)) {
				t.Error("an answer holds a share")
			}
			if strings.Contains(log.String(), spelling) {
				t.Error("the log holds a share")
			}
			for key, value := range m.stored() {
				if strings.Contains(value, spelling) {
					t.Errorf("the mount's storage holds a share at %s", key)
				}
			}
		}
	}
}

// A reload, or Vault stepping down, while sys/init is under way: the end of the mount waits until the answer lies, sealed, in the
// mount's storage, and the next process goes on with it.
func TestTheMountEndsWhileAVaultIsInitialised(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	var ended sync.WaitGroup
	nodes[0].DuringInit(func() {
		cleaning := make(chan struct{})
		ended.Go(func() {
			close(cleaning)
			m.Cleanup(context.Background())
		})
		<-cleaning
		<-m.closing.Done()
	})
	got := m.write("clusters/prod/init", nil)
	ended.Wait()
	t.Logf("the request that was cut off: %d %s", got.status, got.message)

	m = m.remount()
	await(t, "the new process to unseal it", func() bool {
		m.tickOnce(t)
		return !nodes[0].Sealed()
	})
	m.write("clusters/prod/init", nil).want(t, http.StatusOK)
	nodes[0].Restart()
	m.write("clusters/prod/unseal", nil).want(t, http.StatusOK)
	if status := m.read("clusters/prod/status").ok(t); status.text("held") != "[]" {
		t.Errorf("held = %v", status.data["held"])
	}
}

// brokenStore is a store that takes nothing while it is broken.
type brokenStore struct {
	store.Store

	mu     sync.Mutex
	broken bool
}

func (s *brokenStore) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	s.mu.Lock()
	broken := s.broken
	s.mu.Unlock()
	if broken {
		return store.NoRevision, store.ErrUnavailable
	}
	return s.Store.Put(ctx, name, value, expected)
}

func (s *brokenStore) set(broken bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken = broken
}

func TestKeysThatTheStoreDoesNotTakeAreHeldAndStoredLater(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	files, err := m.Store(t.Context(), "files")
	if err != nil {
		t.Fatal(err)
	}
	flaky := &brokenStore{Store: files}
	m.stores.mu.Lock()
	m.stores.open["files"] = openStore{Store: flaky}
	m.stores.mu.Unlock()

	nodes[0].DuringInit(func() { flaky.set(true) })
	m.write("clusters/prod/init", nil).want(t, http.StatusServiceUnavailable).says(t, "held")
	status := m.read("clusters/prod/status").ok(t)
	if status.text("held") != "[unseal]" && !strings.Contains(status.text("held"), "unseal") {
		t.Errorf("status = %v", status.data)
	}
	m.delete("clusters/prod", nil).want(t, http.StatusBadRequest).says(t, "force=true")
	nodes[0].Restart()
	flaky.set(false)
	await(t, "the watch to store and unseal", func() bool {
		m.tickOnce(t)
		return !nodes[0].Sealed()
	})
	if status := m.read("clusters/prod/status").ok(t); status.text("held") != "[]" {
		t.Errorf("held = %v", status.data["held"])
	}
}

// A node that did not take the shares gets no more of them by itself. Whoever has mended it, and asks, does not wait.
func TestAPersonWhoAsksIsNotToldOfTheLastTry(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	m.write("clusters/prod/init", nil).ok(t)
	nodes[0].Restart()
	nodes[0].Break("sys/unseal", 1, nodetest.Answer(http.StatusInternalServerError, 0, "cipher: message authentication failed"))
	m.write("clusters/prod/unseal", nil).want(t, http.StatusConflict).says(t, "do not unseal")
	nodes[0].Mend()
	before := nodes[0].Count(http.MethodPut, "sys/unseal")
	for range 3 {
		m.tickOnce(t)
	}
	if after := nodes[0].Count(http.MethodPut, "sys/unseal"); after != before {
		t.Errorf("the watch sent %d shares again", after-before)
	}
	m.write("clusters/prod/unseal", nil).want(t, http.StatusOK)
}

// What people are told to do is something that they can do here, in the words of the mount.
func TestSentencesAboutClustersAreInTheWordsOfTheMount(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	m.write("clusters/prod/unseal", nil).want(t, http.StatusBadRequest).says(t, "run: write clusters/prod/init")
	said := ""
	for _, data := range []fields{
		{"nodes": ""},
		{"root_token": "pgp"},
		{"root_token": "x"},
		{"root_pgp_key": alicePublic(t)},
		{"root_token": "keep", "spread": "1 of prod, office"},
		{"store": ""},
		{"shares": 2, "threshold": 3},
	} {
		said += m.write("clusters/prod", data).want(t, http.StatusBadRequest).message + "\n"
	}
	nodes[0].Break("sys/init", 1, func(w http.ResponseWriter, r *http.Request, serve http.Handler) {
		serve.ServeHTTP(httptest.NewRecorder(), r)
		nodetest.Cut(w, r, nil)
	})
	said += m.write("clusters/prod/init", nil).message
	said += m.write("clusters/prod/init", nil).want(t, http.StatusConflict).says(t, "nobody holds its keys").message
	for _, word := range []string{"_file", " = ", "nitroseal"} {
		if strings.Contains(said, word) {
			t.Errorf("it is said %q:\n%s", word, said)
		}
	}
}

// A node with a foreign certificate gets nothing, and 503 says whose certificate it is not.
func TestAForeignCertificateGetsNoShare(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	m.write("clusters/prod/init", nil).ok(t)
	nodes[0].Restart()
	nodes[0].SetCertificate(nodetest.NewAuthority(t).Issue(t))
	before := nodes[0].Count(http.MethodPut, "sys/unseal")
	m.write("clusters/prod/unseal", nil).want(t, http.StatusServiceUnavailable).says(t, "certificate")
	if after := nodes[0].Count(http.MethodPut, "sys/unseal"); after != before {
		t.Errorf("%d shares were sent", after-before)
	}
}

// What the custodian notes before it asks Vault lies in the mount's storage: the next active node finds it.
func TestTheIntentLiesInTheMount(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	var noted []string
	nodes[0].DuringInit(func() { noted = keysOf(m.stored()) })
	m.write("clusters/prod/init", nil).ok(t)
	if !slices.Contains(noted, "custody/clusters/prod/intent") {
		t.Errorf("while the cluster was initialised the mount's storage held %v", noted)
	}
	for key := range m.stored() {
		if strings.HasPrefix(key, "custody/held/") || strings.HasPrefix(key, "custody/clusters/") {
			t.Errorf("%s is left", key)
		}
	}
}

func TestLocksOfTheMountAreOnesOwn(t *testing.T) {
	local := &mountLocal{}
	unlock, err := local.Lock(t.Context(), "clusters/a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := local.Lock(ctx, "clusters/a"); err == nil {
		t.Error("two have one lock")
	}
	free, err := local.Lock(t.Context(), "clusters/b")
	if err != nil {
		t.Fatal(err)
	}
	free()
	unlock()
	again, err := local.Lock(t.Context(), "clusters/a")
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// Another wrapping key, and another number of HSMs that take part, are a matter of two writes.
func TestTheSharesMoveToAnotherKeyAndToASpread(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	for _, key := range []string{"office", "bunker", "bank"} {
		m.addKey(key)
		m.read("keys/" + key + "/backup").ok(t)
		m.write("keys/"+key, fields{"accept_single_hsm": true}).ok(t)
	}
	m.write("clusters/prod/init", nil).ok(t)
	for _, change := range []fields{
		{"key": "office"},
		{"spread": "2 of prod, bunker, bank"},
		{"key": "office"},
	} {
		change["accept_destination"] = true
		if got := m.write("clusters/prod", change).want(t, http.StatusOK); !strings.Contains(strings.Join(got.warnings, " "), "clusters/prod/rekey") {
			t.Errorf("warnings = %q", got.warnings)
		}
		m.write("clusters/prod/rekey", nil).want(t, http.StatusOK)
		nodes[0].Restart()
		m.write("clusters/prod/unseal", nil).want(t, http.StatusOK)
	}
}

// A raft node that is sealed while the keys change would want the old ones, which are gone.
func TestKeysAreNotChangedWhileANodeIsAway(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Raft, 3)
	m.write("clusters/prod/init", nil).ok(t)
	unsealed := func() bool { return m.write("clusters/prod/unseal", nil).ok(t).text("unsealed") == "true" }
	await(t, "all nodes to be unsealed", unsealed)
	before := m.read("material/prod/unseal").ok(t).text("generation")
	for name, leave := range map[string]func(){"sealed": nodes[2].Restart, "down": nodes[2].Down} {
		leave()
		m.write("clusters/prod/rekey", nil).want(t, http.StatusServiceUnavailable).says(t, nodes[2].Address(), "old")
		if now := m.read("material/prod/unseal").ok(t).text("generation"); now != before {
			t.Errorf("%s: generation %s, want %s", name, now, before)
		}
	}
	nodes[2].Up(t)
	await(t, "all nodes to be unsealed", unsealed)
	m.write("clusters/prod/rekey", nil).want(t, http.StatusOK)
}
