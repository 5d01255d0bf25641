package hsm_test

import (
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
)

// thumbprint is what another implementation of RFC 7638 says.
func thumbprint(t *testing.T, public crypto.PublicKey) string {
	t.Helper()
	sum, err := (&jose.JSONWebKey{Key: public}).Thumbprint(crypto.SHA256)
	if err != nil {
		t.Fatalf("go-jose: %v", err)
	}
	return base64.RawURLEncoding.EncodeToString(sum)
}

func TestFingerprintOfTheKeyInTheRFC(t *testing.T) {
	// RFC 7638, 3.1.
	const n = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMs" +
		"tn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbI" +
		"SD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
	modulus, err := base64.RawURLEncoding.DecodeString(n)
	if err != nil {
		t.Fatal(err)
	}
	got, err := hsm.Fingerprint(&rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: 65537})
	if want := "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"; err != nil || got != want {
		t.Errorf("Fingerprint gives %q, %v; the RFC has %q", got, err, want)
	}
}

func TestFingerprintAgreesWithGoJose(t *testing.T) {
	memory := hsmtest.NewMemory()
	for name, bits := range map[string]int{"RSA 2048": 2048, "RSA 3072": 3072} {
		public := memory.AddRSA(t, name, "01", bits).Public()
		got, err := hsm.Fingerprint(public)
		if want := thumbprint(t, public); err != nil || got != want {
			t.Errorf("%s: Fingerprint gives %q, %v; go-jose %q", name, got, err, want)
		}
	}
	for _, exponent := range []int{3, 17, 65537, 1<<31 - 1} {
		public := *memory.AddRSA(t, "exponent", "02", 2048).Public().(*rsa.PublicKey)
		public.E = exponent
		got, err := hsm.Fingerprint(&public)
		if want := thumbprint(t, &public); err != nil || got != want {
			t.Errorf("exponent %d: Fingerprint gives %q, %v; go-jose %q", exponent, got, err, want)
		}
	}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		// Leading zero bytes of a coordinate belong to the thumbprint: enough keys that some have them.
		zeros := 0
		for i := 0; i < 200 || (zeros == 0 && i < 5000); i++ {
			private, err := ecdsa.GenerateKey(curve, rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			public, err := private.PublicKey.ECDH()
			if err != nil {
				t.Fatal(err)
			}
			point := public.Bytes()
			if point[1] == 0 || point[1+(len(point)-1)/2] == 0 {
				zeros++
			} else if i >= 20 {
				continue // comparing a few ordinary ones is enough
			}
			got, err := hsm.Fingerprint(public)
			if want := thumbprint(t, &private.PublicKey); err != nil || got != want {
				t.Errorf("%s: Fingerprint gives %q, %v; go-jose %q", curve.Params().Name, got, err, want)
			}
		}
		if zeros == 0 {
			t.Errorf("%s: no key with a leading zero among 5000", curve.Params().Name)
		}
	}
}

func TestFingerprintRefusesOtherKinds(t *testing.T) {
	ed, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x, err := ecdh.X25519().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p521, err := ecdh.P521().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for name, public := range map[string]crypto.PublicKey{
		"Ed25519": ed, "X25519": x.PublicKey(), "P-521": p521.PublicKey(), "nothing": nil, "a certificate": &x509.Certificate{},
	} {
		if got, err := hsm.Fingerprint(public); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("%s: Fingerprint gives %q, %v; want ErrUnsupported", name, got, err)
		}
	}
}

func TestFindKeySaysWhatWasLookedUp(t *testing.T) {
	memory := hsmtest.NewMemory()
	memory.AddEC(t, "twin", "01", ecdh.P256())
	memory.AddEC(t, "twin", "02", ecdh.P256())
	for name, c := range map[string]struct {
		query hsm.KeyQuery
		want  error
		words []string
	}{
		"no key":           {hsm.KeyQuery{Label: "seal"}, hsm.ErrNotFound, []string{`label "seal"`}},
		"two keys":         {hsm.KeyQuery{Label: "twin"}, hsm.ErrAmbiguous, []string{`label "twin"`, "2 keys", "id"}},
		"several criteria": {hsm.KeyQuery{Label: "a", ID: "b", Fingerprint: "c"}, hsm.ErrNotFound, []string{`id "b"`, `fingerprint "c"`}},
		"any key":          {hsm.KeyQuery{}, hsm.ErrAmbiguous, []string{"any name"}},
	} {
		_, err := hsm.FindKey(t.Context(), memory, c.query)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: FindKey gives %v, want %v", name, err, c.want)
			continue
		}
		for _, word := range c.words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %q does not say %s", name, err, word)
			}
		}
	}
	memory.SetError(hsm.ErrUnavailable)
	if _, err := hsm.FindKey(t.Context(), memory, hsm.KeyQuery{}); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("FindKey hides the device's own error: %v", err)
	}
}

func TestPINErrorIsLockedOnlyWithoutTries(t *testing.T) {
	for tries, locked := range map[int]bool{0: true, 1: false, 3: false, -1: false} {
		err := fmt.Errorf("logging in: %w", &hsm.PINError{TriesLeft: tries, Detail: "detail"})
		if errors.Is(err, hsm.ErrLocked) != locked {
			t.Errorf("with %d tries left the error is ErrLocked: %t, want %t", tries, !locked, locked)
		}
		var pin *hsm.PINError
		if !errors.As(err, &pin) || pin.TriesLeft != tries {
			t.Errorf("errors.As gives %+v", pin)
		}
		if errors.Is(err, hsm.ErrUnavailable) {
			t.Error("a PIN error looks worth a retry")
		}
	}
}

func TestAlgorithmsSurviveJSON(t *testing.T) {
	text, err := json.Marshal(hsm.Algorithms())
	if want := `["rsa-2048","rsa-3072","rsa-4096","ecdh-p256","ecdh-p384"]`; err != nil || string(text) != want {
		t.Errorf("the algorithms are %s, %v; want %s", text, err, want)
	}
}
