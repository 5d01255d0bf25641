package config

import (
	"net"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2/hclsyntax"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// Where "nitroseal serve" listens, and the path of its keys, where the file does not say.
const (
	DefaultServeListen        = "0.0.0.0:8210"
	DefaultServeMetricsListen = "127.0.0.1:9109"
	DefaultServeMount         = "transit"
	DefaultServeRate          = 100       // requests of a token in a second
	DefaultServeBurst         = 1000      // and at once, after a pause
	DefaultServeMaxBody       = 256 << 10 // bytes: a ciphertext of the largest payload with the most recipients fits
	DefaultServeConnections   = 4096
)

// Which clients of "nitroseal serve" must show a certificate.
const (
	CertificatesNone     = ""         // none is asked for
	CertificatesOptional = "optional" // those whose token is bound to a name
	CertificatesRequired = "required" // every one
)

// Serve is how the seal server behaves.
type Serve struct {
	// Listen is host and port. TLSCertFile and TLSKeyFile are PEM and read anew when they change; both are empty where PlainHTTP is, which
	// is for a loopback address only.
	Listen                  string
	TLSCertFile, TLSKeyFile string
	PlainHTTP               bool
	// ClientCAFile is PEM: who signs client certificates; empty where ClientCertificates is CertificatesNone.
	ClientCAFile       string
	ClientCertificates string // one of the constants
	// Mount is the path of the keys, without a slash at its ends: what a seal's mount_path names.
	Mount string
	// Keys are the wrapping keys that are served; none: all that tokens name.
	Keys []string
	// Tokens is the store of the tokens; "" for a folder of the state directory.
	Tokens string
	// Rate and Burst are how many requests a token has in a second and at once that has no limit of its own; both 0 for no limit.
	Rate, Burst int
	// MaxBody is the size of the largest request, in bytes.
	MaxBody int64
	// MaxConnections are served at one time.
	MaxConnections int
	// MetricsListen is where it answers /healthz, /readyz and /metrics, without TLS and on a loopback address; "" for nowhere.
	MetricsListen string
	// MLock keeps all of the process's memory from being swapped, not only keys.
	MLock bool
}

// Secure tells whether the server speaks TLS.
func (s *Serve) Secure() bool { return s.TLSCertFile != "" }

// serveAttributes are those of the block serve.
type serveAttributes struct {
	Listen             string   `hcl:"listen,optional"`
	TLSCertFile        string   `hcl:"tls_cert_file,optional"`
	TLSKeyFile         string   `hcl:"tls_key_file,optional"`
	PlainHTTP          bool     `hcl:"plain_http,optional"`
	ClientCAFile       string   `hcl:"client_ca_file,optional"`
	ClientCertificates string   `hcl:"client_certificates,optional"`
	Mount              string   `hcl:"mount,optional"`
	Keys               []string `hcl:"keys,optional"`
	Tokens             string   `hcl:"tokens,optional"`
	Rate               *int     `hcl:"rate,optional"`
	Burst              *int     `hcl:"burst,optional"`
	MaxBody            *int64   `hcl:"max_body,optional"`
	MaxConnections     *int     `hcl:"max_connections,optional"`
	MetricsListen      *string  `hcl:"metrics_listen,optional"`
	MLock              bool     `hcl:"mlock,optional"`
}

// The bounds of what can be set.
const (
	maxServeRate        = 1_000_000
	minServeBody        = 192 << 10 // the largest ciphertext that encrypt/ answers, or nobody could have it opened again
	maxServeBody        = 32 << 20
	maxServeConnections = 1_000_000
)

func (b *block) serve() *Serve {
	given := serveAttributes{Listen: DefaultServeListen, Mount: DefaultServeMount}
	b.decode(&given)
	s := &Serve{
		Listen: given.Listen, TLSCertFile: b.resolve(given.TLSCertFile), TLSKeyFile: b.secretFile("tls_key_file", given.TLSKeyFile), PlainHTTP: given.PlainHTTP,
		ClientCAFile: b.resolve(given.ClientCAFile), ClientCertificates: given.ClientCertificates,
		Mount: strings.Trim(given.Mount, "/"), Keys: given.Keys, Tokens: given.Tokens,
		Rate: DefaultServeRate, Burst: DefaultServeBurst, MaxBody: DefaultServeMaxBody, MaxConnections: DefaultServeConnections,
		MetricsListen: DefaultServeMetricsListen, MLock: given.MLock,
	}
	if given.MetricsListen != nil {
		s.MetricsListen = *given.MetricsListen
	}
	if b.good {
		b.checkServeListener(s)
		b.checkServeClients(s)
		b.checkServeKeys(s)
		b.checkServeLimits(s, &given)
	}
	return s
}

func (b *block) checkServeListener(s *Serve) {
	host, port, err := net.SplitHostPort(s.Listen)
	switch {
	case err != nil || port == "":
		b.wrong("listen", `listen is not host and port; write %q`, DefaultServeListen)
	case (s.TLSCertFile == "") != (s.TLSKeyFile == ""):
		b.wrong("tls_cert_file", "tls_cert_file and tls_key_file belong together; give both")
	case s.Secure() && s.PlainHTTP:
		b.wrong("plain_http", "plain_http is true and there is a certificate; keep one of both")
	case !s.Secure() && !s.PlainHTTP:
		b.wrong("tls_cert_file", "tls_cert_file and tls_key_file are missing: tokens and the keys of Vaults would pass in the clear; a server for this machine "+
			`alone may do without, by listen = "127.0.0.1:8210" and plain_http = true`)
	case s.PlainHTTP && !loopback(host):
		b.wrong("listen", "listen is an address that others can reach, and without TLS tokens and the keys of Vaults would pass in the clear; set tls_cert_file and "+
			`tls_key_file, or listen = "127.0.0.1:8210"`)
	}
	if s.MetricsListen == "" {
		return
	}
	host, port, err = net.SplitHostPort(s.MetricsListen)
	switch {
	case err != nil || port == "":
		b.wrong("metrics_listen", `metrics_listen is not host and port; write %q, or "" for none`, DefaultServeMetricsListen)
	case !loopback(host):
		b.wrong("metrics_listen", "metrics_listen is an address that others can reach, and it speaks no TLS; write %q, and let an agent on this machine collect",
			DefaultServeMetricsListen)
	case s.MetricsListen == s.Listen:
		b.wrong("metrics_listen", "metrics_listen and listen are the same; give each a port of its own")
	}
}

func (b *block) checkServeClients(s *Serve) {
	if s.ClientCAFile != "" && s.ClientCertificates == CertificatesNone && b.body.Attributes["client_certificates"] == nil {
		s.ClientCertificates = CertificatesRequired
	}
	switch {
	case !slices.Contains([]string{CertificatesNone, CertificatesOptional, CertificatesRequired}, s.ClientCertificates):
		b.wrong("client_certificates", "client_certificates %q is not known; it is %q, or %q for those alone whose token is bound to a name",
			s.ClientCertificates, CertificatesRequired, CertificatesOptional)
	case s.ClientCAFile == "" && s.ClientCertificates != CertificatesNone:
		b.wrong("client_certificates", "client_certificates asks for certificates, and nobody is trusted to sign them; set client_ca_file")
	case s.ClientCAFile != "" && s.ClientCertificates == CertificatesNone:
		b.wrong("client_certificates", "client_certificates is empty, and client_ca_file says who signs them; write %q or %q", CertificatesRequired, CertificatesOptional)
	case s.ClientCAFile != "" && !s.Secure():
		b.wrong("client_ca_file", "client_ca_file is for TLS, and this server speaks none; set tls_cert_file and tls_key_file")
	default:
		b.pem("client_ca_file", s.ClientCAFile) // read anew when it changes; here it is looked whether it can be
	}
}

// mountPath is a path whose parts are names, as in a URL without escapes.
var mountPath = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$`)

func (b *block) checkServeKeys(s *Serve) {
	const longest = 128
	first, _, _ := strings.Cut(s.Mount, "/")
	switch {
	case !mountPath.MatchString(s.Mount) || len(s.Mount) > longest:
		b.wrong("mount", "mount is not a path; write %q, as the seal's mount_path has it", DefaultServeMount)
	case first == "sys" || first == "auth":
		b.wrong("mount", "mount begins with %s, where the server answers as Vault does; write %q", first, DefaultServeMount)
	}
	seen := map[string]bool{}
	for _, key := range s.Keys {
		switch {
		case strings.Contains(key, "/") || store.CheckName(key) != nil:
			b.wrong("keys", "keys lists the names of wrapping keys, and %q is none", key)
		case seen[key]:
			b.wrong("keys", "keys has %q twice", key)
		}
		seen[key] = true
	}
}

func (b *block) checkServeLimits(s *Serve, given *serveAttributes) {
	if given.Rate != nil {
		s.Rate, s.Burst = *given.Rate, min(10**given.Rate, maxServeRate)
	}
	if given.Burst != nil {
		s.Burst = *given.Burst
	}
	if given.MaxBody != nil {
		s.MaxBody = *given.MaxBody
	}
	if given.MaxConnections != nil {
		s.MaxConnections = *given.MaxConnections
	}
	switch {
	case s.Rate < 0 || s.Rate > maxServeRate:
		b.wrong("rate", "rate is how many requests a token has in a second: 1 to %d, or 0 for no limit", maxServeRate)
	case s.Rate == 0 && given.Burst != nil && s.Burst != 0:
		b.wrong("burst", "burst belongs to a rate, and rate = 0 is no limit; leave it out")
	case s.Rate > 0 && (s.Burst < 1 || s.Burst > maxServeRate):
		b.wrong("burst", "burst is how many requests a token has at once, after a pause: 1 to %d", maxServeRate)
	}
	if s.MaxBody < minServeBody || s.MaxBody > maxServeBody {
		b.wrong("max_body", "max_body is the size of the largest request in bytes: %d to %d", minServeBody, maxServeBody)
	}
	if s.MaxConnections < 1 || s.MaxConnections > maxServeConnections {
		b.wrong("max_connections", "max_connections is 1 to %d", maxServeConnections)
	}
}

// checkServeReferences checks what the block serve says about the rest of the file.
func (r *reader) checkServeReferences(config *Config, nested *hclsyntax.Block) {
	s := config.Serve
	if s == nil {
		return
	}
	if given, ok := nested.Body.Attributes["tokens"]; ok && s.Tokens != "" {
		at := given.Expr.Range()
		switch kept, known := config.Store(s.Tokens); {
		case !known:
			r.complain(at, "serve: there is no store %q in this file", s.Tokens)
		case kept.Type == StoreObject:
			r.complain(at, "serve: store %q lies on an HSM, which is slow and may be away; keep tokens in a store of type %q or %q", s.Tokens, StoreEtcd, StoreFile)
		}
	}
	for _, listener := range []struct{ attribute, address string }{{"listen", s.Listen}, {"metrics_listen", s.MetricsListen}} {
		if listener.address != "" && listener.address == config.Run.Listen {
			at := nested.DefRange()
			if given, ok := nested.Body.Attributes[listener.attribute]; ok {
				at = given.Expr.Range()
			}
			r.complain(at, "serve: %s is %s, where \"nitroseal run\" answers; give each a port of its own", listener.attribute, listener.address)
		}
	}
}
