package doctor

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// Serve is how the parts of a seal server are opened.
type Serve struct {
	// Certificate reads the server's certificate and key, in PEM; the doctor wipes the key. ClientCA reads who signs client certificates.
	Certificate func() (chain, key []byte, err error)
	ClientCA    func() ([]byte, error)
	// Tokens lists who may ask.
	Tokens func(ctx context.Context) ([]token.Listed, error)
	// Ready says why a wrapping key cannot seal for Vaults; nil where it can.
	Ready func(ctx context.Context, key string) error
}

// serve examines what "nitroseal serve" needs. The running one is not asked.
func (d *doctor) serve(ctx context.Context) {
	if d.Config.Serve == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	f := d.about("seal server")
	d.serveCertificate(f)
	d.serveClients(f)
	keys := slices.Clone(d.Config.Serve.Keys)
	for _, named := range d.serveTokens(ctx, f) {
		if len(d.Config.Serve.Keys) == 0 && !slices.Contains(keys, named) {
			keys = append(keys, named)
		}
	}
	slices.Sort(keys)
	for _, key := range keys {
		check := "key " + key
		switch err := d.Serve.Ready(ctx, key); {
		case err == nil:
			f.ok(check, "it may seal for Vaults")
		case slices.Contains(d.Config.Serve.Keys, key):
			f.problem(check, "nitroseal key show "+key, "%v", err)
		default:
			f.warning(check, "nitroseal key show "+key+"; or revoke the token that names it", "%v", err)
		}
	}
	d.serveAudit(ctx)
	f.skipped("server", "nobody asked the running one: nitroseal serve status does")
}

func (d *doctor) serveCertificate(f chart) {
	s := d.Config.Serve
	if !s.Secure() {
		f.skipped("certificate", "it serves this machine alone, without TLS")
		return
	}
	const remedy = "put a renewed one, and its key, in place of it; a running server takes it by itself"
	chain, key, err := d.Serve.Certificate()
	defer clear(key)
	var pair tls.Certificate
	if err == nil {
		pair, err = tls.X509KeyPair(chain, key)
	}
	if err != nil {
		f.problem("certificate", "Vaults cannot ask; mend tls_cert_file and tls_key_file", "%v", err)
		return
	}
	f.certificate("the server", pair.Leaf.NotAfter, remedy)
	if info, err := os.Stat(s.TLSKeyFile); err == nil && info.Mode().Perm()&0o004 != 0 {
		f.warning("key file", "chmod o-r "+s.TLSKeyFile, "every user of this machine can read the key of the server's certificate")
	}
}

// serveClients looks whether the authorities of client certificates are good for long enough.
func (d *doctor) serveClients(f chart) {
	if d.Config.Serve.ClientCAFile == "" {
		return
	}
	authorities, err := d.Serve.ClientCA()
	var last time.Time // one that is good is enough
	for block, rest := pem.Decode(authorities); block != nil; block, rest = pem.Decode(rest) {
		if parsed, err := x509.ParseCertificate(block.Bytes); err == nil && parsed.NotAfter.After(last) {
			last = parsed.NotAfter
		}
	}
	if err == nil && last.IsZero() {
		err = fmt.Errorf("%s holds no certificate in PEM", d.Config.Serve.ClientCAFile)
	}
	if err != nil {
		f.problem("client authority", "Vaults with a client certificate cannot ask; mend client_ca_file", "%v", err)
		return
	}
	f.certificate("the clients' authority", last, "add the new one to client_ca_file before; a running server takes it by itself")
}

// serveTokens looks at the list of tokens and returns the wrapping keys that they name.
func (d *doctor) serveTokens(ctx context.Context, f chart) (named []string) {
	listed, err := d.Serve.Tokens(ctx)
	if err != nil {
		f.problem("tokens", "without their list the server refuses everybody, or takes the last copy of it: see what the store has", "%v", err)
		return nil
	}
	good := 0
	for i := range listed {
		if listed[i].Err != nil {
			remedy := "nitroseal serve token revoke " + listed[i].ID + ", and make another"
			if errors.Is(listed[i].Err, store.ErrCorrupt) { // which no revision is known of, and the store says what to do
				remedy = "do so, or make another token"
			}
			f.warning("tokens", remedy, "%v", listed[i].Err)
			continue
		}
		good++
		for _, key := range listed[i].Keys {
			if !slices.Contains(named, key) {
				named = append(named, key)
			}
		}
	}
	if good == 0 {
		f.warning("tokens", "nitroseal serve token create NAME --key KEY", "there is none, so nobody may ask")
	} else {
		f.ok("tokens", "%d can be read", good)
	}
	return named
}

// serveAudit looks where openings are written to.
func (d *doctor) serveAudit(ctx context.Context) {
	switch {
	case len(d.Config.Audits) == 0:
		d.about("seal server").warning("audit log", `name a place: audit "journal", or audit "file" with logrotate`,
			"the configuration names none: openings go to systemd's journal, and without one to audit.log in state_dir, which grows without bound")
	case len(d.Config.Clusters) == 0: // which are examined with it
		d.audit(ctx)
	}
}
