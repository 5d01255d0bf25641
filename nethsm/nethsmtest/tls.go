package nethsmtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"
)

// authority issues the nodes' certificates.
type authority struct {
	certificate *x509.Certificate
	key         crypto.Signer
	pem         []byte
}

// openAuthority reads an authority, or makes one.
func openAuthority(r *pairRecord, now time.Time) (*authority, error) {
	if r == nil {
		return newAuthority("NetHSM double", now)
	}
	pair, err := tls.X509KeyPair(r.Certificate, r.Key)
	if err != nil {
		return nil, err
	}
	key, ok := pair.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, errors.New("reading the authority of a NetHSM double: its key cannot sign")
	}
	return &authority{certificate: pair.Leaf, key: key, pem: r.Certificate}, nil
}

func newAuthority(name string, now time.Time) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certificate(name, now)
	template.NotAfter = now.AddDate(10, 0, 0)
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{certificate: parsed, key: key, pem: encodePEM("CERTIFICATE", der)}, nil
}

func (a *authority) record() *pairRecord {
	return &pairRecord{Certificate: a.pem, Key: encodeKey(a.key)}
}

// issue certifies a public key; a nil authority makes a self-signed certificate with key.
func (a *authority) issue(template *x509.Certificate, key crypto.Signer) (*pairRecord, error) {
	parent, signer := template, key
	if a != nil {
		parent, signer = a.certificate, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, err
	}
	return &pairRecord{Certificate: encodePEM("CERTIFICATE", der), Key: encodeKey(key)}, nil
}

// certificate is a template for a server at 127.0.0.1 and localhost, valid for a year.
func certificate(name string, now time.Time) *x509.Certificate {
	serial := new(big.Int).SetBytes(random(15))
	return &x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		DNSNames:     []string{"localhost"},
	}
}

// selfSigned is what a NetHSM shows until a certificate is set.
func (h *HSM) selfSigned() (*pairRecord, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := certificate("keyfender", h.now())
	template.IPAddresses, template.DNSNames = nil, nil
	return (*authority)(nil).issue(template, key)
}

// firstCertificate is what a new node shows.
func (h *HSM) firstCertificate() (*pairRecord, error) {
	if h.options.SelfSigned {
		return h.selfSigned()
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return h.ca.issue(certificate("keyfender", h.now()), key)
}

// show makes the listener use a certificate from the next connection on.
func (n *Node) show(pair *pairRecord) error {
	parsed, err := tls.X509KeyPair(pair.Certificate, pair.Key)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.shown = &parsed
	return nil
}

func (n *Node) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.shown, nil
}

// CertificateChange is a way in which a node's certificate can differ from the one before.
type CertificateChange int

// The ways.
const (
	// Renewed has a new key, the same authority, the same names: right for whoever trusts the authority, wrong for a pin.
	Renewed CertificateChange = iota
	// Expired ended an hour ago.
	Expired
	// OtherAuthority comes from an authority that nobody trusts.
	OtherAuthority
	// OtherName is for other.example only.
	OtherName
	// FellBack is what a NetHSM falls back to when it starts without its etcd.
	FellBack
)

// ReplaceCertificate gives the node another certificate for all connections from now on, and closes those that exist.
func (n *Node) ReplaceCertificate(change CertificateChange) error {
	pair, err := n.hsm.changed(change)
	if err != nil {
		return fmt.Errorf("replacing the certificate of a node: %w", err)
	}
	return n.setCertificate(pair)
}

func (h *HSM) changed(change CertificateChange) (*pairRecord, error) {
	now := h.now()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	issuer, template := h.ca, certificate("keyfender", now)
	switch change {
	case Renewed:
	case Expired:
		template.NotBefore, template.NotAfter = now.Add(-48*time.Hour), now.Add(-time.Hour)
	case OtherAuthority:
		if issuer, err = newAuthority("somebody else", now); err != nil {
			return nil, err
		}
	case OtherName:
		template.Subject.CommonName = "other.example"
		template.IPAddresses, template.DNSNames = nil, []string{"other.example"}
	case FellBack:
		return h.selfSigned()
	}
	return issuer.issue(template, key)
}

// setCertificate stores and shows a certificate. Connections that exist close, so that the next request meets it.
func (n *Node) setCertificate(pair *pairRecord) error {
	err := n.hsm.store.update(func(*record) error {
		n.record().TLS = pair
		return nil
	})
	if err != nil {
		return err
	}
	if err := n.show(pair); err != nil {
		return err
	}
	n.mu.Lock()
	listening := n.server != nil
	n.mu.Unlock()
	if !listening {
		return nil
	}
	n.Stop()
	return n.Start()
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// encodeKey is PKCS#8 in PEM.
func encodeKey(key crypto.Signer) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		panic("nethsmtest: encoding a key that was just made: " + err.Error())
	}
	return encodePEM("PRIVATE KEY", der)
}
