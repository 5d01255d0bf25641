package autounseal

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestServeAndThoseWhoMeanHarm asks one server everything that somebody asks who has a token, or none, and means harm. The
// server is the same process in the end, and has said nothing that it must not.
func TestServeAndThoseWhoMeanHarm(t *testing.T) {
	host := vaulttest.NewHost(t)
	host.WithToken(t, pkcs11test.SoftHSM(t))
	s := serveOn(t, host, "client_ca_file = \"serve-ca.pem\"\n client_certificates = \"optional\"")
	host.Must(t, "key", "generate", "ours", "--device", "hsm", "--algorithm", "rsa-2048", "--label", "shared")
	host.Must(t, "key", "adopt", "theirs", "--device", "hsm", "--label", "shared", "--accept-weak-key")
	for _, key := range []string{"ours", "theirs"} {
		s.keepRecord(t, key)
	}
	ours, theirs := s.key(t, "ours"), s.key(t, "theirs")
	certified := s.key(t, "ours", "--certificate-name", "vault-1.example.org")
	elsewhere := s.key(t, "ours", "--address", "192.0.2.0/24")
	s.run(t)
	s.served(t, ours)
	s.served(t, theirs)
	process := s.Running.Process(t)
	slow := dawdlers(t, s, ours)

	// Each is named, sent, and answered with a code and words.
	mine := encrypts(t, ours, "the root key")
	refused := func(name string, seal vaulttest.Seal, path string, fields vaulttest.Fields, code int, words ...string) {
		t.Run(name, func(t *testing.T) {
			got := call(t, seal, http.MethodPut, path, fields)
			if got.Code != code || len(got.Errors) == 0 && code != http.StatusNotFound || got.Data != nil {
				t.Errorf("it is answered with %d %s, not refused with %d", got.Code, got.Raw, code)
			}
			for _, word := range words {
				if !strings.Contains(strings.Join(got.Errors, "\n"), word) {
					t.Errorf("%q is missing in %s", word, got.Raw)
				}
			}
			silent(t, "the answer", string(got.Raw), ours.Token, theirs.Token)
		})
	}
	ciphertext := func(text string) vaulttest.Fields { return vaulttest.Fields{"ciphertext": text} }
	sealing := vaulttest.Fields{"plaintext": "YQ=="}
	const invalid = "invalid ciphertext"
	refused("a ciphertext of Vault's own transit", ours, "transit/decrypt/ours",
		ciphertext("vault:v1:"+base64.StdEncoding.EncodeToString(noise(60))), http.StatusBadRequest, invalid)
	refused("another cluster's ciphertext, of the same HSM key", ours, "transit/decrypt/ours",
		ciphertext(encrypts(t, theirs, "their root key")), http.StatusBadRequest, invalid)
	refused("the same, asked for by its own name with a token that is not for it", ours, "transit/decrypt/theirs",
		ciphertext(encrypts(t, theirs, "their root key")), http.StatusForbidden, "permission denied")
	refused("a ciphertext whose version was changed", ours, "transit/decrypt/ours",
		ciphertext(strings.Replace(mine, ":v1:", ":v2:", 1)), http.StatusBadRequest, invalid)
	must(t, os.Mkdir(s.File("files"), 0o700))
	s.Set(t, `store "files"`, "type = \"file\"\n dir = \"files\"")
	s.Put(t, "secret", []byte("an unseal key"))
	refused("an envelope that the same key made for material", ours, "transit/decrypt/ours",
		ciphertext("vault:v1:"+base64.StdEncoding.EncodeToString(materialOf(t, s, "ours"))), http.StatusBadRequest, invalid)
	refused("an envelope that the same key made for people", ours, "transit/decrypt/ours",
		ciphertext("vault:v1:"+base64.StdEncoding.EncodeToString(wrapOf(t, s, "ours"))), http.StatusBadRequest, invalid)
	refused("the authentication key of the key record", ours, "transit/decrypt/ours",
		ciphertext("vault:v1:"+base64.StdEncoding.EncodeToString(authKeyOf(t, s, "ours"))), http.StatusBadRequest, invalid)
	refused("no token", s.with("", "ours"), "transit/encrypt/ours", sealing, http.StatusForbidden, "permission denied")
	refused("a token that is nobody's", s.with(tampered(ours.Token), "ours"), "transit/encrypt/ours", sealing,
		http.StatusForbidden, "permission denied")
	refused("a key that there is not", ours, "transit/encrypt/other", sealing, http.StatusForbidden, "permission denied")
	refused("another mount", ours, "transit2/encrypt/ours", vaulttest.Fields{"plaintext": "YQ=="}, http.StatusNotFound)
	refused("a batch", ours, "transit/encrypt/ours", vaulttest.Fields{"batch_input": []any{vaulttest.Fields{"plaintext": "YQ=="}}},
		http.StatusBadRequest, "batch_input")
	refused("a context, which would have to be bound", ours, "transit/encrypt/ours", vaulttest.Fields{"plaintext": "YQ==", "context": "YQ=="},
		http.StatusBadRequest, "context")
	refused("a value larger than an envelope holds", ours, "transit/encrypt/ours", vaulttest.Fields{"plaintext": noise(65 << 10)},
		http.StatusBadRequest)
	refused("a body larger than any request", ours, "transit/encrypt/ours", vaulttest.Fields{"plaintext": noise(2 << 20)},
		http.StatusRequestEntityTooLarge)

	refused("a token that is bound to another address", elsewhere, "transit/encrypt/ours", sealing, http.StatusForbidden, "permission denied")
	refused("a token that is bound to a certificate, without it", certified, "transit/encrypt/ours", sealing, http.StatusForbidden, "permission denied")
	refused("the same, with another certificate", withCertificate(t, certified, s.Authority, "vault-2.example.org"), "transit/encrypt/ours", sealing,
		http.StatusForbidden, "permission denied")
	t.Run("the same, with its own", func(t *testing.T) {
		seal := withCertificate(t, certified, s.Authority, "vault-1.example.org")
		must(t, opens(t, seal, encrypts(t, seal, "a"), "a"))
	})
	t.Run("a certificate that nobody vouches for is no way in", func(t *testing.T) {
		seal := withCertificate(t, certified, vaulttest.NewAuthority(t), "vault-1.example.org")
		client := httpClient(t, seal)
		defer client.CloseIdleConnections()
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.Address+"/v1/sys/health", nil)
		must(t, err)
		if response, err := client.Do(request); err == nil {
			_ = response.Body.Close()
			t.Errorf("it is answered with %s", response.Status)
		}
	})

	t.Run("10,000 random and mutated requests", func(t *testing.T) { mutants(t, s, ours, theirs, mine) })
	t.Run("what is no HTTP", func(t *testing.T) { noHTTP(t, s, ours) })
	t.Run("a Vault that shows a certificate is unsealed all the while", func(t *testing.T) {
		seal := withCertificate(t, certified, s.Authority, "vault-1.example.org")
		vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}, Storage: vaulttest.InMem})
	})
	t.Run("clients that do not come to an end are left", func(t *testing.T) {
		for i, conn := range slow {
			if i%dawdling == inBody {
				continue // it has half a minute, which no test waits for
			}
			must(t, conn.SetReadDeadline(time.Now().Add(vaulttest.Patience)))
			if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal("one is still waited for")
			}
		}
	})

	// It has survived, and serves.
	must(t, opens(t, ours, mine, "the root key"))
	s.healthy(t)
	if now := s.Running.Process(t); now != process || !now.Alive() {
		t.Errorf("the process was %v and is %v", process, now)
	}
	log := s.Running.Log.String()
	for _, word := range []string{"panic", "goroutine ", "runtime error", "nil pointer"} {
		if strings.Contains(log, word) {
			t.Errorf("its log says %q", word)
		}
	}
	silent(t, "its log", log, ours.Token, theirs.Token, "the root key", vaulttest.Base64("the root key"))
}

// withCertificate is a stanza with a client certificate for a name.
func withCertificate(t testing.TB, seal vaulttest.Seal, authority *vaulttest.Authority, name string) vaulttest.Seal {
	t.Helper()
	dir := t.TempDir()
	certificate, key := authority.Issue(t, name)
	seal.ClientCert, seal.ClientKey = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	must(t, os.WriteFile(seal.ClientCert, certificate, 0o600))
	must(t, os.WriteFile(seal.ClientKey, key, 0o600))
	return seal
}

// silent fails the test where a text holds what nobody may read.
func silent(t testing.TB, what, text string, secrets ...string) {
	t.Helper()
	for _, secret := range secrets {
		if strings.Contains(text, secret) || strings.Contains(text, secret[strings.LastIndex(secret, ".")+1:]) {
			t.Errorf("%s holds a secret", what)
		}
	}
}

func noise(size int) []byte {
	made := make([]byte, size)
	_, _ = rand.Read(made) // never fails
	return made
}

// tampered is a token with the id of another and another secret.
func tampered(token string) string {
	last := byte('A')
	if token[len(token)-2] == last {
		last = 'B'
	}
	return token[:len(token)-2] + string(last) + token[len(token)-1:]
}

// materialOf seals a file as material and returns the envelope.
func materialOf(t testing.TB, s *serve, key string) []byte {
	t.Helper()
	s.Must(t, "material", "put", "eu", "share", "share="+s.File("secret"), "--key", key, "--store", "files")
	return envelopeUnder(t, s.File("files"))
}

// wrapOf seals the same file for people.
func wrapOf(t testing.TB, s *serve, key string) []byte {
	t.Helper()
	return []byte(s.Must(t, "wrap", key, "--in", s.File("secret")))
}

// authKeyOf is the envelope of the version's authentication key, as the key record shows it to everybody.
func authKeyOf(t testing.TB, s *serve, key string) []byte {
	t.Helper()
	shown := vaulttest.Decode[struct {
		Versions []struct {
			AuthEnvelope json.RawMessage `json:"auth_envelope"`
		} `json:"versions"`
	}](t, s.Must(t, "key", "backup", key))
	return shown.Versions[0].AuthEnvelope
}

// envelopeUnder finds the envelope in a folder of a file store: each file is a line and then the value.
func envelopeUnder(t testing.TB, dir string) (found []byte) {
	t.Helper()
	must(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		content, err := os.ReadFile(path)
		if _, value, ok := bytes.Cut(content, []byte("\n")); ok && bytes.Contains(value, []byte(`"protected"`)) {
			found = value
		}
		return err
	}))
	if found == nil {
		t.Fatalf("there is no envelope under %s", dir)
	}
	return found
}

// The mutants are made of what a seal sends.
const (
	mutantCount   = 10_000
	mutantClients = 8
	mutantSeed    = 20260923
)

// mutants sends requests that are nearly right. None may be answered with 5xx but for 503, nor with another value than the
// one that was sealed.
func mutants(t *testing.T, s *serve, ours, theirs vaulttest.Seal, ciphertext string) {
	t.Helper()
	texts := map[string]string{ciphertext: vaulttest.Base64("the root key")}
	var mu sync.Mutex
	answers := map[int]int{}
	trust := httpClient(t, ours)
	defer trust.CloseIdleConnections()
	trust.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	var all sync.WaitGroup
	for worker := range mutantClients {
		all.Go(func() {
			m := &mutator{
				Rand: mathrand.New(mathrand.NewPCG(mutantSeed, uint64(worker))),
				ours: ours, theirs: theirs, ciphertext: ciphertext,
			}
			for n := 0; n < mutantCount/mutantClients; {
				request := m.request(t.Context(), s.Address)
				what := fmt.Sprintf("worker %d, request %d, %s %q", worker, n, request.Method, request.URL.Opaque)
				response, err := trust.Do(request)
				if isClientSide(err) { // it finds the request impossible: another one is made
					continue
				}
				if err != nil {
					t.Errorf("%s: %v", what, err)
					return
				}
				n++
				raw, err := io.ReadAll(response.Body)
				_ = response.Body.Close()
				if err != nil {
					t.Errorf("%s: reading the answer: %v", what, err)
				}
				mu.Lock()
				answers[response.StatusCode]++
				mu.Unlock()
				m.judge(t, what, response, raw, texts)
			}
		})
	}
	all.Wait()
	t.Logf("answers: %v", answers)
	for _, code := range []int{
		http.StatusOK, http.StatusBadRequest, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed,
	} {
		if answers[code] < mutantCount/50 {
			t.Errorf("too few of the requests are answered with %d: they are not what they should be", code)
		}
	}
}

// isClientSide tells whether a request never left.
func isClientSide(err error) bool {
	if err == nil {
		return false
	}
	for _, text := range []string{"invalid header field", "invalid method", "invalid URL", "malformed"} {
		if strings.Contains(err.Error(), text) {
			return true
		}
	}
	return false
}

// mutator makes requests out of right ones.
type mutator struct {
	*mathrand.Rand
	ours, theirs vaulttest.Seal
	ciphertext   string
}

func pick[T any](m *mutator, from ...T) T { return from[m.IntN(len(from))] }

func (m *mutator) once(n int) bool { return m.IntN(n) == 0 }

// request makes the next one.
func (m *mutator) request(ctx context.Context, address string) *http.Request {
	method, path, body := m.right()
	switch m.IntN(8) {
	case 0:
		method = pick(m, http.MethodGet, http.MethodHead, http.MethodDelete, http.MethodPatch, http.MethodOptions, http.MethodTrace, "LIST", "PUTT", "put")
	case 1:
		path = m.path(path)
	case 2:
		body = noiseOf(m, m.IntN(300))
	case 3, 4, 5:
		for range 1 + m.IntN(3) {
			body = m.body(body)
		}
	}
	var reader io.Reader = bytes.NewReader(body)
	if m.once(10) {
		reader = io.MultiReader(reader) // of unknown length: chunked
	}
	request, err := http.NewRequestWithContext(ctx, method, address, reader)
	if err != nil { // a method that is none, by Go's book
		request, _ = http.NewRequestWithContext(ctx, http.MethodPut, address, reader)
	}
	request.URL.Opaque = "//" + request.URL.Host + path // as it is written
	request.Header.Set("X-Vault-Request", "true")
	request.Header.Set("X-Vault-Token", m.ours.Token)
	if m.once(5) {
		m.header(request)
	}
	return request
}

// right is a request of a seal, or of a probe.
func (m *mutator) right() (method, path string, body []byte) {
	method = pick(m, http.MethodPut, http.MethodPut, http.MethodPost)
	switch m.IntN(7) {
	case 0:
		return method, "/v1/auth/token/renew-self", []byte(`{"increment":0}`)
	case 1:
		return http.MethodGet, "/v1/auth/token/lookup-self", nil
	case 2:
		return http.MethodGet, "/v1/sys/health", nil
	case 3:
		return method, "/v1/transit/encrypt/ours", []byte(`{"plaintext":"YQ=="}`)
	default:
		return method, "/v1/transit/decrypt/ours", []byte(`{"ciphertext":"` + m.ciphertext + `"}`)
	}
}

func (m *mutator) path(path string) string {
	switch m.IntN(12) {
	case 0:
		return path + "/"
	case 1:
		return strings.Replace(path, "/", "//", 1+m.IntN(3))
	case 2:
		return strings.Replace(path, "ours", "theirs", 1)
	case 3:
		return strings.Replace(path, "ours", pick(m, "..", "../decrypt/theirs", "%2e%2e", "ours%00", "ours%2ftheirs", "OURS", "%6furs", "öurs", "ours;a=b", "*"), 1)
	case 4:
		return path + "?" + pick(m, "list=true", "help=1", "sealedcode=500", "sealedcode=99999", "sealedcode=x&sealedcode=200", "uninitcode=501", "standbyok=%zz", "a[]=1")
	case 5:
		return strings.ToUpper(path)
	case 6:
		return path[:m.IntN(len(path))]
	case 7:
		return "/v1/" + string(letters(m, 1+m.IntN(2000)))
	case 8:
		return strings.Replace(path, "/v1/", pick(m, "/v2/", "/", "/v1/../v1/", "/v1/ns1/", "/v1/./"), 1)
	case 9:
		return strings.Replace(path, "transit", pick(m, "sys", "auth/token", "transit/keys", "transit%2fencrypt", "cubbyhole"), 1)
	case 10:
		return "/v1/" + pick(m, "sys/seal", "sys/unseal", "sys/mounts", "sys/init", "transit/keys/ours", "transit/rewrap/ours", "transit/datakey/plaintext/ours", "transit/export/encryption-key/ours", "metrics", "debug/pprof/")
	default:
		return path + string(letters(m, m.IntN(20)))
	}
}

func (m *mutator) header(request *http.Request) {
	switch m.IntN(12) {
	case 0:
		request.Header.Del("X-Vault-Token")
	case 1:
		request.Header.Set("X-Vault-Token", m.theirs.Token)
	case 2:
		request.Header.Add("X-Vault-Token", m.theirs.Token) // twice
	case 3:
		token := []byte(m.ours.Token)
		token[m.IntN(len(token))] ^= byte(1 << m.IntN(7))
		request.Header.Set("X-Vault-Token", string(token))
	case 4:
		request.Header.Set("X-Vault-Token", m.ours.Token[:m.IntN(len(m.ours.Token))])
	case 5:
		request.Header.Del("X-Vault-Token")
		request.Header.Set("Authorization", pick(m, "Bearer ", "Basic ", "")+m.ours.Token)
	case 6:
		request.Header.Set("X-Vault-Token", string(letters(m, m.IntN(9000))))
	case 7:
		request.Header.Set("X-Vault-Namespace", pick(m, "ns1/", "root", "../..", "/"))
	case 8:
		request.Header.Set("Content-Type", pick(m, "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/xml", ";;;"))
	case 9:
		request.Header.Set("Content-Encoding", pick(m, "gzip", "br", "x"))
	case 10:
		request.Header.Set(pick(m, "X-Vault-Wrap-TTL", "X-Forwarded-For", "X-Http-Method-Override", "Range", "If-Match", "Upgrade"), pick(m, "1", "127.0.0.1", "DELETE", "bytes=0-0", "*", "h2c"))
	default:
		for range m.IntN(50) {
			request.Header.Add("X-"+string(letters(m, 1+m.IntN(8))), string(letters(m, m.IntN(200))))
		}
	}
}

// body changes what a seal would send.
func (m *mutator) body(body []byte) []byte {
	body = slices.Clone(body)
	switch at := m.IntN(len(body) + 1); m.IntN(14) {
	case 0: // a bit
		if at < len(body) {
			body[at] ^= byte(1 << m.IntN(8))
		}
	case 1:
		return body[:at]
	case 2:
		return append(body, noiseOf(m, m.IntN(20))...)
	case 3:
		return slices.Insert(body, at, noiseOf(m, 1+m.IntN(10))...)
	case 4:
		return append(body, body...)
	case 5: // other types
		return bytes.Replace(body, []byte(`":"`), []byte(pick(m, `":["`, `":{"a":"`, `":1e999,"a":"`, `":null,"a":"`, `":true,"`)), 1)
	case 6: // once more, differently
		return bytes.Replace(body, []byte("{"), []byte(pick(m, `{"ciphertext":"vault:v1:AAAA",`, `{"plaintext":"QQ==",`, `{"ciphertext":null,`, `{"Ciphertext":"x",`)), 1)
	case 7:
		return bytes.Replace(body, []byte("{"), []byte(pick(m,
			`{"batch_input":[{"plaintext":"YQ=="}],`, `{"context":"YQ==",`, `{"nonce":"AAAA",`, `{"key_version":2,`, `{"associated_data":"YQ==",`, `{"unknown":{"a":[1,2,3]},`)), 1)
	case 8:
		return slices.Concat(bytes.Repeat([]byte(pick(m, "[", `{"a":`)), 1+m.IntN(10_000)), body)
	case 9: // the ciphertext's own parts
		return bytes.Replace(body, []byte("vault:v1:"), []byte(pick(m, "vault:v2:", "vault:v0:", "vault:v-1:", "vault:v99999999999999999999:", "vault:v01:", "vault:", "v1:", "vault:v1::", "VAULT:V1:", "vault:v1:AAAA")), 1)
	case 10: // the envelope
		return m.envelope(body)
	case 11:
		return bytes.Replace(body, []byte(":"), []byte(pick(m, " : ", "\t:\n", ":\x00", "\\u003a")), 1)
	case 12:
		return []byte(pick(m, "", "null", "[]", "{}", `""`, "0", "true", "{", `{"plaintext":""}`, `{"ciphertext":""}`, `{"plaintext":"===="}`, `{"plaintext":"YQ"}`, `{"plaintext":"Y Q=="}`, "\xef\xbb\xbf{}", `{"plaintext":"YQ==\n"}`))
	default: // some text, escaped
		return bytes.ReplaceAll(body, []byte("a"), []byte(pick(m, `\u0061`, `\ud800`, `\ud83d\ude00`, `\x61`, `\u00`)))
	}
	return body
}

// envelope changes something in the JSON of the envelope itself, where there is one, and encodes it again.
func (m *mutator) envelope(body []byte) []byte {
	_, encoded, found := bytes.Cut(body, []byte("vault:v1:"))
	encoded, _, closed := bytes.Cut(encoded, []byte(`"`))
	raw, err := base64.StdEncoding.DecodeString(string(encoded))
	if !found || !closed || err != nil || len(raw) == 0 {
		return body
	}
	var members map[string]any
	if m.once(2) && json.Unmarshal(raw, &members) == nil {
		switch name := pick(m, "protected", "encrypted_key", "iv", "ciphertext", "tag", "unprotected", "aad", "recipients", "header"); m.IntN(4) {
		case 0:
			delete(members, name)
		case 1:
			members[name] = ""
		case 2:
			members[name] = base64.RawURLEncoding.EncodeToString(noiseOf(m, m.IntN(400)))
		default:
			members[name] = pick[any](m, nil, 1, []any{}, map[string]any{"kid": "x"}, true)
		}
		raw, _ = json.Marshal(members)
	} else {
		raw[m.IntN(len(raw))] ^= byte(1 << m.IntN(8))
	}
	return slices.Concat([]byte(`{"ciphertext":"vault:v1:`), []byte(base64.StdEncoding.EncodeToString(raw)), []byte(`"}`))
}

// judge looks at an answer.
func (m *mutator) judge(t *testing.T, what string, response *http.Response, raw []byte, texts map[string]string) {
	t.Helper()
	var got answered
	code := response.StatusCode
	head := response.Request.Method == http.MethodHead
	switch err := json.Unmarshal(raw, &got); {
	case code >= http.StatusInternalServerError && code != http.StatusServiceUnavailable:
		t.Errorf("%s is answered with %d %.200s", what, code, raw)
	case code == http.StatusServiceUnavailable && response.Header.Get("Retry-After") == "" && !strings.Contains(what, "sys/health"):
		t.Errorf("%s is answered with 503 and no Retry-After: %.200s", what, raw)
	case code != http.StatusOK && code < http.StatusBadRequest:
		t.Errorf("%s is answered with %d %.200s", what, code, raw)
	case head && len(raw) > 0:
		t.Errorf("%s: an answer to HEAD has a body", what)
	case head || code == http.StatusRequestHeaderFieldsTooLarge: // that is net/http's own
	case err != nil:
		t.Errorf("%s is answered with %d and no JSON: %.200s", what, code, raw)
	case code >= http.StatusBadRequest && !strings.Contains(string(raw), `"errors"`):
		t.Errorf("%s is refused with %d and no word: %.200s", what, code, raw)
	}
	// What opens is what was sealed: the one text, or the letter that other requests of ours have sealed.
	if opened, is := got.Data["plaintext"].(string); is && opened != texts[m.ciphertext] {
		t.Errorf("%s opens another value", what)
	}
	if !strings.Contains(what, "/v1/auth/token/renew-self") {
		silent(t, "the answer to "+what, string(raw), m.ours.Token, m.theirs.Token) // a renewal gives the token back that was sent
	}
}

func noiseOf(m *mutator, size int) []byte {
	made := make([]byte, size)
	for i := range made {
		made[i] = byte(m.Uint32())
	}
	return made
}

func letters(m *mutator, size int) []byte {
	made := make([]byte, size)
	for i := range made {
		made[i] = byte('!' + m.IntN('~'-'!'))
		if strings.IndexByte(`%"<>\^`+"`{|}", made[i]) >= 0 {
			made[i] = 'a'
		}
	}
	return made
}

// noHTTP writes what is no request, or two at once. Afterwards the connection is closed, or refused with 4xx: nothing hangs.
func noHTTP(t *testing.T, s *serve, ours vaulttest.Seal) {
	t.Helper()
	right := "PUT /v1/auth/token/renew-self HTTP/1.1\r\nHost: x\r\nX-Vault-Token: " + ours.Token + "\r\n"
	for name, text := range map[string]string{
		"noise":                           string(noise(2000)),
		"HTTP/0.9":                        "GET /\r\n\r\n",
		"no host":                         "GET /v1/sys/health HTTP/1.1\r\n\r\n",
		"two lengths":                     right + "Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
		"a length and chunks":             right + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
		"a length that is none":           right + "Content-Length: -1\r\n\r\n{}",
		"a length beyond all":             right + "Content-Length: 99999999999999999999\r\n\r\n{}",
		"a chunk that is none":            right + "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
		"a header without an end":         right + "X: " + strings.Repeat("a", 2<<20),
		"a header with a line of its own": right + "X: a\r\n b\x00c\r\n\r\n",
		"the preface of HTTP/2":           "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + string(noise(200)),
		"an absolute address elsewhere":   strings.Replace(right, "/v1/auth", "http://169.254.169.254/v1/auth", 1) + "\r\n",
		"CONNECT":                         "CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1:22\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			conn := dialTLS(t, s)
			must(t, conn.SetDeadline(time.Now().Add(vaulttest.Patience)))
			_, _ = io.WriteString(conn, text) // it may close before the end
			_ = conn.CloseWrite()
			answer, err := io.ReadAll(conn)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("nothing came of it: %.200q", answer)
			}
			// 501 and 505 are net/http's own words for a protocol that it does not speak.
			if bytes.HasPrefix(answer, []byte("HTTP/1.1 500")) || bytes.HasPrefix(answer, []byte("HTTP/1.1 502")) {
				t.Errorf("it is answered with %.200q", answer)
			}
			silent(t, "the answer", string(bytes.ReplaceAll(answer, []byte(`"client_token":"`+ours.Token), nil)), ours.Token)
		})
	}
	t.Run("no TLS", func(t *testing.T) {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", strings.TrimPrefix(s.Address, "https://"))
		must(t, err)
		defer conn.Close()
		must(t, conn.SetDeadline(time.Now().Add(vaulttest.Patience)))
		_, _ = io.WriteString(conn, right+"\r\n")
		if answer, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) || bytes.Contains(answer, []byte("client_token")) {
			t.Errorf("%v, %.200q", err, answer)
		}
	})
	t.Run("TLS 1.1", func(t *testing.T) {
		config := s.trust()
		config.MinVersion, config.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
		dialer := tls.Dialer{Config: config}
		if conn, err := dialer.DialContext(t.Context(), "tcp", strings.TrimPrefix(s.Address, "https://")); err == nil {
			_ = conn.Close()
			t.Error("it is spoken")
		}
	})
}

func dialTLS(t testing.TB, s *serve) *tls.Conn {
	t.Helper()
	dialer := tls.Dialer{Config: s.trust()}
	conn, err := dialer.DialContext(t.Context(), "tcp", strings.TrimPrefix(s.Address, "https://"))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*tls.Conn)
}

// Where a dawdler stays.
const (
	inHeaders = iota
	inBody
	silence
	dawdling // how many places there are
)

// dawdlers hold many connections with requests that do not come to an end. Others are served meanwhile.
func dawdlers(t *testing.T, s *serve, ours vaulttest.Seal) (conns []*tls.Conn) {
	t.Helper()
	for i := range 300 {
		text := "PUT /v1/transit/encrypt/ours HTTP/1.1\r\nHost: x\r\n"
		switch i % dawdling {
		case inHeaders:
		case inBody:
			text += "X-Vault-Token: " + ours.Token + "\r\nContent-Length: 100\r\n\r\n{"
		case silence:
			text = ""
		}
		conn := dialTLS(t, s)
		_, err := io.WriteString(conn, text)
		must(t, err)
		conns = append(conns, conn)
	}
	return conns
}
