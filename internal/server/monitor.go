package server

import (
	"fmt"
	"net/http"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// newMonitor returns what answers about the server.
func newMonitor(s *server) *monitor.Server {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", s.healthz)
	mux.HandleFunc("GET /readyz", s.readyz)
	mux.HandleFunc("GET /v1/sys/health", s.health)
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: 4, Timeout: monitor.RequestLimit,
	}))
	return monitor.NewServer(monitor.Options{
		Handler: mux, Logger: s.logger, Meanwhile: "seals are served meanwhile",
		Listening: func(address string) {
			if s.options.Listening != nil {
				s.options.Listening("monitor", address)
			}
		},
	})
}

// healthz: the process lives and its loops turn. Whoever restarts it for want of that does no harm.
func (s *server) healthz(w http.ResponseWriter, _ *http.Request) {
	if err := s.healthy(); err != nil {
		monitor.Respond(w, http.StatusServiceUnavailable, map[string]any{"healthy": false, "reason": err.Error()})
		return
	}
	monitor.Respond(w, http.StatusOK, map[string]any{"healthy": true})
}

// readiness is the answer of /readyz. It holds no secret: names, states and the sentences of errors.
type readiness struct {
	Ready   bool              `json:"ready"`
	Reasons []string          `json:"reasons"`         // why not, empty where it is
	Audit   string            `json:"audit,omitempty"` // why no opening can be announced; sealing works all the same
	Keys    []keyReadiness    `json:"keys"`
	Devices []deviceReadiness `json:"devices"`
}

type keyReadiness struct {
	KeyHealth

	Reason string `json:"reason,omitempty"`
}

type deviceReadiness struct {
	Device string `json:"device"`
	Up     *bool  `json:"up"` // null while nobody knows
	Reason string `json:"reason,omitempty"`
}

// readyz: the served keys can seal, so that a Vault which starts now gets its answer. An HSM that went away after it was needed
// once changes nothing about that; /v1/sys/health tells what it changes.
func (s *server) readyz(w http.ResponseWriter, _ *http.Request) {
	answer := readiness{Reasons: []string{}, Keys: []keyReadiness{}, Devices: []deviceReadiness{}}
	in := s.service.Load()
	if in == nil {
		answer.Reasons = append(answer.Reasons, "the server is starting")
		monitor.Respond(w, http.StatusServiceUnavailable, answer)
		return
	}
	counted := 0
	for _, v := range in.views() {
		shown := keyReadiness{KeyHealth: v.health}
		if v.err != nil {
			shown.Reason = shorten(v.err.Error())
		}
		if v.counts {
			counted++
		}
		if v.counts && !v.health.Seals && !v.patience {
			answer.Reasons = append(answer.Reasons, fmt.Sprintf("key %q cannot seal: %s", v.health.Name, shown.Reason))
		}
		answer.Keys = append(answer.Keys, shown)
	}
	switch {
	case !(doorkeeper{in.site.Tokens}).knows():
		answer.Reasons = append(answer.Reasons, "the tokens were not read yet, because their store does not answer")
	case len(answer.Keys) == 0:
		answer.Reasons = append(answer.Reasons, "no key is served: make a token for one")
	case !in.settled():
		answer.Reasons = append(answer.Reasons, "keys wait for their HSM before they can seal")
	case counted == 0:
		answer.Reasons = append(answer.Reasons, "no key is fit for use")
	}
	if err := in.deaf(); err != nil {
		answer.Audit = "nothing is opened: " + shorten(err.Error())
	}
	for _, d := range in.site.Devices {
		shown := deviceReadiness{Device: d.HSM.Name()}
		if state, known := in.probes[d.HSM.Name()].State(); known {
			shown.Up, shown.Reason = &state.Up, shorten(state.Reason)
		}
		answer.Devices = append(answer.Devices, shown)
	}
	answer.Ready = len(answer.Reasons) == 0
	code := http.StatusOK
	if !answer.Ready {
		code = http.StatusServiceUnavailable
	}
	monitor.Respond(w, code, answer)
}

// maxReason bounds the sentence of one error.
const maxReason = 500

func shorten(text string) string {
	if len(text) > maxReason {
		return text[:maxReason] + "…"
	}
	return text
}
