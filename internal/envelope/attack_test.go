package envelope

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"vault-plugin-secrets-nitrokey/hsm"
)

// refuse opens raw and checks the error and the number of HSM operations that it took.
func refuse(t *testing.T, raw []byte, want Context, with party, auth *AuthKey, target error, operations int64) {
	t.Helper()
	e, err := Parse(raw)
	before := with.ops.count.Load()
	var payload []byte
	if err == nil {
		payload, err = e.Open(t.Context(), want, with.Recipient, with.key, auth)
	}
	if !errors.Is(err, target) {
		t.Errorf("opening gave %v, want %v", err, target)
	}
	if payload != nil {
		t.Errorf("a refused envelope gave the payload %q", payload)
	}
	if spent := with.ops.count.Load() - before; spent != operations {
		t.Errorf("it took %d HSM operations, want %d", spent, operations)
	}
}

func TestTheForgerOfTheseTestsForgesWell(t *testing.T) {
	for _, names := range [][]string{{rsa2048}, {ecP256}, {ecP384}, testKeys} {
		var to []party
		for _, name := range names {
			to = append(to, load(t, name, ""))
		}
		raw := forge(t, wrapForger("payload", to...))
		for _, p := range to {
			if payload, err := open(t, raw, plainContext(), p); err != nil || string(payload) != "payload" {
				t.Errorf("with the authentication key a forgery is no forgery: %q, %v", payload, err)
			}
		}
	}
}

func TestAnEnvelopeForgedWithThePublicKeyAloneIsNotAuthentic(t *testing.T) {
	own := load(t, rsa2048, "")
	for name, key := range map[string]*AuthKey{
		"guessed key":             NewAuthKey(),
		"zero key":                {},
		"another version's key":   {1, 2, 3},
		"the payload as its key?": (*AuthKey)([]byte("0123456789abcdef0123456789abcdef")),
	} {
		t.Run(name, func(t *testing.T) {
			f := wrapForger("0123456789abcdef0123456789abcdef", own)
			f.auth = key
			refuse(t, forge(t, f), plainContext(), own, testAuth, ErrNotAuthentic, 1)
		})
	}
}

func TestAnEnvelopeOfAnotherVersionsAuthenticationKeyIsNotAuthentic(t *testing.T) {
	own := load(t, rsa2048, "")
	raw, err := Seal(wrapContext(), []Recipient{own.Recipient}, NewAuthKey(), []byte("payload"))
	if err != nil {
		t.Fatal(err)
	}
	refuse(t, raw, wrapContext(), own, testAuth, ErrNotAuthentic, 1)
}

func TestOpenUnauthenticatedOpensAForgery(t *testing.T) {
	own := load(t, rsa2048, "")
	f := wrapForger("payload", own)
	f.auth = NewAuthKey()
	e, err := Parse(forge(t, f))
	if err != nil {
		t.Fatal(err)
	}
	payload, err := e.OpenUnauthenticated(t.Context(), plainContext(), own.Recipient, own.key)
	if err != nil || string(payload) != "payload" {
		t.Errorf("opening without authentication gave %q, %v", payload, err)
	}
	if _, err := e.OpenUnauthenticated(t.Context(), wrapContext(), own.Recipient, own.key); !errors.Is(err, ErrContext) {
		t.Errorf("opening without authentication for another context gave %v", err)
	}
}

func TestAnEnvelopeOpensForNothingButItsContext(t *testing.T) {
	own := load(t, rsa2048, "")
	c := materialContext()
	c.Caller = []byte("caller")
	raw := mustSeal(t, c, []byte("payload"), own)
	for field, change := range map[string]func(*Context){
		"use": func(c *Context) { c.Use, c.Cluster, c.Name, c.Generation = UseWrap, "", "", 0 },

		"wrapping key":         func(c *Context) { c.Key = "test" },
		"wrapping key version": func(c *Context) { c.Version-- },
		"cluster":              func(c *Context) { c.Cluster = "vault-us" },
		"name":                 func(c *Context) { c.Name = "root-token" },
		"generation":           func(c *Context) { c.Generation++ },
		"caller's context":     func(c *Context) { c.Caller = []byte("Caller") },
	} {
		t.Run(field, func(t *testing.T) {
			want := c
			change(&want)
			refuse(t, raw, want, own, testAuth, ErrContext, 0)
			_, err := open(t, raw, want, own)
			var contextErr *ContextError
			if !errors.As(err, &contextErr) || contextErr.Field != field {
				t.Errorf("the error %v does not name the field %q", err, field)
			}
			var asked *ContextError
			if !errors.As(c.Differs(want), &asked) || *asked != *contextErr {
				t.Errorf("asked before, the answer is %v, and opening says %v", asked, contextErr)
			}
			if strings.Contains(strings.ToLower(err.Error()), `"caller"`) {
				t.Errorf("the error shows the caller's context: %v", err)
			}
		})
	}
	if err := c.Differs(c); err != nil {
		t.Errorf("a context differs from itself: %v", err)
	}
	want := c
	want.Caller = nil
	refuse(t, raw, want, own, testAuth, ErrContext, 0)
}

func TestEveryUseOpensAtItsOwnEntranceOnly(t *testing.T) {
	own := load(t, rsa2048, "")
	at := func(use Use) Context {
		c := Context{Use: use, Key: "prod", Version: 1}
		if use == UseMaterial {
			c.Cluster, c.Name, c.Generation = "vault-eu", "unseal-keys", 1
		}
		return c
	}
	for _, made := range Uses() {
		raw := mustSeal(t, at(made), testAuth[:], own)
		for _, entrance := range Uses() {
			t.Run(fmt.Sprintf("%s at %s", made, entrance), func(t *testing.T) {
				if made != entrance {
					refuse(t, raw, at(entrance), own, testAuth, ErrContext, 0)
					return
				}
				if payload, err := open(t, raw, at(entrance), own); err != nil || !bytes.Equal(payload, testAuth[:]) {
					t.Errorf("its own entrance gave %v", err)
				}
			})
		}
	}
}

// Whoever can write the store rewrites what the envelope claims: the tag of the content covers it.
func TestAnEnvelopeRewrittenForAnotherContextDoesNotDecrypt(t *testing.T) {
	own, other := load(t, rsa2048, ""), load(t, ecP256, "")
	for _, to := range [][]party{{own}, {own, other}} {
		raw := mustSeal(t, materialContext(), []byte("payload"), to...)
		for _, change := range []struct {
			old, with string
			want      func(*Context)
		}{
			{`"name":"unseal-keys"`, `"name":"root-token"`, func(c *Context) { c.Name = "root-token" }},
			{`"cluster":"vault-eu"`, `"cluster":"vault-us"`, func(c *Context) { c.Cluster = "vault-us" }},
			{`"gen":7`, `"gen":8`, func(c *Context) { c.Generation = 8 }},
			{`"kver":3`, `"kver":4`, func(c *Context) { c.Version = 4 }},
			{`"key":"prod"`, `"key":"test"`, func(c *Context) { c.Key = "test" }},
		} {
			t.Run(fmt.Sprintf("%s with %d recipients", change.with, len(to)), func(t *testing.T) {
				want := materialContext()
				change.want(&want)
				refuse(t, withProtected(t, raw, replace(change.old, change.with)), want, own, testAuth, ErrDecrypt, 1)
			})
		}
	}
}

// Whoever knows the content key (an HSM's former holder) can seal the same plaintext anew for another context: the
// HMAC covers that.
func TestAPlaintextMovedIntoAnotherContextIsNotAuthentic(t *testing.T) {
	own := load(t, rsa2048, "")
	f := wrapForger("payload", own)
	f.macOver.Version = 2
	refuse(t, forge(t, f), plainContext(), own, testAuth, ErrNotAuthentic, 1)
	f = wrapForger("payload", own)
	f.macOver.Use = UseTransit
	refuse(t, forge(t, f), plainContext(), own, testAuth, ErrNotAuthentic, 1)
}

func TestAContextSmuggledIntoAnUnprotectedHeaderIsRefused(t *testing.T) {
	own, other := load(t, rsa2048, ""), load(t, ecP256, "")
	smuggled := replace(`"kid"`, `"key":"prod","kid"`)
	f := wrapForger("payload", own, other)
	f.header = smuggled
	refuse(t, forge(t, f), plainContext(), own, testAuth, ErrMalformed, 0)

	// What go-jose itself would merge: the protected header lacks the use, the recipients' headers bring it.
	f = wrapForger("payload", own, other)
	f.protected = replace(`"use":"wrap",`, ``)
	f.header = replace(`}`, `,"use":"wrap"}`)
	refuse(t, forge(t, f), plainContext(), own, testAuth, ErrMalformed, 0)

	one := string(forge(t, wrapForger("payload", own)))
	refuse(t, []byte(strings.Replace(one, `,"iv"`, `,"unprotected":{"use":"wrap"},"iv"`, 1)), plainContext(), own, testAuth, ErrMalformed, 0)
	refuse(t, []byte(strings.Replace(one, `,"encrypted_key"`, `,"header":{"use":"wrap"},"encrypted_key"`, 1)),
		plainContext(), own, testAuth, ErrMalformed, 0)
}

func TestAContextTwiceInTheProtectedHeaderIsRefused(t *testing.T) {
	own := load(t, rsa2048, "")
	for _, change := range []func(string) string{
		replace(`"use":"wrap"`, `"use":"wrap","use":"material"`),
		replace(`"use":"wrap"`, `"use":"material","use":"wrap"`),
		replace(`"use":"wrap"`, `"use":"wrap","Use":"material"`),
		replace(`"key":"prod"`, `"key":"prod","key":"test"`),
	} {
		f := wrapForger("payload", own)
		f.protected = change
		refuse(t, forge(t, f), plainContext(), own, testAuth, ErrMalformed, 0)
	}
}

func TestSixteenRecipientsWithOurKidCostNoOperation(t *testing.T) {
	own := load(t, rsa2048, "")
	f := wrapForger("payload", slices.Repeat([]party{own}, MaxRecipients)...)
	refuse(t, forge(t, f), plainContext(), own, testAuth, ErrMalformed, 0)
}

// The parser refuses such an envelope. If it ever did not, the HSM would still be asked once.
func TestTheUnwrapperAnswersOnceAndForItsOwnKidOnly(t *testing.T) {
	own, other := load(t, rsa2048, ""), load(t, rsa3072, "")
	f := wrapForger("payload", slices.Repeat([]party{own}, MaxRecipients)...)
	f.block = func(_ []byte, to party) []byte { return make([]byte, to.key.(*softRSA).private.Size()) } // none decrypts
	raw := string(forge(t, f))
	u := &unwrapper{
		ctx:    t.Context(),
		stanza: stanza{RecipientID: RecipientID{KID: own.KID, Algorithm: own.Algorithm}},
		operation: func(ctx context.Context) ([]byte, error) {
			return own.key.(hsm.Decrypter).DecryptOAEP(ctx, crypto.SHA256, make([]byte, 256))
		},
	}
	jwe, err := jose.ParseEncryptedJSON(raw, []jose.KeyAlgorithm{jose.RSA_OAEP_256}, []jose.ContentEncryption{jose.A256GCM})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := jwe.DecryptMulti(u); err == nil {
		t.Fatal("an envelope without a content key opened")
	}
	if n := own.ops.count.Load(); n != 1 {
		t.Errorf("%d HSM operations, want 1", n)
	}

	u.spent = false
	for _, header := range []jose.Header{
		{KeyID: other.KID, Algorithm: string(RSAOAEP256)},
		{KeyID: own.KID, Algorithm: string(RSAOAEP)},
		{KeyID: own.KID, Algorithm: "dir"},
		{},
	} {
		if _, err := u.DecryptKey(nil, header); err == nil {
			t.Errorf("it answered for %+v", header)
		}
	}
	if n := own.ops.count.Load(); n != 1 {
		t.Errorf("%d HSM operations after foreign headers, want 1", n)
	}
}

func TestRecipientsOfOthersCostNoOperation(t *testing.T) {
	own := load(t, rsa2048, "")
	others := []party{load(t, rsa3072, ""), load(t, ecP256, ""), load(t, ecP384, "")}
	raw := mustSeal(t, wrapContext(), []byte("payload"), append(slices.Clone(others), own)...)
	if _, err := open(t, raw, wrapContext(), own); err != nil {
		t.Fatal(err)
	}
	for _, other := range others {
		if n := other.ops.count.Load(); n != 0 {
			t.Errorf("another recipient's key was used %d times", n)
		}
	}
	if n := own.ops.count.Load(); n != 1 {
		t.Errorf("%d HSM operations, want 1", n)
	}
	refuse(t, mustSeal(t, wrapContext(), []byte("payload"), others...), wrapContext(), own, testAuth, ErrNotRecipient, 0)
}

func TestAnotherAlgorithmThanTheRecordedOneIsRefused(t *testing.T) {
	sha1Key, sha256Key := load(t, rsa2048, RSAOAEP), load(t, rsa2048, RSAOAEP256)
	refuse(t, mustSeal(t, wrapContext(), []byte("payload"), sha1Key), wrapContext(), sha256Key, testAuth, ErrNotRecipient, 0)
	refuse(t, mustSeal(t, wrapContext(), []byte("payload"), sha256Key), wrapContext(), sha1Key, testAuth, ErrNotRecipient, 0)

	// Sealed with SHA-1, labelled as SHA-256: the block does not decrypt.
	f := wrapForger("payload", sha1Key)
	f.claimAlg = RSAOAEP256
	refuse(t, forge(t, f), plainContext(), sha256Key, testAuth, ErrDecrypt, 1)

	// An EC key's kid with an RSA algorithm, and the other way round.
	ec := load(t, ecP256, "")
	f = wrapForger("payload", sha256Key)
	f.claimAlg = ECDHESA256KW
	refuse(t, forge(t, f), plainContext(), sha256Key, testAuth, ErrMalformed, 0)
	f = wrapForger("payload", ec)
	f.claimAlg = RSAOAEP256
	refuse(t, forge(t, f), plainContext(), ec, testAuth, ErrMalformed, 0)
}

func TestAlgorithmsThatNeedNoHSMAreRefused(t *testing.T) {
	own := load(t, rsa2048, "")
	for _, alg := range []Algorithm{
		"dir", "A128KW", "A256KW", "A256GCMKW", "PBES2-HS256+A128KW", "PBES2-HS512+A256KW", "RSA1_5", "ECDH-ES", "none", "",
	} {
		t.Run(string(alg), func(t *testing.T) {
			f := wrapForger("payload", own)
			f.claimAlg = alg
			if alg == "" {
				f.claimAlg, f.protected = "", replace(`"alg":"RSA-OAEP-256"`, `"alg":""`)
			}
			refuse(t, forge(t, f), plainContext(), own, testAuth, ErrMalformed, 0)
		})
	}
}

func TestAnEPKThatIsNoPointNeverReachesTheHSM(t *testing.T) {
	own := load(t, ecP256, "")
	zero := b64(make([]byte, 32))
	for name, epk := range map[string]string{
		"the origin":         `{"kty":"EC","crv":"P-256","x":"` + zero + `","y":"` + zero + `"}`,
		"a point off P-256":  `{"kty":"EC","crv":"P-256","x":"` + zero + `","y":"` + b64(bytes.Repeat([]byte{1}, 32)) + `"}`,
		"P-256K1's base":     `{"kty":"EC","crv":"P-256","x":"eb5mfvncu6xVoGKVzocLBwKb_NstzijZWfKBWxb4F5g","y":"SDradyajxGVdpPv8DhEIqP0XtEimhVQZnEfQj_sQ1Lg"}`,
		"a P-384 point":      strings.Replace(epkJSON(ephemeral(t, "P-384")), "P-384", "P-256", 1),
		"a secp256k1 header": `{"kty":"EC","crv":"secp256k1","x":"` + zero + `","y":"` + zero + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			f := wrapForger("payload", own)
			f.protected = withEPK(epk)
			refuse(t, forge(t, f), plainContext(), own, testAuth, ErrMalformed, 0)
		})
	}
	t.Run("a point on another curve than the key's", func(t *testing.T) {
		f := wrapForger("payload", own)
		f.protected = withEPK(epkJSON(ephemeral(t, "P-384")))
		refuse(t, forge(t, f), plainContext(), own, testAuth, ErrDecrypt, 0)
	})
	t.Run("another point on the key's curve", func(t *testing.T) {
		f := wrapForger("payload", own)
		f.protected = withEPK(epkJSON(ephemeral(t, "P-256")))
		refuse(t, forge(t, f), plainContext(), own, testAuth, ErrDecrypt, 1)
	})
}

func TestAnOversizedPlaintextIsRefused(t *testing.T) {
	own := load(t, rsa2048, "")
	f := wrapForger(strings.Repeat("x", MaxPayload+1), own)
	refuse(t, forge(t, f), plainContext(), own, testAuth, ErrMalformed, 0)
	if _, err := Seal(wrapContext(), []Recipient{own.Recipient}, testAuth, make([]byte, MaxPayload+1)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("sealing it gave %v, want ErrTooLarge", err)
	}
}

// A block that does not decrypt, a content key of the wrong size and a changed ciphertext look the same from outside.
func TestEveryKindOfDamageIsTheSameErrDecrypt(t *testing.T) {
	for _, name := range []string{rsa2048, ecP256, ecP384} {
		own := load(t, name, "")
		good := forge(t, wrapForger("payload", own))
		f := wrapForger("payload", own)
		f.block = func(contentKey []byte, to party) []byte {
			if _, ok := to.Public.(*rsa.PublicKey); ok {
				return forgeBlock(t, to, contentKey[:16]) // the block decrypts to a key of the wrong size
			}
			return bytes.Repeat([]byte{7}, wrappedKeySize) // the block does not unwrap
		}
		texts := map[string]string{}
		for what, raw := range map[string][]byte{
			"changed key block":      withMember(t, good, "encrypted_key", flip(t, member(t, good, "encrypted_key"))),
			"changed iv":             withMember(t, good, "iv", flip(t, member(t, good, "iv"))),
			"changed ciphertext":     withMember(t, good, "ciphertext", flip(t, member(t, good, "ciphertext"))),
			"changed tag":            withMember(t, good, "tag", flip(t, member(t, good, "tag"))),
			"another content key":    forge(t, f),
			"key block of all zeros": withMember(t, good, "encrypted_key", b64(make([]byte, len(unb64(t, member(t, good, "encrypted_key")))))),
		} {
			t.Run(name+" "+what, func(t *testing.T) {
				refuse(t, raw, plainContext(), own, testAuth, ErrDecrypt, 1)
			})
			_, err := open(t, raw, plainContext(), own)
			texts[fmt.Sprint(err)] = what
		}
		if len(texts) != 1 {
			t.Errorf("the errors tell the kinds of damage apart: %q", texts)
		}
	}
}

func TestAKeyBlockOfAnotherSizeThanTheModulusNeverReachesTheHSM(t *testing.T) {
	own, larger := load(t, rsa2048, ""), load(t, rsa3072, "")
	f := wrapForger("payload", own)
	f.block = func(contentKey []byte, _ party) []byte { return forgeBlock(t, larger, contentKey) }
	refuse(t, forge(t, f), plainContext(), own, testAuth, ErrDecrypt, 0)
}

func TestSeventeenForgedRecipientsAreRefused(t *testing.T) {
	own := load(t, ecP256, "")
	to := []party{own}
	for range MaxRecipients - 1 {
		to = append(to, party{Recipient: named(t, ephemeral(t, "P-256"))})
	}
	if payload, err := open(t, forge(t, wrapForger("payload", to...)), plainContext(), own); err != nil || string(payload) != "payload" {
		t.Fatalf("sixteen: %q, %v", payload, err)
	}
	to = append(to, party{Recipient: named(t, ephemeral(t, "P-256"))})
	refuse(t, forge(t, wrapForger("payload", to...)), plainContext(), own, testAuth, ErrMalformed, 0)
}

// Such an envelope says everything twice, and a JOSE library may open it.
func TestASingleRecipientInTheGeneralSerialisationIsRefused(t *testing.T) {
	own := load(t, rsa2048, "")
	raw := forge(t, wrapForger("payload", own))
	key := member(t, raw, "encrypted_key")
	for _, element := range []string{
		`{"header":{"alg":"RSA-OAEP-256","kid":"` + own.KID + `"},"encrypted_key":"` + key + `"}`,
		`{"encrypted_key":"` + key + `"}`,
	} {
		general := strings.Replace(string(raw), `"encrypted_key":"`+key+`"`, `"recipients":[`+element+`]`, 1)
		refuse(t, []byte(general), plainContext(), own, testAuth, ErrMalformed, 0)
	}
}

func TestPartsOfTwoEnvelopesDoNotFitTogether(t *testing.T) {
	for _, name := range []string{rsa2048, ecP256} {
		own := load(t, name, "")
		a := mustSeal(t, wrapContext(), []byte("payload a"), own)
		b := mustSeal(t, wrapContext(), []byte("payload b"), own)
		for _, part := range []string{"protected", "encrypted_key", "iv", "ciphertext", "tag"} {
			if part == "protected" && name == rsa2048 {
				continue // the same text in both: context, kid and alg
			}
			t.Run(name+" "+part, func(t *testing.T) {
				refuse(t, withMember(t, a, part, member(t, b, part)), wrapContext(), own, testAuth, ErrDecrypt, 1)
			})
		}
	}
}
