package node

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
)

// parseAddress checks the address of a node and returns it as scheme://host[:port]. plain is true for http.
func parseAddress(text string, allowPlain bool) (address string, plain bool, err error) {
	const form = "write it as https://host:port"
	parsed, err := url.Parse(text)
	if err != nil { // its text would repeat what may be a password in the wrong place
		return "", false, fmt.Errorf("%w: the address of a node is no URL; %s", ErrConfig, form)
	}
	switch {
	case parsed.User != nil:
		return "", false, fmt.Errorf("%w: the address of a node holds a user; %s", ErrConfig, form)
	case parsed.Scheme != "https" && parsed.Scheme != "http":
		return "", false, fmt.Errorf("%w: the address %q of a node is not https; %s", ErrConfig, text, form)
	case parsed.Hostname() == "" || parsed.Opaque != "":
		return "", false, fmt.Errorf("%w: the address %q of a node has no host; %s", ErrConfig, text, form)
	case parsed.Path != "" && parsed.Path != "/" || parsed.RawQuery != "" || parsed.ForceQuery || parsed.Fragment != "":
		return "", false, fmt.Errorf("%w: the address %q of a node has more than a host and a port; %s", ErrConfig, text, form)
	}
	address = (&url.URL{Scheme: parsed.Scheme, Host: parsed.Host}).String() // with the zone of an IPv6 address as a URL has it
	if parsed.Scheme == "https" {
		return address, false, nil
	}
	if !allowPlain {
		return "", false, fmt.Errorf("%w: %s is not encrypted, so anybody in between could read the shares; use https, or allow plain_http "+
			"where the node listens on this machine's loopback only", ErrConfig, address)
	}
	if !isLoopback(parsed.Hostname()) {
		return "", false, fmt.Errorf("%w: %s is not encrypted and not on loopback, so anybody in between could read the shares; use https",
			ErrConfig, address)
	}
	return address, true, nil
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true // what it resolves to is looked at when dialling
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// onlyLoopback refuses to dial anything else: "localhost" is what a resolver says it is. address is ip:port.
func onlyLoopback(address string) error {
	host, _, err := net.SplitHostPort(address)
	if err == nil && host != "localhost" && isLoopback(host) {
		return nil
	}
	return &foreignError{text: fmt.Sprintf("%s is not on loopback, and plain http is for nothing else", address)}
}
