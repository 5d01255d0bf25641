// Package token is who may ask the seal server: tokens as Vault's X-Vault-Token carries them, and what each is good for.
//
// A token's text is "ns.", ten characters that name it, ".", and 32 random bytes in base64url. Only its holder has it: a store keeps
// its SHA-256, the wrapping keys that it opens and seals with, and, where it is bound, from which addresses or with which client
// certificates it is taken. Thirty-two random bytes need no slow hash. A token never expires: a seal's token that ended by itself
// would keep a Vault from starting. It ends by being revoked, which takes its item out of the store.
//
// Tokens never change, they are made and revoked. All servers share one store, so there is one place to rotate, and each has a
// [Registry]: it reads the list every few seconds and answers from memory. A store that is away takes nothing from it, and a
// copy of the list on the local disk serves a restart meanwhile.
//
// Items are read strictly: what is not exactly what [Create] writes is no token, and whoever presents it is unknown.
package token

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// The parts of a token's text.
const (
	prefix      = "ns."
	idLength    = 10 // 50 bits: two tokens of one id are refused when the second is made
	secretSize  = 32 // bytes
	secretChars = 43 // of base64url
	textLength  = len(prefix) + idLength + 1 + secretChars
)

// The errors of this package. They are wrapped: ask with errors.Is.
var (
	// ErrInvalid: somebody asked for a token that cannot be, or for one by something that is no id. The message says what to do.
	ErrInvalid = errors.New("no such token can be")
	// ErrUnknown: there is no token of that id.
	ErrUnknown = errors.New("there is no such token")
	// ErrMalformed: an item is not what this package writes: damaged, foreign, or of a later version.
	ErrMalformed = errors.New("malformed token item")
	// ErrDenied: a token is not taken. The client is told no more than that; what else the error says is for our own log.
	ErrDenied = errors.New("permission denied")
)

// Token is what is kept of a token.
type Token struct {
	// ID names it: in lists, in metrics and in the audit log. It is no secret.
	ID string
	// Name is what its maker calls it: the cluster that has it, say. Several tokens may have one name.
	Name string
	// Hash is the SHA-256 of the token's text.
	Hash [sha256.Size]byte
	// Keys are the wrapping keys that it may use, at least one.
	Keys []string
	// CertificateNames are those of client certificates, one of which it must come with; none: it needs no certificate.
	CertificateNames []string
	// Addresses are the networks that it is taken from; none: from anywhere.
	Addresses []netip.Prefix
	// Limit is how often it may ask; nil: as often as the server lets any.
	Limit *Limit

	Created   time.Time
	CreatedBy string
}

// Limit is how many requests a token has.
type Limit struct {
	Rate  int // in a second; 0 for no limit
	Burst int // at once, after a pause; 0 where Rate is
}

// Spec is what somebody asks for.
type Spec struct {
	Name             string
	Keys             []string
	CertificateNames []string
	Addresses        []string // networks, "192.0.2.0/24", or single addresses
	Limit            *Limit
	By               string // who asks
}

// The bounds of a token.
const (
	maxName      = 64  // bytes of the name, and of a wrapping key's
	maxCreator   = 256 // bytes
	maxKeys      = 64
	maxNames     = 64
	maxAddresses = 256

	// MaxLimit is the highest rate, and the largest burst.
	MaxLimit = 1_000_000
)

// make returns a new token and its text, which the caller wipes. Nothing is stored yet.
func (s *Spec) make(now time.Time) (Token, []byte, error) {
	t := Token{
		ID: strings.ToLower(rand.Text()[:idLength]), Name: s.Name, Keys: slices.Clone(s.Keys), CertificateNames: slices.Clone(s.CertificateNames),
		Limit: s.Limit, Created: now.UTC().Truncate(time.Second), CreatedBy: s.By,
	}
	for _, given := range s.Addresses {
		network, err := parseNetwork(given)
		if err != nil {
			return Token{}, nil, err
		}
		t.Addresses = append(t.Addresses, network)
	}
	if err := t.check(); err != nil {
		return Token{}, nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	secret := make([]byte, secretSize)
	defer clear(secret)
	_, _ = rand.Read(secret) // never fails, says its documentation
	text := make([]byte, 0, textLength)
	text = append(append(append(text, prefix...), t.ID...), '.')
	text = base64.RawURLEncoding.AppendEncode(text, secret)
	t.Hash = sha256.Sum256(text)
	return t, text, nil
}

// parseNetwork reads a network, or a single address.
func parseNetwork(given string) (netip.Prefix, error) {
	if address, err := netip.ParseAddr(given); err == nil && address.Zone() == "" {
		address = address.Unmap()
		return netip.PrefixFrom(address, address.BitLen()), nil
	}
	network, err := netip.ParsePrefix(given)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%w: %q is neither an address nor a network; write 192.0.2.17 or 192.0.2.0/24", ErrInvalid, given)
	}
	return network, nil
}

// check says what a token cannot be.
func (t *Token) check() error {
	switch {
	case !isID(t.ID):
		return fmt.Errorf("%q is no id of a token", t.ID)
	case !isName(t.Name):
		return fmt.Errorf("the name %q is not 1 to %d printable characters of ASCII; name whoever will hold the token, a cluster for example", t.Name, maxName)
	case len(t.Keys) == 0:
		return errors.New("it names no wrapping key; a token is good for those that it names")
	case len(t.CreatedBy) > maxCreator:
		return fmt.Errorf("who made it is told in more than %d bytes", maxCreator)
	case t.Created.IsZero() || t.Created.Year() > 9999:
		return errors.New("it was made at no time")
	}
	for _, list := range []struct {
		what string
		all  []string
		most int
		good func(string) bool
	}{
		{"wrapping key", t.Keys, maxKeys, isKey},
		{"certificate name", t.CertificateNames, maxNames, isCertificateName},
	} {
		if len(list.all) > list.most {
			return fmt.Errorf("it has more than %d %ss", list.most, list.what)
		}
		for i, one := range list.all {
			if !list.good(one) {
				return fmt.Errorf("%q is not the name of a %s", one, list.what)
			}
			if slices.Contains(list.all[:i], one) {
				return fmt.Errorf("%s %q is there twice", list.what, one)
			}
		}
	}
	return errors.Join(t.checkAddresses(), t.Limit.check())
}

func (t *Token) checkAddresses() error {
	if len(t.Addresses) > maxAddresses {
		return fmt.Errorf("it has more than %d networks", maxAddresses)
	}
	for i, network := range t.Addresses {
		switch {
		case !network.IsValid() || network.Addr().Is4In6():
			return fmt.Errorf("%v is no network", network)
		case network != network.Masked():
			return fmt.Errorf("%v is an address in a network; write %v for all of it, or %v", network, network.Masked(), network.Addr())
		case slices.Contains(t.Addresses[:i], network):
			return fmt.Errorf("network %v is there twice", network)
		}
	}
	return nil
}

func (l *Limit) check() error {
	switch {
	case l == nil || l.Rate == 0 && l.Burst == 0:
		return nil
	case l.Rate < 1 || l.Rate > MaxLimit || l.Burst < 1 || l.Burst > MaxLimit:
		return fmt.Errorf("a limit is 1 to %d requests in a second and at once; a rate of 0 is none", MaxLimit)
	}
	return nil
}

func isID(id string) bool {
	return len(id) == idLength && strings.Trim(id, "abcdefghijklmnopqrstuvwxyz234567") == ""
}

func isName(name string) bool {
	return name != "" && len(name) <= maxName && strings.TrimSpace(name) == name && !strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r > '~' })
}

// isKey tells whether a wrapping key may be called so, as package keyring and its stores have it.
func isKey(name string) bool {
	return name != "" && len(name) <= maxName && name[0] != '.' && name[0] != '-' && strings.Trim(name, keyCharacters) == ""
}

const keyCharacters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"

// isCertificateName tells whether a certificate may carry such a name: it is compared, never asked for in DNS.
func isCertificateName(name string) bool {
	const longest = 255
	return name != "" && len(name) <= longest && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' })
}

// split returns the id that a text claims to be of; "" for what is no text of a token.
func split(text string) (id string) {
	if len(text) != textLength || text[:len(prefix)] != prefix || text[len(prefix)+idLength] != '.' {
		return ""
	}
	return text[len(prefix) : len(prefix)+idLength]
}
