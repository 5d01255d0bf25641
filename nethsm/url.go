package nethsm

import (
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"
)

// parseURL checks the URL of a node and returns it as scheme://host:port. Its errors show nothing of the URL but the host: the
// rest may be a password.
func parseURL(text string) (string, error) {
	parsed, err := url.Parse(text)
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: the URL of a node cannot be read; it should be https://host:port", ErrConfig)
	case parsed.User != nil:
		return "", fmt.Errorf("%w: the URL of %s holds a user; credentials have settings of their own", ErrConfig, parsed.Host)
	case parsed.Scheme != "https" && parsed.Scheme != "http":
		return "", fmt.Errorf("%w: the URL of a node should begin with https://, and one does not", ErrConfig)
	case parsed.Hostname() == "":
		return "", fmt.Errorf("%w: the URL of a node names no host; it should be https://host:port", ErrConfig)
	case parsed.RawQuery != "" || parsed.Fragment != "" || strings.Trim(strings.TrimPrefix(parsed.Path, apiPath), "/") != "":
		return "", fmt.Errorf("%w: the URL of %s should end after the port, or in %s", ErrConfig, parsed.Host, apiPath)
	}
	host, port := strings.ToLower(parsed.Hostname()), parsed.Port()
	if parsed.Scheme == "http" && !loopback(host) {
		return "", fmt.Errorf("%w: the URL of %s would send passwords in the clear: http is for a loopback address only", ErrConfig, parsed.Host)
	}
	if port == "" {
		port = map[string]string{"https": "443", "http": "80"}[parsed.Scheme]
	}
	if number, err := strconv.ParseUint(port, 10, 16); err != nil || number == 0 {
		return "", fmt.Errorf("%w: the URL of %s has a port that cannot be; it should be 1 to 65535", ErrConfig, parsed.Host)
	}
	return (&url.URL{Scheme: parsed.Scheme, Host: net.JoinHostPort(host, port)}).String(), nil
}

// loopback is true for this machine. A name other than localhost is not asked for in DNS: it could change.
func loopback(host string) bool {
	address := net.ParseIP(host)
	return host == "localhost" || address != nil && address.IsLoopback()
}
