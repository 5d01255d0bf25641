package nodetest

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"slices"
	"sync"
)

// mu guards the states of all nodes: joining and passing on go from one to another.
var (
	mu      sync.Mutex
	running = map[string]*Node{} // by address
)

// state is what a node holds.
type state struct {
	cluster *cluster // nil: not initialised
	sealed  bool     // where cluster is not nil
	joined  bool     // it has joined its cluster and was never unsealed there
	stale   *keys    // that unseal it, where it missed a rekey: a sealed node of a raft cluster knows what its own disk says
	opening bool     // its first shares were right: it will be unsealed after some looks
	looks   int      // at its seal status, that are left
	given   [][]byte // shares since the last reset
	nonce   string   // of them
	// initializing is run in the middle of an initialisation.
	initializing func()
	halfway      bool // in the middle of one
}

// cluster is what the nodes of a cluster share.
type cluster struct {
	id, name string
	members  []*Node
	active   *Node // nil: none

	unseal, recovery *keys // one of them is nil
	tokens           map[string]bool

	rekey *rekey
	root  *root
}

// keys are shares of which any threshold opens.
type keys struct {
	threshold int
	shares    [][]byte
}

func newKeys(shares, threshold int) *keys {
	k := &keys{threshold: threshold}
	for i := range shares {
		share := random(32)
		if shares > 1 { // a real one ends with a byte that tells the shares of a set apart
			share = append(share, byte(i+1))
		}
		k.shares = append(k.shares, share)
	}
	return k
}

// opens tells whether the given shares are so many different ones of the set.
func (k *keys) opens(given [][]byte) bool {
	for i, share := range given {
		if holds(given[:i], share) || !holds(k.shares, share) {
			return false
		}
	}
	return len(given) == k.threshold
}

func holds(shares [][]byte, share []byte) bool {
	return slices.ContainsFunc(shares, func(other []byte) bool { return bytes.Equal(share, other) })
}

// apart says why shares cannot be combined, as real secret sharing does before it looks at what comes out; "" where they
// can.
func apart(shares [][]byte) string {
	seen := map[byte]bool{}
	for _, share := range shares {
		last := share[len(share)-1] // tells the shares of a set apart
		switch {
		case len(share) != len(shares[0]):
			return "all parts must be the same length"
		case seen[last]:
			return "duplicate part detected"
		}
		seen[last] = true
	}
	return ""
}

// asked is the set that opens rekeys and root tokens.
func (c *cluster) asked() *keys {
	if c.recovery != nil {
		return c.recovery
	}
	return c.unseal
}

// seal makes the node what it is after a new start. The caller holds mu.
func (n *Node) seal() {
	n.given, n.nonce, n.opening = nil, "", false
	c := n.cluster
	if c == nil {
		return
	}
	n.sealed = n.options.Kind != Auto
	if c.active != n {
		return
	}
	c.rekey, c.root = nil, nil // they live in the memory of the active node
	if !n.sealed {
		return
	}
	c.active = nil
	for _, member := range c.members {
		if !member.sealed {
			c.active = member
			return
		}
	}
}

// open makes the node serve. The caller holds mu.
func (n *Node) open() {
	n.sealed, n.joined, n.opening, n.stale = false, false, false, nil
	if n.cluster.active == nil {
		n.cluster.active = n
	}
}

// Wipe makes the node forget everything, as one whose storage was emptied.
func (n *Node) Wipe() {
	mu.Lock()
	defer mu.Unlock()
	n.seal()
	if c := n.cluster; c != nil {
		c.members = slices.DeleteFunc(c.members, func(other *Node) bool { return other == n })
		if c.active == n {
			c.active = nil
		}
	}
	*n.state = state{}
}

// unsealing is the set that unseals the node. The caller holds mu.
func (n *Node) unsealing() *keys {
	if n.stale != nil {
		return n.stale
	}
	return n.cluster.unseal
}

// DuringInit runs something in the middle of the next initialisation, when the node says that it is initialised and knows no
// numbers of shares yet.
func (n *Node) DuringInit(run func()) {
	mu.Lock()
	defer mu.Unlock()
	n.initializing = run
}

// ClusterID is the id of the node's cluster; "" while it has none.
func (n *Node) ClusterID() string {
	mu.Lock()
	defer mu.Unlock()
	if n.cluster == nil {
		return ""
	}
	return n.cluster.id
}

// SetClusterID gives the node's cluster another id, as another cluster at its address would have.
func (n *Node) SetClusterID(id string) {
	mu.Lock()
	defer mu.Unlock()
	n.cluster.id = id
}

// Sealed tells whether the node is sealed.
func (n *Node) Sealed() bool {
	mu.Lock()
	defer mu.Unlock()
	return n.cluster == nil || n.sealed
}

// Tokens counts the root tokens that are valid.
func (n *Node) Tokens() int {
	mu.Lock()
	defer mu.Unlock()
	if n.cluster == nil {
		return 0
	}
	return len(n.cluster.tokens)
}

// Shares are those that open at this moment: unseal keys, or recovery keys with an auto-seal.
func (n *Node) Shares() [][]byte {
	mu.Lock()
	defer mu.Unlock()
	if n.cluster == nil {
		return nil
	}
	var shares [][]byte
	for _, share := range n.cluster.asked().shares {
		shares = append(shares, slices.Clone(share))
	}
	return shares
}

// token makes a root token.
func (c *cluster) token() string {
	token := "hvs." + letters(24)
	c.tokens[token] = true
	return token
}

func random(size int) []byte {
	out := make([]byte, size)
	_, _ = rand.Read(out) // never fails
	return out
}

func letters(size int) string {
	return hex.EncodeToString(random(size))[:size]
}

func uuid() string {
	b := random(16)
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// decodeKey reads a share from a request, as Vault does: hex first, then base64.
func decodeKey(text string) (share []byte, problem string) {
	if text == "" {
		return nil, "'key' must be specified in request body as JSON"
	}
	share, err := hex.DecodeString(text)
	if err != nil {
		share, err = base64.StdEncoding.DecodeString(text)
	}
	if err != nil {
		return nil, "'key' must be a valid hex or base64 string"
	}
	return share, ""
}

// measured complains about the length of a share.
func measured(share []byte) string {
	const shortest, longest = 16, 33
	switch {
	case len(share) < shortest:
		return fmt.Sprintf("key is shorter than minimum %d bytes", shortest)
	case len(share) > longest:
		return fmt.Sprintf("key is longer than maximum %d bytes", longest)
	default:
		return ""
	}
}
