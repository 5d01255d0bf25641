package config

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// What becomes of the root token that Vault gives out when it is initialised.
const (
	RootTokenDiscard = "discard" // revoked as soon as it is not needed any more
	RootTokenKeep    = "keep"    // sealed like the unseal keys
	RootTokenPGP     = "pgp"     // given out, encrypted to a person's key
)

// Cluster is a Vault or OpenBao cluster whose unseal material is kept. Its name is part of what the envelopes are sealed
// for, so it cannot be changed afterwards.
type Cluster struct {
	Name string
	// Nodes are the addresses of the nodes themselves, not of a balancer; the first one is initialised.
	Nodes []string
	// CACert is PEM: the authority of this cluster. The system's are never asked. Pins are hashes of the nodes' keys.
	CACert        []byte
	TLSServerName string
	TLSPins       []string
	PlainHTTP     bool
	// Key is the wrapping key, any of whose HSMs opens the material; Spread says instead which keys take part and how
	// many of them must: "2 of office, bunker, bank". Exactly one is set.
	Key, Spread string
	Store       string
	// How many shares there are, and how many of them unseal; 0 where the file does not say.
	Shares, Threshold                 int
	RecoveryShares, RecoveryThreshold int
	Persons                           []Person
	RootToken                         string // one of the constants
	RootPGPKey                        []byte // OpenPGP, binary or armored
	RaftLeaderCACert                  []byte // PEM; nil: CACert
	Timeout                           time.Duration
}

// Person takes a share of a cluster, which nobody else ever sees.
type Person struct {
	Name   string
	PGPKey []byte // OpenPGP, binary or armored
}

// clusterAttributes are those of a block `cluster "NAME" { … }`.
type clusterAttributes struct {
	Nodes             []string      `hcl:"nodes"`
	CACertFile        string        `hcl:"ca_cert_file,optional"`
	TLSServerName     string        `hcl:"tls_server_name,optional"`
	TLSPins           []string      `hcl:"tls_pins,optional"`
	PlainHTTP         bool          `hcl:"plain_http,optional"`
	Key               string        `hcl:"key,optional"`
	Spread            string        `hcl:"spread,optional"`
	Store             string        `hcl:"store"`
	Shares            *int          `hcl:"shares,optional"`
	Threshold         *int          `hcl:"threshold,optional"`
	RecoveryShares    *int          `hcl:"recovery_shares,optional"`
	RecoveryThreshold *int          `hcl:"recovery_threshold,optional"`
	RootToken         string        `hcl:"root_token,optional"`
	RootPGPKeyFile    string        `hcl:"root_pgp_key_file,optional"`
	RaftLeaderCAFile  string        `hcl:"raft_leader_ca_file,optional"`
	Timeout           string        `hcl:"timeout,optional"`
	Persons           []personBlock `hcl:"person,block"`
}

// personBlock only tells that the block may be there, see top.
type personBlock struct {
	Name string   `hcl:"name,label"`
	Rest hcl.Body `hcl:",remain"`
}

// personAttributes are those of a block `person "NAME" { … }` in a cluster.
type personAttributes struct {
	PGPKeyFile string `hcl:"pgp_key_file"`
}

// cluster reads a block `cluster "NAME" { … }`.
func (b *block) cluster() Cluster {
	var given clusterAttributes
	b.decode(&given)
	c := Cluster{
		Name: b.label, Nodes: given.Nodes, TLSServerName: given.TLSServerName, TLSPins: given.TLSPins, PlainHTTP: given.PlainHTTP,
		Key: given.Key, Spread: given.Spread, Store: given.Store, RootToken: given.RootToken,
	}
	c.CACert = b.pem("ca_cert_file", given.CACertFile)
	c.RaftLeaderCACert = b.pem("raft_leader_ca_file", given.RaftLeaderCAFile)
	c.RootPGPKey = b.trusted("root_pgp_key_file", given.RootPGPKeyFile, maxPGPKey)
	c.Timeout = b.duration("timeout", given.Timeout)
	c.Shares, c.Threshold = b.shares("shares", given.Shares), b.shares("threshold", given.Threshold)
	c.RecoveryShares, c.RecoveryThreshold = b.shares("recovery_shares", given.RecoveryShares), b.shares("recovery_threshold", given.RecoveryThreshold)
	for _, nested := range b.nested("person") {
		if p := nested.person(); !nested.again {
			c.Persons = append(c.Persons, p)
		}
	}
	b.checkTrust(c)
	b.checkCustody(&c)
	return c
}

// maxPGPKey is the size of the largest file with a person's key, in bytes: keys that many people signed are long.
const maxPGPKey = 1 << 20

// person reads a block `person "NAME" { … }`.
func (b *block) person() Person {
	var given personAttributes
	b.decode(&given)
	return Person{Name: b.label, PGPKey: b.trusted("pgp_key_file", given.PGPKeyFile, maxPGPKey)}
}

// maxShares is the most shares that Vault makes.
const maxShares = 255

// shares reads a number of shares; 0 where it is not given.
func (b *block) shares(attribute string, given *int) int {
	if given == nil {
		return 0
	}
	if *given < 1 || *given > maxShares {
		b.wrong(attribute, "%s is not between 1 and %d", attribute, maxShares)
	}
	return *given
}

// checkTrust checks that every node is known before a share is sent to it.
func (b *block) checkTrust(c Cluster) {
	if !b.good {
		return
	}
	if len(c.Nodes) == 0 {
		b.wrong("nodes", `nodes lists the addresses of the nodes themselves, "https://vault-1.example.org:8200"; a balancer would see the shares`)
		return
	}
	tls := false
	for i, node := range c.Nodes {
		trouble := nodeAddress(node, c.PlainHTTP)
		switch {
		case trouble != "":
			b.wrong("nodes", "the address of node %d %s", i+1, trouble)
		case slices.ContainsFunc(c.Nodes[:i], func(other string) bool { return sameNode(other, node) }):
			b.wrong("nodes", "node %s is there twice; keep one", node)
		}
		tls = tls || strings.HasPrefix(strings.ToLower(node), "https:")
	}
	switch {
	case !b.good:
	case tls && c.CACert == nil && len(c.TLSPins) == 0:
		b.wrong("ca_cert_file", "nothing says how to know a node, and its shares would go to whoever answers; set ca_cert_file to the authority of "+
			"this cluster's certificates, or tls_pins to the hashes of its nodes' keys")
	case !tls && (c.CACert != nil || len(c.TLSPins) > 0 || c.TLSServerName != ""):
		b.wrong("plain_http", "the nodes speak plain http, and ca_cert_file, tls_pins and tls_server_name say nothing about them; leave those out")
	}
}

// nodeAddress says what is wrong with the address of a node, which shares are sent to; empty for nothing.
func nodeAddress(address string, plain bool) (trouble string) {
	parsed, err := url.Parse(address)
	switch {
	case err != nil || parsed.Scheme != "https" && parsed.Scheme != "http" || parsed.Hostname() == "":
		return "is no URL; write https://host:8200"
	case parsed.User != nil:
		return "holds a user or a password; write https://host:8200"
	case parsed.RawQuery != "" || parsed.Fragment != "" || strings.Trim(parsed.Path, "/") != "":
		return "has more than host and port; write https://host:8200"
	case parsed.Scheme == "http" && !loopback(parsed.Hostname()):
		return "would send the shares in the clear: http is for a loopback address only; write https://host:8200"
	case parsed.Scheme == "http" && !plain:
		return "is plain http: every program of this machine that takes the port gets the shares; set plain_http = true where that is meant, or write https://host:8200"
	}
	return ""
}

// sameNode tells whether two addresses, which are right, are one.
func sameNode(one, other string) bool {
	return strings.EqualFold(strings.TrimRight(one, "/"), strings.TrimRight(other, "/"))
}

// spreadForm is "2 of office, bunker, bank".
var spreadForm = regexp.MustCompile(`^\s*[1-9][0-9]*\s+of\s+[^\s,]+(\s*,\s*[^\s,]+)+\s*$`)

// checkCustody checks where the material goes and who gets what.
func (b *block) checkCustody(c *Cluster) {
	if b.good {
		switch {
		case (c.Key == "") == (c.Spread == ""):
			b.wrong("key", `one of key and spread says which HSMs open the material; write key = "NAME" of a wrapping key, or spread = "2 of office, bunker, bank"`)
		case c.Spread != "" && !spreadForm.MatchString(c.Spread):
			b.wrong("spread", `spread is not of the form "2 of office, bunker, bank": how many of which wrapping keys must take part`)
		case c.Store == "":
			b.wrong("store", "store is empty; name the store that keeps the material")
		}
	}
	for _, pair := range []struct {
		shares, threshold string
		n, t              int
	}{{"shares", "threshold", c.Shares, c.Threshold}, {"recovery_shares", "recovery_threshold", c.RecoveryShares, c.RecoveryThreshold}} {
		switch {
		case !b.good:
		case (pair.n == 0) != (pair.t == 0):
			b.wrong(pair.shares, "%s and %s belong together; give both or neither", pair.shares, pair.threshold)
		case pair.t > pair.n:
			b.wrong(pair.threshold, "%s asks for %d shares, and there are %d", pair.threshold, pair.t, pair.n)
		case pair.t == 1 && pair.n > 1:
			b.wrong(pair.threshold, "%s = 1 makes copies of one share, which Vault refuses; set it to 2 or more, or %s = 1", pair.threshold, pair.shares)
		}
	}
	if c.RootToken == "" {
		c.RootToken = RootTokenDiscard
	}
	choices := []string{RootTokenDiscard, RootTokenKeep, RootTokenPGP}
	switch {
	case !b.good:
	case !slices.Contains(choices, c.RootToken):
		b.wrong("root_token", "root_token %q is not known; it is one of %s", c.RootToken, strings.Join(choices, ", "))
	case c.RootToken == RootTokenPGP && c.RootPGPKey == nil:
		b.wrong("root_token", "the root token is encrypted to nobody; set root_pgp_key_file to the file with a person's OpenPGP key")
	case c.RootToken != RootTokenPGP && c.RootPGPKey != nil:
		b.wrong("root_pgp_key_file", `root_pgp_key_file is for root_token = "pgp", and the root token is not given out; leave it out, or set that`)
	}
}

// nested returns the blocks of a type inside this one whose labels are right; about those of others HCL complained.
func (b *block) nested(kind string) []*block {
	var all []*block
	seen := map[string]bool{}
	for _, inner := range b.body.Blocks {
		if inner.Type != kind || len(inner.Labels) != 1 {
			continue
		}
		n := &block{reader: b.reader, kindOf: kind, label: inner.Labels[0], body: inner.Body, at: inner.DefRange(), good: true}
		n.what = fmt.Sprintf("%s: %s %q", b.what, kind, n.label)
		n.checkName(inner.LabelRanges[0])
		if n.again = seen[n.label]; n.again {
			n.complain(n.at, "%s is there twice; keep one", n.what)
		}
		seen[n.label] = true
		all = append(all, n)
	}
	return all
}

// checkClusterReferences checks what a cluster says about the rest of the file.
func (r *reader) checkClusterReferences(config *Config, nested *hclsyntax.Block) {
	c, found := config.Cluster(nested.Labels[0])
	if !found {
		return
	}
	r.checkNodesOfOthers(config, c, nested)
	if c.Store == "" {
		return
	}
	if _, known := config.Store(c.Store); !known {
		r.complain(nested.Body.Attributes["store"].Expr.Range(), "cluster %q: there is no store %q in this file", c.Name, c.Store)
	}
}

// checkNodesOfOthers checks that no other cluster has a node of this one: it would get the shares of both.
func (r *reader) checkNodesOfOthers(config *Config, c Cluster, nested *hclsyntax.Block) {
	for _, other := range config.Clusters {
		if other.Name == c.Name { // those before it are compared, so that each is told once
			return
		}
		for _, node := range c.Nodes {
			if slices.ContainsFunc(other.Nodes, func(of string) bool { return sameNode(of, node) }) {
				r.complain(nested.Body.Attributes["nodes"].Expr.Range(), "cluster %q: node %s is one of cluster %q already; a node belongs to one cluster",
					c.Name, node, other.Name)
			}
		}
	}
}
