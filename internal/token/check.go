package token

import (
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Peer is who presents a token.
type Peer struct {
	// Address is where the request comes from: the one of the connection, never of a header.
	Address netip.Addr
	// Certificate is the client's, which was verified; nil where there is none.
	Certificate *x509.Certificate
}

// CertificateNames returns the names of a client certificate that tokens can be bound to: the DNS names and URIs of its subject
// alternative names, or the common name of a certificate that has neither.
func CertificateNames(certificate *x509.Certificate) []string {
	names := slices.Clone(certificate.DNSNames)
	for _, uri := range certificate.URIs {
		names = append(names, uri.String())
	}
	if names == nil && certificate.Subject.CommonName != "" {
		names = []string{certificate.Subject.CommonName}
	}
	return names
}

// Grant is what a token is good for. It is shared by all who ask with the token, and never changed.
type Grant struct {
	ID, Name string
	Keys     []string
	Limit    *Limit // nil for that of the server
}

// Allows tells whether a wrapping key may be used.
func (g *Grant) Allows(key string) bool { return slices.Contains(g.Keys, key) }

// holder is a token, made ready to be compared.
type holder struct {
	grant     Grant
	hash      [sha256.Size]byte
	names     []string // folded
	addresses []netip.Prefix
}

func newHolder(t *Token) *holder {
	h := &holder{grant: Grant{ID: t.ID, Name: t.Name, Keys: t.Keys, Limit: t.Limit}, hash: t.Hash, addresses: t.Addresses}
	for _, name := range t.CertificateNames {
		h.names = append(h.names, fold(name))
	}
	return h
}

// nobody is compared with where there is no token of an id, so that a wrong id takes as long as a wrong secret. Nobody knows a text
// of its hash.
var nobody = &holder{}

// admit compares a text with the token that it claims to be, nil for none. The errors wrap [ErrDenied].
func (h *holder) admit(text string, peer Peer) (*Grant, error) {
	known := h != nil
	if !known {
		h = nobody
	}
	hash := sha256.Sum256([]byte(text))
	if subtle.ConstantTimeCompare(hash[:], h.hash[:]) != 1 || !known {
		return nil, fmt.Errorf("%w: no token is like it", ErrDenied)
	}
	if len(h.addresses) > 0 && !h.from(peer.Address) {
		return nil, fmt.Errorf("%w: token %s is not taken from %v", ErrDenied, h.grant.ID, peer.Address)
	}
	if len(h.names) > 0 {
		if peer.Certificate == nil {
			return nil, fmt.Errorf("%w: token %s needs a client certificate, and came with none", ErrDenied, h.grant.ID)
		}
		if names := CertificateNames(peer.Certificate); !h.certified(names) {
			return nil, fmt.Errorf("%w: token %s is not for a client certificate of %q", ErrDenied, h.grant.ID, names)
		}
	}
	return &h.grant, nil
}

func (h *holder) from(address netip.Addr) bool {
	address = address.Unmap().WithZone("")
	return slices.ContainsFunc(h.addresses, func(network netip.Prefix) bool { return network.Contains(address) })
}

func (h *holder) certified(names []string) bool {
	return slices.ContainsFunc(names, func(name string) bool { return slices.Contains(h.names, fold(name)) })
}

// fold is the form in which names are compared: DNS knows no case, the path of a URI does.
func fold(name string) string {
	if strings.Contains(name, "://") {
		return name
	}
	return strings.ToLower(name)
}
