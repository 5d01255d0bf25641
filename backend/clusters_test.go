package backend

import (
	"context"
	"encoding/pem"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/vault/sdk/framework"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// fakeCustodian answers what a test says, and counts what it was asked.
type fakeCustodian struct {
	mu      sync.Mutex
	tends   map[string]int // by cluster
	nodes   map[string][]string
	inits   int
	cleared []string

	init  func(ctx context.Context, c *cluster.Cluster) (cluster.InitResult, error)
	tend  func(ctx context.Context, c *cluster.Cluster) []cluster.NodeOutcome
	look  func(address string) (cluster.NodeStatus, error)
	rekey func(ctx context.Context, options cluster.RekeyOptions) (cluster.RekeyResult, error)
	root  func(ctx context.Context, options cluster.RootOptions) (cluster.RootResult, error)
}

func (f *fakeCustodian) Init(ctx context.Context, c *cluster.Cluster, _ cluster.InitOptions) (cluster.InitResult, error) {
	f.mu.Lock()
	f.inits++
	f.mu.Unlock()
	return f.init(ctx, c)
}

func (f *fakeCustodian) TendAll(ctx context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
	f.mu.Lock()
	f.tends[c.Name]++
	f.nodes[c.Name] = c.Nodes
	f.mu.Unlock()
	if f.tend == nil {
		return outcomesOf(c, cluster.ActionNone, nil)
	}
	return f.tend(ctx, c)
}

func (f *fakeCustodian) tended(name string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.tends[name]
}

// outcomesOf are the same for every node.
func outcomesOf(c *cluster.Cluster, action cluster.Action, err error) []cluster.NodeOutcome {
	var all []cluster.NodeOutcome
	for _, address := range c.Nodes {
		sealed := err != nil || action == cluster.ActionWaiting
		status := cluster.NodeStatus{Address: address, Seal: node.Status{Initialized: true, Sealed: sealed, Type: "shamir"}}
		all = append(all, cluster.NodeOutcome{Address: address, Err: err, Outcome: cluster.Outcome{Node: status, Action: action}})
	}
	return all
}

func (f *fakeCustodian) Look(_ context.Context, _ *cluster.Cluster, address string) (cluster.NodeStatus, error) {
	if f.look == nil {
		return cluster.NodeStatus{Address: address}, nil
	}
	return f.look(address)
}

func (f *fakeCustodian) Status(ctx context.Context, c *cluster.Cluster) (cluster.Status, error) {
	status := cluster.Status{Cluster: c.Name}
	for _, address := range c.Nodes {
		one, err := f.Look(ctx, c, address)
		one.Address, one.Err = address, err
		status.Nodes = append(status.Nodes, one)
	}
	return status, nil
}

func (f *fakeCustodian) Rekey(ctx context.Context, _ *cluster.Cluster, options cluster.RekeyOptions) (cluster.RekeyResult, error) {
	return f.rekey(ctx, options)
}

func (f *fakeCustodian) Root(ctx context.Context, _ *cluster.Cluster, options cluster.RootOptions) (cluster.RootResult, error) {
	return f.root(ctx, options)
}

func (f *fakeCustodian) ClearAlarm(_ context.Context, _ *cluster.Cluster, address string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.cleared = append(f.cleared, address)
	return nil
}

func (f *fakeCustodian) Retry(*cluster.Cluster) {}

func (f *fakeCustodian) Close() error { return nil }

// someCA is the PEM of some authority.
func someCA(t testing.TB) string {
	t.Helper()
	server := httptest.NewTLSServer(http.NotFoundHandler())
	defer server.Close()
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
}

// newCustody is a mount with what a cluster needs, and a custodian that does what the test says.
func newCustody(t *testing.T) (*mount, *fakeCustodian) {
	t.Helper()
	m, _ := newKeeping(t)
	fake := &fakeCustodian{tends: map[string]int{}, nodes: map[string][]string{}}
	if err := m.clusters.custodian.Close(); err != nil {
		t.Fatal(err)
	}
	m.clusters.custodian = fake
	m.read("keys/prod/backup").ok(t)
	m.write("keys/prod", fields{"accept_single_hsm": true}).ok(t)
	return m, fake
}

// clusterOf is a cluster that can be written as it is.
func clusterOf(t testing.TB, more fields) fields {
	t.Helper()
	data := fields{"nodes": "https://vault-1.example:8200,https://vault-2.example:8200", "ca_cert": someCA(t), "key": "prod", "store": "own"}
	maps.Copy(data, more)
	return data
}

// keep puts something where the shares of a cluster would lie.
func (m *mount) keep(name string) {
	m.t.Helper()
	_, err := m.keeper.Put(m.t.Context(), name, "unseal", custody.Fields{"x": []byte("a")}, custody.PutOptions{Key: "prod", Store: "own"})
	if err != nil {
		m.t.Fatal(err)
	}
}

func TestAClusterIsConfiguredShownAndForgotten(t *testing.T) {
	m, _ := newCustody(t)
	m.read("clusters/prod").want(t, http.StatusNotFound)
	m.write("clusters/prod", clusterOf(t, nil)).want(t, http.StatusNoContent)
	got := m.read("clusters/prod").want(t, http.StatusOK)
	for field, want := range map[string]string{
		"nodes": "[https://vault-1.example:8200 https://vault-2.example:8200]", "key": "prod", "spread": "", "store": "own", "shares": "5",
		"threshold": "3", "recovery_shares": "0", "recovery_threshold": "0", "root_token": "discard", "watch": "true", "plain_http": "false",
		"timeout": "0", "updated_by": "token-test (entity e-1)", "accept_destination": "map[]", "pgp_keys": "map[]",
	} {
		if got.text(field) != want {
			t.Errorf("%s = %q, want %q", field, got.text(field), want)
		}
	}
	if names := m.list("clusters").ok(t).text("keys"); names != "[prod]" {
		t.Errorf("list = %s", names)
	}

	m.write("clusters/prod", fields{"watch": false, "shares": 7, "timeout": "4s"}).want(t, http.StatusNoContent)
	got = m.read("clusters/prod").ok(t)
	if got.text("watch") != "false" || got.text("shares") != "7" || got.text("threshold") != "3" || got.text("timeout") != "4" || got.text("key") != "prod" {
		t.Errorf("after a write of some fields: %v", got.data)
	}
	m.delete("clusters/prod", nil).want(t, http.StatusNoContent)
	m.delete("clusters/prod", nil).want(t, http.StatusNoContent)
	m.read("clusters/prod").want(t, http.StatusNotFound)
}

func TestTheDefaultsOfTheMountFillInKeyAndStore(t *testing.T) {
	m, _ := newCustody(t)
	data := clusterOf(t, nil)
	delete(data, "key")
	m.write("clusters/a", data).want(t, http.StatusBadRequest).says(t, "default_key")
	m.write("config", fields{"default_key": "prod"}).ok(t)
	delete(data, "store")
	m.write("clusters/a", data).want(t, http.StatusBadRequest).says(t, "default_store")
	m.write("config", fields{"default_store": "own"}).ok(t)
	m.write("clusters/a", data).ok(t)
	m.write("config", fields{"default_key": "other", "default_store": "other"}).ok(t)
	if got := m.read("clusters/a").ok(t); got.text("key") != "prod" || got.text("store") != "own" {
		t.Errorf("the cluster moved with the defaults: %v", got.data)
	}
}

func TestMistakesInAClusterAreNamed(t *testing.T) {
	for name, test := range map[string]struct {
		data   fields
		status int
		says   string
	}{
		"no nodes":                         {fields{"nodes": ""}, 400, "addresses of its nodes"},
		"a node twice":                     {fields{"nodes": "https://a:8200,https://a:8200"}, 400, "twice"},
		"plain http to another machine":    {fields{"nodes": "http://vault-1.example:8200", "plain_http": true}, 400, "http"},
		"nothing to know the nodes by":     {fields{"ca_cert": ""}, 400, "CA"},
		"a CA that is none":                {fields{"ca_cert": "no pem"}, 400, ""},
		"a pin that is none":               {fields{"tls_pins": "abc"}, 400, ""},
		"a key that is not there":          {fields{"key": "none"}, 400, "keys/none"},
		"a store that is not there":        {fields{"store": "none"}, 400, "stores/none"},
		"key and spread":                   {fields{"spread": "1 of prod, other"}, 400, "not both"},
		"a spread that is none":            {fields{"key": "", "spread": "two of them"}, 400, "2 of office"},
		"a threshold above the shares":     {fields{"shares": 3, "threshold": 4}, 400, "threshold"},
		"many shares, any of which opens":  {fields{"shares": 3, "threshold": 1}, 400, "threshold of 1"},
		"a person's key that is no key":    {fields{"pgp_keys": fields{"alice": "%%%"}}, 400, "neither armored nor base64"},
		"a person's key that is none":      {fields{"pgp_keys": fields{"alice": "YWJj"}}, 400, "alice"},
		"a root token for nobody":          {fields{"root_token": "pgp"}, 400, "root_pgp_key"},
		"a root token that is thrown away": {fields{"root_token": "burn"}, 400, "discard"},
		"a timeout of an hour":             {fields{"timeout": "1h"}, 400, "60 seconds"},
		"a field that is not there":        {fields{"node": "https://a:8200"}, 400, "unknown field"},
	} {
		t.Run(name, func(t *testing.T) {
			m, _ := newCustody(t)
			m.write("clusters/prod", clusterOf(t, test.data)).want(t, test.status).says(t, test.says)
			m.read("clusters/prod").want(t, http.StatusNotFound)
		})
	}
}

func TestAClusterWhoseKeyIsNotReadyIsTakenWithAWarning(t *testing.T) {
	m, _ := newCustody(t)
	m.addKey("young")
	got := m.write("clusters/prod", clusterOf(t, fields{"key": "young"})).want(t, http.StatusOK)
	if len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "key record") {
		t.Errorf("warnings = %q", got.warnings)
	}
}

// Whoever may write a cluster decides where its shares go: once there are shares, that wants a word which policies can deny.
func TestSharesGoElsewhereOnlyWhereThatIsSaid(t *testing.T) {
	m, _ := newCustody(t)
	m.addKey("other")
	m.write("stores/second", fields{"type": "vault"}).ok(t)
	m.write("clusters/prod", clusterOf(t, nil)).ok(t)
	m.write("clusters/prod", fields{"nodes": "https://vault-3.example:8200"}).want(t, http.StatusNoContent) // nothing is kept yet
	m.keep("prod")
	m.write("clusters/prod", fields{"watch": false, "shares": 7, "root_token": "keep", "timeout": 3}).want(t, http.StatusNoContent)
	before := m.read("clusters/prod").ok(t)

	for field, value := range map[string]any{
		"nodes": "https://evil.example:8200", "ca_cert": someCA(t) + someCA(t), "tls_server_name": "evil.example", "raft_leader_ca_cert": someCA(t),
		"tls_pins": strings.Repeat("ab", 32), "plain_http": true, "key": "other", "pgp_keys": fields{},
	} {
		data := fields{field: value}
		if field == "pgp_keys" {
			continue // none is none
		}
		m.write("clusters/prod", data).want(t, http.StatusBadRequest).says(t, field, "accept_destination=true", "unseal")
		if now := m.read("clusters/prod").ok(t); now.text(field) != before.text(field) || now.text("updated") != before.text("updated") {
			t.Errorf("the refused write changed it: %v", now.data)
		}
	}
	m.write("clusters/prod", fields{"store": "second", "accept_destination": true}).want(t, http.StatusBadRequest).says(t, `lies in store "own"`)
	m.write("clusters/prod", fields{"nodes": "https://vault-3.example:8200", "ca_cert": before.text("ca_cert")}).want(t, http.StatusNoContent) // as it is

	m.write("clusters/prod", fields{"nodes": "https://vault-4.example:8200", "accept_destination": true}).want(t, http.StatusNoContent)
	accepted, _ := m.read("clusters/prod").ok(t).data["accept_destination"].(map[string]any)
	if accepted["by"] != "token-test (entity e-1)" || accepted["at"] == "" || len(accepted["changed"].([]any)) != 1 {
		t.Errorf("recorded: %v", accepted)
	}

	// Nor by forgetting the cluster and writing it anew.
	m.delete("clusters/prod", nil).want(t, http.StatusBadRequest).says(t, "unseal", "force=true")
	m.delete("clusters/prod", fields{"force": true}).want(t, http.StatusNoContent)
	m.read("material/prod/unseal").want(t, http.StatusOK)
	m.write("clusters/prod", clusterOf(t, nil)).want(t, http.StatusBadRequest).says(t, "accept_destination=true")
	m.write("clusters/prod", clusterOf(t, fields{"accept_destination": true})).want(t, http.StatusNoContent)
}

// What people keep beside the shares of a cluster does not count.
func TestOtherMaterialOfTheNameHindersNoChange(t *testing.T) {
	m, _ := newCustody(t)
	m.write("clusters/prod", clusterOf(t, nil)).ok(t)
	m.write("material/prod/notes", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "own"}).ok(t)
	m.write("clusters/prod", fields{"nodes": "https://vault-9.example:8200"}).want(t, http.StatusNoContent)
	m.delete("clusters/prod", nil).want(t, http.StatusNoContent)
}

func TestTheVaultThatTheMountLivesInIsRefused(t *testing.T) {
	m, fake := newCustody(t)
	fake.look = func(address string) (cluster.NodeStatus, error) {
		id := "another"
		if strings.Contains(address, "vault-2") {
			id = ownCluster
		}
		return cluster.NodeStatus{Address: address, Seal: node.Status{Initialized: true, ClusterID: id}}, nil
	}
	m.write("clusters/self", clusterOf(t, nil)).want(t, http.StatusBadRequest).says(t, "vault-2", "the Vault that this mount lives in")
	m.read("clusters/self").want(t, http.StatusNotFound)

	// Where it could not be asked, the write says so, and asks again before anything is done.
	told := fake.look
	fake.look = func(string) (cluster.NodeStatus, error) { return cluster.NodeStatus{}, node.ErrUnavailable }
	if got := m.write("clusters/self", clusterOf(t, nil)).want(t, http.StatusOK); len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "vault-1") {
		t.Errorf("warnings = %q", got.warnings)
	}
	fake.look = told
	for _, verb := range []string{"init", "unseal", "rekey", "root"} {
		data := fields{}
		if verb == "root" {
			data["pgp_key"] = alicePublic(t)
		}
		m.write("clusters/self/"+verb, data).want(t, http.StatusBadRequest).says(t, "the Vault that this mount lives in")
	}
	if fake.inits != 0 || fake.tended("self") != 0 {
		t.Error("the custodian was asked nevertheless")
	}
}

func TestWhatAClusterNeedsIsInUse(t *testing.T) {
	m, _ := newCustody(t)
	m.addKey("second")
	m.write("clusters/prod", clusterOf(t, fields{"key": "", "spread": "2 of prod, second", "shares": 4})).ok(t)
	for _, key := range []string{"prod", "second"} {
		m.write("keys/"+key, fields{"deletion_allowed": true}).ok(t)
		m.delete("keys/"+key, nil).want(t, http.StatusBadRequest).says(t, "clusters/prod")
	}
	m.delete("stores/own", nil).want(t, http.StatusBadRequest).says(t, "clusters/prod")
	m.delete("clusters/prod", nil).ok(t)
	m.delete("keys/second", nil).ok(t)
	m.delete("stores/own", nil).ok(t)
}

func TestActionsOnAClusterThatIsNotThere(t *testing.T) {
	m, _ := newCustody(t)
	m.read("clusters/none/status").want(t, http.StatusNotFound)
	for _, verb := range []string{"init", "unseal", "rekey"} {
		m.write("clusters/none/"+verb, nil).want(t, http.StatusNotFound).says(t, "write clusters/none first")
	}
}

func TestADamagedRecordOfAClusterIsNamedAndCanBeDeleted(t *testing.T) {
	m, _ := newCustody(t)
	m.write("clusters/prod", clusterOf(t, nil)).ok(t)
	entry := m.entry(t, "clusters/prod")
	entry.Value = []byte("{")
	if err := m.storage.Put(t.Context(), entry); err != nil {
		t.Fatal(err)
	}
	m.read("clusters/prod").want(t, http.StatusInternalServerError).says(t, "damaged")
	if got := m.read("health").ok(t); !strings.Contains(got.text("clusters"), "damaged") {
		t.Errorf("health = %v", got.data)
	}
	m.delete("clusters/prod", nil).want(t, http.StatusNoContent)
}

func TestHealthTellsWhatTheWatchFound(t *testing.T) {
	m, fake := newCustody(t)
	m.write("clusters/prod", clusterOf(t, nil)).ok(t)
	fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
		outcomes := outcomesOf(c, cluster.ActionNone, nil)
		outcomes[1].Err = node.ErrUnavailable
		return outcomes
	}
	m.write("clusters/prod/unseal", nil).ok(t)
	clusters, _ := m.read("health").ok(t).data["clusters"].(map[string]any)
	prod, _ := clusters["prod"].(map[string]any)
	if troubled, _ := prod["troubled"].([]any); !slices.Equal(troubled, []any{"https://vault-2.example:8200"}) || prod["looked"] == "" {
		t.Errorf("health of the cluster = %v", prod)
	}
}

// A rotation seals stored material anew by itself. What unseals a cluster waits until the loss of one HSM, or of this mount, does
// not lose what the new version sealed.
func TestTheKeysOfAClusterFollowARotationWhenItIsReady(t *testing.T) {
	m, _ := newCustody(t)
	m.write("clusters/prod", clusterOf(t, fields{"watch": false})).ok(t)
	m.keep("prod")
	m.write("keys/prod/rotate", fields{"generate": true}).ok(t)
	m.awaitState("prod", "ready")
	rewrap := m.awaitRewrap("prod", "waiting")
	if problems, _ := rewrap["problems"].([]any); len(problems) != 1 || !strings.Contains(problems[0].(string), "clusters/prod") {
		t.Errorf("rewrap = %v", rewrap)
	}
	kept := func() string { return m.read("material/prod/unseal").ok(t).text("key_version") }
	m.tickOnce(t)
	if kept() != "1" {
		t.Fatal("the keys of the cluster are sealed to a version that nobody has the key record of")
	}
	m = m.remount()
	m.read("keys/prod/backup").ok(t) // a single HSM was accepted for the key before
	m.tickOnce(t)
	m.awaitRewrap("prod", "done")
	if kept() != "2" {
		t.Error("the keys of the cluster were not sealed anew")
	}
	if entries, _ := framework.ListWAL(context.Background(), m.storage); len(entries) != 0 {
		t.Errorf("%d journal entries are left", len(entries))
	}
}
