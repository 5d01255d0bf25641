package nethsm

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"time"
)

const (
	defaultTimeout     = 10 * time.Second
	defaultConnections = 32
	defaultUserAgent   = "nitroseal"
)

// pool is what all views of a client share: the nodes and what is known about them.
type pool struct {
	nodes     []*node
	timeout   time.Duration
	userAgent string
	logger    *slog.Logger
}

// login is a user and password.
type login struct {
	header string // of Authorization
}

func newPool(options Options) (*pool, error) {
	p := &pool{timeout: options.Timeout, userAgent: options.UserAgent, logger: options.Logger}
	if p.timeout == 0 {
		p.timeout = defaultTimeout
	}
	if p.userAgent == "" {
		p.userAgent = defaultUserAgent
	}
	if p.logger == nil {
		p.logger = slog.New(slog.DiscardHandler)
	}
	if options.Connections == 0 {
		options.Connections = defaultConnections
	}
	if len(options.URLs) == 0 {
		return nil, fmt.Errorf("%w: it has no URL; give at least one, https://host:port", ErrConfig)
	}
	for _, text := range options.URLs {
		base, err := parseURL(text)
		if err != nil {
			return nil, err
		}
		n, err := newNode(base, options)
		if err != nil {
			return nil, err
		}
		p.nodes = append(p.nodes, n)
	}
	return p, nil
}

func (p *pool) loginOf(credentials Credentials) *login {
	pair := append([]byte(credentials.Username+":"), credentials.Password...)
	defer clear(pair)
	return &login{header: "Basic " + base64.StdEncoding.EncodeToString(pair)}
}

func (p *pool) close() {
	for _, n := range p.nodes {
		n.http.CloseIdleConnections()
	}
}

// parseURL checks the URL of a node and returns it as scheme://host:port.
func parseURL(text string) (string, error) {
	parsed, err := url.Parse(text)
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: a URL of a node cannot be read; it should be https://host:port", ErrConfig)
	case parsed.User != nil:
		return "", fmt.Errorf("%w: the URL of node %s holds a user; credentials have settings of their own", ErrConfig, parsed.Host)
	case parsed.Hostname() == "":
		return "", fmt.Errorf("%w: the URL %q names no host; it should be https://host:port", ErrConfig, text)
	case parsed.RawQuery != "" || parsed.Fragment != "":
		return "", fmt.Errorf("%w: the URL %q should end after the port", ErrConfig, text)
	}
	switch strings.TrimSuffix(parsed.Path, "/") {
	case "", apiPath:
	default:
		return "", fmt.Errorf("%w: the URL %q should end after the port, or in %s", ErrConfig, text, apiPath)
	}
	host, port := parsed.Hostname(), parsed.Port()
	switch parsed.Scheme {
	case "https":
		if port == "" {
			port = "443"
		}
	case "http":
		if address := net.ParseIP(host); host != "localhost" && (address == nil || !address.IsLoopback()) {
			return "", fmt.Errorf("%w: the URL %q would send passwords in the clear; http is for a loopback address only", ErrConfig, text)
		}
		if port == "" {
			port = "80"
		}
	default:
		return "", fmt.Errorf("%w: the URL %q should begin with https://", ErrConfig, text)
	}
	return parsed.Scheme + "://" + net.JoinHostPort(strings.ToLower(host), port), nil
}
