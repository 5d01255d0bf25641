package transit

import (
	"crypto/x509"
	"errors"
	"net/netip"
	"slices"
)

// ErrDenied is wrapped by every error of [Tokens]. The rest of such an error is for our own log: the client reads
// "permission denied" whatever the reason was, so that nobody learns which half of a guess was right.
var ErrDenied = errors.New("permission denied")

// Tokens know who may ask.
type Tokens interface {
	// Authenticate returns what a token grants to whoever sends it from there. An unknown token, and one that is not for this
	// peer, is an error that wraps [ErrDenied] and holds nothing of the token but, where it is known, its id. It is called for
	// every request, so it does no I/O, and is safe for concurrent use.
	Authenticate(token string, peer Peer) (*Grant, error)
}

// Peer is where a request comes from.
type Peer struct {
	// Address is the other end of the connection; a mapped IPv4 address is an IPv4 address here.
	Address netip.Addr
	// Certificate is the client's, verified against the client CA; nil where it showed none.
	Certificate *x509.Certificate
}

// Grant is what a token stands for. It is shared by the requests that use the token, and never changed.
type Grant struct {
	ID   string   // of the token; no secret
	Name string   // that people gave it
	Keys []string // the wrapping keys that it is for
	// Rate is how many requests a second it is for, Burst how many at once; 0 for what the server grants to every token, a
	// negative Rate for no limit.
	Rate  float64
	Burst int
}

// Allows tells whether the grant is for a wrapping key.
func (g *Grant) Allows(key string) bool { return slices.Contains(g.Keys, key) }
