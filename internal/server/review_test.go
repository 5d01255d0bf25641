package server

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/token"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// disk is an audit sink that may be full.
type disk struct{ full atomic.Bool }

func (*disk) Name() string  { return "disk" }
func (*disk) Reopen() error { return nil }
func (*disk) Close() error  { return nil }

// Write implements [audit.Sink].
func (d *disk) Write([]audit.Line) error {
	if d.full.Load() {
		return errors.New("no space left on device")
	}
	return nil
}

// Room is what the log asks without an act.
func (d *disk) Room() error { return d.Write(nil) }

// TestAFullAuditDiskEndsOpeningsAndHealthSaysSo: a balancer sends Vaults that unseal elsewhere, and those that start may stay.
func TestAFullAuditDiskEndsOpeningsAndHealthSaysSo(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	d := &disk{}
	r := w.start(func(site *Site) {
		log, err := audit.Open(audit.Options{Sinks: []audit.Sink{d}, Host: "seal-1", Program: "nitroseal"})
		must(t, err)
		site.Audit = log
		before := site.Close
		site.Close = func() error { return errors.Join(before(), log.Close()) }
	}).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	d.full.Store(true)
	if got := r.decrypt(client, text, "prod", sealed); got.code != http.StatusServiceUnavailable {
		t.Errorf("an opening: %d %s", got.code, got.raw)
	}
	if got := r.encrypt(client, text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("a sealing: %d %s", got.code, got.raw)
	}
	eventually(t, "health tells that nothing is opened", func() bool {
		return r.ask(client, http.MethodGet, "/v1/sys/health", "", "").code == http.StatusServiceUnavailable
	})
	if got := r.ask(client, http.MethodGet, "/v1/sys/health?sealedcode=200", "", ""); got.code != http.StatusOK {
		t.Errorf("for a Vault that starts: %d %s", got.code, got.raw)
	}
	if about := r.page("/readyz"); !strings.Contains(about, `"ready": true`) || !strings.Contains(about, "no space left") {
		t.Errorf("readyz says %s", about)
	}
	d.full.Store(false)
	if got := r.decrypt(client, text, "prod", sealed); got.code != http.StatusOK {
		t.Errorf("with room again: %d %s", got.code, got.raw)
	}
	eventually(t, "health tells that openings work again", func() bool {
		return r.ask(client, http.MethodGet, "/v1/sys/health", "", "").code == http.StatusOK
	})
}

// TestACAThatWasReplacedVouchesForNobody, not for one more request over a connection that it let in.
func TestACAThatWasReplacedVouchesForNobody(t *testing.T) {
	w := newWorld(t)
	w.timing.certificates = 20 * time.Millisecond
	bound, free := w.token(token.Spec{CertificateNames: []string{"vault-1.example"}}), w.token(token.Spec{})
	must(t, os.WriteFile(w.file("clients.pem"), w.ca.pem(), 0o600))
	r := w.start(func(site *Site) {
		site.Listen.ClientCA = func() ([]byte, error) { return os.ReadFile(w.file("clients.pem")) }
	}).waitReady()
	thief, anonymous := r.client(w.ca.pair("vault-1.example")), r.client()
	sealed := r.encrypt(thief, bound, "prod", "a secret").data("ciphertext")
	if got := r.decrypt(anonymous, free, "prod", sealed); got.code != http.StatusOK {
		t.Fatalf("%d %s", got.code, got.raw)
	}
	must(t, os.WriteFile(w.file("clients.pem"), newAuthority(t).pem(), 0o600))
	eventually(t, "the new CA is in use", func() bool { return r.logged.count("a new certificate is in use") == 1 })
	if got, err := r.try(thief, http.MethodPut, "/v1/transit/decrypt/prod", bound, `{"ciphertext":"`+sealed+`"}`); err == nil && got.code == http.StatusOK {
		t.Errorf("with a certificate of the former CA: %d %s", got.code, got.raw)
	}
	if got := r.decrypt(anonymous, free, "prod", sealed); got.code != http.StatusOK { // it never needed a CA
		t.Errorf("without a certificate: %d %s", got.code, got.raw)
	}
}

// TestHealthSendsNoLengthWithAnAnswerThatHasNoBody: what is between might wait for it, and take the next answer for it.
func TestHealthSendsNoLengthWithAnAnswerThatHasNoBody(t *testing.T) {
	s := &server{}
	for _, path := range []string{"?uninitcode=204", "?uninitcode=304"} {
		recorder := httptest.NewRecorder()
		s.health(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/sys/health"+path, nil))
		if length := recorder.Header().Get("Content-Length"); length != "" || recorder.Body.Len() != 0 {
			t.Errorf("%s: %d with a length of %s and %d bytes", path, recorder.Code, length, recorder.Body.Len())
		}
	}
}

// TestARequestThatComesAfterTheEndIsAnswered, and does not go round and round.
func TestARequestThatComesAfterTheEndIsAnswered(t *testing.T) {
	s := &server{}
	last := &service{}
	<-last.requests.close()
	s.service.Store(last)
	answered := make(chan int)
	go func() {
		recorder := httptest.NewRecorder()
		s.ServeHTTP(recorder, httptest.NewRequestWithContext(context.Background(), http.MethodGet, "/v1/sys/health", nil))
		answered <- recorder.Code
	}()
	select {
	case code := <-answered:
		if code != http.StatusServiceUnavailable {
			t.Errorf("it is answered with %d", code)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("it is not answered")
	}
}

// TestWhatIsWornIsWhatItsFilesHoldThen: a new configuration may wait for half a minute between reading them and its use.
func TestWhatIsWornIsWhatItsFilesHoldThen(t *testing.T) {
	a := newAuthority(t)
	chain, key := a.issue("seal.example", time.Hour)
	ca := a.pem()
	files := Listen{
		Certificate: func() ([]byte, []byte, error) { return chain, slices.Clone(key), nil },
		ClientCA:    func() ([]byte, error) { return ca, nil },
	}
	w := &wardrobe{logger: slog.New(slog.DiscardHandler), metrics: newMetrics()}
	before, err := load(files, nil)
	must(t, err)
	w.wear(files, before)
	first := w.current.Load().clients
	ca = newAuthority(t).pem()
	coming, err := load(files, w.current.Load())
	must(t, err)
	ca = newAuthority(t).pem()
	w.look() // while the new configuration waits
	second := w.current.Load().clients
	w.wear(files, coming)
	if worn := w.current.Load(); second == first || worn.clients != second || worn.caSum == coming.caSum {
		t.Errorf("the CAs are counted %d, %d, %d; those that were read earlier are in use: %v", first, second, worn.clients, worn.caSum == coming.caSum)
	}
	other := files
	other.Required = true
	w.wear(other, coming)
	w.look() // by whoever had no turn since the configuration before
	if worn := w.current.Load(); worn.clients != second+1 || worn.config.ClientAuth != tls.RequireAndVerifyClientCert {
		t.Errorf("after the next configuration: CAs counted %d, %v", worn.clients, worn.config.ClientAuth)
	}
}

// TestOpeningsThatWaitTakeBoundedMemory: thousands of the largest envelopes there are would be a gigabyte.
func TestOpeningsThatWaitTakeBoundedMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(1, 0)
		leave, err := g.enter(t.Context(), false, maxWaitingBytes)
		must(t, err) // who is in does not wait
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		come := func(ctx context.Context, bytes int) {
			running.Go(func() {
				if leave, err := g.enter(ctx, false, bytes); err == nil {
					leave()
				}
			})
			synctest.Wait()
		}
		come(ctx, maxWaitingBytes/2)
		come(t.Context(), maxWaitingBytes/2)
		var busy *transit.BusyError
		if _, err := g.enter(t.Context(), false, 1); !errors.As(err, &busy) {
			t.Errorf("one more: %v", err)
		}
		stop() // one of them goes away
		synctest.Wait()
		come(t.Context(), maxWaitingBytes/2)
		if _, urgent, _ := g.load(); urgent != 2 {
			t.Errorf("%d wait", urgent)
		}
		leave()
		running.Wait()
		if g.bytes != 0 || g.inside != 0 {
			t.Errorf("left behind: %d bytes, %d inside", g.bytes, g.inside)
		}
		come(t.Context(), 1)
		running.Wait()
	})
}

// TestAReloadBeforeKeysCanSealDoesNotSayReady: systemd would start a Vault, and it would end.
func TestAReloadBeforeKeysCanSealDoesNotSayReady(t *testing.T) {
	w := newWorld(t)
	w.token(token.Spec{})
	w.units[0].away(hsm.ErrUnavailable)
	r := w.start(nil)
	r.reload <- syscall.SIGHUP
	eventually(t, "the configuration is read", func() bool { return r.logged.count("the new configuration is in use") == 1 })
	r.reload <- syscall.SIGHUP // taken when the loop has turned
	if told := r.told.String(); strings.Contains(told, "READY=1") {
		t.Errorf("systemd was told\n%s", told)
	}
	w.units[0].away(nil)
	r.waitReady()
	eventually(t, "systemd is told", func() bool { return r.told.count("READY=1") >= 1 })
	r.reload <- syscall.SIGHUP
	eventually(t, "systemd is told of a reload", func() bool { return r.told.count("RELOADING=1") == 1 && r.told.count("READY=1") == 2 })
}

// TestMemoryThatIsInUseIsNoReasonToCollectWithoutEnd.
func TestMemoryThatIsInUseIsNoReasonToCollectWithoutEnd(t *testing.T) {
	used := make([][]byte, 128)
	for i := range used {
		used[i] = make([]byte, 1<<20)
	}
	runtime.GC()
	synctest.Test(t, func(t *testing.T) {
		s := &server{timing: usual()}
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { s.saveMemory(ctx) })
		<-time.After(2 * time.Second)
		synctest.Wait()
		if limit := debug.SetMemoryLimit(-1); limit < 128<<20*5/4 {
			t.Errorf("with 128 MiB in use the limit is %d MiB", limit>>20)
		}
		stop()
		running.Wait()
	})
	runtime.KeepAlive(used) // and no longer
	runtime.GC()            // other tests count what is in use as well
}

// TestStrangersDoNotTakeAllConnections: they need no token to connect.
func TestStrangersDoNotTakeAllConnections(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(func(site *Site) { site.Listen.MaxConnections = 8 }).waitReady()
	vault := r.client()
	if got := r.encrypt(vault, text, "prod", "a"); got.code != http.StatusOK {
		t.Fatalf("%d %s", got.code, got.raw)
	}
	vault.CloseIdleConnections()
	eventually(t, "nobody is connected", func() bool { return r.server.conns.Load() == 0 })
	stranger := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}
	for range 12 {
		conn, err := stranger.DialContext(t.Context(), "tcp", r.at)
		must(t, err)
		t.Cleanup(func() { _ = conn.Close() })
	}
	eventually(t, "some strangers are turned away", func() bool { return r.metric("nitroseal_serve_connections_refused_total") != "0" })
	if got, err := r.try(vault, http.MethodPut, "/v1/transit/encrypt/prod", text, `{"plaintext":"YQ=="}`); err != nil || got.code != http.StatusOK {
		t.Errorf("a Vault that was here before: %d, %v", got.code, err)
	}
}

// TestAReloadThatKnowsNoTokensIsRefusedAndSaysWhy: the HSM is not to blame.
func TestAReloadThatKnowsNoTokensIsRefusedAndSaysWhy(t *testing.T) {
	w := newWorld(t)
	w.timing.settle = 200 * time.Millisecond
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	r.mu.Lock()
	r.change = func(site *Site) { site.Tokens = token.NewRegistry(token.RegistryOptions{Store: &absentStore{Store: w.tokens}}) }
	r.mu.Unlock()
	r.reload <- syscall.SIGHUP
	eventually(t, "it is refused", func() bool { return r.logged.count("the store of its tokens does not tell them") == 1 })
	if got := r.encrypt(r.client(), text, "prod", "a"); got.code != http.StatusOK {
		t.Errorf("the configuration in use: %d %s", got.code, got.raw)
	}
}
