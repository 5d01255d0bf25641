package envelope

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/go-jose/go-jose/v4"
)

// typ and formatVersion are the header parameters of the same meaning. A later format gets another version.
const (
	typ           = "nitroseal+jwe"
	formatVersion = 1
)

// macDomain begins the HMAC's input, so that a MAC of ours cannot mean anything else.
const macDomain = "nitroseal/envelope/v1"

// maxGeneration is the largest integer that every JSON reader keeps exact (RFC 8259, 6).
const maxGeneration = 1<<53 - 1

// Use is the entrance that an envelope was made for. No entrance opens an envelope of another use.
type Use string

// The uses of envelopes.
const (
	UseWrap     Use = "wrap"     // wrap and unwrap
	UseTransit  Use = "transit"  // encrypt and decrypt, the wire of seal "transit"
	UseMaterial Use = "material" // stored material: the only use with cluster, name and generation
	UseKEK      Use = "kek"      // a key encryption key, see [KEK]
	UseAuth     Use = "auth"     // a wrapping key version's authentication key
	UseSeal     Use = "seal"     // the seal of OpenBao, by its seal plugin
)

// Uses lists every [Use].
func Uses() []Use { return []Use{UseWrap, UseTransit, UseMaterial, UseKEK, UseAuth, UseSeal} }

// Context is what an envelope was made for. Names are 1 to [MaxName] bytes of printable ASCII without space and
// without the characters " & ' < > \ that JSON writers escape differently.
type Context struct {
	Use     Use
	Key     string // the wrapping key's name
	Version int    // the wrapping key's version, from 1

	// Cluster, Name and Generation (from 1, below 2⁵³) are set for UseMaterial and for nothing else.
	Cluster    string
	Name       string
	Generation uint64

	// Caller is the caller's own context, opaque, up to [MaxCaller] bytes. None and empty are the same.
	Caller []byte
}

// ContextError says in which field an envelope's context differs from the wanted one. It is an [ErrContext].
type ContextError struct {
	Field string
	// Claimed and Wanted are the two values; both are empty for the caller's context, which may be a secret.
	Claimed, Wanted string
}

func (e *ContextError) Error() string {
	if e.Claimed == "" && e.Wanted == "" {
		return fmt.Sprintf("%v: its %s is another one", ErrContext, e.Field)
	}
	return fmt.Sprintf("%v: its %s is %q, not %q", ErrContext, e.Field, e.Claimed, e.Wanted)
}

// Is makes a ContextError answer to [ErrContext].
func (e *ContextError) Is(target error) bool { return target == ErrContext }

// check tells why an envelope cannot have this context. The caller adds ErrInvalid or ErrMalformed.
func (c Context) check() error {
	switch c.Use {
	case UseWrap, UseTransit, UseKEK, UseAuth, UseSeal:
		if c.Cluster != "" || c.Name != "" || c.Generation != 0 {
			return fmt.Errorf("cluster, name and generation belong to use %q only, not to %q", UseMaterial, c.Use)
		}
	case UseMaterial:
		if err := checkName("cluster", c.Cluster); err != nil {
			return err
		}
		if err := checkName("name", c.Name); err != nil {
			return err
		}
		if c.Generation < 1 || c.Generation > maxGeneration {
			return fmt.Errorf("generation %d is not between 1 and %d", c.Generation, maxGeneration)
		}
	default:
		return fmt.Errorf("unknown use %q", c.Use)
	}
	if err := checkName("wrapping key", c.Key); err != nil {
		return err
	}
	if c.Version < 1 || c.Version > math.MaxInt32 {
		return fmt.Errorf("wrapping key version %d is not between 1 and %d", c.Version, math.MaxInt32)
	}
	return nil
}

func checkName(what, name string) error {
	if name == "" || len(name) > MaxName {
		return fmt.Errorf("%s name of %d bytes: a name has 1 to %d", what, len(name), MaxName)
	}
	if i := slices.IndexFunc([]byte(name), func(c byte) bool { return !isNameByte(c) }); i >= 0 {
		return fmt.Errorf("%s name %q: byte %d is not allowed in a name", what, name, i)
	}
	return nil
}

// isNameByte tells whether names may hold c. What it allows, every JSON writer writes as itself.
func isNameByte(c byte) bool {
	return c > ' ' && c < 0x7f && !strings.ContainsRune(`"&'<>\`, rune(c))
}

// Differs returns a [*ContextError] that names the first field in which what an envelope claims, c, is not what is
// wanted; nil where they are the same. Opening asks it; asking before saves an HSM an envelope that it could not open.
func (c Context) Differs(want Context) error {
	if c.Use == want.Use && c.Key == want.Key && c.Version == want.Version && c.Cluster == want.Cluster && c.Name == want.Name &&
		c.Generation == want.Generation && bytes.Equal(c.Caller, want.Caller) {
		return nil
	}
	for _, field := range []struct{ name, claimed, wanted string }{
		{"use", string(c.Use), string(want.Use)},
		{"wrapping key", c.Key, want.Key},
		{"wrapping key version", strconv.Itoa(c.Version), strconv.Itoa(want.Version)},
		{"cluster", c.Cluster, want.Cluster},
		{"name", c.Name, want.Name},
		{"generation", strconv.FormatUint(c.Generation, 10), strconv.FormatUint(want.Generation, 10)},
	} {
		if field.claimed != field.wanted {
			return &ContextError{Field: field.name, Claimed: field.claimed, Wanted: field.wanted}
		}
	}
	return &ContextError{Field: "caller's context"}
}

// headers adds the context to the protected header.
func (c Context) headers(options *jose.EncrypterOptions) {
	options.WithType(typ).
		WithHeader("v", formatVersion).
		WithHeader("use", c.Use).
		WithHeader("key", c.Key).
		WithHeader("kver", c.Version)
	if c.Use == UseMaterial {
		options.WithHeader("cluster", c.Cluster).WithHeader("name", c.Name).WithHeader("gen", c.Generation)
	}
	if len(c.Caller) > 0 {
		options.WithHeader("ctx", base64.RawURLEncoding.EncodeToString(c.Caller))
	}
}

// mac returns HMAC-SHA256 over context and payload. Every field is preceded by its length, so that no two inputs are
// written alike.
func (c Context) mac(key *AuthKey, payload []byte) []byte { return c.macInto(nil, key, payload) }

// macInto appends it to b.
func (c Context) macInto(b []byte, key *AuthKey, payload []byte) []byte {
	input := make([]byte, 0, len(macDomain)+len(c.Key)+len(c.Cluster)+len(c.Name)+len(c.Caller)+128)
	input = appendField(input, macDomain)
	input = appendField(input, c.Use)
	input = appendField(input, c.Key)
	input = binary.BigEndian.AppendUint64(appendLength(input, 8), uint64(c.Version)) //nolint:gosec // check keeps it positive
	input = appendField(input, c.Cluster)
	input = appendField(input, c.Name)
	input = binary.BigEndian.AppendUint64(appendLength(input, 8), c.Generation)
	input = appendField(input, c.Caller)
	input = appendLength(input, len(payload))
	mac := hmac.New(sha256.New, key[:])
	_, _ = mac.Write(input) // a hash does not fail
	_, _ = mac.Write(payload)
	b = mac.Sum(b)
	var zeros [sha256.BlockSize]byte
	_, _ = mac.Write(zeros[:]) // the hash keeps its last block, which is the end of the payload
	return b
}

// appendField appends a field and its length before it.
func appendField[T ~string | ~[]byte](b []byte, field T) []byte {
	return append(appendLength(b, len(field)), field...)
}

// appendLength appends the length of a field: four bytes, big endian.
func appendLength(b []byte, length int) []byte {
	return binary.BigEndian.AppendUint32(b, uint32(length)) //nolint:gosec // fields have 64 KiB at most
}
