package cluster

import (
	"errors"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestClusterSaysWhatToWrite(t *testing.T) {
	authority := nodetest.NewAuthority(t)
	alice, bob := publicKey(t, newPerson(t, "Alice", nil)), publicKey(t, newPerson(t, "Bob", nil))
	threeKeys := func(needed int) *Spread { return &Spread{Needed: needed, Keys: []string{"office", "bunker", "bank"}} }
	for name, c := range map[string]struct {
		change func(c *Cluster)
		want   string // in the sentence; "" where it is fine
	}{
		"as little as it takes":              {func(*Cluster) {}, ""},
		"a spread":                           {func(c *Cluster) { c.Key, c.Spread = "", threeKeys(2) }, ""},
		"people":                             {func(c *Cluster) { c.People = []Person{{"alice", alice}, {"bob", bob}} }, ""},
		"one share":                          {func(c *Cluster) { c.Shares, c.Threshold = 1, 1 }, ""},
		"a root token for a person":          {func(c *Cluster) { c.RootToken, c.RootPGPKey = RootPGP, alice }, ""},
		"pins and no CA":                     {func(c *Cluster) { c.TLS = node.TLS{Pins: []string{strings.Repeat("ab", 32)}} }, ""},
		"no name":                            {func(c *Cluster) { c.Name = "" }, "the name"},
		"a name with a slash":                {func(c *Cluster) { c.Name = "a/b" }, "the name"},
		"no node":                            {func(c *Cluster) { c.Nodes = nil }, "nodes is missing"},
		"a node twice":                       {func(c *Cluster) { c.Nodes = append(c.Nodes, c.Nodes[0]) }, "twice"},
		"a node without a scheme":            {func(c *Cluster) { c.Nodes = []string{"vault:8200"} }, "vault:8200"},
		"plain http elsewhere":               {func(c *Cluster) { c.Nodes, c.TLS.PlainHTTP = []string{"http://vault:8200"}, true }, "loopback"},
		"neither CA nor pins":                {func(c *Cluster) { c.TLS = node.TLS{} }, "CA"},
		"no store":                           {func(c *Cluster) { c.Store = "" }, "store is missing"},
		"no key":                             {func(c *Cluster) { c.Key = "" }, "key is missing"},
		"key and spread":                     {func(c *Cluster) { c.Spread = threeKeys(2) }, "not both"},
		"a spread of one key":                {func(c *Cluster) { c.Key, c.Spread = "", &Spread{1, []string{"office"}} }, "two wrapping keys"},
		"a spread that needs more than all":  {func(c *Cluster) { c.Key, c.Spread = "", threeKeys(4) }, "how many"},
		"a spread with a key twice":          {func(c *Cluster) { c.Key, c.Spread = "", &Spread{2, []string{"a", "a", "b"}} }, "twice"},
		"a spread that one key opens":        {func(c *Cluster) { c.Key, c.Spread = "", &Spread{2, []string{"office", "bunker"}} }, "can hold 3"},
		"a spread that needs all to open":    {func(c *Cluster) { c.Key, c.Spread, c.Threshold, c.Shares = "", threeKeys(2), 5, 6 }, "the fewest hold 4"},
		"more shares than there is room for": {func(c *Cluster) { c.Shares, c.Threshold = MaxShares+1, 3 }, "possible"},
		"a threshold above the shares":       {func(c *Cluster) { c.Shares, c.Threshold = 3, 4 }, "threshold of 4"},
		"a threshold of one":                 {func(c *Cluster) { c.Shares, c.Threshold = 3, 1 }, "Vault refuses"},
		"a threshold and no shares":          {func(c *Cluster) { c.Threshold = 3 }, "0 shares"},
		"recovery shares that cannot be":     {func(c *Cluster) { c.RecoveryShares, c.RecoveryThreshold = 2, 3 }, "recovery_shares"},
		"a person without a name":            {func(c *Cluster) { c.People = []Person{{"", alice}} }, "no name"},
		"a person twice":                     {func(c *Cluster) { c.People = []Person{{"alice", alice}, {"alice", bob}} }, "twice"},
		"two people with one key":            {func(c *Cluster) { c.People = []Person{{"alice", alice}, {"bob", alice}} }, "one key"},
		"a person whose key is none":         {func(c *Cluster) { c.People = []Person{{"alice", []byte("x")}} }, `"alice"`},
		"no share for the HSM": {func(c *Cluster) {
			c.Shares, c.Threshold, c.People = 2, 2, []Person{{"alice", alice}, {"bob", bob}}
		}, "leave none"},
		"a root token kept with a spread":   {func(c *Cluster) { c.Key, c.Spread, c.RootToken = "", threeKeys(2), RootKeep }, "opens everything"},
		"a root token for nobody":           {func(c *Cluster) { c.RootToken = RootPGP }, "root_pgp_key"},
		"a key for a discarded root token":  {func(c *Cluster) { c.RootPGPKey = alice }, `for root_token "pgp"`},
		"a root token that becomes unknown": {func(c *Cluster) { c.RootToken = "print" }, `"discard"`},
	} {
		t.Run(name, func(t *testing.T) {
			cluster := &Cluster{Name: "prod", Nodes: []string{"https://127.0.0.1:8200"}, TLS: node.TLS{CA: authority.PEM}, Key: "office", Store: "etcd"}
			c.change(cluster)
			switch err := cluster.Check(); {
			case c.want == "" && err != nil:
				t.Errorf("Check = %v", err)
			case c.want != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("Check = %v, want a sentence with %q", err, c.want)
			}
		})
	}
}

func TestSpreadIsReadAsItIsWritten(t *testing.T) {
	spread, err := ParseSpread(" 2 of office,bunker , bank")
	if err != nil || spread.String() != "2 of office, bunker, bank" {
		t.Errorf("ParseSpread = %q, %v", spread, err)
	}
	for _, text := range []string{"", "2", "office, bunker", "two of office, bunker", "2 of office", "0 of a, b", "3 of a, b", "2 of a, a", "2 of a b, c", "2 of a,, b"} {
		if spread, err := ParseSpread(text); !errors.Is(err, ErrInvalid) {
			t.Errorf("ParseSpread(%q) = %v, %v, want ErrInvalid", text, spread, err)
		}
	}
}

func TestNodeOfAnotherClusterIsNoNode(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	_, err := s.host("one").process().Tend(t.Context(), s.Cluster, "https://127.0.0.1:1")
	if !errors.Is(err, ErrInvalid) {
		t.Errorf("Tend = %v, want ErrInvalid", err)
	}
}

func TestChangedTrustMakesANewClient(t *testing.T) {
	s, h := inCustody(t, nodetest.Alone, 1)
	k := h.process()
	if _, err := h.tend(k); err != nil {
		t.Fatal(err)
	}
	other := *s.Cluster
	other.TLS = node.TLS{CA: nodetest.NewAuthority(t).PEM}
	if _, err := k.Tend(t.Context(), &other, s.Nodes[0]); !errors.Is(err, node.ErrIdentity) {
		t.Errorf("Tend with another CA = %v, want ErrIdentity", err)
	}
	if _, err := h.tend(k); err != nil {
		t.Error(err)
	}
}
