package vaulttest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// certificates are the files of one server's TLS.
type certificates struct{ ca, cert, key string }

// Authority is a CA made for a test.
type Authority struct {
	// PEM is its certificate, for clients.
	PEM []byte

	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// NewAuthority makes a CA. All have the same name, so that nothing but the key tells them apart.
func NewAuthority(t testing.TB) *Authority {
	t.Helper()
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "nitroseal test CA"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	certificate, err := x509.ParseCertificate(der)
	must(t, err)
	return &Authority{PEM: encodePEM("CERTIFICATE", der), certificate: certificate, key: key}
}

// Issue makes a certificate of a server on loopback and its key, both PEM. It is for localhost and 127.0.0.1, or for the
// names alone where there are any.
func (a *Authority) Issue(t testing.TB, names ...string) (certificate, key []byte) {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 100))
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "vault"},
		NotBefore:    a.certificate.NotBefore,
		NotAfter:     a.certificate.NotAfter,
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames:     []string{"localhost"},
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if len(names) > 0 {
		template.IPAddresses, template.DNSNames = nil, names
	}
	private := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, private.Public(), a.key)
	must(t, err)
	privateDER, err := x509.MarshalECPrivateKey(private)
	must(t, err)
	return encodePEM("CERTIFICATE", der), encodePEM("EC PRIVATE KEY", privateDER)
}

// TLS is a server's configuration with a certificate of this CA, see [Authority.Issue].
func (a *Authority) TLS(t testing.TB, names ...string) *tls.Config {
	t.Helper()
	pair, err := tls.X509KeyPair(a.Issue(t, names...))
	must(t, err)
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
}

// Roots trust this CA and no other.
func (a *Authority) Roots() *x509.CertPool {
	roots := x509.NewCertPool()
	roots.AddCert(a.certificate)
	return roots
}

// write puts the CA and a new certificate of its into a folder, for a server to read.
func (a *Authority) write(t testing.TB, dir string) certificates {
	t.Helper()
	files := certificates{
		ca:   filepath.Join(dir, "ca.pem"),
		cert: filepath.Join(dir, "cert.pem"),
		key:  filepath.Join(dir, "key.pem"),
	}
	certificate, key := a.Issue(t)
	must(t, os.WriteFile(files.ca, a.PEM, 0o600))
	must(t, os.WriteFile(files.cert, certificate, 0o600))
	must(t, os.WriteFile(files.key, key, 0o600))
	return files
}

// pin is the SHA-256 of the public key in a certificate file, in hexadecimal.
func pin(t testing.TB, file string) string {
	t.Helper()
	content, err := os.ReadFile(file)
	must(t, err)
	block, _ := pem.Decode(content)
	certificate, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	return hexPin(certificate)
}

func hexPin(certificate *x509.Certificate) string {
	sum := sha256.Sum256(certificate.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// shownPin is the pin of the certificate that a server shows.
func shownPin(t testing.TB, address string) (string, error) {
	t.Helper()
	dialer := tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true}} // to look at whatever certificate it has
	connection, err := dialer.DialContext(context.Background(), "tcp", strings.TrimPrefix(address, "https://"))
	if err != nil {
		return "", err
	}
	defer connection.Close()
	shown := connection.(*tls.Conn).ConnectionState().PeerCertificates[0]
	return hexPin(shown), nil
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	return key
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
