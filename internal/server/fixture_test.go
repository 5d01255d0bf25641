package server

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	nist "crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/monitor"
	"vault-plugin-secrets-nitrokey/internal/store/file"
	"vault-plugin-secrets-nitrokey/internal/token"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually polls until yes is true.
func eventually(t testing.TB, what string, yes func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !yes() {
		if time.Now().After(deadline) {
			t.Fatalf("it never came to this: %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

// log is what the server wrote to its log.
type log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *log) count(text string) int { return strings.Count(l.String(), text) }

// unit is an HSM in memory that does a bounded number of operations at one time, and tells of them.
type unit struct {
	*hsmtest.Memory

	name   string
	places chan struct{}

	mu    sync.Mutex
	hooks *Hooks
	err   error // why it cannot be opened
	hangs bool  // operations that begin now come to no end but their caller's
	hung  int   // how many of those there were
}

func newUnit(name string, parallel int) *unit {
	return &unit{Memory: hsmtest.NewMemory(), name: name, places: make(chan struct{}, parallel)}
}

func (u *unit) Name() string { return u.name }

// Device is what keyring and probes open.
func (u *unit) Device(context.Context) (hsm.Device, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.err != nil {
		return nil, u.err
	}
	return u, nil
}

// away takes the HSM away, or brings it back with nil.
func (u *unit) away(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.err = err
	u.SetError(err)
}

// hang has what begins from now on hang, or not, and returns how many operations do.
func (u *unit) hang(now bool) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hangs = now
	return u.hung
}

// hold lets no operation begin until it is given back: whatever asks meanwhile waits, however slow this machine is.
func (u *unit) hold() (giveBack func()) {
	for range cap(u.places) {
		u.places <- struct{}{}
	}
	return func() {
		for range cap(u.places) {
			<-u.places
		}
	}
}

func (u *unit) tell(hooks *Hooks) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hooks = hooks
}

// FindKeys implements hsm.Device.
func (u *unit) FindKeys(ctx context.Context, query hsm.KeyQuery) ([]hsm.Key, error) {
	keys, err := u.Memory.FindKeys(ctx, query)
	for i, key := range keys {
		if agreer, ok := key.(hsm.Agreer); ok {
			keys[i] = &unitKey{agreer, u}
		}
	}
	return keys, err
}

type unitKey struct {
	hsm.Agreer

	unit *unit
}

// Agree implements hsm.Agreer.
func (k *unitKey) Agree(ctx context.Context, peer *ecdh.PublicKey) (secret []byte, err error) {
	begun := time.Now()
	defer func() {
		k.unit.mu.Lock()
		defer k.unit.mu.Unlock()
		if k.unit.hooks != nil {
			k.unit.hooks.DeviceOperation(k.unit.name, "agree", time.Since(begun), err)
		}
	}()
	select {
	case k.unit.places <- struct{}{}:
		defer func() { <-k.unit.places }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	k.unit.mu.Lock()
	hangs := k.unit.hangs
	if hangs {
		k.unit.hung++
	}
	k.unit.mu.Unlock()
	if hangs {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return k.Agreer.Agree(ctx, peer)
}

// devices opens units by name.
type devices []*unit

// Device implements keyring.Devices.
func (d devices) Device(ctx context.Context, name string) (hsm.Device, error) {
	for _, u := range d {
		if u.name == name {
			return u.Device(ctx)
		}
	}
	return nil, keyring.ErrNoDevice
}

// world is what several servers share: HSMs, records, tokens.
type world struct {
	t       testing.TB
	dir     string
	units   devices
	keys    *keyring.Keyring // of an operator, who is another process
	records string
	tokens  *file.Store
	ca      *authority
	timing  timing // of the servers that start
}

// newWorld makes a world with one HSM that has one key, "prod", and two places.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), units: devices{newUnit("one", 2)}, ca: newAuthority(t), timing: usual()}
	w.records = filepath.Join(w.dir, "keyring")
	w.timing.memory = 0                                       // a test has other uses for it
	w.timing.header, w.timing.read = time.Minute, time.Minute // handshakes take what they take on a busy machine
	w.units[0].AddEC(t, "prod", "01", ecdh.P256())
	tokens, err := file.Open(filepath.Join(w.dir, "tokens"))
	must(t, err)
	w.tokens = tokens
	t.Cleanup(func() { must(t, tokens.Close()) })
	w.keys = w.keyring()
	w.adopt("prod")
	return w
}

// keyring opens the records as a process of its own does.
func (w *world) keyring() *keyring.Keyring {
	records, err := file.Open(w.records)
	must(w.t, err)
	keys := keyring.New(keyring.Config{Records: records, Devices: w.units, CacheRecords: true, SealAuthKeys: true})
	w.t.Cleanup(func() { must(w.t, keys.Close()); must(w.t, records.Close()) })
	return keys
}

// adopt makes a wrapping key of the HSM key with that label, and acknowledges what is to be acknowledged.
func (w *world) adopt(name string) { w.adoptAs(name, "prod") }

func (w *world) adoptAs(name, label string) { w.adoptAt(name, "one", label) }

// adoptElsewhere makes a wrapping key of a key of another HSM.
func (w *world) adoptElsewhere(name string, u *unit) {
	u.AddEC(w.t, name, "01", ecdh.P256())
	w.units = append(w.units, u)
	w.keys = w.keyring()
	w.adoptAt(name, u.name, name)
}

func (w *world) adoptAt(name, device, label string) {
	ctx := w.t.Context()
	_, err := w.keys.Adopt(ctx, name, keyring.AdoptRequest{Device: device, Label: label, By: "alice"})
	must(w.t, err)
	_, err = w.keys.Backup(ctx, name, "alice")
	must(w.t, err)
	yes := true
	_, err = w.keys.Configure(ctx, name, keyring.Settings{AcceptSingleHSM: &yes, By: "alice"})
	must(w.t, err)
}

// adopt2 makes a wrapping key of an HSM key of its own.
func (w *world) adopt2(name string) {
	w.units[0].AddEC(w.t, name, "02", ecdh.P256())
	w.adoptAs(name, name)
}

func (w *world) lease(name string, d time.Duration) {
	_, err := w.keys.Configure(w.t.Context(), name, keyring.Settings{Lease: &d, By: "alice"})
	must(w.t, err)
	_, err = w.keys.Backup(w.t.Context(), name, "alice")
	must(w.t, err)
}

// token makes a token.
func (w *world) token(spec token.Spec) string {
	w.t.Helper()
	if spec.Name == "" {
		spec.Name = "cluster"
	}
	if spec.Keys == nil {
		spec.Keys = []string{"prod"}
	}
	spec.By = "alice"
	_, text, err := token.Create(w.t.Context(), w.tokens, spec, nil)
	must(w.t, err)
	return string(text)
}

// authority signs certificates.
type authority struct {
	t      testing.TB
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(nist.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{t: t, cert: cert, key: key, serial: 1}
}

func (a *authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// issue makes a certificate for a name, good for a while, in PEM.
func (a *authority) issue(name string, lasts time.Duration) (chain, key []byte) {
	a.t.Helper()
	private, err := ecdsa.GenerateKey(nist.P256(), rand.Reader)
	must(a.t, err)
	a.serial++
	template := &x509.Certificate{
		SerialNumber: big.NewInt(a.serial), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lasts),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, private.Public(), a.key)
	must(a.t, err)
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	must(a.t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

func (a *authority) pair(name string) tls.Certificate {
	chain, key := a.issue(name, time.Hour)
	pair, err := tls.X509KeyPair(chain, key)
	must(a.t, err)
	return pair
}

// running is a server under test.
type running struct {
	t       testing.TB
	world   *world
	logged  *log
	told    *log // by systemd's protocol
	reload  chan os.Signal
	seal    chan os.Signal
	ready   chan struct{}
	ended   chan error
	stop    context.CancelFunc
	address chan string // of seals
	monitor chan string
	at      string
	about   string

	server *server

	mu     sync.Mutex
	change func(*Site) // of the next build
}

// start starts a server and waits until it listens. The change is made to its site.
func (w *world) start(change func(*Site)) *running {
	w.t.Helper()
	r := &running{
		t: w.t, world: w, logged: &log{}, told: &log{}, reload: make(chan os.Signal), seal: make(chan os.Signal), ready: make(chan struct{}),
		ended: make(chan error, 1), address: make(chan string, 8), monitor: make(chan string, 8), change: change,
	}
	chain, key := w.ca.issue("seal.example", time.Hour)
	must(w.t, os.WriteFile(w.file("tls.pem"), chain, 0o600))
	must(w.t, os.WriteFile(w.file("tls.key"), key, 0o600))
	ctx, stop := context.WithCancel(context.Background())
	r.stop = stop
	options := Options{
		Build: r.build, Logger: slog.New(slog.NewTextHandler(r.logged, &slog.HandlerOptions{Level: slog.LevelDebug})), Version: "1.2.3",
		Reload: r.reload, Seal: r.seal, Ready: func() { close(r.ready) },
		Listening: func(what, address string) {
			if what == "seal" {
				r.address <- address
			} else {
				r.monitor <- address
			}
		},
		notify: &monitor.Notifier{
			Send: func(state string) { _, _ = fmt.Fprintln(r.told, strings.ReplaceAll(state, "\n", " ")) }, Interval: 20 * time.Second,
		},
		running: func(s *server) { r.server = s }, timing: &w.timing,
	}
	go func() { r.ended <- Run(ctx, options) }()
	select {
	case r.at = <-r.address:
		r.about = <-r.monitor
	case err := <-r.ended:
		r.ended <- err
	}
	w.t.Cleanup(r.end)
	return r
}

func (w *world) file(name string) string { return filepath.Join(w.dir, name) }

// build is what nitroseal does with its configuration.
func (r *running) build(ctx context.Context, hooks *Hooks) (*Site, error) {
	w := r.world
	for _, u := range w.units {
		u.tell(hooks)
	}
	records, err := file.Open(w.records)
	if err != nil {
		return nil, err
	}
	keys := keyring.New(keyring.Config{Records: records, Devices: w.units, CacheRecords: true, SealAuthKeys: true})
	site := &Site{
		Keys: keys, Tokens: token.NewRegistry(token.RegistryOptions{Store: w.tokens, Every: 20 * time.Millisecond}), Records: w.records,
		Listen: Listen{
			Address: "127.0.0.1:0",
			Certificate: func() (chain, key []byte, err error) {
				if chain, err = os.ReadFile(w.file("tls.pem")); err != nil {
					return nil, nil, err
				}
				key, err = os.ReadFile(w.file("tls.key"))
				return chain, key, err
			},
		},
		Monitor: monitor.Listen{Address: "127.0.0.1:0"},
		Close:   func() error { return keys.Close() },
	}
	for _, u := range w.units {
		site.Devices = append(site.Devices, Device{HSM: u, Parallel: cap(u.places)})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.change != nil {
		r.change(site)
	}
	return site, nil
}

// set changes what the next reload reads.
func (r *running) set(change func(*Site)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.change = change
}

// end stops the server, once, and wants a clean stop.
func (r *running) end() {
	r.t.Helper()
	r.stop()
	if err := <-r.ended; err != nil {
		r.t.Errorf("Run: %v", err)
	}
	r.ended <- nil
}

func (r *running) waitReady() *running {
	r.t.Helper()
	select {
	case <-r.ready:
	case <-time.After(20 * time.Second):
		r.t.Fatalf("it is not ready:\n%s", r.logged)
	}
	return r
}

// client is who asks.
func (r *running) client(certificates ...tls.Certificate) *http.Client {
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: r.world.ca.pool(), Certificates: certificates}, ForceAttemptHTTP2: true}
	r.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// answer is what came of a request.
type answer struct {
	code   int
	header http.Header
	body   map[string]any
	raw    string
}

func (a answer) data(name string) string {
	data, _ := a.body["data"].(map[string]any)
	text, _ := data[name].(string)
	return text
}

// ask sends a request with a body in JSON, "" for none.
func (r *running) ask(client *http.Client, method, path, token, body string) answer {
	r.t.Helper()
	got, err := r.try(client, method, path, token, body)
	must(r.t, err)
	return got
}

func (r *running) try(client *http.Client, method, path, token, body string) (answer, error) {
	return r.tryUntil(r.t.Context(), client, method, path, token, body)
}

// tryUntil is try of a client that goes away when ctx ends.
func (r *running) tryUntil(ctx context.Context, client *http.Client, method, path, token, body string) (answer, error) {
	request, err := http.NewRequestWithContext(ctx, method, "https://"+r.at+path, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	if token != "" {
		request.Header.Set("X-Vault-Token", token)
	}
	response, err := client.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = response.Body.Close() }()
	raw, err := io.ReadAll(response.Body)
	if err != nil {
		return answer{}, err
	}
	got := answer{code: response.StatusCode, header: response.Header, raw: string(raw)}
	if len(raw) > 0 && json.Unmarshal(raw, &got.body) != nil {
		return got, fmt.Errorf("the answer is no JSON: %s", raw)
	}
	return got, nil
}

func (r *running) encrypt(client *http.Client, token, key, plaintext string) answer {
	r.t.Helper()
	return r.ask(client, http.MethodPut, "/v1/transit/encrypt/"+key, token,
		fmt.Sprintf(`{"plaintext":%q}`, base64.StdEncoding.EncodeToString([]byte(plaintext))))
}

// queue tells how many openings have their turn, and how many wait.
func (r *running) queue() (inside, waiting int) {
	inside, urgent, patient := r.server.service.Load().desk.load()
	return inside, urgent + patient
}

func (r *running) decrypt(client *http.Client, token, key, ciphertext string) answer {
	r.t.Helper()
	return r.ask(client, http.MethodPut, "/v1/transit/decrypt/"+key, token, fmt.Sprintf(`{"ciphertext":%q}`, ciphertext))
}

// metric returns the value of a sample, "" where there is none.
func (r *running) metric(sample string) string {
	r.t.Helper()
	for line := range strings.Lines(r.page("/metrics")) {
		if value, found := strings.CutPrefix(line, sample+" "); found {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// page reads what the server tells about itself.
func (r *running) page(path string) string {
	r.t.Helper()
	request, err := http.NewRequestWithContext(r.t.Context(), http.MethodGet, "http://"+r.about+path, nil)
	must(r.t, err)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	must(r.t, err)
	defer func() { must(r.t, response.Body.Close()) }()
	raw, err := io.ReadAll(response.Body)
	must(r.t, err)
	return string(raw)
}

// elliptic is the curve of the keys that are added.
func elliptic() ecdh.Curve { return ecdh.P256() }

// isTaken tells whether somebody else has the address.
func isTaken(err error) bool { return errors.Is(err, syscall.EADDRINUSE) }

// tellAll tells of an operation that failed or not, as a probe or a use of the HSM would.
func (u *unit) tellAll(err error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.hooks.DeviceOperation(u.name, "info", time.Millisecond, err)
}
