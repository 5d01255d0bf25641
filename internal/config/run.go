package config

import (
	"cmp"
	"net"
	"path/filepath"
	"strings"
	"time"
)

// DefaultListen is where "nitroseal run" answers about its health where the file does not say.
const DefaultListen = "127.0.0.1:9108"

// Run is how the daemon behaves.
type Run struct {
	// Listen is where it answers /healthz, /readyz and /metrics: host and port; "" for nowhere.
	Listen string
	// TLSCertFile and TLSKeyFile are PEM; both or neither. They are read anew at each reload.
	TLSCertFile, TLSKeyFile string
	// PlainHTTP allows an address that others can reach without TLS.
	PlainHTTP bool
	// Interval is how often a node that is well is looked at; 0 for the usual.
	Interval time.Duration
}

// Secure tells whether the daemon answers over TLS.
func (r Run) Secure() bool { return r.TLSCertFile != "" }

// runAttributes are those of the block run.
type runAttributes struct {
	Listen      *string `hcl:"listen,optional"`
	TLSCertFile string  `hcl:"tls_cert_file,optional"`
	TLSKeyFile  string  `hcl:"tls_key_file,optional"`
	PlainHTTP   bool    `hcl:"plain_http,optional"`
	Interval    string  `hcl:"interval,optional"`
}

// The shortest and the longest interval: a node is not to be hammered, and a sealed one not to be overlooked for hours.
const (
	minInterval = time.Second
	maxInterval = time.Hour
)

func (b *block) run() Run {
	var given runAttributes
	b.decode(&given)
	r := Run{
		Listen: DefaultListen, PlainHTTP: given.PlainHTTP,
		TLSCertFile: b.resolve(given.TLSCertFile), TLSKeyFile: b.secretFile("tls_key_file", given.TLSKeyFile),
	}
	if given.Listen != nil {
		r.Listen = *given.Listen
	}
	host, port, err := net.SplitHostPort(r.Listen)
	switch {
	case !b.good:
	case (r.TLSCertFile == "") != (r.TLSKeyFile == ""):
		b.wrong("tls_cert_file", "tls_cert_file and tls_key_file belong together; give both or neither")
	case r.Listen == "":
	case err != nil || port == "":
		b.wrong("listen", `listen is not host and port; write "127.0.0.1:9108", or "" for none`)
	case !loopback(host) && !r.Secure() && !r.PlainHTTP:
		b.wrong("listen", "listen is an address that others can reach, and without TLS what is answered there can be forged on its way; set tls_cert_file and "+
			"tls_key_file, or plain_http = true")
	}
	r.Interval = b.duration("interval", given.Interval)
	if given.Interval != "" && b.good && (r.Interval < minInterval || r.Interval > maxInterval) {
		b.wrong("interval", "interval is not between %v and %v", minInterval, maxInterval)
	}
	return r
}

// The kinds of audit sink.
const (
	AuditFile    = "file"
	AuditJournal = "journal"
	AuditSyslog  = "syslog"
)

// Audit is one place that acts of custody are written to. There may be several, and an act needs at least one of them.
type Audit struct {
	Kind    string
	Path    string // AuditFile
	Address string // AuditSyslog: the socket of the local server, "" for the usual one, or "tcp://host:601" or "udp://host:514"
}

// fileAuditAttributes are those of a block `audit "file" { … }`.
type fileAuditAttributes struct {
	Path string `hcl:"path"`
}

// syslogAuditAttributes are those of a block `audit "syslog" { … }`.
type syslogAuditAttributes struct {
	Address string `hcl:"address,optional"`
}

// audit reads a block `audit "KIND" { … }`.
func (b *block) audit() Audit {
	a := Audit{Kind: b.label}
	switch a.Kind {
	case AuditFile:
		var given fileAuditAttributes
		b.decode(&given)
		if b.good && given.Path == "" {
			b.wrong("path", "path is empty; name the file that acts are written to")
		}
		a.Path = b.resolve(given.Path)
	case AuditJournal:
		b.decode(&struct{}{})
	case AuditSyslog:
		var given syslogAuditAttributes
		b.decode(&given)
		if a.Address = given.Address; b.good && !syslogAddress(a.Address) {
			b.wrong("address", `address is no syslog server; write the path of the local one's socket, "/dev/log", or "tcp://host:601" or "udp://host:514"`)
		}
	default:
		b.refuse(b.at, "%s is not known; it is one of %s, %s and %s", b.what, AuditFile, AuditJournal, AuditSyslog)
	}
	return a
}

// syslogAddress tells whether an address is one of a syslog server.
func syslogAddress(address string) bool {
	if address == "" || filepath.IsAbs(address) {
		return true
	}
	scheme, rest, _ := strings.Cut(address, "://")
	host, port, err := net.SplitHostPort(rest)
	return err == nil && host != "" && port != "" && (scheme == "tcp" || scheme == "udp")
}

// elsewhere tells whether a sink is a server on another machine.
func (a Audit) elsewhere() bool { return strings.Contains(a.Address, "://") }

// where tells two sinks apart.
func (a Audit) where() string { return a.Kind + " " + cmp.Or(a.Path, a.Address) }
