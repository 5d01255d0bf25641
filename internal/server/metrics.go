package server

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"vault-plugin-secrets-nitrokey/internal/monitor"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// metrics count what happens, in a registry of their own. Their labels take values from the configuration (keys, devices), ids of
// tokens and short lists in the code. What each request counts is looked up once, here.
type metrics struct {
	registry *prometheus.Registry

	requests map[transit.Operation]*requestMetrics
	other    *requestMetrics // for what has no name of its own

	leased, strict prometheus.Counter // openings
	turnedAway     prometheus.Counter
	waited         prometheus.Histogram
	refusedConns   prometheus.Counter

	deviceOperations *prometheus.CounterVec
	deviceSeconds    *prometheus.HistogramVec

	reloads             *prometheus.CounterVec
	reloaded            prometheus.Gauge
	reloadTime          prometheus.Gauge
	certificateReloads  *prometheus.CounterVec
	certificateReloaded prometheus.Gauge
}

// requestMetrics are those of one operation.
type requestMetrics struct {
	codes   map[int]prometheus.Counter
	unknown prometheus.Counter
	seconds prometheus.Observer
}

// results are what a request comes to, by the code of its answer.
var results = map[int]string{
	http.StatusOK: "ok", http.StatusBadRequest: "invalid", http.StatusForbidden: "denied", http.StatusNotFound: "not_found",
	http.StatusMethodNotAllowed: "method", http.StatusRequestEntityTooLarge: "too_large", http.StatusTooManyRequests: "limited",
	http.StatusServiceUnavailable: monitor.ResultUnavailable, http.StatusInternalServerError: monitor.ResultError,
}

// buckets are the upper bounds of seconds: from an opening in memory (50 µs) over a card (0.6 s) to one that had to wait.
var buckets = []float64{
	0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 30, 45,
}

func newMetrics() *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: "nitroseal_serve_" + name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: "nitroseal_serve_" + name, Help: help})
	}
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "nitroseal_serve_requests_total", Help: "Requests, by what they asked for and what came of it.",
	}, []string{"operation", "result"})
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "nitroseal_serve_request_duration_seconds", Buckets: buckets, Help: "Time of requests, waiting for an HSM included.",
	}, []string{"operation"})
	m := &metrics{
		registry: prometheus.NewRegistry(), requests: map[transit.Operation]*requestMetrics{},
		leased: counter("leased_openings_total", "Openings that a lease in memory did, without an HSM."),
		strict: counter("hsm_openings_total", "Openings that asked an HSM."),
		turnedAway: counter("turned_away_total",
			"Openings that were answered with 503 because too many others waited for an HSM."),
		waited: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "nitroseal_serve_queue_wait_seconds", Buckets: buckets, Help: "Time that openings waited for their turn at an HSM.",
		}),
		refusedConns: counter("connections_refused_total", "Connections that were closed because there were too many."),
		deviceOperations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nitroseal_serve_device_operations_total", Help: "Operations on an HSM, by what they were and how they ended.",
		}, []string{"device", "operation", "result"}),
		deviceSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "nitroseal_serve_device_operation_duration_seconds", Buckets: buckets,
			Help: "Time of operations on an HSM, waiting at the device included.",
		}, []string{"device", "operation"}),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nitroseal_serve_config_reloads_total", Help: "Times that the configuration was read anew, by how it ended.",
		}, []string{"result"}),
		reloaded: gauge("config_last_reload_successful",
			"1 where the configuration in use is the newest one that was read, 0 where the newest was refused."),
		reloadTime: gauge("config_last_reload_success_timestamp_seconds", "When the configuration in use was read."),
		certificateReloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nitroseal_serve_certificate_reloads_total", Help: "Times that a changed certificate was found, by how it ended.",
		}, []string{"result"}),
		certificateReloaded: gauge("certificate_last_reload_successful",
			"1 where the certificate in use is what its files hold, 0 where those are not good."),
	}
	m.registry.MustRegister(
		requests, seconds, m.leased, m.strict, m.turnedAway, m.waited, m.refusedConns, m.deviceOperations, m.deviceSeconds, m.reloads,
		m.reloaded, m.reloadTime, m.certificateReloads, m.certificateReloaded,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	for _, operation := range transit.Operations() {
		of := &requestMetrics{codes: map[int]prometheus.Counter{}, seconds: seconds.WithLabelValues(string(operation))}
		for code, result := range results {
			of.codes[code] = requests.WithLabelValues(string(operation), result)
		}
		of.unknown = requests.WithLabelValues(string(operation), "other")
		m.requests[operation] = of
	}
	m.other = m.requests[transit.OperationOther]
	for _, result := range []string{monitor.ResultOK, monitor.ResultError} { // so that a rate over them begins at 0
		m.reloads.WithLabelValues(result)
		m.certificateReloads.WithLabelValues(result)
	}
	return m
}

// request counts a request.
func (m *metrics) request(o transit.Observation) {
	of := m.requests[o.Operation]
	if of == nil {
		of = m.other
	}
	if known := of.codes[o.Code]; known != nil {
		known.Inc()
	} else {
		of.unknown.Inc()
	}
	of.seconds.Observe(o.Took.Seconds())
}

// reload counts the reading of a configuration.
func (m *metrics) reload(err error) {
	if err != nil {
		m.reloads.WithLabelValues(monitor.ResultError).Inc()
		m.reloaded.Set(0)
		return
	}
	m.reloads.WithLabelValues(monitor.ResultOK).Inc()
	m.read()
}

// read notes that a configuration is in use from now on.
func (m *metrics) read() {
	m.reloaded.Set(1)
	m.reloadTime.SetToCurrentTime()
}

// certificate counts the reading of a changed certificate.
func (m *metrics) certificate(err error) {
	result, good := monitor.ResultOK, 1.0
	if err != nil {
		result, good = monitor.ResultError, 0
	}
	m.certificateReloads.WithLabelValues(result).Inc()
	m.certificateReloaded.Set(good)
}

func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }
