package envelope

import (
	"bytes"
	"errors"
	"strings"
	"testing"
)

func TestWhatIsNoEnvelopeIsRefused(t *testing.T) {
	rsaKey, ecKey := load(t, rsa2048, ""), load(t, ecP256, "")
	one := mustSeal(t, wrapContext(), []byte("payload"), rsaKey)
	ec := mustSeal(t, wrapContext(), []byte("payload"), ecKey)
	many := mustSeal(t, wrapContext(), []byte("payload"), rsaKey, ecKey)
	material := mustSeal(t, materialContext(), []byte("payload"), rsaKey)
	header := func(raw []byte, old, with string) []byte { return withProtected(t, raw, replace(old, with)) }
	text := func(raw []byte, old, with string) []byte {
		changed := bytes.Replace(raw, []byte(old), []byte(with), 1)
		if bytes.Equal(raw, changed) {
			t.Fatalf("%q is not in %s", old, raw)
		}
		return changed
	}
	iv, tag, ciphertext := member(t, one, "iv"), member(t, one, "tag"), member(t, one, "ciphertext")
	protected, key := member(t, one, "protected"), member(t, one, "encrypted_key")
	recipient := string(many[bytes.Index(many, []byte(`{"header"`)):bytes.Index(many, []byte(`,{"header"`))])
	other := string(many[bytes.Index(many, []byte(`,{"header"`))+1 : bytes.Index(many, []byte(`]`))])

	for name, raw := range map[string][]byte{
		"nothing":                         {},
		"null":                            []byte("null"),
		"an empty object":                 []byte("{}"),
		"the compact serialisation":       []byte(strings.Join([]string{protected, key, iv, ciphertext, tag}, ".")),
		"an array of it":                  []byte("[" + string(one) + "]"),
		"blank behind it":                 append(bytes.Clone(one), ' '),
		"a line feed behind it":           append(bytes.Clone(one), '\n'),
		"blank before it":                 append([]byte(" "), one...),
		"a byte order mark before it":     append([]byte("\ufeff"), one...),
		"two of it":                       append(bytes.Clone(one), one...),
		"blank inside":                    text(one, `","iv":`, `", "iv":`),
		"the last byte missing":           one[:len(one)-1],
		"larger than any envelope":        append(bytes.Clone(one), bytes.Repeat([]byte(" "), MaxSize)...),
		"a member twice":                  text(one, `"iv":`, `"iv":"`+iv+`","iv":`),
		"protected twice":                 text(one, `"iv":`, `"protected":"`+protected+`","iv":`),
		"a member in capitals":            text(one, `"iv":`, `"IV":`),
		"a member twice, once in capital": text(one, `,"iv":`, `,"Protected":"`+protected+`","iv":`),
		"an unknown member":               text(one, `"iv":`, `"comment":"","iv":`),
		"an escaped member name":          text(one, `"iv":`, `"\u0069v":`),
		"an escaped value":                text(one, `"iv":"`, `"iv":"\u0041`),
		"other order of members":          text(text(one, `"iv":"`+iv+`",`, ""), `"tag":`, `"iv":"`+iv+`","tag":`),
		"unprotected":                     text(one, `"iv":`, `"unprotected":{},"iv":`),
		"unprotected with a context":      text(one, `"iv":`, `"unprotected":{"use":"material"},"iv":`),
		"aad":                             text(one, `"iv":`, `"aad":"AAAA","iv":`),
		"a header beside the only key":    text(one, `"encrypted_key":`, `"header":{"use":"material"},"encrypted_key":`),
		"an empty header":                 text(one, `"encrypted_key":`, `"header":{},"encrypted_key":`),
		"null as value":                   text(one, `"`+iv+`"`, `null`),
		"a number as value":               text(one, `"`+iv+`"`, `12`),
		"no protected":                    text(one, `"protected":"`+protected+`",`, ""),
		"no encrypted_key":                text(one, `"encrypted_key":"`+key+`",`, ""),
		"no iv":                           text(one, `"iv":"`+iv+`",`, ""),
		"no ciphertext":                   text(one, `"ciphertext":"`+ciphertext+`",`, ""),
		"no tag":                          text(one, `,"tag":"`+tag+`"`, ""),

		"base64 with padding":                withMember(t, one, "tag", tag+"=="),
		"base64 of the other alphabet":       withMember(t, one, "iv", "+/+/+/+/+/+/+/+/"),
		"base64 with a line feed":            withMember(t, one, "iv", iv[:4]+"\n"+iv[4:]),
		"base64 with unused bits set":        withMember(t, one, "tag", tag[:len(tag)-1]+"B"),
		"base64 of an impossible length":     withMember(t, one, "tag", tag[:len(tag)-1]),
		"iv of 11 bytes":                     withMember(t, one, "iv", b64(make([]byte, 11))),
		"iv of 13 bytes":                     withMember(t, one, "iv", b64(make([]byte, 13))),
		"iv of 16 bytes":                     withMember(t, one, "iv", b64(make([]byte, 16))),
		"no iv at all":                       withMember(t, one, "iv", ""),
		"tag of 12 bytes":                    withMember(t, one, "tag", b64(make([]byte, 12))),
		"tag of 17 bytes":                    withMember(t, one, "tag", b64(make([]byte, 17))),
		"no tag at all":                      withMember(t, one, "tag", ""),
		"ciphertext shorter than a MAC":      withMember(t, one, "ciphertext", b64(make([]byte, macSize-1))),
		"ciphertext of a byte too many":      withMember(t, one, "ciphertext", b64(make([]byte, macSize+MaxPayload+1))),
		"no encrypted_key at all":            withMember(t, one, "encrypted_key", ""),
		"encrypted_key of RSA-1024":          withMember(t, one, "encrypted_key", b64(make([]byte, 128))),
		"encrypted_key of RSA-16384":         withMember(t, one, "encrypted_key", b64(make([]byte, 2048))),
		"encrypted_key of a wrapped 128 bit": withMember(t, ec, "encrypted_key", b64(make([]byte, 24))),
		"encrypted_key of a wrapped 320 bit": withMember(t, ec, "encrypted_key", b64(make([]byte, 48))),
		"RSA block for ECDH":                 withMember(t, ec, "encrypted_key", key),
		"wrapped key for RSA":                withMember(t, one, "encrypted_key", member(t, ec, "encrypted_key")),

		"zip":                          header(one, `"use":`, `"zip":"DEF","use":`),
		"zip, in its order":            header(one, `"v":1`, `"v":1,"zip":"DEF"`),
		"crit":                         header(one, `"ctx":`, `"crit":["exp"],"ctx":`),
		"empty crit":                   header(one, `"ctx":`, `"crit":[],"ctx":`),
		"apu":                          header(ec, `"ctx":`, `"apu":"QQ","ctx":`),
		"apv":                          header(ec, `"ctx":`, `"apv":"QQ","ctx":`),
		"jwk":                          header(one, `"key":`, `"jwk":{},"key":`),
		"jku":                          header(one, `"key":`, `"jku":"https://example.com","key":`),
		"x5c":                          header(one, `,"v":1`, `,"v":1,"x5c":[]`),
		"x5u":                          header(one, `,"v":1`, `,"v":1,"x5u":""`),
		"x5t#S256":                     header(one, `,"v":1`, `,"v":1,"x5t#S256":""`),
		"cty":                          header(one, `"ctx":`, `"cty":"text/plain","ctx":`),
		"p2c":                          header(one, `"typ":`, `"p2c":1000000,"typ":`),
		"nonce":                        header(one, `"typ":`, `"nonce":"QQ","typ":`),
		"an unknown header":            header(one, `"typ":`, `"note":"","typ":`),
		"another typ":                  header(one, `nitroseal+jwe`, `jwe`),
		"no typ":                       header(one, `"typ":"nitroseal+jwe",`, ``),
		"version 2":                    header(one, `"v":1`, `"v":2`),
		"version 01":                   header(one, `"v":1`, `"v":01`),
		"version as text":              header(one, `"v":1`, `"v":"1"`),
		"no version":                   header(one, `,"v":1`, ``),
		"another content algorithm":    header(one, `A256GCM`, `A128GCM`),
		"CBC":                          header(one, `A256GCM`, `A256CBC-HS512`),
		"no use":                       header(one, `"use":"wrap",`, ``),
		"an unknown use":               header(one, `"use":"wrap"`, `"use":"unwrap"`),
		"use in capitals":              header(one, `"use":"wrap"`, `"use":"WRAP"`),
		"use twice":                    header(one, `"use":"wrap"`, `"use":"wrap","use":"material"`),
		"use twice, once in capitals":  header(one, `"use":"wrap"`, `"USE":"material","use":"wrap"`),
		"header name in capitals":      header(one, `"kver"`, `"kVer"`),
		"an escaped header name":       header(one, `"use"`, `"us\u0065"`),
		"an escaped header value":      header(one, `"wrap"`, `"wr\u0061p"`),
		"blank in the header":          header(one, `,"use"`, `, "use"`),
		"bytes behind the header":      header(one, `,"v":1}`, `,"v":1} `),
		"other order of headers":       header(one, `"key":"prod"`, `"kver":3,"key":"prod"`),
		"empty key name":               header(one, `"key":"prod"`, `"key":""`),
		"key name too long":            header(one, `"key":"prod"`, `"key":"`+strings.Repeat("x", MaxName+1)+`"`),
		"key name with a blank":        header(one, `"key":"prod"`, `"key":"pr od"`),
		"key name with an accent":      header(one, `"key":"prod"`, `"key":"pród"`),
		"key version 0":                header(one, `"kver":3`, `"kver":0`),
		"key version -1":               header(one, `"kver":3`, `"kver":-1`),
		"key version 03":               header(one, `"kver":3`, `"kver":03`),
		"key version 3.0":              header(one, `"kver":3`, `"kver":3.0`),
		"key version 3e0":              header(one, `"kver":3`, `"kver":3e0`),
		"key version 2³¹":              header(one, `"kver":3`, `"kver":2147483648`),
		"key version beyond 64 bit":    header(one, `"kver":3`, `"kver":36893488147419103235`),
		"key version as text":          header(one, `"kver":3`, `"kver":"3"`),
		"an empty caller's context":    header(one, `"ctx":"`+b64(wrapContext().Caller)+`"`, `"ctx":""`),
		"a caller's context too long":  header(one, b64(wrapContext().Caller), b64(make([]byte, MaxCaller+1))),
		"a padded caller's context":    header(one, b64(wrapContext().Caller), "QQ=="),
		"a caller's context with bits": header(one, b64(wrapContext().Caller), "QR"),
		"a protected of no JSON":       withMember(t, one, "protected", b64([]byte("wrap"))),
		"an empty protected":           withMember(t, one, "protected", ""),
		"a protected too large":        withMember(t, one, "protected", b64(make([]byte, maxProtected+1))),
		"cluster for use wrap":         header(one, `"ctx":`, `"cluster":"c","ctx":`),
		"generation for use wrap":      header(one, `"key":`, `"gen":1,"key":`),
		"name for use wrap":            header(one, `"typ":`, `"name":"n","typ":`),
		"material without cluster":     header(material, `"cluster":"vault-eu",`, ``),
		"material without name":        header(material, `"name":"unseal-keys",`, ``),
		"material without generation":  header(material, `"gen":7,`, ``),
		"generation 0":                 header(material, `"gen":7`, `"gen":0`),
		"generation 2⁵³":               header(material, `"gen":7`, `"gen":9007199254740992`),

		"no alg":                         header(one, `"alg":"RSA-OAEP-256",`, ``),
		"alg dir":                        header(one, `RSA-OAEP-256`, `dir`),
		"alg A128KW":                     header(one, `RSA-OAEP-256`, `A128KW`),
		"alg A256GCMKW":                  header(one, `RSA-OAEP-256`, `A256GCMKW`),
		"alg PBES2":                      header(one, `RSA-OAEP-256`, `PBES2-HS512+A256KW`),
		"alg RSA1_5":                     header(one, `RSA-OAEP-256`, `RSA1_5`),
		"alg RSA-OAEP-512":               header(one, `RSA-OAEP-256`, `RSA-OAEP-512`),
		"alg ECDH-ES":                    header(ec, `ECDH-ES+A256KW`, `ECDH-ES`),
		"alg ECDH-ES+A128KW":             header(ec, `ECDH-ES+A256KW`, `ECDH-ES+A128KW`),
		"alg none":                       header(one, `RSA-OAEP-256`, `none`),
		"alg in small letters":           header(one, `RSA-OAEP-256`, `rsa-oaep-256`),
		"no kid":                         header(one, `"kid":"`+rsaKey.KID+`",`, ``),
		"a kid that is no thumbprint":    header(one, rsaKey.KID, `key-1`),
		"a kid with unused bits set":     header(one, rsaKey.KID, rsaKey.KID[:42]+"_"),
		"epk for RSA":                    header(one, `"enc":"A256GCM"`, `"enc":"A256GCM","epk":`+epkJSON(ephemeral(t, "P-256"))),
		"no epk for ECDH":                withProtected(t, ec, cutEPK),
		"epk off the curve":              withProtected(t, ec, withEPK(`{"kty":"EC","crv":"P-256","x":"`+b64(make([]byte, 32))+`","y":"`+b64(make([]byte, 32))+`"}`)),
		"epk beyond the field":           withProtected(t, ec, withEPK(`{"kty":"EC","crv":"P-256","x":"`+b64(bytes.Repeat([]byte{255}, 32))+`","y":"`+b64(make([]byte, 32))+`"}`)),
		"epk on P-384 that says P-256":   withProtected(t, ec, withEPK(strings.Replace(epkJSON(ephemeral(t, "P-384")), "P-384", "P-256", 1))),
		"epk on P-256 that says P-384":   withProtected(t, ec, withEPK(strings.Replace(epkJSON(ephemeral(t, "P-256")), "P-256", "P-384", 1))),
		"epk on P-521":                   withProtected(t, ec, withEPK(`{"kty":"EC","crv":"P-521","x":"`+b64(make([]byte, 66))+`","y":"`+b64(make([]byte, 66))+`"}`)),
		"epk on Curve25519":              withProtected(t, ec, withEPK(`{"kty":"OKP","crv":"X25519","x":"`+b64(make([]byte, 32))+`"}`)),
		"epk with a private half":        header(ec, `"kid"`, `"d":"QQ","kid"`),
		"epk in other order":             header(ec, `"kty":"EC","crv":"P-256"`, `"crv":"P-256","kty":"EC"`),
		"one recipient in General":       text(many, `,`+other, ``),
		"no recipient in General":        text(many, recipient+`,`+other, ``),
		"a comma behind the recipients":  text(many, `}],`, `},],`),
		"go-jose's repeated key":         text(many, `],"iv"`, `],"encrypted_key":"`+key+`","iv"`),
		"both serialisations at once":    text(many, `,"recipients"`, `,"encrypted_key":"`+key+`","recipients"`),
		"a kid twice":                    text(many, other, recipient),
		"17 recipients":                  text(many, recipient, strings.Repeat(recipient+",", 15)+recipient),
		"recipient's alg dir":            text(many, `"alg":"RSA-OAEP-256"`, `"alg":"dir"`),
		"recipient's kid in capitals":    text(many, `"kid":`, `"KID":`),
		"recipient with a context":       text(many, `"kid":`, `"ctx":"QQ","kid":`),
		"recipient with a use":           text(many, `"kid":"`+rsaKey.KID+`"`, `"kid":"`+rsaKey.KID+`","use":"material"`),
		"recipient with zip":             text(many, `"kid":"`+rsaKey.KID+`"`, `"kid":"`+rsaKey.KID+`","zip":"DEF"`),
		"recipient without a header":     text(many, recipient, `{"encrypted_key":"`+key+`"}`),
		"recipient without a key":        text(many, recipient, recipient[:strings.Index(recipient, `,"encrypted_key"`)]+`}`),
		"recipient with another member":  text(many, `},"encrypted_key"`, `},"note":"","encrypted_key"`),
		"recipient in other order":       text(many, `{"header":{"alg":"RSA-OAEP-256","kid":"`+rsaKey.KID+`"},"encrypted_key":"`+member(t, many, "encrypted_key")+`"}`, `{"encrypted_key":"`+member(t, many, "encrypted_key")+`","header":{"alg":"RSA-OAEP-256","kid":"`+rsaKey.KID+`"}}`),
		"General with kid in protected":  header(many, `,"kver"`, `,"kid":"`+rsaKey.KID+`","kver"`),
		"General with alg in protected":  header(many, `{"ctx"`, `{"alg":"RSA-OAEP-256","ctx"`),
		"Flattened with General headers": withMember(t, one, "protected", member(t, many, "protected")),
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Parse(raw); !errors.Is(err, ErrMalformed) {
				t.Errorf("parsing gave %v, want ErrMalformed", err)
			}
		})
	}
}

func TestEveryTruncationIsRefused(t *testing.T) {
	for _, to := range [][]party{{load(t, rsa2048, "")}, {load(t, ecP256, "")}, {load(t, ecP256, ""), load(t, ecP384, "")}} {
		raw := mustSeal(t, materialContext(), []byte("payload"), to...)
		for n := range raw {
			if _, err := Parse(raw[:n]); !errors.Is(err, ErrMalformed) {
				t.Fatalf("the first %d bytes: %v, want ErrMalformed", n, err)
			}
		}
	}
}

func TestParseKeepsNothingOfItsInput(t *testing.T) {
	own := load(t, rsa2048, "")
	raw := mustSeal(t, wrapContext(), []byte("payload"), own)
	e, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	clear(raw)
	claimed := e.Context()
	clear(claimed.Caller)
	if _, err := e.Open(t.Context(), wrapContext(), own.Recipient, own.key, testAuth); err != nil {
		t.Error(err)
	}
}

func TestAMistakeIsShownWithItsPlace(t *testing.T) {
	raw := mustSeal(t, wrapContext(), []byte("payload"), load(t, rsa2048, ""))
	changed := bytes.Replace(raw, []byte(`,"iv"`), []byte(`,"aad":"QQ","iv"`), 1)
	_, err := Parse(changed)
	if err == nil || !strings.Contains(err.Error(), `"aad`) || !strings.Contains(err.Error(), "at byte ") {
		t.Errorf("the error does not show what is wrong and where: %v", err)
	}
}
