package nethsm

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"strings"
)

// node is one NetHSM of a cluster.
type node struct {
	url  string // https://host:port
	host string // host:port
	http *http.Client
}

func newNode(base string, options Options) (*node, error) {
	_, host, _ := strings.Cut(base, "://")
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: options.TLS.ServerName}
	if len(options.TLS.CA) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(options.TLS.CA) {
			return nil, fmt.Errorf("%w: the CA holds no certificate in PEM", ErrConfig)
		}
	}
	return &node{url: base, host: host, http: &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     config,
			MaxIdleConnsPerHost: options.Connections,
			MaxConnsPerHost:     options.Connections,
			DisableCompression:  true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}
