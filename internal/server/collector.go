package server

import (
	"runtime"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
)

// collector shows how the service in use fares at the moment of the scrape, so that nothing stays that is not configured any more.
type collector struct{ server *server }

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("nitroseal_serve_"+name, help, labels, nil)
}

var (
	buildInfo       = describe("build_info", "1, for the version that runs.", "version", "goversion")
	certificateEnds = describe("certificate_expiry_timestamp_seconds", "When the certificate in use ends; missing without TLS.")
	connections     = describe("connections", "Connections that are open.")
	keySeals        = describe("key_seals", "1 where encrypting with the key works now.", "key")
	keyOpens        = describe("key_opens", "1 where decrypting with the key works now: by an HSM that answers, or a lease.", "key")
	keyVersion      = describe("key_version", "The version that seals; 0 where none may.", "key")
	keyCapacity     = describe("key_capacity_vaults",
		"How many sealed Vaults come up within three minutes in strict mode, by the HSMs that answer; 0 before it was measured.", "key")
	recipientsUp = describe("key_recipients_up", "Recipients of the version that seals whose HSM answers.", "key")
	recipients   = describe("key_recipients", "Recipients of the version that seals.", "key")
	leaseUntil   = describe("lease_until_timestamp_seconds", "When a lease that is open ends.", "key", "version")
	leaseLocked  = describe("lease_locked",
		"1 where the memory of a lease that is open is never written to swap space.", "key", "version")
	queueInside  = describe("queue_inside", "Openings that have their turn at an HSM.")
	queueWaiting = describe("queue_waiting", "Openings that wait for one: urgent ones, and those that yield to them.", "priority")
	deviceUp     = describe("device_up",
		"1 where the HSM answered when it was last asked or used, and is neither locked nor absent.", "device")
	devicePIN = describe("device_pin_state",
		"Flags of the user PIN: count_low, a wrong one was sent; final_try, the next wrong one locks; locked.", "device", "state")
	deviceTime = describe("device_operation_seconds",
		"Time of one opening in the HSM, on average and without waiting; missing before it was measured.", "device")
	tokensKnown = describe("tokens", "Tokens that are good.")
	tokenUsed   = describe("token_last_use_timestamp_seconds",
		"When this process last took the token; missing where it has not.", "token")
	tokenRequests = describe("token_requests_total", "Requests with the token.", "token")
	tokenLimited  = describe("token_limited_total", "Requests with the token that were answered with 429.", "token")
	sinkUp        = describe("audit_sink_up", "1 where the audit sink took the last line.", "sink")
	sinkLost      = describe("audit_missed_lines_total", "Lines of the audit log that the sink did not take.", "sink")
)

// Describe implements [prometheus.Collector].
func (c *collector) Describe(to chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		buildInfo, certificateEnds, connections, keySeals, keyOpens, keyVersion, keyCapacity, recipientsUp, recipients, leaseUntil,
		leaseLocked, queueInside, queueWaiting, deviceUp, devicePIN, deviceTime, tokensKnown, tokenUsed, tokenRequests, tokenLimited,
		sinkUp, sinkLost,
	} {
		to <- desc
	}
}

// Collect implements [prometheus.Collector].
func (c *collector) Collect(to chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	gauge(buildInfo, 1, c.server.options.Version, runtime.Version())
	gauge(connections, float64(c.server.conns.Load()))
	if worn := c.server.wardrobe.current.Load(); worn != nil {
		gauge(certificateEnds, seconds(worn.ends))
	}
	in := c.server.service.Load()
	if in == nil {
		return
	}
	for _, v := range in.views() {
		h := v.health
		gauge(keySeals, number(h.Seals), h.Name)
		gauge(keyOpens, number(h.Opens), h.Name)
		gauge(keyVersion, float64(h.Version), h.Name)
		gauge(keyCapacity, float64(h.Capacity), h.Name)
		gauge(recipients, float64(h.Recipients), h.Name)
		gauge(recipientsUp, float64(h.RecipientsUp), h.Name)
	}
	for _, l := range newest(in.site.Keys.Leases()) {
		gauge(leaseUntil, seconds(l.Until), l.Key, strconv.Itoa(l.Version))
		gauge(leaseLocked, number(l.Locked), l.Key, strconv.Itoa(l.Version))
	}
	inside, urgent, patient := in.desk.load()
	gauge(queueInside, float64(inside))
	gauge(queueWaiting, float64(urgent), "urgent")
	gauge(queueWaiting, float64(patient), "patient")
	c.collectDevices(in, gauge)
	c.collectTokens(in, to)
	if in.site.Audit == nil {
		return
	}
	for _, sink := range in.site.Audit.Sinks() {
		gauge(sinkUp, number(sink.Err == nil), sink.Name)
		to <- prometheus.MustNewConstMetric(sinkLost, prometheus.CounterValue, float64(sink.Missed), sink.Name)
	}
}

func (c *collector) collectDevices(in *service, gauge func(*prometheus.Desc, float64, ...string)) {
	for name, p := range in.probes {
		if took := in.hooks.operations.of(name); took > 0 {
			gauge(deviceTime, took.Seconds(), name)
		}
		state, known := p.State()
		if !known {
			continue
		}
		gauge(deviceUp, number(state.Up), name)
		if state.Told {
			gauge(devicePIN, number(state.PIN.CountLow), name, "count_low")
			gauge(devicePIN, number(state.PIN.FinalTry), name, "final_try")
			gauge(devicePIN, number(state.PIN.Locked), name, "locked")
		}
	}
}

// collectTokens tells of tokens that are good: those that were revoked go from here too.
func (c *collector) collectTokens(in *service, to chan<- prometheus.Metric) {
	ids := in.site.Tokens.IDs()
	to <- prometheus.MustNewConstMetric(tokensKnown, prometheus.GaugeValue, float64(len(ids)))
	for _, id := range ids {
		who := c.server.holders.known(id)
		if who == nil {
			continue
		}
		to <- prometheus.MustNewConstMetric(tokenUsed, prometheus.GaugeValue, float64(who.last.Load()), id)
		to <- prometheus.MustNewConstMetric(tokenRequests, prometheus.CounterValue, float64(who.requests.Load()), id)
		to <- prometheus.MustNewConstMetric(tokenLimited, prometheus.CounterValue, float64(who.limited.Load()), id)
	}
}

func number(set bool) float64 { return float64(flag(set)) }
