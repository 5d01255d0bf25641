package envelope

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	josecipher "github.com/go-jose/go-jose/v4/cipher"

	"vault-plugin-secrets-nitrokey/hsm"
)

// The worked example of docs/envelope.md is made of golden files.
func TestTheWorkedExampleOfTheDocumentIsTheGoldenFiles(t *testing.T) {
	path := filepath.Join("..", "..", "docs", "envelope.md")
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, written, _ := strings.Cut(string(doc), "golden files.\n\n")
	want := example(t, "use-material", "RSA") + "\n" + example(t, "ec-p256", "EC") + "\n" + leasedExample(t)
	if written == "" && *update {
		if err := os.WriteFile(path, append(doc, want...), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if written != want {
		t.Errorf("the example in docs/envelope.md should read:\n%s", want)
	}
}

// example opens a golden file step by step, with nothing of this package's own but its key derivation.
func example(t *testing.T, name, kind string) string {
	t.Helper()
	var g golden
	for _, candidate := range goldens() {
		if candidate.name == name {
			g = candidate
		}
	}
	raw := g.read(t)
	key := &witness{Key: g.parties(t)[0].key}
	e, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Open(t.Context(), g.context, g.parties(t)[0].Recipient, key.as(), testAuth); err != nil {
		t.Fatal(err)
	}
	input := macInput(g.context, []byte(g.payload))
	mac := hmac.New(sha256.New, testAuth[:])
	mac.Write(input)
	if !bytes.Equal(mac.Sum(nil), g.context.mac(testAuth, []byte(g.payload))) {
		t.Fatal("the documented HMAC is not the one of this package")
	}

	var b strings.Builder
	block := func(title, text string) { fmt.Fprintf(&b, "%s:\n\n```\n%s\n```\n\n", title, fold(text)) }
	fmt.Fprintf(&b, "### %s: `testdata/golden/%s.jwe` with `%s.pem`\n\n", kind, g.name, g.to[0])
	block("The envelope, one line", string(raw))
	block("The protected header, decoded, one line", string(unb64(t, member(t, raw, "protected"))))
	if key.secret != nil {
		block("The shared secret Z, and the key that the Concat KDF makes of it",
			hex.EncodeToString(key.secret)+"\n"+hex.EncodeToString(concatKDF(key.secret, "ECDH-ES+A256KW", "", "", 32)))
		block("The content key, unwrapped with that", hex.EncodeToString(key.content(t, e)))
	} else {
		block("The content key, as the HSM decrypts it", hex.EncodeToString(key.contentKey))
	}
	block("The HMAC's input", hex.EncodeToString(input))
	block("The HMAC, the first 32 bytes of the plaintext", hex.EncodeToString(mac.Sum(nil)))
	return strings.TrimSuffix(b.String(), "\n")
}

// leasedExample opens the golden leased envelope step by step, with nothing of this package's own but its key unwrap.
func leasedExample(t *testing.T) string {
	t.Helper()
	g := leasedGoldens()[0]
	raw, carried := g.read(t), g.carried().read(t)
	jwk := `{"k":"` + b64([]byte(testKEK)) + `","kty":"oct"}`
	sum := sha256.Sum256([]byte(jwk))
	if b64(sum[:]) != KEKID([]byte(testKEK)) {
		t.Fatal("the documented kid is not the one of this package")
	}
	contentKey, err := josecipher.KeyUnwrap(kekBlock(t, testKEK), unb64(t, member(t, raw, "encrypted_key")))
	if err != nil {
		t.Fatal(err)
	}
	input := macInput(g.context(), []byte("a test payload"))
	mac := hmac.New(sha256.New, testAuth[:])
	mac.Write(input)

	var b strings.Builder
	block := func(title, text string) { fmt.Fprintf(&b, "%s:\n\n```\n%s\n```\n\n", title, fold(text)) }
	fmt.Fprintf(&b, "### Leased: `testdata/golden/leased.jwe`, and with `%s.pem`\n\n", g.to[0])
	block("The envelope, one line", string(raw))
	block("The protected header, decoded, one line", string(unb64(t, member(t, raw, "protected"))))
	block("The KEK's envelope, `testdata/golden/kek.jwe`: `kek`, decoded, one line", string(carried))
	block("Its protected header, decoded, one line", string(unb64(t, member(t, carried, "protected"))))
	block("The KEK, its payload", hex.EncodeToString([]byte(testKEK)))
	block("What its kid is the SHA-256 of, and that", jwk+"\n"+hex.EncodeToString(sum[:]))
	block("The content key, unwrapped with the KEK", hex.EncodeToString(contentKey))
	block("The HMAC's input", hex.EncodeToString(input))
	block("The HMAC, the first 32 bytes of the plaintext", hex.EncodeToString(mac.Sum(nil)))
	return strings.TrimSuffix(b.String(), "\n")
}

// fold breaks a text into lines of 120 characters.
func fold(text string) string {
	const width = 120
	var lines []string
	for line := range strings.SplitSeq(text, "\n") {
		for len(line) > width {
			lines, line = append(lines, line[:width]), line[width:]
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

// witness keeps what an HSM would return.
type witness struct {
	hsm.Key
	contentKey, secret []byte
}

func (w *witness) as() hsm.Key {
	if decrypter, ok := w.Key.(hsm.Decrypter); ok {
		return witnessRSA{decrypter, w}
	}
	return witnessEC{w.Key.(hsm.Agreer), w}
}

// content unwraps the content key from the only recipient's block.
func (w *witness) content(t *testing.T, e *Envelope) []byte {
	t.Helper()
	contentKey, err := agreeAndUnwrap(t.Context(), w.Key.(hsm.Agreer), e.recipients[0].ephemeral, e.recipients[0].encryptedKey)
	if err != nil {
		t.Fatal(err)
	}
	return contentKey
}

type witnessRSA struct {
	hsm.Decrypter
	*witness
}

func (k witnessRSA) DecryptOAEP(ctx context.Context, hash crypto.Hash, block []byte) ([]byte, error) {
	key, err := k.Decrypter.DecryptOAEP(ctx, hash, block)
	k.contentKey = bytes.Clone(key)
	return key, err
}

func (k witnessRSA) Ref() hsm.KeyRef          { return k.Decrypter.Ref() }
func (k witnessRSA) Public() crypto.PublicKey { return k.Decrypter.Public() }
func (k witnessRSA) Traits() hsm.Traits       { return k.Decrypter.Traits() }

type witnessEC struct {
	hsm.Agreer
	*witness
}

func (k witnessEC) Agree(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	z, err := k.Agreer.Agree(ctx, peer)
	k.secret = bytes.Clone(z)
	return z, err
}

func (k witnessEC) Ref() hsm.KeyRef          { return k.Agreer.Ref() }
func (k witnessEC) Public() crypto.PublicKey { return k.Agreer.Public() }
func (k witnessEC) Traits() hsm.Traits       { return k.Agreer.Traits() }
