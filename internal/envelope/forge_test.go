package envelope

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"

	josecipher "github.com/go-jose/go-jose/v4/cipher"
)

// forger writes envelopes without go-jose and without Seal's scruples: what an attacker has who knows the public keys
// and the format. It is a second implementation of docs/envelope.md at the same time.
type forger struct {
	context   string // the protected header's members behind "enc" and before "typ", with a leading comma
	use       string
	to        []party
	auth      *AuthKey
	macOver   Context
	payload   []byte
	claimAlg  Algorithm                                // where set, the alg in the envelope, whatever was done
	protected func(string) string                      // changes the protected header before anything is computed
	header    func(string) string                      // changes each recipient's unprotected header
	ephemeral func(p *ecdh.PublicKey) (epk string)     // changes epk
	block     func(contentKey []byte, to party) []byte // makes another encrypted_key
}

func forge(t testing.TB, f forger) []byte {
	t.Helper()
	contentKey := make([]byte, contentKeySize)
	rand.Read(contentKey)

	type sealed struct{ alg, epk, block string }
	var blocks []sealed
	for _, p := range f.to {
		s := sealed{alg: string(p.Algorithm)}
		if f.claimAlg != "" {
			s.alg = string(f.claimAlg)
		}
		block := []byte(nil)
		switch public := p.Public.(type) {
		case *rsa.PublicKey:
			hash := crypto.SHA256
			if p.Algorithm == RSAOAEP {
				hash = crypto.SHA1
			}
			var err error
			if block, err = rsa.EncryptOAEP(hash.New(), rand.Reader, public, contentKey, nil); err != nil {
				t.Fatal(err)
			}
		case *ecdh.PublicKey:
			var ephemeral *ecdh.PublicKey
			block, ephemeral = agreeAndWrap(t, public, contentKey)
			s.epk = epkJSON(ephemeral)
			if f.ephemeral != nil {
				s.epk = f.ephemeral(ephemeral)
			}
		}
		if f.block != nil {
			block = f.block(contentKey, p)
		}
		s.block = b64(block)
		blocks = append(blocks, s)
	}

	var protected, keys string
	if epk := ""; len(f.to) == 1 {
		if blocks[0].epk != "" {
			epk = `,"epk":` + blocks[0].epk
		}
		before, after, _ := strings.Cut(f.context, `,"kver"`)
		protected = fmt.Sprintf(`{"alg":%q,"enc":"A256GCM"%s%s,"kid":%q,"kver"%s,"typ":"nitroseal+jwe","use":%q,"v":1}`,
			blocks[0].alg, epk, before, f.to[0].KID, after, f.use)
		keys = fmt.Sprintf(`"encrypted_key":%q`, blocks[0].block)
	} else {
		protected = fmt.Sprintf(`{"enc":"A256GCM"%s,"typ":"nitroseal+jwe","use":%q,"v":1}`, f.context, f.use)
		var elements []string
		for i, b := range blocks {
			if b.epk != "" {
				b.epk = `"epk":` + b.epk + `,`
			}
			header := fmt.Sprintf(`{"alg":%q,%s"kid":%q}`, b.alg, b.epk, f.to[i].KID)
			if f.header != nil {
				header = f.header(header)
			}
			elements = append(elements, fmt.Sprintf(`{"header":%s,"encrypted_key":%q}`, header, b.block))
		}
		keys = `"recipients":[` + strings.Join(elements, ",") + `]`
	}
	if f.protected != nil {
		protected = f.protected(protected)
	}

	plaintext := slices.Concat(referenceMAC(f.auth, f.macOver, f.payload), f.payload)
	block, err := aes.NewCipher(contentKey)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	iv := make([]byte, ivSize)
	rand.Read(iv)
	sealedText := gcm.Seal(nil, iv, plaintext, []byte(b64([]byte(protected))))
	split := len(sealedText) - tagSize
	return fmt.Appendf(nil, `{"protected":%q,%s,"iv":%q,"ciphertext":%q,"tag":%q}`,
		b64([]byte(protected)), keys, b64(iv), b64(sealedText[:split]), b64(sealedText[split:]))
}

// wrapForger forges what Seal makes of wrapContext without a caller's context.
func wrapForger(payload string, to ...party) forger {
	c := plainContext()
	return forger{
		context: `,"key":"prod","kver":3`, use: "wrap", to: to, auth: testAuth, macOver: c, payload: []byte(payload),
	}
}

func plainContext() Context { return Context{Use: UseWrap, Key: "prod", Version: 3} }

// referenceMAC is docs/envelope.md's HMAC, written anew.
func referenceMAC(key *AuthKey, c Context, payload []byte) []byte {
	mac := hmac.New(sha256.New, key[:])
	mac.Write(macInput(c, payload))
	return mac.Sum(nil)
}

// macInput is the input of that HMAC.
func macInput(c Context, payload []byte) []byte {
	var input []byte
	add := func(field []byte) {
		input = binary.BigEndian.AppendUint32(input, uint32(len(field)))
		input = append(input, field...)
	}
	add([]byte("nitroseal/envelope/v1"))
	add([]byte(c.Use))
	add([]byte(c.Key))
	add(binary.BigEndian.AppendUint64(nil, uint64(c.Version)))
	add([]byte(c.Cluster))
	add([]byte(c.Name))
	add(binary.BigEndian.AppendUint64(nil, c.Generation))
	add(c.Caller)
	add(payload)
	return input
}

// agreeAndWrap is the sender's side of ECDH-ES+A256KW.
func agreeAndWrap(t testing.TB, public *ecdh.PublicKey, contentKey []byte) ([]byte, *ecdh.PublicKey) {
	t.Helper()
	ephemeral, err := public.Curve().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	z, err := ephemeral.ECDH(public)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(concatKDF(z, "ECDH-ES+A256KW", "", "", 32))
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := josecipher.KeyWrap(block, contentKey)
	if err != nil {
		t.Fatal(err)
	}
	return wrapped, ephemeral.PublicKey()
}

func epkJSON(p *ecdh.PublicKey) string {
	point := p.Bytes()[1:]
	name := map[int]string{64: "P-256", 96: "P-384"}[len(point)]
	return fmt.Sprintf(`{"kty":"EC","crv":%q,"x":%q,"y":%q}`, name, b64(point[:len(point)/2]), b64(point[len(point)/2:]))
}

func b64(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }

func unb64(t testing.TB, s string) []byte {
	t.Helper()
	b, err := base64.RawURLEncoding.Strict().DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// member returns the text of a member of the envelope whose value is a string: the first one of that name.
func member(t testing.TB, raw []byte, name string) string {
	t.Helper()
	_, after, ok := strings.Cut(string(raw), `"`+name+`":"`)
	if !ok {
		t.Fatalf("no member %q", name)
	}
	value, _, _ := strings.Cut(after, `"`)
	return value
}

// withMember replaces the value of such a member.
func withMember(t testing.TB, raw []byte, name, value string) []byte {
	t.Helper()
	return []byte(strings.Replace(string(raw), `"`+name+`":"`+member(t, raw, name)+`"`, `"`+name+`":"`+value+`"`, 1))
}

// withProtected changes the text of the protected header, and nothing else: the tag no longer fits.
func withProtected(t testing.TB, raw []byte, change func(string) string) []byte {
	t.Helper()
	text := string(unb64(t, member(t, raw, "protected")))
	changed := change(text)
	if changed == text {
		t.Fatalf("the change changed nothing in %s", text)
	}
	return withMember(t, raw, "protected", b64([]byte(changed)))
}

// replace returns a change for withProtected and forger.
func replace(old, with string) func(string) string {
	return func(s string) string { return strings.Replace(s, old, with, 1) }
}

// ephemeral makes a public key on a curve.
func ephemeral(t testing.TB, curve string) *ecdh.PublicKey {
	t.Helper()
	c := map[string]ecdh.Curve{"P-256": ecdh.P256(), "P-384": ecdh.P384()}[curve]
	key, err := c.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key.PublicKey()
}

// withEPK returns a change that puts another epk in the place of the one that is there.
func withEPK(epk string) func(string) string {
	return func(header string) string {
		before, after, _ := strings.Cut(header, `"epk":`)
		_, after, _ = strings.Cut(after, `}`)
		return before + `"epk":` + epk + after
	}
}

// cutEPK removes epk.
func cutEPK(header string) string {
	before, after, _ := strings.Cut(header, `,"epk":`)
	_, after, _ = strings.Cut(after, `}`)
	return before + after
}

// forgeBlock encrypts any content key for an RSA party.
func forgeBlock(t testing.TB, to party, contentKey []byte) []byte {
	t.Helper()
	block, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, to.Public.(*rsa.PublicKey), contentKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	return block
}

// flip changes one bit of what a base64url text stands for.
func flip(t testing.TB, text string) string {
	t.Helper()
	b := unb64(t, text)
	b[len(b)/2] ^= 4
	return b64(b)
}
