package nethsm

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"
)

// trust is how the nodes prove what they are: the checked form of [TLS].
//
// Without pins a certificate must be signed by a trusted authority, be in its time and have the node's name: what the
// standard library checks. With pins and no CA the pins stand in for all that: a NetHSM makes itself a self-signed
// certificate CN=keyfender, and a pin names exactly it. With pins and a CA both must hold. In each case the handshake
// proves that the node has the certificate's private key. Sessions are not resumed, so that every new connection shows the
// certificate that the node has now.
type trust struct {
	roots      *x509.CertPool // nil: the system's
	pins       [][sha256.Size]byte
	serverName string
	insecure   bool
}

func newTrust(options TLS) (*trust, error) {
	t := &trust{serverName: options.ServerName, insecure: options.Insecure}
	if len(options.CA) > 0 {
		if options.Insecure {
			return nil, fmt.Errorf("%w: a CA is given, and that certificates are not to be checked; take one of them back", ErrConfig)
		}
		roots, err := parseCA(options.CA)
		if err != nil {
			return nil, err
		}
		t.roots = roots
	}
	for i, text := range options.Pins {
		pin, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(text), ":", ""))
		if err != nil || len(pin) != sha256.Size {
			return nil, fmt.Errorf("%w: pin %d is not a SHA-256 fingerprint: it should be 64 hexadecimal digits, colons allowed", ErrConfig, i+1)
		}
		t.pins = append(t.pins, [sha256.Size]byte(pin))
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

// chain is true where the authority, name and time of a certificate are checked.
func (t *trust) chain() bool { return !t.insecure && (t.roots != nil || len(t.pins) == 0) }

// config is the TLS configuration for one node. It tells seen of every leaf certificate that passed.
func (t *trust) config(host string, logger *slog.Logger, seen func(*x509.Certificate)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		RootCAs:    t.roots,
		ServerName: t.serverName,
		//nolint:gosec // only where pins stand in for the chain (checked below), or the operator asked for no check at all
		InsecureSkipVerify: !t.chain(),
		VerifyConnection: func(state tls.ConnectionState) error {
			leaf := state.PeerCertificates[0]
			seen(leaf)
			if t.insecure && len(t.pins) == 0 {
				logger.Warn("the certificate of a NetHSM is not checked: anybody in between can read the passwords sent to it; "+
					"give its CA or pin its SHA-256, and take the insecure setting back", "node", host, "sha256", fingerprint(leaf))
			}
			return t.checkPin(host, leaf)
		},
	}
}

func (t *trust) checkPin(host string, leaf *x509.Certificate) error {
	if len(t.pins) == 0 || slices.Contains(t.pins, sha256.Sum256(leaf.Raw)) {
		return nil
	}
	return newCertificateError(host, CertificateNotPinned, leaf, errors.New("none of the pins matches"))
}

// CertificateProblem is what is wrong with a certificate.
type CertificateProblem string

// The problems of certificates.
const (
	CertificateExpired     CertificateProblem = "expired"
	CertificateNotYetValid CertificateProblem = "not yet valid"
	CertificateUnknown     CertificateProblem = "of an unknown authority"
	CertificateWrongName   CertificateProblem = "for another name"
	CertificateNotPinned   CertificateProblem = "not pinned"
	CertificateUnusable    CertificateProblem = "not usable"
)

// CertificateError says that a node showed a certificate that cannot be trusted. Nothing was sent to it. Errors that wrap
// it are [hsm.ErrUnavailable]: another node may serve.
type CertificateError struct {
	Node    string // host:port
	Problem CertificateProblem
	// Fingerprint is the SHA-256 of the certificate that was shown, as a pin is written.
	Fingerprint string
	// Names are those that the certificate is for.
	Names               []string
	NotBefore, NotAfter time.Time

	cause error
}

func newCertificateError(host string, problem CertificateProblem, leaf *x509.Certificate, cause error) *CertificateError {
	e := &CertificateError{
		Node: host, Problem: problem, Fingerprint: fingerprint(leaf), NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, cause: cause,
	}
	e.Names = append(e.Names, leaf.DNSNames...)
	for _, address := range leaf.IPAddresses {
		e.Names = append(e.Names, address.String())
	}
	return e
}

// Error says what is wrong and what to do.
func (e *CertificateError) Error() string {
	switch e.Problem {
	case CertificateExpired:
		return fmt.Sprintf("the certificate of %s ended on %s; give the NetHSM a new one, or set this machine's clock if it is wrong",
			e.Node, e.NotAfter.UTC().Format(time.RFC3339))
	case CertificateNotYetValid:
		return fmt.Sprintf("the certificate of %s begins on %s only; set this machine's clock, or the one where it was made",
			e.Node, e.NotBefore.UTC().Format(time.RFC3339))
	case CertificateUnknown:
		return fmt.Sprintf("the certificate of %s is not signed by a trusted authority; give the CA that signed it (ca_cert), or, once "+
			"you have compared it with the NetHSM's own, pin its SHA-256 (tls_pins): %s", e.Node, e.Fingerprint)
	case CertificateWrongName:
		names := "no name at all"
		if len(e.Names) > 0 {
			names = strings.Join(e.Names, ", ")
		}
		return fmt.Sprintf("the certificate of %s is for %s; use a URL with such a name, or say which name it should have "+
			"(tls_server_name)", e.Node, names)
	case CertificateNotPinned:
		return fmt.Sprintf("the certificate of %s is not one of those pinned, its SHA-256 is %s; if the NetHSM's certificate was "+
			"replaced, add that to the pins (tls_pins), and if it was not, somebody stands in between", e.Node, e.Fingerprint)
	default:
		return fmt.Sprintf("the certificate of %s cannot be used: %v", e.Node, e.cause)
	}
}

func (e *CertificateError) Unwrap() error { return e.cause }

// certificateError finds what is wrong with the certificate that made a handshake fail; nil where it was something else.
func (t *trust) certificateError(host string, err error) *CertificateError {
	if known, is := errors.AsType[*CertificateError](err); is {
		return known
	}
	refused, is := errors.AsType[*tls.CertificateVerificationError](err)
	if !is || len(refused.UnverifiedCertificates) == 0 {
		return nil
	}
	leaf := refused.UnverifiedCertificates[0]
	problem := problemOf(refused.Err, leaf)
	if problem == CertificateWrongName {
		// The name is looked at first. Where nobody trusts the certificate either, that is the thing to say.
		options := x509.VerifyOptions{Roots: t.roots, Intermediates: x509.NewCertPool()}
		for _, certificate := range refused.UnverifiedCertificates[1:] {
			options.Intermediates.AddCert(certificate)
		}
		if _, err := leaf.Verify(options); err != nil {
			problem = problemOf(err, leaf)
		}
	}
	return newCertificateError(host, problem, leaf, refused.Err)
}

func problemOf(err error, leaf *x509.Certificate) CertificateProblem {
	if invalid, is := errors.AsType[x509.CertificateInvalidError](err); is && invalid.Reason == x509.Expired {
		if time.Now().Before(leaf.NotBefore) {
			return CertificateNotYetValid
		}
		return CertificateExpired
	}
	if _, is := errors.AsType[x509.HostnameError](err); is {
		return CertificateWrongName
	}
	if _, is := errors.AsType[x509.UnknownAuthorityError](err); is {
		return CertificateUnknown
	}
	return CertificateUnusable
}

// fingerprint is the SHA-256 of a certificate as a pin is written.
func fingerprint(certificate *x509.Certificate) string {
	sum := sha256.Sum256(certificate.Raw)
	return hex.EncodeToString(sum[:])
}
