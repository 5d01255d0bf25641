package daemon

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// metrics count what happens, in a registry of their own. Labels take their values from the configuration (clusters, nodes,
// devices, stores, sinks) or from short lists in the code; what a reload takes out of the configuration goes from here too.
type metrics struct {
	registry *prometheus.Registry

	deviceOperations, storeOperations *prometheus.CounterVec
	deviceSeconds, storeSeconds       *prometheus.HistogramVec
	reloads                           *prometheus.CounterVec
	reloaded                          prometheus.Gauge // whether the last reload worked
	reloadTime                        prometheus.Gauge // of the last that did

	mu      sync.Mutex // guards what follows
	devices map[string]outcome
	stores  map[string]outcome
}

// outcome is the newest thing that was heard of a device or a store.
type outcome struct {
	at time.Time
	ok bool
}

// buckets are the upper bounds of seconds: from a SoftHSM (1 ms) over a card (0.6 s) to one that generates a key.
var buckets = []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(), devices: map[string]outcome{}, stores: map[string]outcome{},
		deviceOperations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nitroseal_device_operations_total", Help: "Operations on an HSM, by what they were and how they ended.",
		}, []string{"device", "operation", "result"}),
		deviceSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "nitroseal_device_operation_duration_seconds", Buckets: buckets,
			Help: "Time of operations on an HSM, waiting in our queue included.",
		}, []string{"device", "operation"}),
		storeOperations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nitroseal_store_operations_total",
			Help: "Operations on a store, by what they were and how they ended. A missing name or a lost race is an answer, so ok.",
		}, []string{"store", "operation", "result"}),
		storeSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "nitroseal_store_operation_duration_seconds", Buckets: buckets, Help: "Time of operations on a store.",
		}, []string{"store", "operation"}),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "nitroseal_config_reloads_total", Help: "Times that the configuration was read anew, by how it ended.",
		}, []string{"result"}),
		reloaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "nitroseal_config_last_reload_successful",
			Help: "1 where the configuration in use is the newest one that was read, 0 where the newest was refused.",
		}),
		reloadTime: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "nitroseal_config_last_reload_success_timestamp_seconds", Help: "When the configuration in use was read.",
		}),
	}
	m.registry.MustRegister(
		m.deviceOperations, m.deviceSeconds, m.storeOperations, m.storeSeconds, m.reloads, m.reloaded, m.reloadTime,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	for _, result := range []string{monitor.ResultOK, monitor.ResultError} { // so that a rate over them begins at 0
		m.reloads.WithLabelValues(result)
	}
	return m
}

func (m *metrics) deviceOperation(name, operation string, took time.Duration, err error) {
	result, answered := monitor.DeviceResult(err)
	m.deviceOperations.WithLabelValues(name, operation, result).Inc()
	m.deviceSeconds.WithLabelValues(name, operation).Observe(took.Seconds())
	if errors.Is(err, context.Canceled) {
		return // the caller went away: that says nothing about the HSM
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.devices[name] = outcome{time.Now(), answered}
}

func (m *metrics) storeOperation(name, operation string, took time.Duration, err error) {
	result := monitor.ResultOK
	if !storeAnswered(err) {
		result = monitor.ResultError
	}
	m.storeOperations.WithLabelValues(name, operation, result).Inc()
	m.storeSeconds.WithLabelValues(name, operation).Observe(took.Seconds())
	if errors.Is(err, context.Canceled) {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stores[name] = outcome{time.Now(), result == monitor.ResultOK}
}

// lastOfDevice is what a [monitor.Probe] asks.
func (m *metrics) lastOfDevice(name string) (at time.Time, ok, known bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, known := m.devices[name]
	return o.at, o.ok, known
}

func (m *metrics) lastOfStore(name string) (outcome, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	o, ok := m.stores[name]
	return o, ok
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

// keep forgets the devices and stores that are not in the configuration any more.
func (m *metrics) keep(devices, stores []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.devices {
		if !slices.Contains(devices, name) {
			delete(m.devices, name)
			m.deviceOperations.DeletePartialMatch(prometheus.Labels{"device": name})
			m.deviceSeconds.DeletePartialMatch(prometheus.Labels{"device": name})
		}
	}
	for name := range m.stores {
		if !slices.Contains(stores, name) {
			delete(m.stores, name)
			m.storeOperations.DeletePartialMatch(prometheus.Labels{"store": name})
			m.storeSeconds.DeletePartialMatch(prometheus.Labels{"store": name})
		}
	}
}
