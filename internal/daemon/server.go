package daemon

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// newServer returns what answers about the daemon.
func newServer(d *daemon) *monitor.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", d.healthz)
	mux.HandleFunc("GET /readyz", d.readyz)
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4, Timeout: monitor.RequestLimit,
	}))
	return monitor.NewServer(monitor.Options{
		Handler: mux, Logger: d.logger, Listening: d.options.Listening, Meanwhile: "nodes are unsealed meanwhile",
	})
}

// healthz: the process lives and its loops turn. Whoever restarts it for want of that does no harm.
func (d *daemon) healthz(w http.ResponseWriter, _ *http.Request) {
	if err := d.healthy(); err != nil {
		monitor.Respond(w, http.StatusServiceUnavailable, map[string]any{"healthy": false, "reason": err.Error()})
		return
	}
	monitor.Respond(w, http.StatusOK, map[string]any{"healthy": true})
}

// readyz: every node was looked at, an HSM and the store answer where they are needed, and an act could be announced.
func (d *daemon) readyz(w http.ResponseWriter, _ *http.Request) {
	r := d.readiness()
	code := http.StatusOK
	if !r.Ready {
		code = http.StatusServiceUnavailable
	}
	monitor.Respond(w, code, r)
}
