package nethsm

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// A key's description is parsed or refused. What comes out can be used: a modulus that is odd and large enough, a point on
// its curve.
func FuzzKeyJSON(f *testing.F) {
	for _, e := range recording(f) {
		if e.Request.Method == http.MethodGet && strings.HasPrefix(e.Request.Path, apiPath+"/keys/") && e.Response.Status == 200 {
			f.Add([]byte(e.Response.Body))
		}
	}
	f.Add([]byte(`{"mechanisms":["ECDSA_Signature"],"type":"EC_P256","operations":0,"restrictions":{},"public":{"data":` +
		`"BGsX0fLhLEJH+Lzm5WOkQPJ3A32BLeszoPShOUXYmMKWT+NC4v4af5uO5+tKfA+eFivOM1drMV7Oy7ZAaDe/UfU="}}`))
	f.Add([]byte(`{"mechanisms":["AES_Decryption_CBC"],"type":"Generic","operations":0,"public":null,"restrictions":{"tags":["a"]}}`))
	f.Add([]byte(`{"mechanisms":["Later"],"type":"MLKEM768","operations":0,"public":{"data":"AA=="}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var key Key
		if json.Unmarshal(text, &key) != nil {
			return
		}
		if key.Type == "" || len(key.Mechanisms) == 0 {
			if string(text) != "null" { // encoding/json does not ask about null
				t.Fatalf("%+v lacks what is needed", key)
			}
			return
		}
		switch public := key.Public.(type) {
		case *rsa.PublicKey:
			if key.Type != TypeRSA || public.N.BitLen() < minModulus || public.N.Bit(0) == 0 || public.E < 3 || public.E%2 == 0 {
				t.Errorf("RSA key %v of type %s", public, key.Type)
			}
		case *ecdsa.PublicKey:
			if _, err := public.ECDH(); err != nil {
				t.Error(err)
			}
		case ed25519.PublicKey:
			if key.Type != TypeCurve25519 || len(public) != ed25519.PublicKeySize {
				t.Errorf("Ed25519 key %v of type %s", public, key.Type)
			}
		case nil:
			if slices.Contains([]KeyType{TypeRSA, TypeCurve25519, TypeECP256, TypeECP384, TypeECP521}, key.Type) {
				t.Errorf("no key of type %s", key.Type)
			}
		default:
			t.Errorf("a key of type %T", public)
		}
	})
}

// Whatever status and message come, the error has a text and at most one meaning besides its state.
func FuzzError(f *testing.F) {
	for _, e := range recording(f) {
		var said struct{ Message string }
		_ = json.Unmarshal([]byte(e.Response.Body), &said)
		f.Add(e.Response.Status, said.Message, string(StateLocked))
	}
	f.Fuzz(func(t *testing.T, status int, message, state string) {
		e := &Error{Op: "doing it", Node: "hsm:443", Status: status, Message: message, State: State(state)}
		if text := e.Error(); !strings.HasPrefix(text, "doing it at hsm:443: ") || strings.ContainsAny(text, "\n\r\x00\x1b") {
			t.Errorf("text = %q", text)
		}
		meanings := 0
		for _, kind := range []error{
			hsm.ErrNotFound, hsm.ErrExists, hsm.ErrLocked, hsm.ErrUnavailable, hsm.ErrForbidden, hsm.ErrUnsupported, hsm.ErrCiphertext,
			ErrRequest,
		} {
			if errors.Is(e, kind) {
				meanings++
			}
		}
		if meanings > 1 {
			t.Errorf("%v means %d things", e, meanings)
		}
	})
}

// What passes as PEM of a kind decodes as such.
func FuzzPEM(f *testing.F) {
	f.Add(pemCertificate, []byte(someCert+"\n\n"+someCert))
	f.Add(pemPublicKey, []byte(recorded(f, http.MethodGet, "/keys/rsa1/public.pem").Response.Body))
	f.Add(pemRequest, []byte(someCSR+"-----BEGIN CERTIFICATE REQUEST-----"))
	f.Add(pemRequest, []byte("text "+someCSR))
	f.Fuzz(func(t *testing.T, kind string, text []byte) {
		if checkPEM(kind, text) != nil {
			return
		}
		for rest := text; ; {
			block, after := pem.Decode(rest)
			if block == nil {
				if strings.TrimSpace(string(rest)) != "" {
					t.Errorf("%q is left", rest)
				}
				return
			}
			if block.Type != kind {
				t.Errorf("a %q passed as %q", block.Type, kind)
			}
			rest = after
		}
	})
}
