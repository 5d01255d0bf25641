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
	"strconv"
	"strings"
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
	status, body, err := answerOf(ctx, client, url+"/v1/sys/health")
	if errors.Is(err, errStranger) {
		return server.Health{}, at, err
	}
	if err != nil {
		return server.Health{}, at, fmt.Errorf("%w: the seal server at %s: %w", errSilent, at, err)
	}
	if err := json.Unmarshal(body, &health); err != nil || health.Nitroseal.Keys == nil {
		return server.Health{}, at, fmt.Errorf("what answers at %s (status %d) %w; is it another program?", url, status, errStranger)
	}
	return health, at, nil
}

// answerOf asks the server.
func answerOf(ctx context.Context, client *http.Client, url string) (status int, body []byte, err error) {
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close()
	body, err = io.ReadAll(io.LimitReader(response.Body, maxHealth))
	return response.StatusCode, body, err
}

// lastUses are when the seal server of this machine saw each token last, since it was started; nil where it does not tell.
func lastUses(ctx context.Context, c *config.Config) map[string]time.Time {
	if c.Serve.MetricsListen == "" {
		return nil
	}
	url, client, err := healthClient(c)
	if err != nil {
		return nil
	}
	_, body, err := answerOf(ctx, client, url+"/metrics")
	if err != nil {
		return nil
	}
	uses := map[string]time.Time{}
	for line := range strings.Lines(string(body)) {
		of, value, found := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), lastUseMetric+`{token="`), `"} `)
		seconds, err := strconv.ParseFloat(value, 64)
		if found && strings.HasPrefix(line, lastUseMetric) && err == nil && seconds > 0 {
			uses[of] = time.Unix(int64(seconds), 0)
		}
	}
	return uses
}

// lastUseMetric is the server's metric of that.
const lastUseMetric = "nitroseal_serve_token_last_use_timestamp_seconds"

// healthClient is how the server is asked, and the beginning of its URLs: nothing from the environment, no redirects.
func healthClient(c *config.Config) (url string, client *http.Client, err error) {
	transport := &http.Transport{DisableKeepAlives: true}
	client = &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	if c.Serve.MetricsListen != "" {
		return "http://" + dialable(c.Serve.MetricsListen), client, nil
	}
	if !c.Serve.Secure() {
		return "http://" + dialable(c.Serve.Listen), client, nil
	}
	if c.Serve.ClientCertificates == config.CertificatesRequired {
		return "", nil, fmt.Errorf("%w: the seal server at %s speaks to nobody without a client certificate, so nothing is known of it; set metrics_listen, where it asks "+
			"for none", errSilent, c.Serve.Listen)
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
	return "https://" + dialable(c.Serve.Listen), client, nil
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
