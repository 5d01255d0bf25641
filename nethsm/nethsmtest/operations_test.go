package nethsmtest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"mime/multipart"
	"net/http"
	"strings"
	"testing"
)

// addRSA makes an RSA key with some mechanisms and returns its public half.
func addRSA(t *testing.T, h *HSM, id string, mechanisms ...string) *rsa.PublicKey {
	t.Helper()
	_, public, err := h.AddKey(Key{ID: id, Mechanisms: mechanisms})
	if err != nil {
		t.Fatal(err)
	}
	key, ok := public.(*rsa.PublicKey)
	if !ok {
		t.Fatalf("the public key is a %T", public)
	}
	return key
}

func TestEveryWayToDecrypt(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/keys/all/decrypt"
	key := addRSA(t, h, "all", mechanismsOf(typeRSA)...)
	plain := []byte("sixteen bytes 12")
	for mode := range decryptModes {
		if mode == "AES_CBC" {
			continue
		}
		t.Run(mode, func(t *testing.T) {
			want := plain
			var block []byte
			var err error
			switch mode {
			case "RAW":
				want = append(make([]byte, key.Size()-len(plain)), plain...)
				block = new(big.Int).Exp(new(big.Int).SetBytes(plain), big.NewInt(int64(key.E)), key.N).Bytes()
			case "PKCS1":
				block, err = rsa.EncryptPKCS1v15(rand.Reader, key, plain) //nolint:staticcheck // a mechanism of the original
			default:
				block, err = rsa.EncryptOAEP(hashes[strings.TrimPrefix(mode, "OAEP_")].New(), rand.Reader, key, plain, nil)
			}
			if err != nil {
				t.Fatal(err)
			}
			body := c.must(200, "POST", url, operatorLogin, fmt.Sprintf(`{"mode":%q,"encrypted":%q}`, mode, b64(block)))
			if got := decrypted(t, body); !bytes.Equal(got, want) {
				t.Errorf("got %x, want %x", got, want)
			}
		})
	}
	for name, test := range map[string]struct {
		mode   string
		block  []byte
		status int
		answer string
	}{
		"a raw zero throws":               {"RAW", make([]byte, 256), 503, ""},
		"a raw number above the modulus":  {"RAW", bytes.Repeat([]byte{0xff}, 256), 400, `{"message":"Decryption failure"}`},
		"a block that is too long":        {"OAEP_SHA256", make([]byte, 257), 400, `{"message":"Decryption failure"}`},
		"a block of nothing":              {"OAEP_SHA256", nil, 400, `{"message":"Decryption failure"}`},
		"AES on an RSA key":               {"AES_CBC", nil, 400, `{"message":"Key mechanisms do not allow requested decryption."}`},
		"padding that is not of this key": {"PKCS1", bytes.Repeat([]byte{1}, 256), 400, `{"message":"Decryption failure"}`},
	} {
		t.Run(name, func(t *testing.T) {
			body := c.must(test.status, "POST", url, operatorLogin, fmt.Sprintf(`{"mode":%q,"encrypted":%q}`, test.mode, b64(test.block)))
			if test.answer != "" && body != test.answer {
				t.Errorf("got %s", body)
			}
		})
	}
}

func TestEveryWayToSign(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/keys/"
	digest := sha256.Sum256([]byte("message"))
	signature := func(id, mode string, data []byte) []byte {
		t.Helper()
		body := c.must(200, "POST", url+id+"/sign", operatorLogin, fmt.Sprintf(`{"mode":%q,"message":%q}`, mode, b64(data)))
		var a struct{ Signature []byte }
		if err := json.Unmarshal([]byte(body), &a); err != nil {
			t.Fatal(err)
		}
		return a.Signature
	}
	rsaKey := addRSA(t, h, "rsa", mechanismsOf(typeRSA)...)
	pss := &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}
	if err := rsa.VerifyPSS(rsaKey, crypto.SHA256, digest[:], signature("rsa", "PSS_SHA256", digest[:]), pss); err != nil {
		t.Errorf("PSS: %v", err)
	}
	// For PKCS1 the client brings the DigestInfo.
	info := append([]byte{
		0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00, 0x04, 0x20,
	}, digest[:]...)
	if err := rsa.VerifyPKCS1v15(rsaKey, crypto.SHA256, digest[:], signature("rsa", "PKCS1", info)); err != nil {
		t.Errorf("PKCS1: %v", err)
	}
	for kind := range curves {
		_, public, err := h.AddKey(Key{ID: kind, Type: kind})
		if err != nil {
			t.Fatal(err)
		}
		key, ok := public.(*ecdsa.PublicKey)
		if !ok || !ecdsa.VerifyASN1(key, digest[:], signature(kind, "ECDSA", digest[:])) {
			t.Errorf("%s: the signature does not verify (%T)", kind, public)
		}
	}
	_, public, err := h.AddKey(Key{ID: "ed", Type: typeEd25519})
	if err != nil {
		t.Fatal(err)
	}
	key, ok := public.(ed25519.PublicKey)
	if !ok || !ed25519.Verify(key, []byte("message"), signature("ed", "EdDSA", []byte("message"))) {
		t.Errorf("Ed25519: the signature does not verify (%T)", public)
	}
	if _, _, err := h.AddKey(Key{ID: "aes", Type: typeGeneric}); err != nil {
		t.Fatal(err)
	}
	for id, mode := range map[string]string{"aes": "ECDSA", "ed": "ECDSA", "rsa": "EdDSA"} {
		body := c.must(400, "POST", url+id+"/sign", operatorLogin, fmt.Sprintf(`{"mode":%q,"message":"AAAA"}`, mode))
		if body != `{"message":"Key mechanisms do not allow requested signing."}` {
			t.Errorf("%s by %s: %s", mode, id, body)
		}
	}
}

func TestKeysComeInFromOutside(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/keys"
	private, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	number := func(n *big.Int) string { return b64(n.Bytes()) }
	parts := fmt.Sprintf(`{"mechanisms":["RSA_Decryption_OAEP_SHA256"],"type":"RSA","private":{"primeP":%q,"primeQ":%q,`+
		`"publicExponent":%q},"restrictions":{"tags":["t1"]},"label":"imported"}`,
		number(private.Primes[0]), number(private.Primes[1]), number(big.NewInt(int64(private.E))))
	c.must(204, "PUT", url+"/brought", adminLogin, parts)
	if body := c.must(400, "PUT", url+"/brought", adminLogin, parts); body != `{"message":"Key with id brought already exists"}` {
		t.Errorf("the second time: %s", body)
	}
	body := c.must(200, "GET", url+"/brought", adminLogin, "")
	if !strings.Contains(body, number(private.N)) || !strings.Contains(body, `"label":"imported"`) {
		t.Errorf("the imported key is %s", body)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := ec.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	body = c.must(201, "POST", url, adminLogin,
		fmt.Sprintf(`{"mechanisms":["ECDSA_Signature"],"type":"EC_P256","private":{"data":%q}}`, b64(raw)))
	var made idItem
	if err := json.Unmarshal([]byte(body), &made); err != nil || len(made.ID) != 20 {
		t.Fatalf("got %s", body)
	}
	block, _ := pem.Decode([]byte(c.must(200, "GET", url+"/"+made.ID+"/public.pem", operatorLogin, "")))
	if public, err := x509.ParsePKIXPublicKey(block.Bytes); err != nil || !ec.PublicKey.Equal(public) {
		t.Errorf("the public key is another one (%v)", err)
	}
	// A PEM file in a form.
	var form bytes.Buffer
	w := multipart.NewWriter(&form)
	for name, content := range map[string]string{
		"arguments": `{"mechanisms":["RSA_Decryption_RAW"]}`,
		"key_file":  string(encodePEM("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(private))),
	} {
		if err := w.WriteField(name, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, url+"/from-a-file", &form)
	if err != nil {
		t.Fatal(err)
	}
	r.SetBasicAuth(AdminUser, AdminPassphrase)
	r.Header.Set("Content-Type", w.FormDataContentType())
	answer, err := c.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusNoContent {
		t.Errorf("importing a PEM file: HTTP %d", answer.StatusCode)
	}
	if body := c.must(200, "GET", url+"/from-a-file", adminLogin, ""); !strings.Contains(body, number(private.N)) {
		t.Errorf("the key from the file is %s", body)
	}
	if body := c.must(400, "PUT", url+"/p224", adminLogin,
		`{"mechanisms":["ECDSA_Signature"],"type":"EC_P224","private":{"data":"AAAA"}}`); body != `{"message":"P224 is unsupported"}` {
		t.Errorf("P-224: %s", body)
	}
}

func TestKeysAreListedLabelledAndMoved(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/keys"
	for _, k := range []Key{
		{ID: "app.one", Type: typeGeneric, Label: "first"},
		{ID: "app.two", Type: typeGeneric, Tags: []string{"t1"}},
		{ID: "other", Type: typeGeneric},
	} {
		if _, _, err := h.AddKey(k); err != nil {
			t.Fatal(err)
		}
	}
	for query, want := range map[string]string{
		"":             `[{"id":"app.one"},{"id":"app.two"},{"id":"other"}]`,
		"/app.*":       `[{"id":"app.one"},{"id":"app.two"}]`,
		"?label=first": `[{"id":"app.one"}]`,
		"?label=none":  `[]`,
		"?filter=":     `[{"id":"app.one"},{"id":"other"}]`,
	} {
		if got := c.must(200, "GET", url+query, operatorLogin, ""); got != want {
			t.Errorf("GET /keys%s: %s, want %s", query, got, want)
		}
	}
	c.must(400, "GET", url+"/*", adminLogin, "")
	c.must(304, "PUT", url+"/app.one/label", adminLogin, `{"label":"first"}`)
	c.must(204, "PUT", url+"/app.one/label", adminLogin, `{"label":"second"}`)
	c.must(400, "PUT", url+"/app.one/label", adminLogin, `{"label":"`+strings.Repeat("x", 33)+`"}`)
	c.must(204, "DELETE", url+"/app.one/label", adminLogin, "")
	if body := c.must(200, "GET", url+"/app.one", adminLogin, ""); strings.Contains(body, "label") {
		t.Errorf("the label stays: %s", body)
	}
	if body := c.must(200, "POST", url+"/app.one/move", adminLogin, `{"newId":"moved"}`); body != `{"id":"moved"}` {
		t.Errorf("moving answered %s", body)
	}
	c.must(409, "POST", url+"/moved/move", adminLogin, `{"newId":"other"}`)
	c.must(404, "POST", url+"/app.one/move", adminLogin, `{"newId":"again"}`)
	c.must(204, "PUT", url+"/moved/restrictions/tags/t2", adminLogin, `{}`)
	c.must(304, "PUT", url+"/moved/restrictions/tags/t2", adminLogin, `{}`)
	c.must(403, "POST", url+"/moved/encrypt", operatorLogin, `{"mode":"AES_CBC","message":"AAAAAAAAAAAAAAAAAAAAAA=="}`)
	c.must(204, "DELETE", url+"/moved/restrictions/tags/t2", adminLogin, "")
	c.must(404, "DELETE", url+"/moved/restrictions/tags/t2", adminLogin, "")
	c.must(200, "POST", url+"/moved/encrypt", operatorLogin, `{"mode":"AES_CBC","message":"AAAAAAAAAAAAAAAAAAAAAA=="}`)
}
