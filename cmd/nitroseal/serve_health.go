package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/server"
)

// healthTimeout is how long the seal server of this machine has to answer; maxHealth the size of its answer, in bytes.
const (
	healthTimeout = 5 * time.Second
	maxHealth     = 4 << 20
)

// errStranger: where the seal server should answer, somebody else does.
var errStranger = errors.New("does not answer as a seal server")

// sealHealth asks the seal server of this machine how it is: over the listener that nobody else reaches, where there is one, else over the
// one of the seals.
func sealHealth(ctx context.Context, c *config.Config) (health server.Health, at string, err error) {
	at = c.Serve.Listen
	url, client, err := healthClient(c)
	if err != nil {
		return server.Health{}, at, err
	}
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return server.Health{}, at, fmt.Errorf("asking the seal server: %w", err)
	}
	response, err := client.Do(request)
	if errors.Is(err, errStranger) {
		return server.Health{}, at, err
	}
	if err != nil {
		return server.Health{}, at, fmt.Errorf("%w: the seal server at %s: %w", errSilent, at, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxHealth))
	if err != nil {
		return server.Health{}, at, fmt.Errorf("%w: the seal server at %s: %w", errSilent, at, err)
	}
	if err := json.Unmarshal(body, &health); err != nil || health.Nitroseal.Keys == nil {
		return server.Health{}, at, fmt.Errorf("what answers at %s (status %d) %w; is it another program?", url, response.StatusCode, errStranger)
	}
	return health, at, nil
}

// healthClient is how the health of the server is asked: nothing from the environment, no redirects.
func healthClient(c *config.Config) (url string, client *http.Client, err error) {
	transport := &http.Transport{DisableKeepAlives: true}
	client = &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	const path = "/v1/sys/health"
	if c.Serve.MetricsListen != "" {
		return "http://" + dialable(c.Serve.MetricsListen) + path, client, nil
	}
	if !c.Serve.Secure() {
		return "http://" + dialable(c.Serve.Listen) + path, client, nil
	}
	chain, key, err := sealCertificate(c)
	clear(key)
	if err != nil {
		return "", nil, err
	}
	leaf, _ := pem.Decode(chain)
	if leaf == nil {
		return "", nil, fmt.Errorf("%w: serve: tls_cert_file %s holds no certificate in PEM", config.ErrInvalid, c.Serve.TLSCertFile)
	}
	transport.TLSClientConfig = &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, //nolint:gosec // the server is known by its very certificate, below: its names are not those of the loopback
		VerifyConnection: func(state tls.ConnectionState) error {
			if !bytes.Equal(state.PeerCertificates[0].Raw, leaf.Bytes) {
				return fmt.Errorf("what listens at %s %w: it has another certificate than %s; it was renewed a moment ago, or another program took the port",
					c.Serve.Listen, errStranger, c.Serve.TLSCertFile)
			}
			return nil
		},
	}
	return "https://" + dialable(c.Serve.Listen) + path, client, nil
}

// dialable is where somebody on this machine reaches a listener: one at every address is at the loopback's as well.
func dialable(listen string) string {
	host, port, _ := net.SplitHostPort(listen)
	address, err := netip.ParseAddr(host)
	switch {
	case host == "" || err == nil && address.IsUnspecified() && address.Is4():
		host = "127.0.0.1"
	case err == nil && address.IsUnspecified():
		host = "::1"
	}
	return net.JoinHostPort(host, port)
}
