package server

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"
)

// armour is what makes a connection TLS at one time. It is never changed.
type armour struct {
	config *tls.Config
	ends   time.Time // of the certificate
	digest [sha256.Size]byte
	// clients counts the sets of CAs that client certificates were checked against: a connection of an older one is not kept.
	clients uint64
	caSum   [sha256.Size]byte
}

// wardrobe keeps the armour of a listener and looks for a newer one.
type wardrobe struct {
	logger  *slog.Logger
	metrics *metrics
	current atomic.Pointer[armour] // nil for a plain listener

	mu        sync.Mutex // one look at a time; guards what follows
	listen    Listen     // what it is worn for
	complaint string     // what the log was last told
}

// load reads what a listener is to wear, without wearing it.
func load(l Listen, before *armour) (*armour, error) {
	if l.Certificate == nil {
		return nil, nil //nolint:nilnil // a plain listener wears nothing
	}
	chain, key, err := l.Certificate()
	defer clear(key)
	if err != nil {
		return nil, fmt.Errorf("reading the server's certificate: %w", err)
	}
	var ca []byte
	if l.ClientCA != nil {
		if ca, err = l.ClientCA(); err != nil {
			return nil, fmt.Errorf("reading the CA of client certificates: %w", err)
		}
	}
	next := &armour{digest: digest(chain, key, ca), caSum: digest(ca, []byte{flag(l.Required)}), clients: 1}
	if before != nil {
		if next.digest == before.digest && next.caSum == before.caSum {
			return before, nil
		}
		next.clients = before.clients
		if next.caSum != before.caSum {
			next.clients++
		}
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("the server's certificate and key: %w", err)
	}
	next.ends = pair.Leaf.NotAfter
	if now := time.Now(); now.After(next.ends) {
		return nil, fmt.Errorf("the server's certificate ended on %s", next.ends.UTC().Format(time.DateTime))
	}
	// Not HTTP/2: a seal has one request under way at a time, a connection takes half the memory without it, and Go's server hangs
	// up on whoever has not said all of its greeting within two seconds, which is when a thousand Vaults have power again. Vault's
	// client takes what is offered.
	next.config = &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, Certificates: []tls.Certificate{pair}}
	if l.ClientCA == nil {
		return next, nil
	}
	next.config.ClientCAs = x509.NewCertPool()
	if !next.config.ClientCAs.AppendCertsFromPEM(ca) {
		return nil, errors.New("the CA of client certificates: there is no certificate in PEM in it")
	}
	next.config.ClientAuth = tls.VerifyClientCertIfGiven
	if l.Required {
		next.config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return next, nil
}

// digest is a hash of several texts that says where each of them ends.
func digest(texts ...[]byte) (sum [sha256.Size]byte) {
	hash := sha256.New()
	for _, text := range texts {
		one := sha256.Sum256(text)
		_, _ = hash.Write(one[:]) // a hash does not fail
	}
	hash.Sum(sum[:0])
	return sum
}

func flag(set bool) byte {
	if set {
		return 1
	}
	return 0
}

// look takes a changed certificate into use, or says why the one in use stays.
func (w *wardrobe) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	before := w.current.Load()
	found, err := load(w.listen, before)
	switch {
	case err != nil:
		if err.Error() != w.complaint {
			w.complaint = err.Error()
			w.metrics.certificate(err)
			w.logger.Warn("the certificate in use stays: the new one is not good", "cause", err)
		}
	case found != before:
		w.complaint = ""
		w.metrics.certificate(nil)
		w.current.Store(found)
		w.logger.Info("a new certificate is in use", "ends", found.ends)
	case w.complaint != "": // what it was before came back
		w.complaint = ""
		w.metrics.certificateReloaded.Set(1)
	}
}

// wear takes what was loaded for a listener into use, or what its files hold meanwhile: a new configuration may have waited for its
// HSM in between.
func (w *wardrobe) wear(l Listen, a *armour) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if newest, err := load(l, w.current.Load()); err == nil {
		a = newest
	}
	w.listen, w.complaint = l, ""
	w.current.Store(a)
	w.metrics.certificateReloaded.Set(1)
}
