package monitor

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ownAddress is an address of this machine whose ports nobody else takes as soon as they are free: other tests run meanwhile.
func ownAddress() string {
	pid := os.Getpid()
	return fmt.Sprintf("127.%d.%d.%d:0", 1+pid>>16&0x3f, pid>>8&0xff, pid&0xff)
}

func TestNoListenerIsTriedAgainWhereNoneIsWantedAnyMore(t *testing.T) {
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", ownAddress())
	must(t, err)
	s := NewServer(Options{Handler: http.NotFoundHandler(), Logger: slog.New(slog.DiscardHandler)})
	defer s.Close()
	s.Begin(Listen{Address: taken.Addr().String()})
	must(t, s.Listen(Listen{}))
	must(t, taken.Close())
	s.Retry()
	again, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", taken.Addr().String())
	must(t, err)
	must(t, again.Close())
}

// TestAListenerThatHasNotBegunToServeIsClosedAllTheSame: a reload may come before its goroutine has had its turn.
func TestAListenerThatHasNotBegunToServeIsClosedAllTheSame(t *testing.T) {
	free, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", ownAddress())
	must(t, err)
	address := free.Addr().String()
	must(t, free.Close())
	s := NewServer(Options{Handler: http.NotFoundHandler(), Logger: slog.New(slog.DiscardHandler)})
	defer s.Close()
	for range 50 {
		must(t, s.Listen(Listen{Address: address}))
		must(t, s.Listen(Listen{}))
	}
}

// TestANameThatNobodyResolvesDelaysNothingForLong: after a power cut the name server may be what waits for a Vault.
func TestANameThatNobodyResolvesDelaysNothingForLong(t *testing.T) {
	before := net.DefaultResolver
	defer func() { net.DefaultResolver = before }()
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	s := NewServer(Options{Handler: http.NotFoundHandler(), Logger: slog.New(slog.DiscardHandler)})
	defer s.Close()
	begun := time.Now()
	s.Begin(Listen{Address: "nobody.example:0", Plain: true})
	if took := time.Since(begun); took > nameLimit+6*time.Second { // without a limit of ours it is 10 s at least
		t.Errorf("it took %v", took)
	}
	if s.missing.Address == "" {
		t.Error("it is not tried again")
	}
}

func TestOnlyThisMachineIsServedWithoutTLSUnlessThatIsWanted(t *testing.T) {
	c := &tls.Certificate{}
	tests := map[string]struct {
		listen Listen
		ok     bool
	}{
		"nowhere":                     {Listen{}, true},
		"loopback":                    {Listen{Address: "127.0.0.1:9108"}, true},
		"another loopback":            {Listen{Address: "127.8.8.8:9108"}, true},
		"loopback in IPv6":            {Listen{Address: "[::1]:9108"}, true},
		"localhost":                   {Listen{Address: "localhost:9108"}, true},
		"all addresses":               {Listen{Address: ":9108"}, false},
		"all addresses by number":     {Listen{Address: "0.0.0.0:9108"}, false},
		"an address":                  {Listen{Address: "10.0.0.1:9108"}, false},
		"a name":                      {Listen{Address: "vault-1:9108"}, false},
		"a name that looks harmless":  {Listen{Address: "localhost.example:9108"}, false},
		"all addresses with TLS":      {Listen{Address: ":9108", Certificate: c}, true},
		"all addresses because so":    {Listen{Address: ":9108", Plain: true}, true},
		"a port alone is no address":  {Listen{Address: "9108"}, false},
		"an IPv4 address within IPv6": {Listen{Address: "[::ffff:127.0.0.1]:9108"}, true},
	}
	for name, test := range tests {
		if err := test.listen.Check(); (err == nil) != test.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
