package server

import (
	"context"
	"errors"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/monitor"
)

// Hooks are what the parts of a site report to. It is a device.Observer.
type Hooks struct {
	metrics    *metrics
	operations operations

	mu   sync.Mutex
	last map[string]outcome // by device
}

// outcome is the newest thing that was heard of a device.
type outcome struct {
	at time.Time
	ok bool
}

var _ device.Observer = (*Hooks)(nil)

func newHooks(m *metrics) *Hooks { return &Hooks{metrics: m, last: map[string]outcome{}} }

// DeviceOperation implements device.Observer.
func (h *Hooks) DeviceOperation(name, operation string, took time.Duration, err error) {
	now := time.Now()
	result, answered := monitor.DeviceResult(err)
	h.metrics.deviceOperations.WithLabelValues(name, operation, result).Inc()
	h.metrics.deviceSeconds.WithLabelValues(name, operation).Observe(took.Seconds())
	if err == nil && (operation == device.OperationDecrypt || operation == device.OperationAgree) {
		h.operations.ended(name, now, took)
	}
	if errors.Is(err, context.Canceled) {
		return // the caller went away: that says nothing about the HSM
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last[name] = outcome{now, answered}
}

// lastOfDevice is what a monitor.Probe asks.
func (h *Hooks) lastOfDevice(name string) (at time.Time, ok, known bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	o, known := h.last[name]
	return o.at, o.ok, known
}
