package node_test

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"testing"
)

func derOf(t *testing.T, certificate *tls.Certificate) (der, key []byte) {
	t.Helper()
	key, err := x509.MarshalECPrivateKey(certificate.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	return certificate.Certificate[0], key
}

func pairOf(der, key []byte) (tls.Certificate, error) {
	private, err := x509.ParseECPrivateKey(key)
	if err != nil {
		return tls.Certificate{}, errors.New("the server got no key")
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, nil
}
