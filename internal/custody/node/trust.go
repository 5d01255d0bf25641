package node

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"time"
)

// TLS says how a node proves that it is one of this cluster's. A CA or pins must be given, unless the address is http.
type TLS struct {
	// CA holds the certificates, in PEM, of the authorities that sign this cluster's certificates. The system's are never used.
	CA []byte
	// ServerName is the name that a certificate must be for; "": the host of the address.
	ServerName string
	// Pins are SHA-256 of the SubjectPublicKeyInfo of a node's certificate: 64 hexadecimal digits, colons allowed, or
	// "sha256/" and base64. One of them must match. Without a CA they replace the chain: who signed the certificate, its
	// name and its time are then not looked at, only that the node has the pinned key.
	Pins []string
	// PlainHTTP allows an http address, on loopback only.
	PlainHTTP bool
}

// trust is the checked form of TLS.
type trust struct {
	roots      *x509.CertPool // nil: pins only
	pins       [][sha256.Size]byte
	serverName string
}

func newTrust(options TLS) (*trust, error) {
	t := &trust{serverName: options.ServerName}
	if len(options.CA) > 0 {
		roots, err := parseCA(options.CA)
		if err != nil {
			return nil, err
		}
		t.roots = roots
	}
	for i, text := range options.Pins {
		pin, err := parsePin(text)
		if err != nil {
			return nil, fmt.Errorf("%w: pin %d is no SHA-256 of a public key; write 64 hexadecimal digits, or sha256/ and base64", ErrConfig, i+1)
		}
		t.pins = append(t.pins, pin)
	}
	if t.roots == nil && len(t.pins) == 0 {
		return nil, fmt.Errorf("%w: nothing says how to know the node; give the CA of its cluster, or pin its key", ErrConfig)
	}
	return t, nil
}

// parseCA reads certificates in PEM. Whatever it does not understand is an error: a CA that is passed over would be missed
// on a bad day.
func parseCA(text []byte) (*x509.CertPool, error) {
	pool, count := x509.NewCertPool(), 0
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%w: the CA holds a PEM block of type %q; it should hold certificates only", ErrConfig, block.Type)
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d of the CA cannot be read: %w", ErrConfig, count+1, err)
		}
		pool.AddCert(certificate)
		count++
	}
	switch {
	case count == 0:
		return nil, fmt.Errorf("%w: the CA holds no certificate in PEM (-----BEGIN CERTIFICATE-----)", ErrConfig)
	case strings.Contains(string(text), "-----BEGIN"):
		return nil, fmt.Errorf("%w: after certificate %d the CA is damaged", ErrConfig, count)
	default:
		return pool, nil
	}
}

func parsePin(text string) (pin [sha256.Size]byte, err error) {
	text = strings.TrimSpace(text)
	var raw []byte
	if encoded, is := strings.CutPrefix(text, "sha256/"); is {
		raw, err = base64.StdEncoding.Strict().DecodeString(strings.TrimPrefix(encoded, "/")) // curl writes sha256//
	} else {
		raw, err = hex.DecodeString(strings.ReplaceAll(text, ":", ""))
	}
	if err == nil && len(raw) != sha256.Size {
		err = errors.New("it has another length")
	}
	if err != nil {
		return pin, err
	}
	return [sha256.Size]byte(raw), nil
}

// Pin is the pin of a certificate, as [TLS.Pins] takes it.
func Pin(certificate *x509.Certificate) string {
	sum := sha256.Sum256(certificate.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// config is what every handshake goes by. Sessions are not resumed, so that each new connection shows the certificate that
// the node has now.
func (t *trust) config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		RootCAs:    t.roots, // with a CA never nil, so never the system's
		ServerName: t.serverName,
		//nolint:gosec // only where pins replace the chain; VerifyConnection runs in any case, and the handshake proves the key
		InsecureSkipVerify: t.roots == nil,
		VerifyConnection:   t.checkPin,
	}
}

func (t *trust) checkPin(state tls.ConnectionState) error {
	if len(t.pins) == 0 {
		return nil
	}
	leaf := state.PeerCertificates[0]
	if slices.Contains(t.pins, sha256.Sum256(leaf.RawSubjectPublicKeyInfo)) {
		return nil
	}
	return &foreignError{text: "its key is not pinned, the pin would be " + Pin(leaf)}
}

// foreignError is a refusal of ours to speak to what answers.
type foreignError struct{ text string }

func (e *foreignError) Error() string { return e.text }

// foreign tells whether a connection failed because what answers is not the node that we know, and says so in words.
// handshake is why the TLS handshake failed, if it did: where that was not the network, the node could not prove itself.
func foreign(err error, handshake *error) (what, advice string, is bool) {
	if own, is := errors.AsType[*foreignError](err); is {
		return own.text, "if the node has a new key, pin that as well; if not, somebody stands in between", true
	}
	if refused, is := errors.AsType[*tls.CertificateVerificationError](err); is {
		what, advice = whyRefused(refused)
		return what, advice, true
	}
	if _, is := errors.AsType[tls.RecordHeaderError](err); is {
		return "it does not speak TLS", "check the address", true
	}
	if alert, is := errors.AsType[tls.AlertError](err); is {
		return "the TLS handshake failed: " + alert.Error(), "check that the node speaks TLS 1.2 or later and asks for no client certificate", true
	}
	if handshake != nil && !isNetwork(*handshake) {
		return "the TLS handshake failed: " + printable((*handshake).Error()), "check the address and the certificate of the node", true
	}
	return "", "", false
}

// isNetwork tells trouble of the network from what TLS finds out.
func isNetwork(err error) bool {
	_, is := errors.AsType[net.Error](err)
	return is || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

func whyRefused(refused *tls.CertificateVerificationError) (what, advice string) {
	if invalid, is := errors.AsType[x509.CertificateInvalidError](refused); is && invalid.Reason == x509.Expired {
		return fmt.Sprintf("its certificate is valid from %s to %s", invalid.Cert.NotBefore.UTC().Format(time.RFC3339),
			invalid.Cert.NotAfter.UTC().Format(time.RFC3339)), "renew it, or set this machine's clock if it is wrong"
	}
	if _, is := errors.AsType[x509.UnknownAuthorityError](refused); is {
		return "its certificate is not signed by the CA of this cluster", "check the address and the CA; if both are right, somebody stands in between"
	}
	if _, is := errors.AsType[x509.HostnameError](refused); is {
		return "its certificate is for another name", "use an address with a name of the certificate, or set the server name"
	}
	return "its certificate is refused: " + printable(refused.Err.Error()), "give the node a certificate of the CA of this cluster"
}
