package daemon

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// TestAPortThatIsTakenKeepsNothingSealed: whoever wants the metrics waits, the Vaults do not.
func TestAPortThatIsTakenKeepsNothingSealed(t *testing.T) {
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	other, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer other.Close()
	y := newYard()
	a := y.cluster("a", 1)
	y.seal(a.Nodes...)
	var address atomic.Value
	address.Store(taken.Addr().String())
	logged, reload, ended := &log{}, make(chan os.Signal), make(chan error, 1)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	go func() {
		ended <- Run(ctx, Options{
			Build: func(context.Context, *Hooks) (*Site, error) {
				return &Site{Custodian: y, Clusters: []Cluster{a}, Listen: Listen{Address: address.Load().(string)}}, nil
			},
			Logger: slog.New(slog.NewTextHandler(logged, nil)), Reload: reload, listenPause: 20 * time.Millisecond,
		})
	}()
	eventually(t, func() bool {
		select {
		case err := <-ended:
			t.Fatalf("Run: %v", err)
		default:
		}
		return len(y.sealed()) == 0
	})
	if logged.count("level=ERROR") != 1 || logged.count("address already in use") != 1 {
		t.Errorf("the log says\n%s", logged)
	}

	reload <- syscall.SIGHUP // what else is new does not wait for the port either
	eventually(t, func() bool { return logged.count("the new configuration is in use") == 1 })
	address.Store(other.Addr().String()) // a move to a port that is taken is refused, as ever
	reload <- syscall.SIGHUP
	eventually(t, func() bool { return logged.count("the one in use stays") == 1 })

	must(t, taken.Close())
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	eventually(t, func() bool {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+taken.Addr().String()+"/healthz", nil)
		must(t, err)
		response, err := client.Do(request)
		if err != nil {
			return false
		}
		return response.Body.Close() == nil && response.StatusCode == http.StatusOK
	})
	if logged.count("level=ERROR") != 2 { // nothing is told twice
		t.Errorf("the log says\n%s", logged)
	}
	stop()
	must(t, <-ended)
}
