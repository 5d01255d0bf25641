package nethsm

import (
	"context"
	"fmt"
	"net/http"
)

// TLSPublicKey reads the public key of a node's TLS certificate, as PEM.
func (c *Client) TLSPublicKey(ctx context.Context) ([]byte, error) {
	return c.pemAlone(ctx, pemPublicKey, call{op: "reading the TLS public key", method: http.MethodGet, path: "/config/tls/public.pem"})
}

// TLSCertificate reads the TLS certificate of a node, as PEM.
func (c *Client) TLSCertificate(ctx context.Context) ([]byte, error) {
	return c.pemAlone(ctx, pemCertificate, call{op: "reading the TLS certificate", method: http.MethodGet, path: "/config/tls/cert.pem"})
}

// SetTLSCertificate sets the TLS certificate of a node, as PEM. It must be for the node's key, see [Client.TLSCSR], and
// signed by the cluster's CA if one is set. Clients that pin the old one are locked out: give them both pins first.
func (c *Client) SetTLSCertificate(ctx context.Context, certificate []byte) error {
	const op = "setting the TLS certificate"
	if err := checkPEM(pemCertificate, certificate); err != nil {
		return fmt.Errorf("%s: %w: %w", op, ErrRequest, err)
	}
	return c.doAlone(ctx, call{
		op: op, method: http.MethodPut, path: "/config/tls/cert.pem", creates: true, raw: certificate, contentType: pemContentType,
	})
}

// TLSCSR returns a certificate signing request for the TLS key of a node, as PEM.
func (c *Client) TLSCSR(ctx context.Context, subject DistinguishedName) ([]byte, error) {
	const op = "making a certificate signing request for TLS"
	one, err := c.alone(op)
	if err != nil {
		return nil, err
	}
	return one.csr(ctx, subject, call{op: op, path: "/config/tls/csr.pem"})
}

// GenerateTLSKey makes a new TLS key for a node, and a certificate of its own to go with it. Its clients do not trust that
// until they are told to. The length, in bits, is for RSA.
func (c *Client) GenerateTLSKey(ctx context.Context, kind KeyType, length int) error {
	return c.doAlone(ctx, call{
		op: "generating a TLS key", method: http.MethodPost, path: "/config/tls/generate", timeout: generating, creates: true,
		body: struct {
			Type   KeyType `json:"type"`
			Length int     `json:"length,omitempty"`
		}{kind, length},
	})
}

// ClusterCA reads the CA by which the nodes of the cluster know each other, as PEM (since 5.0). None is [hsm.ErrNotFound].
func (c *Client) ClusterCA(ctx context.Context) ([]byte, error) {
	return c.pem(ctx, pemCertificate, call{op: "reading the cluster's CA", method: http.MethodGet, path: clusterCAPath})
}

const clusterCAPath = "/config/tls/cluster-ca.pem"

// SetClusterCA sets the CA by which the nodes of the cluster know each other, as PEM (since 5.0). It must have signed the
// node's TLS certificate, and there must be no cluster yet: else it is [ErrState].
func (c *Client) SetClusterCA(ctx context.Context, certificate []byte) error {
	const op = "setting the cluster's CA"
	if err := checkPEM(pemCertificate, certificate); err != nil {
		return fmt.Errorf("%s: %w: %w", op, ErrRequest, err)
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPut, path: clusterCAPath, creates: true, raw: certificate, contentType: pemContentType,
	})
	return err
}

func (c *Client) pemAlone(ctx context.Context, kind string, in call) ([]byte, error) {
	one, err := c.alone(in.op)
	if err != nil {
		return nil, err
	}
	return one.pem(ctx, kind, in)
}
