package envelope

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

func TestAnErrorOfTheHSMComesThroughGoJose(t *testing.T) {
	pin := &hsm.PINError{TriesLeft: 1, Detail: "a wrong PIN"}
	for _, name := range []string{rsa2048, ecP256} {
		for _, want := range []error{hsm.ErrUnavailable, hsm.ErrLocked, hsm.ErrUnsupported, pin, context.Canceled} {
			t.Run(fmt.Sprintf("%s %v", name, want), func(t *testing.T) {
				own := load(t, name, "")
				raw := mustSeal(t, wrapContext(), []byte("payload"), own, load(t, rsa3072, ""))
				own.ops.err = fmt.Errorf("CKR_SOMETHING: %w", want)
				_, err := open(t, raw, wrapContext(), own)
				if !errors.Is(err, want) || errors.Is(err, ErrDecrypt) {
					t.Errorf("opening gave %v, want %v", err, want)
				}
				if !strings.Contains(err.Error(), "CKR_SOMETHING") {
					t.Errorf("the HSM's own code is lost in %v", err)
				}
				var pinErr *hsm.PINError
				if errors.As(want, &pinErr) && (!errors.As(err, &pinErr) || pinErr != pin) {
					t.Errorf("the PIN error is lost in %v", err)
				}
				if n := own.ops.count.Load(); n != 1 {
					t.Errorf("%d HSM operations, want 1", n)
				}
			})
		}
	}
}

func TestAContextThatEndedCostsNoOperation(t *testing.T) {
	own := load(t, rsa2048, "")
	e, err := Parse(mustSeal(t, wrapContext(), []byte("payload"), own))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := e.Open(ctx, wrapContext(), own.Recipient, own.key, testAuth); !errors.Is(err, context.Canceled) {
		t.Errorf("opening gave %v, want context.Canceled", err)
	}
	if n := own.ops.count.Load(); n != 0 {
		t.Errorf("%d HSM operations, want 0", n)
	}
}

func TestADeadlineDuringTheOperationIsSeenBesideTheHSMsError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the deadline does not come before the operation has begun
		own := load(t, rsa2048, "")
		e, err := Parse(mustSeal(t, wrapContext(), []byte("payload"), own))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		key := &waiting{Decrypter: own.key.(hsm.Decrypter), err: hsm.ErrUnavailable}
		_, err = e.Open(ctx, wrapContext(), own.Recipient, key, testAuth)
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("opening gave %v, want both DeadlineExceeded and ErrUnavailable", err)
		}
	})
}

// waiting is a key whose HSM answers with err when ctx ends.
type waiting struct {
	hsm.Decrypter
	err error
}

func (k *waiting) DecryptOAEP(ctx context.Context, _ crypto.Hash, _ []byte) ([]byte, error) {
	<-ctx.Done()
	return nil, k.err
}

func TestAKeyThatDoesNotFitIsNotUsed(t *testing.T) {
	own, sha1Only := load(t, rsa2048, ""), load(t, rsa2048, "")
	sha1Only.key.(*softRSA).hashes = []crypto.Hash{crypto.SHA1}
	other, ec := load(t, rsa3072, ""), load(t, ecP256, "")
	raw := mustSeal(t, wrapContext(), []byte("payload"), own, ec)
	for name, tc := range map[string]struct {
		recipient Recipient
		key       hsm.Key
		auth      *AuthKey
		want      error
	}{
		"another key under the recorded name":    {own.Recipient, other.key, testAuth, hsm.ErrKeyChanged},
		"an EC key under the RSA key's name":     {own.Recipient, ec.key, testAuth, hsm.ErrKeyChanged},
		"a token that does SHA-1 only":           {sha1Only.Recipient, sha1Only.key, testAuth, hsm.ErrUnsupported},
		"a key that cannot decrypt":              {own.Recipient, idle{own.key}, testAuth, hsm.ErrUnsupported},
		"a key that cannot agree":                {ec.Recipient, idle{ec.key}, testAuth, hsm.ErrUnsupported},
		"a record of a key that is no recipient": {other.Recipient, other.key, testAuth, ErrNotRecipient},
		"a record whose kid is another's":        {Recipient{KID: own.KID, Algorithm: RSAOAEP256, Public: other.Public}, own.key, testAuth, ErrInvalid},
		"a record without a public key":          {Recipient{KID: own.KID, Algorithm: RSAOAEP256}, own.key, testAuth, ErrInvalid},
		"a record with a foreign algorithm":      {Recipient{KID: own.KID, Algorithm: ECDHESA256KW, Public: own.Public}, own.key, testAuth, ErrInvalid},
		"no authentication key":                  {own.Recipient, own.key, nil, ErrInvalid},
		"an authentication key nobody set":       {own.Recipient, own.key, &AuthKey{}, ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			e, err := Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := e.Open(t.Context(), wrapContext(), tc.recipient, tc.key, tc.auth); !errors.Is(err, tc.want) {
				t.Errorf("opening gave %v, want %v", err, tc.want)
			}
			for _, p := range []party{own, sha1Only, other, ec} {
				if n := p.ops.count.Load(); n != 0 {
					t.Errorf("%d HSM operations, want 0", n)
				}
			}
		})
	}
}

// idle is a key that can do nothing.
type idle struct{ hsm.Key }

func TestASharedSecretOfTheWrongSizeIsAnErrorOfTheHSM(t *testing.T) {
	own := load(t, ecP256, "")
	raw := mustSeal(t, wrapContext(), []byte("payload"), own)
	own.key = shortAgreer{own.key.(hsm.Agreer)}
	if _, err := open(t, raw, wrapContext(), own); err == nil || errors.Is(err, ErrDecrypt) {
		t.Errorf("opening gave %v", err)
	}
}

type shortAgreer struct{ hsm.Agreer }

func (k shortAgreer) Agree(context.Context, *ecdh.PublicKey) ([]byte, error) {
	return make([]byte, 31), nil
}

func TestTheContentKeyAndTheMACAreWiped(t *testing.T) {
	own := load(t, rsa2048, "")
	key := &remembering{Decrypter: own.key.(hsm.Decrypter)}
	raw := mustSeal(t, wrapContext(), []byte("payload"), own)
	e, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	payload, err := e.Open(t.Context(), wrapContext(), own.Recipient, key, testAuth)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(key.contentKey, make([]byte, contentKeySize)) {
		t.Error("the content key is still in memory")
	}
	if len(payload) != len("payload") {
		t.Errorf("the payload has %d bytes", len(payload))
	}
}

// remembering keeps what it returned.
type remembering struct {
	hsm.Decrypter
	contentKey []byte
}

func (k *remembering) DecryptOAEP(ctx context.Context, hash crypto.Hash, block []byte) ([]byte, error) {
	var err error
	k.contentKey, err = k.Decrypter.DecryptOAEP(ctx, hash, block)
	return k.contentKey, err
}

func TestTheAuthenticationKeysOwnEnvelope(t *testing.T) {
	own := load(t, rsa2048, "")
	c := Context{Use: UseAuth, Key: "prod", Version: 1}
	raw, err := Seal(c, []Recipient{own.Recipient}, nil, testAuth[:])
	if err != nil {
		t.Fatal(err)
	}
	e, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	for name, auth := range map[string]*AuthKey{"without knowing it": nil, "knowing it": testAuth} {
		payload, err := e.Open(t.Context(), c, own.Recipient, own.key, auth)
		if err != nil || !bytes.Equal(payload, testAuth[:]) {
			t.Errorf("opening %s gave %v", name, err)
		}
	}
	if _, err := e.Open(t.Context(), c, own.Recipient, own.key, NewAuthKey()); !errors.Is(err, ErrNotAuthentic) {
		t.Errorf("opening with another key in mind gave %v, want ErrNotAuthentic", err)
	}
	for name, payload := range map[string][]byte{"31 bytes": make([]byte, 31), "33 bytes": make([]byte, 33), "zeros": make([]byte, 32)} {
		if _, err := Seal(c, []Recipient{own.Recipient}, nil, payload); !errors.Is(err, ErrInvalid) {
			t.Errorf("sealing %s gave %v, want ErrInvalid", name, err)
		}
	}
	if _, err := Seal(c, []Recipient{own.Recipient}, NewAuthKey(), testAuth[:]); !errors.Is(err, ErrInvalid) {
		t.Errorf("sealing another key than the one given: %v, want ErrInvalid", err)
	}
	forged := forge(t, forger{
		context: `,"key":"prod","kver":1`, use: "auth", to: []party{own}, auth: testAuth, macOver: c, payload: make([]byte, 31),
	})
	refuse(t, forged, c, own, nil, ErrMalformed, 0)
	zero := forge(t, forger{
		context: `,"key":"prod","kver":1`, use: "auth", to: []party{own}, auth: &AuthKey{}, macOver: c, payload: make([]byte, 32),
	})
	refuse(t, zero, c, own, nil, ErrNotAuthentic, 1)
}

func TestSealRefusesWhatItCouldNotOpenAgain(t *testing.T) {
	own, ec := load(t, rsa2048, "").Recipient, load(t, ecP256, "").Recipient
	good := wrapContext()
	with := func(change func(*Context)) Context {
		c := good
		change(&c)
		return c
	}
	weak := weakRSA(t, 1024)
	huge := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 8192, 1), E: 65537}
	for name, tc := range map[string]struct {
		c    Context
		to   []Recipient
		auth *AuthKey
		want error
	}{
		"no use":                      {with(func(c *Context) { c.Use = "" }), []Recipient{own}, testAuth, ErrInvalid},
		"an unknown use":              {with(func(c *Context) { c.Use = "sign" }), []Recipient{own}, testAuth, ErrInvalid},
		"no key name":                 {with(func(c *Context) { c.Key = "" }), []Recipient{own}, testAuth, ErrInvalid},
		"a key name with a quote":     {with(func(c *Context) { c.Key = `a"b` }), []Recipient{own}, testAuth, ErrInvalid},
		"a key name with an accent":   {with(func(c *Context) { c.Key = "pród" }), []Recipient{own}, testAuth, ErrInvalid},
		"a key name that is too long": {with(func(c *Context) { c.Key = strings.Repeat("k", MaxName+1) }), []Recipient{own}, testAuth, ErrInvalid},
		"key version 0":               {with(func(c *Context) { c.Version = 0 }), []Recipient{own}, testAuth, ErrInvalid},
		"key version -1":              {with(func(c *Context) { c.Version = -1 }), []Recipient{own}, testAuth, ErrInvalid},
		"key version 2³¹":             {with(func(c *Context) { c.Version = 1 << 31 }), []Recipient{own}, testAuth, ErrInvalid},
		"a generation without material": {
			with(func(c *Context) { c.Generation = 1 }), []Recipient{own}, testAuth, ErrInvalid,
		},
		"material without a cluster": {
			Context{Use: UseMaterial, Key: "k", Version: 1, Name: "n", Generation: 1}, []Recipient{own}, testAuth, ErrInvalid,
		},
		"material without a name": {
			Context{Use: UseMaterial, Key: "k", Version: 1, Cluster: "c", Generation: 1}, []Recipient{own}, testAuth, ErrInvalid,
		},
		"material without a generation": {
			Context{Use: UseMaterial, Key: "k", Version: 1, Cluster: "c", Name: "n"}, []Recipient{own}, testAuth, ErrInvalid,
		},
		"generation 2⁵³": {
			Context{Use: UseMaterial, Key: "k", Version: 1, Cluster: "c", Name: "n", Generation: 1 << 53},
			[]Recipient{own},
			testAuth, ErrInvalid,
		},
		"a caller's context that is too long": {
			with(func(c *Context) { c.Caller = make([]byte, MaxCaller+1) }), []Recipient{own}, testAuth, ErrTooLarge,
		},
		"no recipient":              {good, nil, testAuth, ErrInvalid},
		"a recipient twice":         {good, []Recipient{own, ec, own}, testAuth, ErrInvalid},
		"no public key":             {good, []Recipient{{KID: own.KID, Algorithm: RSAOAEP256}}, testAuth, ErrInvalid},
		"another's kid":             {good, []Recipient{{KID: ec.KID, Algorithm: RSAOAEP256, Public: own.Public}}, testAuth, ErrInvalid},
		"no algorithm":              {good, []Recipient{{KID: own.KID, Public: own.Public}}, testAuth, ErrInvalid},
		"an RSA key with ECDH":      {good, []Recipient{{KID: own.KID, Algorithm: ECDHESA256KW, Public: own.Public}}, testAuth, ErrInvalid},
		"an EC key with RSA":        {good, []Recipient{{KID: ec.KID, Algorithm: RSAOAEP, Public: ec.Public}}, testAuth, ErrInvalid},
		"an RSA key of 1024 bits":   {good, []Recipient{named(t, weak)}, testAuth, ErrInvalid},
		"an RSA key of 8193 bits":   {good, []Recipient{named(t, huge)}, testAuth, ErrInvalid},
		"an X25519 key":             {good, []Recipient{{KID: own.KID, Algorithm: ECDHESA256KW, Public: x25519(t)}}, testAuth, ErrInvalid},
		"no authentication key":     {good, []Recipient{own}, nil, ErrInvalid},
		"a zero authentication key": {good, []Recipient{own}, &AuthKey{}, ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Seal(tc.c, tc.to, tc.auth, []byte("payload")); !errors.Is(err, tc.want) {
				t.Errorf("sealing gave %v, want %v", err, tc.want)
			}
		})
	}
}

func TestSeventeenRecipientsAreTooMany(t *testing.T) {
	var to []Recipient
	for range MaxRecipients + 1 {
		to = append(to, named(t, ephemeral(t, "P-256")))
	}
	if _, err := Seal(wrapContext(), to, testAuth, nil); !errors.Is(err, ErrInvalid) {
		t.Errorf("sealing to %d gave %v, want ErrInvalid", len(to), err)
	}
	if _, err := Seal(wrapContext(), to[1:], testAuth, nil); err != nil {
		t.Errorf("sealing to %d: %v", MaxRecipients, err)
	}
}

// The largest envelope must stay below MaxSize, which is what every store takes.
func TestTheLargestEnvelopeFits(t *testing.T) {
	own := load(t, rsa2048, "")
	c := Context{
		Use: UseMaterial, Key: strings.Repeat("k", MaxName), Version: 1<<31 - 1, Cluster: strings.Repeat("c", MaxName),
		Name: strings.Repeat("n", MaxName), Generation: maxGeneration, Caller: bytes.Repeat([]byte{0xff}, MaxCaller),
	}
	to := []Recipient{own.Recipient}
	for range MaxRecipients - 1 {
		n := make([]byte, MaxRSABits/8)
		rand.Read(n)
		n[0] |= 0x80
		n[len(n)-1] |= 1
		to = append(to, named(t, &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: 65537}))
	}
	payload := bytes.Repeat([]byte{0xff}, MaxPayload)
	raw, err := Seal(c, to, testAuth, payload)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d of %d bytes", len(raw), MaxSize)
	opened, err := open(t, raw, c, own)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(opened, payload) {
		t.Error("another payload came out")
	}
}

func TestAnEmptyPayloadOpens(t *testing.T) {
	own := load(t, rsa2048, "")
	payload, err := open(t, mustSeal(t, wrapContext(), nil, own), wrapContext(), own)
	if err != nil || len(payload) != 0 {
		t.Errorf("opening gave %q, %v", payload, err)
	}
}

func TestAnAuthenticationKeyIsNotPrinted(t *testing.T) {
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		for _, value := range []any{*testAuth, testAuth, struct{ Key AuthKey }{*testAuth}} {
			if text := fmt.Sprintf(format, value); strings.Contains(text, "guards") || strings.Contains(text, "0x67") || strings.Contains(text, "103") {
				t.Errorf("%s of %T prints the key: %s", format, value, text)
			}
		}
	}
	if one, other := NewAuthKey(), NewAuthKey(); *one == *other {
		t.Error("two new authentication keys are equal")
	}
}

// named makes a recipient of a public key.
func named(t testing.TB, public crypto.PublicKey) Recipient {
	t.Helper()
	kid, err := hsm.Fingerprint(public)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := public.(*ecdh.PublicKey); ok {
		return Recipient{KID: kid, Algorithm: ECDHESA256KW, Public: public}
	}
	return Recipient{KID: kid, Algorithm: RSAOAEP256, Public: public}
}

// weakRSA makes a modulus that looks like one of a weak key.
func weakRSA(t testing.TB, bits int) *rsa.PublicKey {
	t.Helper()
	n, err := rand.Prime(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return &rsa.PublicKey{N: n, E: 65537}
}

func x25519(t testing.TB) *ecdh.PublicKey {
	t.Helper()
	key, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key.PublicKey()
}
