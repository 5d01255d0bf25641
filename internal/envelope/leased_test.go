package envelope

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// testKEK is the KEK of the golden files and most tests. It guards nothing.
const testKEK = "a test KEK that guards nothing!!"

func leasedContext() Context { return Context{Use: UseTransit, Key: "prod", Version: 1} }

func kekBlock(t testing.TB, key string) cipher.Block {
	t.Helper()
	block, err := aes.NewCipher([]byte(key))
	if err != nil {
		t.Fatal(err)
	}
	return block
}

// sealKEK seals the test's KEK to some parties, for leasedContext.
func sealKEK(t testing.TB, to ...party) *KEK {
	t.Helper()
	kek, err := SealKEK("prod", 1, recipients(to), testAuth, []byte(testKEK))
	if err != nil {
		t.Fatal(err)
	}
	return kek
}

func sealLeased(t testing.TB, c Context, payload []byte, to ...party) []byte {
	t.Helper()
	raw, err := SealLeased(c, sealKEK(t, to...), kekBlock(t, testKEK), testAuth, payload)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func openLeased(t testing.TB, raw []byte, want Context) ([]byte, error) {
	t.Helper()
	e, err := Parse(raw)
	if err != nil {
		return nil, err
	}
	return e.OpenLeased(want, kekBlock(t, testKEK), testAuth)
}

// leasedGolden is a leased envelope that every later release must open, and the golden file of the KEK that it carries.
type leasedGolden struct {
	name, kek string
	caller    string
	to        []string
}

func leasedGoldens() []leasedGolden {
	return []leasedGolden{
		{name: "leased", kek: "kek", to: []string{rsa2048}},
		{name: "leased-ec", kek: "kek-ec", to: []string{ecP256}, caller: "caller's own\x00context"},
		{name: "leased-four", kek: "kek-four", to: testKeys},
	}
}

func (g leasedGolden) context() Context {
	c := leasedContext()
	if g.caller != "" {
		c.Caller = []byte(g.caller)
	}
	return c
}

func (g leasedGolden) path() string { return filepath.Join("testdata", "golden", g.name+".jwe") }

func (g leasedGolden) carried() golden {
	for _, candidate := range goldens() {
		if candidate.name == g.kek {
			return candidate
		}
	}
	return golden{}
}

func (g leasedGolden) seal(t testing.TB) []byte {
	t.Helper()
	kek, err := ParseKEK(g.carried().read(t))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := SealLeased(g.context(), kek, kekBlock(t, testKEK), testAuth, []byte("a test payload"))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func (g leasedGolden) read(t testing.TB) []byte {
	t.Helper()
	raw, err := os.ReadFile(g.path())
	if errors.Is(err, fs.ErrNotExist) && *update {
		raw = g.seal(t)
		err = os.WriteFile(g.path(), raw, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestLeasedGoldenFilesOpenForEver(t *testing.T) {
	for _, g := range leasedGoldens() {
		t.Run(g.name, func(t *testing.T) {
			raw := g.read(t)
			e, err := Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(g.context(), e.Context()); diff != "" {
				t.Errorf("context (-wanted +golden):\n%s", diff)
			}
			kek, err := e.KEK()
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(kek.Raw(), g.carried().read(t)) {
				t.Error("it carries another KEK")
			}
			for _, p := range g.carried().parties(t) { // with the HSM alone, by any of its keys
				key, err := kek.Envelope().Open(t.Context(), kek.Envelope().Context(), p.Recipient, p.key, testAuth)
				if err != nil || kek.Check(key) != nil {
					t.Fatalf("opening the KEK with %s: %v", p.KID, err)
				}
				payload, err := e.OpenLeased(g.context(), kekBlock(t, string(key)), testAuth)
				if err != nil || string(payload) != "a test payload" {
					t.Errorf("opened %q, %v", payload, err)
				}
			}
			if diff := cmp.Diff(form(t, raw), form(t, g.seal(t))); diff != "" {
				t.Errorf("sealed now it has another form (-golden +now):\n%s", diff)
			}
			if id, leased := e.KEKID(); !leased || id != KEKID([]byte(testKEK)) {
				t.Errorf("its KEK is %s, %v", id, leased)
			}
			if want := []RecipientID{{KID: kek.ID(), Algorithm: A256KW}}; cmp.Diff(want, e.Recipients()) != "" {
				t.Errorf("its recipients are %v", e.Recipients())
			}
		})
	}
}

func TestAnotherJOSELibraryOpensLeasedEnvelopes(t *testing.T) {
	key := fmt.Sprintf(`{"kty":"oct","k":%q}`, b64([]byte(testKEK)))
	var jobs []job
	for _, g := range leasedGoldens() {
		jobs = append(jobs, job{Do: "open", JWE: string(g.read(t)), Key: key}, job{Do: "open", JWE: string(g.seal(t)), Key: key})
	}
	for i, r := range jwcrypto(t, jobs) {
		g := leasedGoldens()[i/2]
		want := append(referenceMAC(testAuth, g.context(), []byte("a test payload")), "a test payload"...)
		if r.Plaintext != hex.EncodeToString(want) {
			t.Errorf("%s decrypts to %s, want %x", g.name, r.Plaintext, want)
		}
		if r.Thumbprint != KEKID([]byte(testKEK)) {
			t.Errorf("its thumbprint of the KEK is %s, ours %s", r.Thumbprint, KEKID([]byte(testKEK)))
		}
	}
}

func TestWhatAnotherJOSELibrarySealsInALeaseOpens(t *testing.T) {
	kek := sealKEK(t, load(t, rsa2048, ""))
	key := fmt.Sprintf(`{"kty":"oct","k":%q}`, b64([]byte(testKEK)))
	protected := fmt.Sprintf(`{"alg":"A256KW","enc":"A256GCM","kek":%q,"key":"prod","kid":%q,"kver":1,"typ":"nitroseal+jwe","use":"transit","v":1}`,
		b64(kek.Raw()), kek.ID())
	results := jwcrypto(t, []job{{
		Do: "seal", Protected: protected, Recipients: []recipient{{Key: key}},
		Plaintext: hex.EncodeToString(append(referenceMAC(testAuth, leasedContext(), []byte("payload")), "payload"...)),
	}})
	if payload, err := openLeased(t, []byte(results[0].Canonical), leasedContext()); err != nil || string(payload) != "payload" {
		t.Errorf("opened %q, %v", payload, err)
	}
}

// A KEK alone opens nothing that was not made with the authentication key, and the header says nothing that is not compared.
func TestALeasedEnvelopeOpensForWhatItWasMadeForAndNothingElse(t *testing.T) {
	own := load(t, ecP256, "")
	raw := sealLeased(t, leasedContext(), []byte("payload"), own)
	with := func(change func(*Context)) Context {
		c := leasedContext()
		change(&c)
		return c
	}
	for name, want := range map[string]Context{
		"another entrance":         with(func(c *Context) { c.Use = UseWrap }),
		"the seal plugin":          with(func(c *Context) { c.Use = UseSeal }),
		"the entrance of KEKs":     with(func(c *Context) { c.Use = UseKEK }),
		"another wrapping key":     with(func(c *Context) { c.Key = "other" }),
		"another version":          with(func(c *Context) { c.Version = 2 }),
		"another caller's context": with(func(c *Context) { c.Caller = []byte("x") }),
	} {
		if _, err := openLeased(t, raw, want); !errors.Is(err, ErrContext) {
			t.Errorf("%s: %v", name, err)
		}
	}
	e, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.OpenLeased(leasedContext(), kekBlock(t, strings.Repeat("x", 32)), testAuth); !errors.Is(err, ErrDecrypt) {
		t.Errorf("with another KEK: %v", err)
	}
	if _, err := e.OpenLeased(leasedContext(), kekBlock(t, testKEK), NewAuthKey()); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("with another authentication key: %v", err)
	}
	if _, err := e.OpenLeased(leasedContext(), kekBlock(t, testKEK), nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("without an authentication key: %v", err)
	}
	if payload, err := e.OpenLeasedUnauthenticated(leasedContext(), kekBlock(t, testKEK)); err != nil || string(payload) != "payload" {
		t.Errorf("for a recovery: %q, %v", payload, err)
	}
	if _, err := e.Open(t.Context(), leasedContext(), own.Recipient, own.key, testAuth); !errors.Is(err, ErrNotRecipient) || own.ops.count.Load() != 0 {
		t.Errorf("with the HSM key, by itself: %v, %d operations", err, own.ops.count.Load())
	}
	strict, err := Parse(mustSeal(t, leasedContext(), []byte("payload"), own))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := strict.OpenLeased(leasedContext(), kekBlock(t, testKEK), testAuth); !errors.Is(err, ErrNotRecipient) {
		t.Errorf("a strict envelope with a KEK: %v", err)
	}
	if _, err := strict.KEK(); !errors.Is(err, ErrInvalid) {
		t.Errorf("the KEK of a strict envelope: %v", err)
	}
}

// What is carried must be the KEK that the envelope is sealed to, of the same key and version.
func TestACarriedKEKOfSomethingElseIsRefused(t *testing.T) {
	own := load(t, rsa2048, "")
	raw := sealLeased(t, leasedContext(), []byte("payload"), own)
	carry := func(kek []byte) []byte {
		return withProtected(t, raw, replace(b64(sealedIn(t, raw)), b64(kek)))
	}
	kekOf := func(name string, version int, key []byte) []byte {
		kek, err := SealKEK(name, version, recipients([]party{own}), testAuth, key)
		if err != nil {
			t.Fatal(err)
		}
		return kek.Raw()
	}
	for name, test := range map[string]struct {
		kek  []byte
		want error
	}{
		"another key's":                  {kekOf("other", 1, []byte(testKEK)), ErrContext},
		"another version's":              {kekOf("prod", 2, []byte(testKEK)), ErrContext},
		"another one, whose kid differs": {kekOf("prod", 1, NewKEK()), ErrContext},
		"an authentication key":          {mustSeal(t, Context{Use: UseAuth, Key: "prod", Version: 1}, testAuth[:], own), ErrMalformed},
		"an envelope of transit":         {mustSeal(t, leasedContext(), []byte(testKEK), own), ErrMalformed},
		"a leased envelope":              {raw, ErrMalformed},
		"a KEK without its id":           {mustSeal(t, Context{Use: UseKEK, Key: "prod", Version: 1}, []byte(testKEK), own), ErrMalformed},
		"no envelope":                    {[]byte("x"), ErrMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			changed := carry(test.kek)
			e, err := Parse(changed)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := e.KEK(); !errors.Is(err, test.want) {
				t.Errorf("taking it out: %v, want %v", err, test.want)
			}
			if _, err := e.OpenLeased(leasedContext(), kekBlock(t, testKEK), testAuth); !errors.Is(err, ErrDecrypt) {
				t.Errorf("opening with a lease: %v", err)
			}
		})
	}
	kek, err := ParseKEK(kekOf("prod", 1, []byte(testKEK)))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range [][]byte{NewKEK(), nil, []byte(testKEK)[:31], []byte(testKEK + "x")} {
		if err := kek.Check(key); !errors.Is(err, ErrNotAuthentic) {
			t.Errorf("a key of %d bytes that is not the named one: %v", len(key), err)
		}
	}
	if kek.Check([]byte(testKEK)) != nil {
		t.Error("the named key is refused")
	}
}

// sealedIn returns the text of the KEK envelope that a leased envelope carries.
func sealedIn(t testing.TB, raw []byte) []byte {
	t.Helper()
	e, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return e.leased.kek
}

func TestA256KWIsRefusedAnywhereButInALease(t *testing.T) {
	own, ec := load(t, rsa2048, ""), load(t, ecP256, "")
	leased := sealLeased(t, leasedContext(), []byte("payload"), own)
	strict := mustSeal(t, leasedContext(), []byte("payload"), own)
	strictEC := mustSeal(t, leasedContext(), []byte("payload"), ec)
	general := mustSeal(t, leasedContext(), []byte("payload"), own, ec)
	kek := `"kek":"` + b64(sealedIn(t, leased)) + `",`
	header := func(raw []byte, old, with string) []byte { return withProtected(t, raw, replace(old, with)) }
	text := func(raw []byte, old, with string) []byte {
		changed := strings.Replace(string(raw), old, with, 1)
		if changed == string(raw) {
			t.Fatalf("%q changed nothing", old)
		}
		return []byte(changed)
	}
	wrapped := b64(make([]byte, wrappedKeySize))
	for name, raw := range map[string][]byte{
		"without a kek":                      header(leased, kek, ``),
		"an empty kek":                       header(leased, kek, `"kek":"",`),
		"a kek in another place":             header(header(leased, kek, ``), `"enc"`, kek+`"enc"`),
		"a kek with padding":                 header(leased, `","key"`, `=","key"`),
		"a kek with unused bits set":         header(leased, kek, `"kek":"QR",`),
		"a kek that is too long":             header(leased, kek, `"kek":"`+b64(make([]byte, MaxKEK+1))+`",`),
		"a kek twice":                        header(leased, kek, kek+kek),
		"a kek in capitals":                  header(leased, `"kek"`, `"KEK"`),
		"without a kid":                      header(leased, `"kid":"`+KEKID([]byte(testKEK))+`",`, ``),
		"with an epk":                        header(leased, `"enc":"A256GCM"`, `"enc":"A256GCM","epk":`+epkJSON(ephemeral(t, "P-256"))),
		"for use wrap":                       header(leased, `"use":"transit"`, `"use":"wrap"`),
		"for use seal":                       header(leased, `"use":"transit"`, `"use":"seal"`),
		"for use kek":                        header(leased, `"use":"transit"`, `"use":"kek"`),
		"for use auth":                       header(leased, `"use":"transit"`, `"use":"auth"`),
		"alg A128KW":                         header(leased, `A256KW`, `A128KW`),
		"alg A256GCMKW":                      header(leased, `A256KW`, `A256GCMKW`),
		"alg dir":                            header(leased, `A256KW`, `dir`),
		"alg RSA-OAEP-256 with a kek":        header(leased, `A256KW`, `RSA-OAEP-256`),
		"alg ECDH-ES+A256KW with a kek":      header(leased, `A256KW`, `ECDH-ES+A256KW`),
		"a strict RSA envelope with a kek":   header(strict, `"key"`, kek+`"key"`),
		"a strict EC envelope with a kek":    header(strictEC, `"key"`, kek+`"key"`),
		"a strict envelope that says A256KW": header(strict, `RSA-OAEP-256`, `A256KW`),
		"an EC envelope that says A256KW":    withProtected(t, header(strictEC, `ECDH-ES+A256KW`, `A256KW`), cutEPK),
		"A256KW among several recipients":    text(general, `"alg":"RSA-OAEP-256"`, `"alg":"A256KW"`),
		"a kek among several recipients":     header(general, `"key"`, kek+`"key"`),
		"a short encrypted_key":              withMember(t, leased, "encrypted_key", wrapped[:len(wrapped)-2]),
		"an encrypted_key of an RSA key":     withMember(t, leased, "encrypted_key", member(t, strict, "encrypted_key")),
		"a payload beyond 16 KiB":            withMember(t, leased, "ciphertext", b64(make([]byte, macSize+MaxLeasedPayload+1))),
		"a strict header beyond 8 KiB":       header(strict, `"key"`, `"ctx":"`+b64(make([]byte, maxProtected))+`","key"`),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Parse(raw); !errors.Is(err, ErrMalformed) {
				t.Errorf("parsing gave %v, want ErrMalformed", err)
			}
		})
	}
}

func TestSealLeasedRefusesWhatItCouldNotOpenAgain(t *testing.T) {
	own := load(t, rsa2048, "")
	good := leasedContext()
	with := func(change func(*Context)) Context {
		c := good
		change(&c)
		return c
	}
	for name, test := range map[string]struct {
		c       Context
		auth    *AuthKey
		payload int
		want    error
	}{
		"use wrap":                    {with(func(c *Context) { c.Use = UseWrap }), testAuth, 1, ErrInvalid},
		"use seal":                    {with(func(c *Context) { c.Use = UseSeal }), testAuth, 1, ErrInvalid},
		"another key than the KEK's":  {with(func(c *Context) { c.Key = "other" }), testAuth, 1, ErrInvalid},
		"another version":             {with(func(c *Context) { c.Version = 2 }), testAuth, 1, ErrInvalid},
		"a bad name":                  {with(func(c *Context) { c.Key = "" }), testAuth, 1, ErrInvalid},
		"no authentication key":       {good, nil, 1, ErrInvalid},
		"a zero authentication key":   {good, &AuthKey{}, 1, ErrInvalid},
		"a payload that is too long":  {good, testAuth, MaxLeasedPayload + 1, ErrTooLarge},
		"a context that is too long":  {with(func(c *Context) { c.Caller = make([]byte, MaxCaller+1) }), testAuth, 1, ErrTooLarge},
		"the largest of both is fine": {with(func(c *Context) { c.Caller = make([]byte, MaxCaller) }), testAuth, MaxLeasedPayload, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := SealLeased(test.c, sealKEK(t, own), kekBlock(t, testKEK), test.auth, make([]byte, test.payload))
			if !errors.Is(err, test.want) {
				t.Errorf("sealing gave %v, want %v", err, test.want)
			}
		})
	}
	for _, size := range []int{0, 16, 31, 33} {
		if _, err := SealKEK("prod", 1, recipients([]party{own}), testAuth, make([]byte, size)); !errors.Is(err, ErrInvalid) {
			t.Errorf("a KEK of %d bytes: %v", size, err)
		}
	}
}

func TestTheLargestLeasedEnvelopeFits(t *testing.T) {
	own := load(t, rsa2048, "")
	to := []Recipient{own.Recipient}
	for range MaxRecipients - 1 {
		n := make([]byte, MaxRSABits/8)
		rand.Read(n)
		n[0] |= 0x80
		n[len(n)-1] |= 1
		to = append(to, named(t, &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537}))
	}
	c := Context{Use: UseTransit, Key: strings.Repeat("k", MaxName), Version: 1<<31 - 1, Caller: bytes.Repeat([]byte{0xff}, MaxCaller)}
	kek, err := SealKEK(c.Key, c.Version, to, testAuth, []byte(testKEK))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := SealLeased(c, kek, kekBlock(t, testKEK), testAuth, make([]byte, MaxLeasedPayload))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d bytes, the KEK %d of %d", len(raw), MaxSize, len(kek.Raw()), MaxKEK)
	if payload, err := openLeased(t, raw, c); err != nil || len(payload) != MaxLeasedPayload {
		t.Errorf("opened %d bytes, %v", len(payload), err)
	}
}

func TestAnyLeasedContextAndPayloadComeBack(t *testing.T) {
	own := load(t, ecP256, "")
	rapid.Check(t, func(rt *rapid.T) {
		c := drawContext(rt)
		c = Context{Use: UseTransit, Key: c.Key, Version: c.Version, Caller: c.Caller}
		key := NewKEK()
		kek, err := SealKEK(c.Key, c.Version, recipients([]party{own}), testAuth, key)
		if err != nil {
			rt.Fatal(err)
		}
		payload := rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(rt, "payload")
		raw, err := SealLeased(c, kek, kekBlock(t, string(key)), testAuth, payload)
		if err != nil {
			rt.Fatal(err)
		}
		e, err := Parse(raw)
		if err != nil {
			rt.Fatal(err)
		}
		if diff := cmp.Diff(c, e.Context()); diff != "" {
			rt.Fatalf("context (-sealed +parsed):\n%s", diff)
		}
		opened, err := e.OpenLeased(c, kekBlock(t, string(key)), testAuth)
		if err != nil || !bytes.Equal(opened, payload) {
			rt.Fatalf("opened %x, %v; sealed %x", opened, err, payload)
		}
	})
}

// Every single bit: it does not open, whatever it claims.
func TestNoFlippedBitOfALeasedEnvelopeOpens(t *testing.T) {
	raw := leasedGoldens()[1].read(t)
	step := 1
	if testing.Short() {
		step = 97
	}
	for bit := 0; bit < 8*len(raw); bit += step {
		changed := bytes.Clone(raw)
		changed[bit/8] ^= 1 << (bit % 8)
		e, err := Parse(changed)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatalf("bit %d: %v", bit, err)
			}
			continue
		}
		if payload, err := e.OpenLeased(e.Context(), kekBlock(t, testKEK), testAuth); err == nil {
			t.Fatalf("bit %d: opened %q", bit, payload)
		}
	}
}

func TestEveryTruncationOfALeasedEnvelopeIsRefused(t *testing.T) {
	raw := leasedGoldens()[0].read(t)
	for n := range raw {
		if _, err := Parse(raw[:n]); !errors.Is(err, ErrMalformed) {
			t.Fatalf("the first %d bytes: %v, want ErrMalformed", n, err)
		}
	}
}

// FuzzParseLeased: what parses has a KEK that is refused or whole, and what opens was sealed.
func FuzzParseLeased(f *testing.F) {
	for _, g := range leasedGoldens() {
		raw := g.read(f)
		f.Add(raw)
		f.Add(withMember(f, raw, "tag", flip(f, member(f, raw, "tag"))))
		f.Add(g.carried().read(f))
	}
	block := kekBlock(f, testKEK)
	f.Fuzz(func(t *testing.T, raw []byte) {
		if kek, err := ParseKEK(raw); err == nil {
			again, err := ParseKEK(kek.Raw())
			if err != nil || again.ID() != kek.ID() {
				t.Fatalf("parsed again it is %v, %v", again, err)
			}
		} else if !errors.Is(err, ErrMalformed) {
			t.Fatalf("parsing a KEK gave %v", err)
		}
		e, err := Parse(raw)
		if err != nil {
			return
		}
		if _, leased := e.KEKID(); !leased {
			if _, err := e.KEK(); !errors.Is(err, ErrInvalid) {
				t.Fatalf("the KEK of a strict envelope: %v", err)
			}
			return
		}
		if e.Context().Use != UseTransit || len(e.Recipients()) != 1 {
			t.Fatalf("a leased envelope of %+v to %v", e.Context(), e.Recipients())
		}
		if kek, err := e.KEK(); err == nil {
			if id, _ := e.KEKID(); kek.ID() != id {
				t.Fatalf("it is sealed to %s and carries %s", id, kek.ID())
			}
		} else if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrContext) {
			t.Fatalf("its KEK: %v", err)
		}
		if payload, err := e.OpenLeased(e.Context(), block, testAuth); err == nil && string(payload) != "a test payload" {
			t.Fatalf("it opened to %q", payload)
		}
	})
}
