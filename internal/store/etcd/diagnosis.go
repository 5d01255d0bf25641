package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// What the diagnosis of a failure may take, all endpoints together.
const diagnosisLimit = 2 * time.Second

// diagnose looks for a certificate that was refused, by us or by them. To etcd's client that is just a connection that
// failed, as if etcd were down, and a person would look in the wrong place. Every endpoint is dialled once. It returns
// nil where the failure has another cause.
func (c *connection) diagnose(ctx context.Context) error {
	if c.config.TLS == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, diagnosisLimit)
	defer cancel()
	results := make(chan error, len(c.config.Endpoints))
	for _, endpoint := range c.config.Endpoints {
		go func() { results <- c.probe(ctx, endpoint) }()
	}
	var found error
	for range c.config.Endpoints {
		if err := <-results; err != nil && found == nil {
			found = err
		}
	}
	return found
}

// probe makes one TLS connection and returns ErrDenied where a certificate is the problem. With TLS 1.3 a server
// judges the client's certificate after the handshake is over for the client, so the first read tells.
func (c *connection) probe(ctx context.Context, endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil {
		return nil // checked when the store was opened
	}
	config := c.config.TLS.Clone()
	if config.ServerName == "" {
		config.ServerName = u.Hostname()
	}
	config.NextProtos = []string{"h2"}
	conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", u.Host)
	if err == nil {
		defer context.AfterFunc(ctx, func() { conn.Close() })() // ends the read below with ctx
		defer conn.Close()
		// A server of HTTP/2 speaks first: its settings, or the alert.
		_, err = conn.Read(make([]byte, 1))
	}
	var (
		untrusted *tls.CertificateVerificationError
		operation *net.OpError
		plain     tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &untrusted):
		return fmt.Errorf("%w: we refused the certificate of %s; check the CA certificate and the server name: %w",
			store.ErrDenied, endpoint, untrusted)
	case errors.As(err, &operation) && operation.Op == "remote error": // a TLS alert, says crypto/tls
		return fmt.Errorf("%w: %s refused our client certificate, or the lack of one; give one that its CA signed: %w",
			store.ErrDenied, endpoint, operation)
	case errors.As(err, &plain):
		return fmt.Errorf("%w: %s speaks no TLS; write http:// or give etcd a certificate: %w", store.ErrUnavailable, endpoint, plain)
	default:
		return nil
	}
}
