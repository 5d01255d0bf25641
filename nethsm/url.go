package nethsm

import (
	"fmt"
	"net"
	"net/url"
	"strings"
)

// parseURL checks the URL of a node and returns it as scheme://host:port. Its errors show no URL that cannot be read: it may
// hold a password.
func parseURL(text string) (string, error) {
	parsed, err := url.Parse(text)
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: the URL of a node cannot be read; it should be https://host:port", ErrConfig)
	case parsed.User != nil:
		return "", fmt.Errorf("%w: the URL of %s holds a user; credentials have settings of their own", ErrConfig, parsed.Host)
	case parsed.Scheme != "https" && parsed.Scheme != "http":
		return "", fmt.Errorf("%w: the URL %q should begin with https://", ErrConfig, text)
	case parsed.Hostname() == "":
		return "", fmt.Errorf("%w: the URL %q names no host; it should be https://host:port", ErrConfig, text)
	case parsed.RawQuery != "" || parsed.Fragment != "" || strings.Trim(strings.TrimPrefix(parsed.Path, apiPath), "/") != "":
		return "", fmt.Errorf("%w: the URL %q should end after the port, or in %s", ErrConfig, text, apiPath)
	}
	host, port := strings.ToLower(parsed.Hostname()), parsed.Port()
	if parsed.Scheme == "http" && !loopback(host) {
		return "", fmt.Errorf("%w: the URL %q would send passwords in the clear: http is for a loopback address only", ErrConfig, text)
	}
	if port == "" {
		port = map[string]string{"https": "443", "http": "80"}[parsed.Scheme]
	}
	return parsed.Scheme + "://" + net.JoinHostPort(host, port), nil
}

// loopback is true for this machine. A name other than localhost is not asked for in DNS: it could change.
func loopback(host string) bool {
	address := net.ParseIP(host)
	return host == "localhost" || address != nil && address.IsLoopback()
}
