package config

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// withStores is a configuration with stores and something more.
func withStores(around string) string {
	return minimal(`
store "shared" {
  type      = "etcd"
  endpoints = ["https://etcd:2379"]
  prefix    = "nitroseal"
}
store "stick" {
  type   = "object"
  device = "one"
}
device "one" {
  type    = "pkcs11"
  serial  = "1"
  pin_env = "PIN"
}
` + around)
}

func TestAServerIsWhatItsBlockSays(t *testing.T) {
	secure := "tls_cert_file = \"a.pem\"\ntls_key_file = \"a.key\"\n"
	usual := func(change func(*Serve)) func(dir string) *Serve {
		return func(dir string) *Serve {
			s := &Serve{
				Listen: "0.0.0.0:8210", TLSCertFile: filepath.Join(dir, "a.pem"), TLSKeyFile: filepath.Join(dir, "a.key"), Mount: "transit", Rate: 100, Burst: 1000,
				MaxBody: 256 << 10, MaxConnections: 4096, MetricsListen: "127.0.0.1:9109",
			}
			if change != nil {
				change(s)
			}
			return s
		}
	}
	for name, test := range map[string]struct {
		source string
		want   func(dir string) *Serve
	}{
		"nothing without a block":          {"", func(string) *Serve { return nil }},
		"a certificate and defaults":       {"serve {\n" + secure + "}", usual(nil)},
		"tokens of a store":                {"serve {\n" + secure + "tokens = \"shared\"\n}", usual(func(s *Serve) { s.Tokens = "shared" })},
		"a burst of ten times the rate":    {"serve {\n" + secure + "rate = 5\n}", usual(func(s *Serve) { s.Rate, s.Burst = 5, 50 })},
		"no limit":                         {"serve {\n" + secure + "rate = 0\n}", usual(func(s *Serve) { s.Rate, s.Burst = 0, 0 })},
		"a mount with slashes at its ends": {"serve {\n" + secure + "mount = \"/seal/prod/\"\n}", usual(func(s *Serve) { s.Mount = "seal/prod" })},
		"no metrics":                       {"serve {\n" + secure + "metrics_listen = \"\"\n}", usual(func(s *Serve) { s.MetricsListen = "" })},
		"certificates of clients, required": {
			"serve {\n" + secure + "client_ca_file = \"ca.pem\"\n}",
			func(dir string) *Serve {
				return usual(func(s *Serve) {
					s.ClientCAFile, s.ClientCertificates = filepath.Join(dir, "ca.pem"), CertificatesRequired
				})(dir)
			},
		},
		"no TLS on this machine": {
			"serve {\nlisten = \"127.0.0.1:8210\"\nplain_http = true\n}",
			usual(func(s *Serve) { s.Listen, s.TLSCertFile, s.TLSKeyFile, s.PlainHTTP = "127.0.0.1:8210", "", "", true }),
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, withStores(test.source))
			got, err := Load(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want(filepath.Dir(path)), got.Serve); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestAServerThatWouldHarmIsRefused(t *testing.T) {
	const secure = "tls_cert_file = \"a.pem\"\ntls_key_file = \"a.key\"\n"
	for name, test := range map[string]struct{ source, want string }{
		"two blocks":                          {"serve {\n" + secure + "}\nserve {\n" + secure + "tokens = \"shared\"\n}", "serve is there twice; keep one"},
		"no certificate":                      {"serve {\n}", "tls_cert_file and tls_key_file are missing: tokens"},
		"no certificate on this machine":      {"serve {\nlisten = \"127.0.0.1:8210\"\n}", "plain_http = true"},
		"no TLS for others":                   {"serve {\nplain_http = true\n}", "an address that others can reach, and without TLS tokens"},
		"half a pair":                         {"serve {\ntls_cert_file = \"a.pem\"\n}", "belong together; give both"},
		"TLS and none":                        {"serve {\n" + secure + "plain_http = true\n}", "keep one of both"},
		"no port":                             {"serve {\n" + secure + "listen = \"0.0.0.0\"\n}", `write "0.0.0.0:8210"`},
		"metrics for others":                  {"serve {\n" + secure + "metrics_listen = \"0.0.0.0:9109\"\n}", "metrics_listen is an address that others can reach"},
		"metrics on the port of seals":        {"serve {\n" + secure + "listen = \"127.0.0.1:9109\"\n}", "metrics_listen and listen are the same"},
		"metrics on the port of run":          {"serve {\n" + secure + "metrics_listen = \"127.0.0.1:9108\"\n}", `metrics_listen is 127.0.0.1:9108, where "nitroseal run" answers`},
		"client certificates that none signs": {"serve {\n" + secure + "client_certificates = \"required\"\n}", "set client_ca_file"},
		"an authority for nothing":            {"serve {\n" + secure + "client_ca_file = \"ca.pem\"\nclient_certificates = \"\"\n}", "write \"required\" or \"optional\""},
		"a choice that is none":               {"serve {\n" + secure + "client_ca_file = \"ca.pem\"\nclient_certificates = \"yes\"\n}", `client_certificates "yes" is not known`},
		"an authority that is not there":      {"serve {\n" + secure + "client_ca_file = \"none.pem\"\n}", "client_ca_file: reading"},
		"a mount that shadows sys":            {"serve {\n" + secure + "mount = \"sys\"\n}", "mount begins with sys"},
		"a mount with an escape":              {"serve {\n" + secure + "mount = \"a%2fb\"\n}", "mount is not a path"},
		"a mount upwards":                     {"serve {\n" + secure + "mount = \"a/../b\"\n}", "mount is not a path"},
		"a key twice":                         {"serve {\n" + secure + "keys = [\"a\", \"a\"]\n}", `keys has "a" twice`},
		"a key that cannot be":                {"serve {\n" + secure + "keys = [\"a/b\"]\n}", "keys lists the names of wrapping keys"},
		"tokens in no store":                  {"serve {\n" + secure + "tokens = \"share\"\n}", `there is no store "share"`},
		"tokens on an HSM":                    {"serve {\n" + secure + "tokens = \"stick\"\n}", "lies on an HSM"},
		"a burst without a rate":              {"serve {\n" + secure + "rate = 0\nburst = 5\n}", "burst belongs to a rate"},
		"a rate without end":                  {"serve {\n" + secure + "rate = 9999999\n}", "rate is how many requests"},
		"a burst of nothing":                  {"serve {\n" + secure + "burst = 0\n}", "burst is how many requests"},
		"a body that holds nothing":           {"serve {\n" + secure + "max_body = 10\n}", "max_body is the size"},
		"no connections":                      {"serve {\n" + secure + "max_connections = 0\n}", "max_connections is 1"},
		"the token itself":                    {"serve {\n" + secure + "token = \"ns.abc\"\n}", "token would hold a secret"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(write(t, withStores(test.source)))
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "ns.abc") {
				t.Errorf("error %v, want …%s…", err, test.want)
			}
		})
	}
}
