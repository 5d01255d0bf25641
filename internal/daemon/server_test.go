package daemon

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// served is a daemon that listens.
type served struct {
	reload chan os.Signal
	logged *log

	mu      sync.Mutex
	address string
	site    func(hooks *Hooks) *Site
	hooks   *Hooks
	client  *http.Client
	ready   chan struct{}
}

// serve runs a daemon until the test ends. The function makes each of its sites.
func serve(t *testing.T, site func(hooks *Hooks) *Site) *served {
	t.Helper()
	s := &served{reload: make(chan os.Signal), logged: &log{}, site: site, client: &http.Client{Transport: &http.Transport{}}, ready: make(chan struct{})}
	listening := make(chan struct{}, 8)
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- Run(ctx, Options{
			Build: func(_ context.Context, hooks *Hooks) (*Site, error) {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.hooks = hooks
				return s.site(hooks), nil
			},
			Listening: func(address string) {
				s.mu.Lock()
				defer s.mu.Unlock()
				s.address = address
				listening <- struct{}{}
			},
			Ready:  func() { close(s.ready) },
			Logger: slog.New(slog.NewTextHandler(s.logged, nil)), Reload: s.reload, Version: "1.2.3",
		})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		s.client.CloseIdleConnections()
	})
	select {
	case <-listening:
	case err := <-ended:
		t.Fatalf("Run: %v", err)
	}
	return s
}

// build makes another site from now on, and reads the configuration anew.
func (s *served) build(t *testing.T, site func(hooks *Hooks) *Site) {
	t.Helper()
	s.mu.Lock()
	s.site = site
	s.mu.Unlock()
	before := s.logged.count("the new configuration is in use")
	s.reload <- syscall.SIGHUP
	eventually(t, func() bool { return s.logged.count("the new configuration is in use") > before })
}

// get returns the answer to a request.
func (s *served) get(t *testing.T, scheme, path string) (code int, body string) {
	t.Helper()
	s.mu.Lock()
	address := s.address
	s.mu.Unlock()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, scheme+"://"+address+path, nil)
	must(t, err)
	response, err := s.client.Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	must(t, err)
	return response.StatusCode, string(text)
}

func eventually(t *testing.T, happened func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); !happened(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen")
		}
	}
}

// fakeDevice is a device of the configuration.
type fakeDevice struct {
	name   string
	device hsm.Device
	mu     sync.Mutex
	err    error
}

func (d *fakeDevice) Name() string { return d.name }

func (d *fakeDevice) Device(context.Context) (hsm.Device, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.device, d.err
}

// flagged is a device that tells what a test says.
type flagged struct {
	hsm.Device

	info hsm.Info
}

func (d flagged) Info(context.Context) (hsm.Info, error) { return d.info, nil }

// full is a site with one of everything.
func full(t *testing.T, y *yard, hooks *Hooks, clusters ...Cluster) *Site {
	t.Helper()
	kept, err := file.Open(t.TempDir())
	must(t, err)
	sink, err := audit.File(t.TempDir() + "/audit.log")
	must(t, err)
	log, err := audit.Open(audit.Options{Sinks: []audit.Sink{sink}})
	must(t, err)
	return &Site{
		Custodian: y, Clusters: clusters, Audit: log, Close: log.Close, Listen: Listen{Address: "127.0.0.1:0"},
		Devices: []Device{
			&fakeDevice{name: "stick", device: flagged{hsmtest.NewMemory(), hsm.Info{State: hsm.StateOperational, PIN: hsm.PINState{CountLow: true}}}},
			&fakeDevice{name: "drawer", err: fmt.Errorf("opening device \"drawer\": %w", hsm.ErrUnavailable)},
		},
		Stores: []Store{{Name: "local", Store: hooks.Store("local", kept), Probe: true}},
	}
}

func TestMetricsAreNamedAndBoundedAsTheyShouldBe(t *testing.T) {
	y := newYard()
	a, b := y.cluster("a", 2), y.cluster("b", 1)
	y.seal(a.Nodes[0], b.Nodes[0])
	y.refused[b.Nodes[0]] = cluster.ErrWrongShares
	s := serve(t, func(hooks *Hooks) *Site { return full(t, y, hooks, a, b) })
	<-s.ready
	eventually(t, func() bool {
		_, body := s.get(t, "http", "/metrics")
		return strings.Contains(body, `nitroseal_cluster_alarm{alarm="wrong_shares",cluster="b"} 1`) && strings.Contains(body, `nitroseal_device_up{device="stick"}`) &&
			strings.Contains(body, `nitroseal_device_up{device="drawer"}`) && strings.Contains(body, `nitroseal_store_up{store="local"} 1`) &&
			strings.Contains(body, `nitroseal_node_last_unseal_timestamp_seconds`)
	})
	s.hooks.DeviceOperation("stick", "decrypt", 30*time.Millisecond, nil)
	s.hooks.DeviceOperation("stick", "decrypt", 30*time.Millisecond, &hsm.PINError{Detail: "wrong"})
	s.hooks.DeviceOperation("old", "decrypt", time.Second, nil)
	_, body := s.get(t, "http", "/metrics")
	for _, want := range []string{
		`nitroseal_build_info{goversion="go1.`, `version="1.2.3"} 1`,
		`nitroseal_node_up{cluster="a",node="https://a-0:8200"} 1`,
		`nitroseal_node_sealed{cluster="a",node="https://a-0:8200"} 0`,
		`nitroseal_node_sealed{cluster="b",node="https://b-0:8200"} 1`,
		`nitroseal_node_initialized{cluster="b",node="https://b-0:8200"} 1`,
		`nitroseal_node_unseal_attempts_total{cluster="a",node="https://a-0:8200",result="unsealed"} 1`,
		`nitroseal_node_unseal_attempts_total{cluster="b",node="https://b-0:8200",result="failed"} 1`,
		`nitroseal_cluster_alarm{alarm="foreign_cluster",cluster="b"} 0`,
		`nitroseal_device_up{device="drawer"} 0`,
		`nitroseal_device_pin_state{device="stick",state="count_low"} 1`,
		`nitroseal_device_pin_state{device="stick",state="final_try"} 0`,
		`nitroseal_device_operations_total{device="stick",operation="decrypt",result="ok"} 1`,
		`nitroseal_device_operations_total{device="stick",operation="decrypt",result="locked"} 1`,
		`nitroseal_device_operation_duration_seconds_count{device="stick",operation="decrypt"} 2`,
		`nitroseal_store_operations_total{operation="get",result="ok",store="local"} 1`,
		`nitroseal_audit_sink_up{sink="file `,
		`nitroseal_config_last_reload_successful 1`,
		`nitroseal_critical_windows 0`,
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in\n%s", want, body)
		}
	}

	registry := prometheus.NewRegistry()
	m := newMetrics()
	hooks := newHooks(m)
	site := full(t, y, hooks, a)
	defer func() { must(t, site.Close()) }()
	c := newCrew(site, newLanes(), hooks, slog.New(slog.DiscardHandler), nil, func(view) bool { return true })
	c.end()
	registry.MustRegister(&collector{version: "1", crew: func() *crew { return c }, hooks: hooks})
	hooks.DeviceOperation("stick", "decrypt", time.Second, nil)
	hooks.metrics.storeOperation("local", "get", time.Second, store.ErrUnavailable)
	for _, gatherer := range []prometheus.Gatherer{registry, m.registry} {
		problems, err := testutil.GatherAndLint(gatherer)
		must(t, err)
		for _, p := range problems {
			if strings.HasPrefix(p.Metric, "nitroseal_") {
				t.Errorf("%s: %s", p.Metric, p.Text)
			}
		}
		if _, err := testutil.GatherAndCount(gatherer); err != nil {
			t.Error(err)
		}
	}

	s.build(t, func(hooks *Hooks) *Site { return full(t, y, hooks, a) })
	_, body = s.get(t, "http", "/metrics")
	for _, gone := range []string{`cluster="b"`, `device="old"`} {
		if strings.Contains(body, gone) {
			t.Errorf("%s is not in the configuration any more", gone)
		}
	}
	if !strings.Contains(body, `nitroseal_node_unseal_attempts_total{cluster="a",node="https://a-0:8200",result="unsealed"} 1`) {
		t.Error("a reload forgot what was counted")
	}
}

func TestReadyMeansLookedAtAndAnHSMWhereOneIsNeeded(t *testing.T) {
	y := newYard()
	a := y.cluster("a", 2)
	lost := &fakeDevice{name: "stick", err: hsm.ErrUnavailable}
	site := func(*Hooks) *Site {
		return &Site{Custodian: y, Clusters: []Cluster{a}, Listen: Listen{Address: "127.0.0.1:0"}, Devices: []Device{lost}}
	}
	s := serve(t, site)
	<-s.ready
	if code, body := s.get(t, "http", "/healthz"); code != 200 {
		t.Errorf("healthz: %d %s", code, body)
	}
	if code, body := s.get(t, "http", "/readyz"); code != 200 {
		t.Errorf("nobody needs the HSM: %d %s", code, body)
	}

	y.set(func() { y.refused[a.Nodes[0]] = fmt.Errorf("opening: %w", hsm.ErrUnavailable) })
	y.seal(a.Nodes[0])
	s.build(t, site)
	var answer readiness
	eventually(t, func() bool {
		code, body := s.get(t, "http", "/readyz")
		answer = readiness{}
		must(t, json.Unmarshal([]byte(body), &answer))
		return code == 503 && len(answer.Reasons) == 1 && strings.Contains(answer.Reasons[0], "no HSM answers") && answer.Nodes[0].Reason != ""
	})
	if n := answer.Nodes[0]; n.State != "sealed" || n.Node != a.Nodes[0] || !strings.Contains(n.Reason, "unavailable") {
		t.Errorf("the node: %+v", n)
	}
	if d := answer.Devices[0]; d.Up == nil || *d.Up || d.Reason == "" {
		t.Errorf("the device: %+v", d)
	}
	brokenLog, err := audit.File("/nowhere/audit.log")
	must(t, err)
	log, err := audit.Open(audit.Options{Sinks: []audit.Sink{brokenLog}})
	must(t, err)
	s.build(t, func(hooks *Hooks) *Site {
		made := site(hooks)
		made.Audit, made.Close = log, log.Close
		return made
	})
	eventually(t, func() bool {
		code, body := s.get(t, "http", "/readyz")
		return code == 503 && strings.Contains(body, "nothing would be unsealed") && strings.Contains(body, "/nowhere")
	})
	for _, path := range []string{"/", "/healthz/x", "/debug/pprof/"} {
		if code, _ := s.get(t, "http", path); code != 404 {
			t.Errorf("%s: %d", path, code)
		}
	}
}

func TestTheListenerMovesAndTakesARenewedCertificate(t *testing.T) {
	y := newYard()
	a := y.cluster("a", 1)
	site := func(l Listen) func(*Hooks) *Site {
		return func(*Hooks) *Site { return &Site{Custodian: y, Clusters: []Cluster{a}, Listen: l} }
	}
	first, second := certificate(t, "first"), certificate(t, "second")
	s := serve(t, site(Listen{Address: "127.0.0.1:0"}))
	s.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}
	if code, _ := s.get(t, "http", "/healthz"); code != 200 {
		t.Errorf("plain: %d", code)
	}
	for name, c := range map[string]*tls.Certificate{"first": first, "second": second} {
		s.build(t, site(Listen{Address: "127.0.0.1:0", Certificate: c}))
		if code, body := s.get(t, "https", "/healthz"); code != 200 {
			t.Errorf("TLS: %d %s", code, body)
		}
		conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}}).DialContext(t.Context(), "tcp", s.address)
		must(t, err)
		if got := conn.(*tls.Conn).ConnectionState().PeerCertificates[0].DNSNames[0]; got != name {
			t.Errorf("it shows the certificate %s", got)
		}
		conn.Close()
		if code, _ := s.get(t, "http", "/healthz"); code == 200 {
			t.Error("it speaks plain HTTP still")
		}
	}

	old := s.address
	s.build(t, site(Listen{Address: "localhost:0"}))
	if s.address == old {
		t.Error("it did not move")
	}
	if code, _ := s.get(t, "http", "/healthz"); code != 200 {
		t.Errorf("elsewhere: %d", code)
	}
	if conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", old); err == nil {
		conn.Close()
		t.Error("it listens at the old address still")
	}

	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	s.mu.Lock()
	s.site = site(Listen{Address: taken.Addr().String()})
	s.mu.Unlock()
	s.reload <- syscall.SIGHUP
	eventually(t, func() bool { return s.logged.count("the one in use stays") == 1 })
	if code, body := s.get(t, "http", "/metrics"); code != 200 || !strings.Contains(body, "nitroseal_config_last_reload_successful 0") ||
		!strings.Contains(body, `nitroseal_config_reloads_total{result="error"} 1`) {
		t.Errorf("after a reload that failed: %d\n%s", code, body)
	}
	s.build(t, site(Listen{}))
	if code, _ := s.get(t, "http", "/healthz"); code != 0 {
		t.Errorf("nowhere: %d", code)
	}
}

// certificate makes a certificate for a name.
func certificate(t *testing.T, name string) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// names returns the names under which a family's samples appear.
func names(family *dto.MetricFamily) []string {
	name := family.GetName()
	if family.GetType() == dto.MetricType_HISTOGRAM {
		return []string{name + "_bucket", name + "_sum", name + "_count"}
	}
	return slices.Clone([]string{name})
}
