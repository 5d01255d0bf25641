package daemon

import (
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// collector shows how the site in use fares at the moment of the scrape, so that nothing stays that is not configured any more.
type collector struct {
	version string
	crew    func() *crew // the one at work, nil for none
	hooks   *Hooks
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("nitroseal_"+name, help, labels, nil)
}

var (
	buildInfo  = describe("build_info", "1, for the version that runs.", "version", "goversion")
	critical   = describe("critical_windows", "Windows that are open in which the process must not be ended: it holds the only copy of keys.")
	nodeUp     = describe("node_up", "1 where the node answered when it was last looked at.", "cluster", "node")
	nodeSealed = describe("node_sealed",
		"1 where the node is sealed, 0 where it is not; as it was last known, and missing until it was.", "cluster", "node")
	nodeInitialized = describe("node_initialized",
		"1 where the node is initialised; as it was last known, and missing until it was.", "cluster", "node")
	nodeLooked = describe("node_last_look_timestamp_seconds", "When the node was last looked at, whether or not it answered.",
		"cluster", "node")
	nodeUnsealed = describe("node_last_unseal_timestamp_seconds", "When this process last unsealed the node; missing where it has not.",
		"cluster", "node")
	nodeCertificate = describe("node_certificate_expiry_timestamp_seconds",
		"When the node's certificate ends; as it was last known, and missing where nobody looks at that: with pins alone, and plain http.",
		"cluster", "node")
	nodeAttempts = describe("node_unseal_attempts_total",
		"Acts on the node: unsealed, failed, or none where nothing failed and it stays sealed (it joins, or waits for people).",
		"cluster", "node", "result")
	clusterAlarm = describe("cluster_alarm",
		"1 where a person is needed. foreign_cluster: shares were given to another cluster, rekey now; wrong_shares: those in "+
			"custody do not unseal a node; mismatch: a node is not as recorded; identity: by TLS it is another; pin: a PIN was refused.",
		"cluster", "alarm")
	deviceUp = describe("device_up",
		"1 where the HSM answered when it was last asked or used, and is neither locked nor absent.", "device")
	devicePIN = describe("device_pin_state",
		"Flags of the user PIN: count_low, a wrong one was sent; final_try, the next wrong one locks; locked. No token tells the "+
			"number of tries that are left.", "device", "state")
	storeUp  = describe("store_up", "1 where the store answered when it was last asked or used.", "store")
	sinkUp   = describe("audit_sink_up", "1 where the audit sink took the last line.", "sink")
	sinkLost = describe("audit_missed_lines_total", "Lines of the audit log that the sink did not take.", "sink")
)

// Describe implements [prometheus.Collector].
func (c *collector) Describe(to chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{
		buildInfo, critical, nodeUp, nodeSealed, nodeInitialized, nodeLooked, nodeUnsealed, nodeCertificate, nodeAttempts, clusterAlarm,
		deviceUp, devicePIN, storeUp, sinkUp, sinkLost,
	} {
		to <- desc
	}
}

// Collect implements [prometheus.Collector].
func (c *collector) Collect(to chan<- prometheus.Metric) {
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	gauge(buildInfo, 1, c.version, runtime.Version())
	open, _ := c.hooks.windows()
	gauge(critical, float64(len(open)))
	crew := c.crew()
	if crew == nil {
		return
	}
	raised := map[string]map[Alarm]bool{}
	for _, v := range crew.views() {
		if raised[v.cluster] == nil {
			raised[v.cluster] = map[Alarm]bool{}
		}
		raised[v.cluster][v.alarm] = true
		collectNode(to, v)
	}
	for cluster, raisedHere := range raised {
		for _, alarm := range alarms {
			gauge(clusterAlarm, flag(raisedHere[alarm]), cluster, string(alarm))
		}
	}
	for _, d := range crew.devices {
		state, known := d.State()
		if !known {
			continue
		}
		gauge(deviceUp, flag(state.Up), d.Device.Name())
		if state.Told {
			gauge(devicePIN, flag(state.PIN.CountLow), d.Device.Name(), "count_low")
			gauge(devicePIN, flag(state.PIN.FinalTry), d.Device.Name(), "final_try")
			gauge(devicePIN, flag(state.PIN.Locked), d.Device.Name(), "locked")
		}
	}
	for _, s := range crew.site.Stores {
		if last, known := c.hooks.metrics.lastOfStore(s.Name); known {
			gauge(storeUp, flag(last.ok), s.Name)
		}
	}
	if crew.site.Audit == nil {
		return
	}
	for _, sink := range crew.site.Audit.Sinks() {
		gauge(sinkUp, flag(sink.Err == nil), sink.Name)
		to <- prometheus.MustNewConstMetric(sinkLost, prometheus.CounterValue, float64(sink.Missed), sink.Name)
	}
}

func collectNode(to chan<- prometheus.Metric, v view) {
	gauge := func(desc *prometheus.Desc, value float64) {
		to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, v.cluster, v.address)
	}
	for _, result := range outcomes {
		to <- prometheus.MustNewConstMetric(nodeAttempts, prometheus.CounterValue, float64(v.attempts[result]), v.cluster, v.address, result)
	}
	if !v.unsealed.IsZero() {
		gauge(nodeUnsealed, seconds(v.unsealed))
	}
	if !v.looked.IsZero() {
		gauge(nodeUp, flag(v.up))
		gauge(nodeLooked, seconds(v.looked))
	}
	if v.seen { // also before the first look after a reload
		gauge(nodeSealed, flag(v.state.Sealed))
		gauge(nodeInitialized, flag(v.state.Initialized))
		if ends := v.state.CertificateEnds; !ends.IsZero() {
			gauge(nodeCertificate, seconds(ends))
		}
	}
}

func flag(set bool) float64 {
	if set {
		return 1
	}
	return 0
}

func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }
