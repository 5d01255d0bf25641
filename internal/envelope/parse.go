package envelope

import (
	"bytes"
	"crypto/ecdh"
	"crypto/sha256"
	"fmt"
	"math"
	"slices"
)

// Sizes in bytes of an envelope's parts.
const (
	ivSize         = 12
	tagSize        = 16
	macSize        = sha256.Size
	contentKeySize = 32
	// wrappedKeySize is the content key after AES key wrap (RFC 3394): one block of 8 bytes longer.
	wrappedKeySize = contentKeySize + 8
	kidSize        = sha256.Size
	// maxProtected is more than the protected header with all fields full.
	maxProtected = 8 << 10
)

// Envelope is a parsed envelope. What it tells about itself is what its maker wrote: trust it after Open. It does not
// change, and may be used by several goroutines.
type Envelope struct {
	raw        string
	context    Context
	recipients []stanza
	leased     *leasedParts // nil where it is sealed to HSM keys
}

// stanza is what an envelope holds for one recipient.
type stanza struct {
	RecipientID
	encryptedKey []byte
	ephemeral    *ecdh.PublicKey // epk; nil for RSA
}

// Parse reads an envelope. Whatever is not exactly what Seal writes is [ErrMalformed], with the byte where it differs.
// The result keeps no reference to raw.
func Parse(raw []byte) (*Envelope, error) {
	if len(raw) > MaxSize {
		return nil, fmt.Errorf("an envelope of %d bytes exceeds the limit of %d: %w", len(raw), MaxSize, ErrMalformed)
	}
	e := &Envelope{raw: string(raw)}
	s := &scanner{what: "the envelope", text: raw}

	s.want(`{"protected":"`)
	begin := s.at
	protected := s.base64("the protected header", 1, maxLeasedProtected)
	if s.have(`,"recipients":[`) {
		e.recipients = parseRecipients(s)
	} else {
		s.want(`,"encrypted_key":"`)
		e.recipients = []stanza{{encryptedKey: parseEncryptedKey(s)}}
	}
	s.want(`,"iv":"`)
	iv := s.base64("iv", ivSize, ivSize)
	s.want(`,"ciphertext":"`)
	ciphertext := s.base64("ciphertext", macSize, macSize+MaxPayload)
	s.want(`,"tag":"`)
	tag := s.base64("tag", tagSize, tagSize)
	s.want(`}`)
	s.end()
	if s.err != nil {
		return nil, s.err
	}

	if err := e.parseProtected(protected); err != nil {
		return nil, err
	}
	if err := e.checkLeased(len(protected), len(ciphertext)); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrMalformed)
	}
	if e.leased != nil {
		e.leased.protected = e.raw[begin : begin+base64url.EncodedLen(len(protected))]
		e.leased.iv, e.leased.ciphertext = iv, append(ciphertext, tag...)
	}
	for i := range e.recipients {
		if err := e.recipients[i].check(); err != nil {
			return nil, fmt.Errorf("recipient %d: %w: %w", i, err, ErrMalformed)
		}
		if slices.ContainsFunc(e.recipients[:i], func(r stanza) bool { return r.KID == e.recipients[i].KID }) {
			return nil, fmt.Errorf("recipient %d: key %s is a recipient twice: %w", i, e.recipients[i].KID, ErrMalformed)
		}
	}
	if e.context.Use == UseAuth && len(ciphertext) != macSize+len(AuthKey{}) {
		return nil, fmt.Errorf("a payload of %d bytes is no authentication key: %w", len(ciphertext)-macSize, ErrMalformed)
	}
	return e, nil
}

// Context returns what the envelope claims to be made for. Trust it after Open.
func (e *Envelope) Context() Context {
	c := e.context
	c.Caller = bytes.Clone(c.Caller)
	return c
}

// Recipients returns the keys that the envelope is sealed to, in its own order.
func (e *Envelope) Recipients() []RecipientID {
	ids := make([]RecipientID, len(e.recipients))
	for i, r := range e.recipients {
		ids[i] = r.RecipientID
	}
	return ids
}

// parseRecipients reads the elements of the General serialisation and the bracket behind them: two or more, as one
// recipient has the Flattened serialisation.
func parseRecipients(s *scanner) []stanza {
	var recipients []stanza
	for s.err == nil {
		var r stanza
		s.want(`{"header":{"alg":"`)
		r.Algorithm = Algorithm(s.name("alg"))
		if s.have(`,"epk":`) {
			r.ephemeral = parseEphemeral(s)
		}
		s.want(`,"kid":"`)
		r.KID = parseKID(s)
		s.want(`},"encrypted_key":"`)
		r.encryptedKey = parseEncryptedKey(s)
		s.want(`}`)
		recipients = append(recipients, r)
		if !s.have(`,`) {
			break
		}
		if len(recipients) == MaxRecipients {
			s.fail("more than %d recipients", MaxRecipients)
		}
	}
	s.want(`]`)
	if len(recipients) == 1 {
		s.fail("a single recipient in the General serialisation")
	}
	return recipients
}

// parseProtected reads the protected header: the context and, for a single recipient, its header parameters. The
// names come in the order of their bytes.
func (e *Envelope) parseProtected(text []byte) error {
	if !bytes.HasSuffix(text, []byte(`,"v":1}`)) {
		return fmt.Errorf("the format version of the envelope is not 1: a newer release made it, or something else did: %w",
			ErrMalformed)
	}
	c := &e.context
	s := &scanner{what: "the protected header", text: text}

	s.want(`{`)
	single := len(e.recipients) == 1
	if single {
		s.want(`"alg":"`)
		e.recipients[0].Algorithm = Algorithm(s.name("alg"))
		s.want(`,`)
	}
	if s.have(`"cluster":"`) {
		c.Cluster = s.name("cluster")
		s.want(`,`)
	}
	if s.have(`"ctx":"`) {
		c.Caller = s.base64("ctx", 1, MaxCaller)
		s.want(`,`)
	}
	s.want(`"enc":"A256GCM"`)
	if single && s.have(`,"epk":`) {
		e.recipients[0].ephemeral = parseEphemeral(s)
	}
	if s.have(`,"gen":`) {
		c.Generation = s.number("gen", maxGeneration)
	}
	if single && s.have(`,"kek":"`) {
		e.leased = &leasedParts{kek: s.base64("kek", 1, MaxKEK)}
	}
	s.want(`,"key":"`)
	c.Key = s.name("key")
	if single {
		s.want(`,"kid":"`)
		e.recipients[0].KID = parseKID(s)
	}
	s.want(`,"kver":`)
	c.Version = int(s.number("kver", math.MaxInt32)) //nolint:gosec // fits by its maximum
	if s.have(`,"name":"`) {
		c.Name = s.name("name")
	}
	s.want(`,"typ":"` + typ + `","use":"`)
	c.Use = Use(s.name("use"))
	s.want(`,"v":1}`)
	s.end()
	if s.err != nil {
		return s.err
	}
	if err := c.check(); err != nil {
		return fmt.Errorf("reading the protected header: %w: %w", err, ErrMalformed)
	}
	return nil
}

// checkLeased tells what is wrong with an envelope that is sealed to a KEK, or says so and is not. The sizes are those of the
// protected header and of HMAC and payload.
func (e *Envelope) checkLeased(protected, ciphertext int) error {
	claimed := slices.ContainsFunc(e.recipients, func(r stanza) bool { return r.Algorithm == A256KW })
	switch {
	case e.leased == nil && claimed:
		return fmt.Errorf("%s belongs to an envelope with one recipient that carries a kek", A256KW)
	case e.leased == nil && protected > maxProtected:
		return fmt.Errorf("a protected header of %d bytes exceeds the limit of %d", protected, maxProtected)
	case e.leased == nil:
	case !claimed:
		return fmt.Errorf("kek does not belong to %s", e.recipients[0].Algorithm)
	case e.context.Use != UseTransit:
		return fmt.Errorf("kek does not belong to use %q", e.context.Use)
	case ciphertext > macSize+MaxLeasedPayload:
		return fmt.Errorf("a payload of %d bytes exceeds the limit of %d for %s", ciphertext-macSize, MaxLeasedPayload, A256KW)
	}
	return nil
}

// parseKID reads a thumbprint and its closing quote, in the only form in which it can be written.
func parseKID(s *scanner) string {
	return base64url.EncodeToString(s.base64("kid", kidSize, kidSize))
}

func parseEncryptedKey(s *scanner) []byte {
	return s.base64("encrypted_key", wrappedKeySize, MaxRSABits/8)
}

// parseEphemeral reads an ephemeral public key (RFC 7518, 4.6.1.1) and checks that it lies on its curve.
func parseEphemeral(s *scanner) *ecdh.PublicKey {
	s.want(`{"kty":"EC","crv":"`)
	curve, size := ecdh.P256(), 32
	if !s.have(`P-256"`) {
		curve, size = ecdh.P384(), 48
		s.want(`P-384"`)
	}
	s.want(`,"x":"`)
	x := s.base64("epk.x", size, size)
	s.want(`,"y":"`)
	y := s.base64("epk.y", size, size)
	s.want(`}`)
	if s.err != nil {
		return nil
	}
	const uncompressed = 4 // SEC 1, 2.3.3
	public, err := curve.NewPublicKey(slices.Concat([]byte{uncompressed}, x, y))
	if err != nil {
		s.fail("epk is not a point on %v", curve)
		return nil
	}
	return public
}

// check tells what is wrong with a recipient as far as the envelope alone shows it.
func (r *stanza) check() error {
	switch size := len(r.encryptedKey); r.Algorithm {
	case RSAOAEP256, RSAOAEP:
		if r.ephemeral != nil {
			return fmt.Errorf("epk does not belong to %s", r.Algorithm)
		}
		if size < MinRSABits/8 {
			return fmt.Errorf("encrypted_key of %d bytes: an RSA key of %d bits or more makes %d", size, MinRSABits, MinRSABits/8)
		}
	case ECDHESA256KW, A256KW:
		if (r.Algorithm == A256KW) != (r.ephemeral == nil) {
			return fmt.Errorf("%s needs an epk, and nothing else has one", ECDHESA256KW)
		}
		if size != wrappedKeySize {
			return fmt.Errorf("encrypted_key of %d bytes: %s makes %d", size, r.Algorithm, wrappedKeySize)
		}
	default:
		return fmt.Errorf("unknown algorithm %q", r.Algorithm)
	}
	return nil
}
