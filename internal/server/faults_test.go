package server

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// dial opens a connection to the server and says nothing.
func (r *running) dial() net.Conn {
	r.t.Helper()
	conn, err := (&net.Dialer{}).DialContext(r.t.Context(), "tcp", r.at)
	must(r.t, err)
	r.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// dialTLS does the handshake as well.
func (r *running) dialTLS() *tls.Conn {
	r.t.Helper()
	conn := tls.Client(r.dial(), &tls.Config{RootCAs: r.world.ca.pool(), ServerName: "seal.example", MinVersion: tls.VersionTLS12})
	must(r.t, conn.HandshakeContext(r.t.Context()))
	return conn
}

// isClosed tells whether the other end closes a connection within a while.
func isClosed(conn net.Conn) bool {
	_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err := io.Copy(io.Discard, conn)
	timeout, ok := err.(net.Error) //nolint:errorlint // as it comes from the connection
	return err == nil || !ok || !timeout.Timeout()
}

// TestWhoeverIsSlowHoldsUpNobody and is cut off: a connection without a word, one that ends half-way, headers and a body that
// never come to their end.
func TestWhoeverIsSlowHoldsUpNobody(t *testing.T) {
	w := newWorld(t)
	w.timing.header, w.timing.read = 300*time.Millisecond, 600*time.Millisecond
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	connected := func() (conn *tls.Conn) { // on a busy machine a handshake may take too long as well
		eventually(t, "a handshake is done in time", func() bool {
			conn = tls.Client(r.dial(), &tls.Config{RootCAs: w.ca.pool(), ServerName: "seal.example", MinVersion: tls.VersionTLS12})
			return conn.HandshakeContext(t.Context()) == nil
		})
		return conn
	}
	silent := r.dial()
	half := r.dial()
	_, err := half.Write([]byte{22, 3, 1}) // the beginning of a handshake
	must(t, err)
	headers := connected()
	_, err = io.WriteString(headers, "PUT /v1/transit/encrypt/prod HTTP/1.1\r\nHost: seal\r\nX-Vault-To")
	must(t, err)
	body := connected()
	_, err = fmt.Fprintf(body, "PUT /v1/transit/encrypt/prod HTTP/1.1\r\nHost: seal\r\nX-Vault-Token: %s\r\nContent-Length: 100\r\n\r\n{\"plaintext\":", text)
	must(t, err)
	client := r.client()
	eventually(t, "another one is answered meanwhile", func() bool {
		got, err := r.try(client, http.MethodPut, "/v1/transit/encrypt/prod", text, `{"plaintext":"YQ=="}`)
		return err == nil && got.code == http.StatusOK
	})
	for name, conn := range map[string]net.Conn{"silent": silent, "half a handshake": half, "half the headers": headers, "half a body": body} {
		if !isClosed(conn) {
			t.Errorf("%s: it is still open", name)
		}
	}
	eventually(t, "all are gone", func() bool { return r.server.conns.Load() <= 1 })
}

// TestAClientThatGoesAwayGivesUpItsPlace in the queue.
func TestAClientThatGoesAwayGivesUpItsPlace(t *testing.T) {
	w := newWorld(t)
	w.units[0].places = make(chan struct{}, 1)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	defer w.units[0].hold()()
	ctx, leave := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for range 20 {
		running.Go(func() {
			_, _ = r.tryUntil(ctx, client, http.MethodPut, "/v1/transit/decrypt/prod", text, `{"ciphertext":"`+sealed+`"}`) // nobody waits for an answer
		})
	}
	load := func() int {
		inside, waiting := r.queue()
		return inside + waiting
	}
	eventually(t, "all wait", func() bool { return load() == 20 })
	before := w.units[0].Operations()
	leave()
	running.Wait()
	eventually(t, "nobody waits", func() bool { return load() == 0 })
	if got := w.units[0].Operations() - before; got > 0 {
		t.Errorf("%d operations for nobody", got)
	}
	if got := r.metric("nitroseal_serve_turned_away_total"); got != "0" || r.logged.count("level=WARN") > 0 {
		t.Errorf("who went away counts as turned away, %s times, or worries the log:\n%s", got, r.logged)
	}
}

// TestMoreThanAnHSMCanDoIsTurnedAwayAtOnce, with 503 and when to come again, and what it can do is done.
func TestMoreThanAnHSMCanDoIsTurnedAwayAtOnce(t *testing.T) {
	w := newWorld(t)
	w.units[0].places = make(chan struct{}, 1)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	giveBack := w.units[0].hold()
	r.server.hooks.operations.configure(nil) // as after a start with a slow HSM
	r.server.hooks.operations.configure(map[string]int{"one": 1})
	r.server.hooks.operations.ended("one", time.Now(), 3*time.Second)
	ctx, leave := context.WithCancel(t.Context())
	var running sync.WaitGroup
	var turnedAway, answered atomic.Int64
	for range 40 {
		running.Go(func() {
			request, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://"+r.at+"/v1/transit/decrypt/prod", strings.NewReader(`{"ciphertext":"`+sealed+`"}`))
			if err != nil {
				t.Error(err)
				return
			}
			request.Header.Set("X-Vault-Token", text)
			response, err := client.Do(request)
			if err != nil {
				return // it waits, and the test has seen enough
			}
			_ = response.Body.Close()
			switch {
			case response.StatusCode == http.StatusOK:
				answered.Add(1)
			case response.StatusCode != http.StatusServiceUnavailable || response.Header.Get("Retry-After") == "":
				t.Errorf("%d, Retry-After %q", response.StatusCode, response.Header.Get("Retry-After"))
			default:
				turnedAway.Add(1)
			}
		})
	}
	eventually(t, "some are turned away", func() bool { return turnedAway.Load() == 40-(45/3-1) })
	w.units[0].Delay(time.Second)
	giveBack()
	eventually(t, "one is answered", func() bool { return answered.Load() > 0 })
	leave()
	running.Wait()
	if got := r.logged.count("openings are answered with 503"); got != 1 {
		t.Errorf("the log says so %d times", got)
	}
	if got := r.metric("nitroseal_serve_turned_away_total"); got != "26" {
		t.Errorf("%s were counted", got)
	}
}

func TestALargeBodyIsRefused(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	got, err := r.try(client, http.MethodPut, "/v1/transit/encrypt/prod", text, `{"plaintext":"`+strings.Repeat("A", 1<<20)+`"}`)
	if err == nil && got.code != http.StatusRequestEntityTooLarge {
		t.Errorf("%d %.100s", got.code, got.raw)
	}
	if got := r.encrypt(client, text, "prod", strings.Repeat("a", 65536)); got.code != http.StatusOK {
		t.Errorf("the largest value: %d %.100s", got.code, got.raw)
	}
	if got := r.encrypt(client, text, "prod", strings.Repeat("a", 65537)); got.code != http.StatusBadRequest {
		t.Errorf("a larger value: %d %.100s", got.code, got.raw)
	}
	large := r.client()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "https://"+r.at+"/v1/auth/token/renew-self", nil)
	must(t, err)
	request.Header.Set("X-Vault-Token", strings.Repeat("x", 64<<10))
	if response, err := large.Do(request); err == nil {
		_ = response.Body.Close()
		if response.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("large headers: %d", response.StatusCode)
		}
	}
}

func TestThisMachineMayDoWithoutTLS(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(func(site *Site) {
		site.Listen.Plain, site.Listen.Certificate = true, nil
	}).waitReady()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+r.at+"/v1/transit/encrypt/prod", strings.NewReader(`{"plaintext":"YQ=="}`))
	must(t, err)
	request.Header.Set("X-Vault-Token", text)
	response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
	must(t, err)
	must(t, response.Body.Close())
	if response.StatusCode != http.StatusOK {
		t.Errorf("%d", response.StatusCode)
	}
	if got := r.metric("nitroseal_serve_certificate_expiry_timestamp_seconds"); got != "" {
		t.Errorf("a certificate that is not there ends at %s", got)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	w := newWorld(t)
	r := w.start(func(site *Site) { site.Listen.MaxConnections = 3 }).waitReady()
	var open []net.Conn
	for range 3 {
		open = append(open, r.dialTLS())
	}
	if !isClosed(r.dial()) {
		t.Error("one more is taken")
	}
	if got := r.metric("nitroseal_serve_connections_refused_total"); got != "1" {
		t.Errorf("%s were counted", got)
	}
	must(t, open[0].Close())
	eventually(t, "there is room again", func() bool {
		_, err := r.try(r.client(), http.MethodGet, "/v1/sys/health", "", "")
		return err == nil
	})
}

// TestACertificateIsRenewedWithoutARestart, and a broken one keeps the old one in use.
func TestACertificateIsRenewedWithoutARestart(t *testing.T) {
	w := newWorld(t)
	w.timing.certificates = 20 * time.Millisecond
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	serial := func() string { return r.dialTLS().ConnectionState().PeerCertificates[0].SerialNumber.String() }
	first := serial()
	kept := r.client()
	if got := r.encrypt(kept, text, "prod", "a secret"); got.code != http.StatusOK {
		t.Fatalf("%d %s", got.code, got.raw)
	}
	before := r.metric("nitroseal_serve_certificate_expiry_timestamp_seconds")
	for _, broken := range []string{"", "not a certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
		must(t, os.WriteFile(w.file("tls.pem"), []byte(broken), 0o600))
		eventually(t, "it is seen", func() bool { return r.metric("nitroseal_serve_certificate_last_reload_successful") == "0" })
		if serial() != first {
			t.Error("the old one is not in use any more")
		}
	}
	ended, key := w.ca.issue("seal.example", -time.Minute)
	must(t, os.WriteFile(w.file("tls.pem"), ended, 0o600))
	must(t, os.WriteFile(w.file("tls.key"), key, 0o600))
	eventually(t, "the end of one is seen", func() bool { return r.logged.count("certificate ended on") == 1 })
	chain, key := w.ca.issue("seal.example", 2*time.Hour)
	must(t, os.WriteFile(w.file("tls.pem"), chain, 0o600)) // the key still belongs to another one
	must(t, os.WriteFile(w.file("tls.key"), key, 0o600))
	eventually(t, "the new one is in use", func() bool { return serial() != first })
	eventually(t, "the metrics tell", func() bool {
		return r.metric("nitroseal_serve_certificate_last_reload_successful") == "1" && r.metric("nitroseal_serve_certificate_expiry_timestamp_seconds") != before
	})
	if got := r.encrypt(kept, text, "prod", "a secret"); got.code != http.StatusOK {
		t.Errorf("over the old connection: %d %s", got.code, got.raw)
	}
	if log := r.logged.String(); !strings.Contains(log, "the certificate in use stays") || strings.Contains(log, "PRIVATE KEY") {
		t.Errorf("the log says\n%s", log)
	}
}

// TestAnotherClientCAEndsTheConnectionsOfTheOldOne.
func TestAnotherClientCAEndsTheConnectionsOfTheOldOne(t *testing.T) {
	w := newWorld(t)
	w.timing.certificates = 20 * time.Millisecond
	text := w.token(token.Spec{CertificateNames: []string{"vault-1.example"}})
	must(t, os.WriteFile(w.file("clients.pem"), w.ca.pem(), 0o600))
	r := w.start(func(site *Site) {
		site.Listen.ClientCA = func() ([]byte, error) { return os.ReadFile(w.file("clients.pem")) }
		site.Listen.Required = true
	}).waitReady()
	if _, err := r.try(r.client(), http.MethodGet, "/v1/sys/health", "", ""); err == nil {
		t.Error("a client without a certificate is answered")
	}
	old := r.client(w.ca.pair("vault-1.example"))
	if got := r.encrypt(old, text, "prod", "a"); got.code != http.StatusOK {
		t.Fatalf("%d %s", got.code, got.raw)
	}
	stranger := newAuthority(t)
	must(t, os.WriteFile(w.file("clients.pem"), stranger.pem(), 0o600))
	eventually(t, "the old one is not taken any more", func() bool {
		_, err := r.try(old, http.MethodPut, "/v1/transit/encrypt/prod", text, `{"plaintext":"YQ=="}`)
		return err != nil
	})
	if got := r.encrypt(r.client(stranger.pair("vault-1.example")), text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("the new one: %d %s", got.code, got.raw)
	}
}

// TestAReloadTakesWhatIsGoodIntoUse, and leaves what is in use where it is not.
func TestAReloadTakesWhatIsGoodIntoUse(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	set := r.set
	encrypt := func(mount string) int {
		return r.ask(client, http.MethodPut, "/v1/"+mount+"/encrypt/prod", text, `{"plaintext":"YQ=="}`).code
	}
	set(func(site *Site) { site.Mount = "seals" })
	r.reload <- syscall.SIGHUP
	eventually(t, "the new mount is served", func() bool { return encrypt("seals") == http.StatusOK })
	if code := encrypt("transit"); code != http.StatusNotFound {
		t.Errorf("at the old mount: %d", code)
	}
	if !strings.Contains(r.told.String(), "RELOADING=1") {
		t.Errorf("systemd was told\n%s", r.told)
	}

	refused := func(n int) func() bool {
		return func() bool { return r.logged.count("the new configuration is refused; the one in use stays") == n }
	}
	set(func(site *Site) { site.Mount = "sys" })
	r.reload <- syscall.SIGHUP
	eventually(t, "it is refused", refused(1))
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer func() { must(t, taken.Close()) }()
	set(func(site *Site) { site.Mount = "taken"; site.Listen.Address = taken.Addr().String() })
	r.reload <- syscall.SIGHUP
	eventually(t, "it is refused", refused(2))

	if code := encrypt("seals"); code != http.StatusOK {
		t.Errorf("the service in use: %d", code)
	}

	// Another address: what runs at the old one ends there.
	set(func(site *Site) { site.Mount = "moved"; site.Listen.Address = "127.0.0.1:00" })
	r.reload <- syscall.SIGHUP
	old := r.at
	r.at = <-r.address
	eventually(t, "it has moved", func() bool { return encrypt("moved") == http.StatusOK })
	eventually(t, "nobody listens at the old address", func() bool {
		conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", old)
		if err == nil {
			_ = conn.Close()
		}
		return err != nil
	})
}

// TestAReloadLetsEndWhatRuns in the configuration before.
func TestAReloadLetsEndWhatRuns(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	giveBack := w.units[0].hold()
	var running sync.WaitGroup
	for range 8 {
		running.Go(func() {
			if got, err := r.try(client, http.MethodPut, "/v1/transit/decrypt/prod", text, `{"ciphertext":"`+sealed+`"}`); err != nil || got.code != http.StatusOK {
				t.Errorf("%d %s %v", got.code, got.raw, err)
			}
		})
	}
	eventually(t, "they wait", func() bool {
		inside, waiting := r.queue()
		return inside+waiting == 8
	})
	w.units[0].Delay(100 * time.Millisecond)
	r.reload <- syscall.SIGHUP
	giveBack()
	running.Wait()
	eventually(t, "the new one is in use", func() bool { return r.logged.count("the new configuration is in use") == 1 })
}

// absentStore is a store of tokens that answers nothing until it is there.
type absentStore struct {
	store.Store

	there atomic.Bool
}

func (s *absentStore) List(ctx context.Context, prefix string) ([]string, error) {
	if !s.there.Load() {
		return nil, store.ErrUnavailable
	}
	return s.Store.List(ctx, prefix)
}

// TestTokensThatNobodyKnowsYetAreNotRefused for good: the store of the tokens comes after the server.
func TestTokensThatNobodyKnowsYetAreNotRefused(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	tokens := &absentStore{Store: w.tokens}
	r := w.start(func(site *Site) {
		site.Tokens = token.NewRegistry(token.RegistryOptions{Store: tokens, Every: 20 * time.Millisecond})
	})
	got := r.encrypt(r.client(), text, "prod", "a")
	if got.code != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" {
		t.Errorf("%d %s", got.code, got.raw)
	}
	if !strings.Contains(r.page("/readyz"), "the tokens were not read yet") || strings.Contains(r.told.String(), "READY") {
		t.Errorf("systemd was told %s, others %s", r.told, r.page("/readyz"))
	}
	tokens.there.Store(true)
	r.waitReady()
	if got := r.encrypt(r.client(), text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("%d %s", got.code, got.raw)
	}
	tokens.there.Store(false)
	if got := r.encrypt(r.client(), "ns.wrong", "prod", "a"); got.code != http.StatusForbidden {
		t.Errorf("an unknown token, the list being known: %d %s", got.code, got.raw)
	}
}

// TestNoRequestIsTooOdd: random and mutated ones get an answer that is none of the server's faults.
func TestNoRequestIsTooOdd(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{Limit: &token.Limit{}})
	r := w.start(nil).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	random := rand.New(rand.NewPCG(7, 11))
	methods := []string{http.MethodPut, http.MethodPost, http.MethodGet, http.MethodDelete, http.MethodHead, http.MethodPatch, "LIST"}
	paths := []string{
		"/v1/transit/encrypt/prod", "/v1/transit/decrypt/prod", "/v1/transit/decrypt/%70rod", "/v1/transit/decrypt/../x", "/v1/auth/token/renew-self",
		"/v1/auth/token/lookup-self", "/v1/sys/health?sealedcode=%zz", "/v1/%2f", "/v1//transit/encrypt/prod",
	}
	bodies := []string{`{"ciphertext":"` + sealed + `"}`, `{"plaintext":"YQ=="}`, `{}`, ``, `{"plaintext":"` + strings.Repeat("[", 100) + `"}`}
	for range 2000 {
		body := []byte(bodies[random.IntN(len(bodies))])
		for range random.IntN(4) {
			if len(body) > 0 {
				body[random.IntN(len(body))] ^= byte(1 << random.IntN(8))
			}
		}
		method, path := methods[random.IntN(len(methods))], paths[random.IntN(len(paths))]
		got, err := r.try(client, method, path, text, string(body))
		if err != nil && !strings.Contains(err.Error(), "invalid URL escape") || got.code >= 500 && got.code != http.StatusServiceUnavailable {
			t.Fatalf("%s %s %q: %d %s %v", method, path, body, got.code, got.raw, err)
		}
	}
	// What no client library would send.
	for _, raw := range []string{
		"PUT\r\n\r\n", "\x00\x01\x02", "PUT /v1/transit/encrypt/prod HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
		"PUT /v1/transit/encrypt/prod HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "GET http://[::1 HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	} {
		conn := r.dialTLS()
		_, err := io.WriteString(conn, raw)
		must(t, err)
		must(t, conn.SetReadDeadline(time.Now().Add(2*time.Second)))
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			_ = response.Body.Close()
			if response.StatusCode >= 500 && response.StatusCode != http.StatusNotImplemented && response.StatusCode != http.StatusHTTPVersionNotSupported {
				t.Errorf("%q: %d", raw, response.StatusCode)
			}
		}
	}
	if log := r.logged.String(); strings.Contains(log, "fault of the server") {
		t.Errorf("the log says\n%s", log)
	}
}

// TestWhatIsToldHoldsNoSecret: logs, metrics, health.
func TestWhatIsToldHoldsNoSecret(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{Name: "the-vault-of-berlin"})
	r := w.start(nil).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret that nobody else has").data("ciphertext")
	r.decrypt(client, text, "prod", sealed)
	r.decrypt(client, text, "prod", sealed+"A")
	r.encrypt(client, text+"x", "prod", "a secret that nobody else has")
	health := r.ask(client, http.MethodGet, "/v1/sys/health", "", "").raw
	for name, told := range map[string]string{"log": r.logged.String(), "metrics": r.page("/metrics"), "readiness": r.page("/readyz"), "health": health} {
		for what, secret := range map[string]string{
			"token": text[14:], "plaintext": "a secret that nobody", "its base64": "YSBzZWNyZXQgdGhhdCBub2JvZHk", "ciphertext": sealed[20:60],
		} {
			if strings.Contains(told, secret) {
				t.Errorf("%s: the %s is in it", name, what)
			}
		}
	}
	info, err := w.units[0].Info(t.Context())
	must(t, err)
	for what, private := range map[string]string{"serial": info.Serial, "token's name": "berlin", "token's id": text[3:13], "device": `"one"`} {
		if strings.Contains(health, private) {
			t.Errorf("the %s is in the answer that anybody gets: %s", what, health)
		}
	}
}

func TestMetricsAreNamedAsTheyShouldBe(t *testing.T) {
	w := newWorld(t)
	w.lease("prod", time.Hour)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	r.encrypt(r.client(), text, "prod", "a secret")
	for line := range strings.Lines(r.page("/metrics")) {
		name, found := strings.CutPrefix(line, "# TYPE ")
		if !found {
			continue
		}
		name, kind, _ := strings.Cut(strings.TrimSpace(name), " ")
		if !strings.HasPrefix(name, "nitroseal_serve_") && !strings.HasPrefix(name, "go_") && !strings.HasPrefix(name, "process_") {
			t.Errorf("%s is not ours", name)
		}
		if strings.HasPrefix(name, "nitroseal_") && (kind == "counter") != strings.HasSuffix(name, "_total") {
			t.Errorf("%s is a %s", name, kind)
		}
	}
	for _, sample := range []string{
		`nitroseal_serve_requests_total{operation="encrypt",result="ok"}`, `nitroseal_serve_key_seals{key="prod"}`, `nitroseal_serve_key_opens{key="prod"}`,
		`nitroseal_serve_certificate_last_reload_successful`, `nitroseal_serve_device_up{device="one"}`, `nitroseal_serve_tokens`,
	} {
		if got := r.metric(sample); got != "1" {
			t.Errorf("%s is %q", sample, got)
		}
	}
}
