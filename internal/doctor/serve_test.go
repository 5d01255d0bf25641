package doctor

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// certified is a certificate with its key that ends after some time.
func certified(t *testing.T, left time.Duration) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-24 * time.Hour), NotAfter: time.Now().Add(left)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})
}

func TestTheSealServerIsExamined(t *testing.T) {
	year := 365 * 24 * time.Hour
	one := token.Listed{Token: token.Token{ID: "aaaaaaaaaa", Keys: []string{"prod"}}}
	for name, test := range map[string]struct {
		change  func(*config.Config, *Serve)
		left    time.Duration // of the certificates
		check   string
		verdict Verdict
		words   []string
	}{
		"a good certificate":              {nil, year, "certificate", OK, []string{"the server ends on"}},
		"a certificate that ends soon":    {nil, time.Hour, "certificate", Warning, []string{"the server", "in place of it"}},
		"a certificate that has ended":    {nil, -time.Hour, "certificate", Problem, []string{"ended on"}},
		"a key that may seal":             {nil, year, "key prod", OK, nil},
		"tokens":                          {nil, year, "tokens", OK, []string{"1 can be read"}},
		"no audit log of its own":         {nil, year, "audit log", Warning, []string{"grows without bound", "logrotate"}},
		"the running server is not asked": {nil, year, "server", Skipped, []string{"nitroseal serve status"}},
		"a key of another certificate": {
			func(_ *config.Config, s *Serve) {
				other, _ := certified(t, year)
				s.Certificate = swap(s.Certificate, other)
			}, year, "certificate", Problem, []string{"tls_cert_file"},
		},
		"a server without TLS":        {func(c *config.Config, _ *Serve) { c.Serve.TLSCertFile = "" }, year, "certificate", Skipped, []string{"this machine alone"}},
		"an authority that ends soon": {func(c *config.Config, _ *Serve) { c.Serve.ClientCAFile = "ca.pem" }, time.Hour, "certificate", Warning, []string{"the clients' authority"}},
		"an authority that is none": {
			func(c *config.Config, s *Serve) {
				c.Serve.ClientCAFile = "ca.pem"
				s.ClientCA = func() ([]byte, error) { return []byte("x"), nil }
			}, year, "client authority", Problem, []string{"client_ca_file"},
		},
		"a token for a key that is not fit": {
			func(_ *config.Config, s *Serve) {
				s.Ready = func(context.Context, string) error { return keyring.ErrNotReady }
			},
			year, "key prod", Warning,
			[]string{"revoke the token", "nitroseal key show prod"},
		},
		"a configured key that is not fit": {
			func(c *config.Config, s *Serve) {
				c.Serve.Keys = []string{"stage"}
				s.Ready = func(context.Context, string) error { return keyring.ErrKeyNotFound }
			}, year, "key stage", Problem, []string{"nitroseal key show stage"},
		},
		"a store that is away": {
			func(_ *config.Config, s *Serve) {
				s.Tokens = func(context.Context) ([]token.Listed, error) { return nil, store.ErrUnavailable }
			},
			year, "tokens", Problem,
			[]string{"refuses everybody"},
		},
		"nobody who may ask": {
			func(_ *config.Config, s *Serve) {
				s.Tokens = func(context.Context) ([]token.Listed, error) { return nil, nil }
			},
			year, "tokens", Warning,
			[]string{"serve token create"},
		},
		"an item that is no token": {
			func(_ *config.Config, s *Serve) {
				s.Tokens = func(context.Context) ([]token.Listed, error) {
					return []token.Listed{one, {Token: token.Token{ID: "bbbbbbbbbb"}, Err: token.ErrMalformed}}, nil
				}
			}, year, "tokens", Warning, []string{"revoke bbbbbbbbbb"},
		},
		"an audit log that takes nothing": {
			func(c *config.Config, _ *Serve) { c.Audits = []config.Audit{{Kind: config.AuditJournal}} }, year, "any sink", Problem, nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			certificate, key := certified(t, test.left)
			patient := Patient{
				Config: &config.Config{Serve: &config.Serve{TLSCertFile: "serve.pem", TLSKeyFile: "serve.key"}},
				Audit:  func(context.Context) ([]audit.SinkStatus, error) { return nil, audit.ErrNoSink },
				Serve: Serve{
					Certificate: func() (chain, private []byte, err error) { return certificate, slices.Clone(key), nil },
					ClientCA:    func() ([]byte, error) { return certificate, nil },
					Tokens:      func(context.Context) ([]token.Listed, error) { return []token.Listed{one}, nil },
					Ready:       func(context.Context, string) error { return nil },
				},
			}
			if test.change != nil {
				test.change(patient.Config, &patient.Serve)
			}
			var found []string
			seen := false
			d := &doctor{Patient: patient, report: func(f Finding) {
				text := fmt.Sprintf("%s: %s: %s; %s", f.Check, f.Verdict, f.Seen, f.Remedy)
				found = append(found, text)
				fits := f.Check == test.check && f.Verdict == test.verdict
				for _, word := range test.words {
					fits = fits && strings.Contains(text, word)
				}
				seen = seen || fits
			}}
			d.serve(t.Context())
			if !seen {
				t.Errorf("not found: %s %s %q in\n%s", test.check, test.verdict, test.words, strings.Join(found, "\n"))
			}
		})
	}
	quiet := &doctor{Patient: Patient{Config: &config.Config{}}, report: func(f Finding) { t.Errorf("without a server: %+v", f) }}
	quiet.serve(t.Context())
}

// swap has another chain read with the same key.
func swap(read func() (chain, key []byte, err error), other []byte) func() (chain, key []byte, err error) {
	return func() ([]byte, []byte, error) {
		_, key, err := read()
		return other, key, err
	}
}
