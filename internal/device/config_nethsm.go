package device

import (
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of a NetHSM's configuration.
const (
	maxURLs           = 16
	minRequestTimeout = time.Second
	maxRequestTimeout = time.Minute
)

// name is the syntax of users, namespaces and tags on a NetHSM (nethsm, src/keyfender/json.ml).
const name = `[A-Za-z0-9][A-Za-z0-9_.-]{0,127}`

var (
	userSyntax = regexp.MustCompile(`^(?:(` + name + `)~)?` + name + `$`)
	tagSyntax  = regexp.MustCompile(`^` + name + `$`)
)

func (c Config) validateNetHSM() error {
	for _, check := range []func() error{c.validateURLs, c.validateUsers, c.validateTrust} {
		if err := check(); err != nil {
			return err
		}
	}
	for _, tag := range c.KeyTags {
		if !tagSyntax.MatchString(tag) {
			return complain(`%q in "key_tags" is not a tag; use letters, digits, ".", "_" and "-", beginning with a letter or digit`, tag)
		}
	}
	return between("request_timeout", c.RequestTimeout, minRequestTimeout, maxRequestTimeout)
}

func (c Config) validateURLs() error {
	switch {
	case len(c.URLs) == 0:
		return complain(`"urls" is missing; name the nodes of the NetHSM, https://nethsm.example:8443 for example`)
	case len(c.URLs) > maxURLs:
		return complain(`"urls" names %d nodes; use at most %d`, len(c.URLs), maxURLs)
	}
	seen := map[string]bool{}
	for i, text := range c.URLs {
		node, err := parseNode(text)
		switch {
		case err != nil:
			return complain(`url %d of "urls" %w`, i+1, err)
		case seen[node]:
			return complain(`"urls" names the node %s twice; keep one`, node)
		}
		seen[node] = true
	}
	return nil
}

// parseNode returns scheme, host and port of a node's URL, in the same form however it was written. An error does not
// quote the URL: it may hold a password.
func parseNode(text string) (string, error) {
	node, err := url.Parse(text)
	switch {
	case err != nil || node.Hostname() == "":
		return "", fmt.Errorf(`is not a URL; write https://host or https://host:port`)
	case strings.ContainsFunc(node.Hostname(), notOfHost):
		return "", fmt.Errorf(`has a character in its host that no host has; write the name as DNS has it, in letters, digits, "-" and ".", or an address`)
	case node.User != nil:
		return "", fmt.Errorf(`holds a user or a password; give them in "username" and "password"`)
	case node.RawQuery != "" || node.Fragment != "" || !slices.Contains([]string{"", "/api/v1"}, strings.TrimSuffix(node.Path, "/")):
		return "", fmt.Errorf(`has a path or a query; write https://host or https://host:port`)
	}
	host, port := strings.ToLower(node.Hostname()), node.Port()
	switch node.Scheme {
	case "https":
		port = cmp.Or(port, "443")
	case "http":
		if !isLoopback(host) {
			return "", fmt.Errorf(`begins with http:// and leads beyond this machine: passwords would travel in the clear; write https://`)
		}
		port = cmp.Or(port, "80")
	default:
		return "", fmt.Errorf(`has the scheme %q; write https://host or https://host:port`, node.Scheme)
	}
	return node.Scheme + "://" + net.JoinHostPort(host, port), nil
}

// notOfHost is true for what is neither in a name of DNS nor in an address. Other characters would be written in one way
// where the node is allowed and in another where it is asked.
func notOfHost(r rune) bool {
	return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-_.:", r))
}

// CheckURL says what is wrong with the URL of a node of a NetHSM.
func CheckURL(text string) error {
	if _, err := parseNode(text); err != nil {
		return complain(`the URL of a NetHSM %w`, err)
	}
	return nil
}

// checkAllowed complains about nodes that are not among the allowed ones; where none is, about files that strangers would
// have sent to them.
func (c Config) checkAllowed(allowed []string, strangers bool) error {
	if len(allowed) == 0 {
		if strangers {
			return c.checkNoFile()
		}
		return nil
	}
	known := map[string]bool{}
	for _, text := range allowed {
		if node, err := parseNode(text); err == nil {
			known[node] = true
		}
	}
	for _, text := range c.URLs {
		if node, err := parseNode(text); err != nil || !known[node] {
			return complain(`%s in "urls" is not among the NetHSMs that the plugin was registered with; register it with -args=-nethsm-url=%s as well, `+
				`or name another`, node, node)
		}
	}
	return nil
}

// checkNoFile complains about a file whose content would go to a NetHSM.
func (c Config) checkNoFile() error {
	for _, secret := range c.SecretFields() {
		if secret.kind == TypeNetHSM && *secret.File != "" {
			node, _ := parseNode(c.URLs[0]) // it was validated
			return complain(`%q may not be given: the plugin was registered without -nethsm-url, so no file is sent to any NetHSM; register it with `+
				`-args=-nethsm-url=%s, and so for each node, or give %q itself`, secret.FileName(), node, secret.Name)
		}
	}
	return nil
}

func isLoopback(host string) bool {
	address := net.ParseIP(host)
	return host == "localhost" || address != nil && address.IsLoopback()
}

func (c Config) validateUsers() error {
	for _, given := range []struct{ field, user string }{{"username", c.Username}, {"admin_username", c.AdminUsername}} {
		if given.user != "" && !userSyntax.MatchString(given.user) {
			return complain(`%s %q is not the name of a user; write user, or namespace~user`, given.field, given.user)
		}
	}
	hasAdminPassword := c.AdminPassword != "" || c.AdminPasswordFile != ""
	switch {
	case c.Username == "":
		return complain(`"username" is missing; name a user of the NetHSM with the role Operator`)
	case c.Password == "" && c.PasswordFile == "":
		return complain(`no password is given; set "password", or "password_file" to a file under the secrets directory`)
	case c.AdminUsername == c.Username:
		return complain(`"username" and "admin_username" are the same user, and a user of a NetHSM has one role; name an Operator and an Administrator`)
	case c.AdminUsername != "" && !hasAdminPassword:
		return complain(`"admin_username" is given without its password; set "admin_password", or "admin_password_file" to a file under the secrets directory`)
	case c.AdminUsername == "" && hasAdminPassword:
		return complain(`a password of the Administrator is given without "admin_username"; give both, or neither`)
	case c.AdminUsername != "" && namespace(c.AdminUsername) != namespace(c.Username):
		return complain(`"username" and "admin_username" are of different namespaces, and neither sees the keys of the other; name two users of one namespace`)
	case c.ObjectStore && c.AdminUsername == "":
		return complain(`"object_store" needs "admin_username" and its password: only an Administrator may write certificate slots`)
	}
	return nil
}

// namespace returns the namespace of a user, empty for the root namespace.
func namespace(user string) string {
	space, _, found := strings.Cut(user, "~")
	if !found {
		return ""
	}
	return space
}

func (c Config) validateTrust() error {
	if c.Insecure && (c.CACert != "" || len(c.TLSPins) > 0) {
		return complain(`"tls_insecure" accepts any certificate, so "ca_cert" and "tls_pins" would check nothing; drop the one or the others`)
	}
	if c.CACert != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(c.CACert)) {
		return complain(`"ca_cert" holds no certificate in PEM; give the text of the file, ca_cert=@ca.pem for example`)
	}
	for _, pin := range c.TLSPins {
		sum, err := hex.DecodeString(strings.ReplaceAll(pin, ":", ""))
		if err != nil || len(sum) != sha256.Size {
			return complain(`%q in "tls_pins" is not a SHA-256 in hexadecimal; openssl x509 -fingerprint -sha256 prints the right one`, pin)
		}
	}
	return nil
}

// Place names a NetHSM by its nodes and the namespace of the user, whichever node answers and in whatever order they are
// written: a cluster has no serial number of its own. It holds nothing but letters, digits and "-".
func (c Config) Place() string { return c.place(c.URLs...) }

// Places names each node, with the namespace, as [Config.Place] does all: two configurations that share a node share its name.
func (c Config) Places() []string {
	var places []string
	for _, text := range c.URLs {
		places = append(places, c.place(text))
	}
	return places
}

func (c Config) place(urls ...string) string {
	var nodes []string
	for _, text := range urls {
		node, err := parseNode(text)
		if err != nil {
			node = text // not a valid configuration, and one more name
		}
		nodes = append(nodes, node)
	}
	sum := sha256.Sum256([]byte(setOf(nodes) + namespace(c.Username)))
	return "nethsm-" + hex.EncodeToString(sum[:8])
}

func (c Config) fieldsNetHSM() []field {
	fields := []field{
		{name: "urls", set: len(c.URLs) > 0, shown: present(c.URLs), destination: setOf(c.URLs)},
		{name: "username", set: c.Username != "", shown: c.Username, destination: c.Username},
		{name: "admin_username", set: c.AdminUsername != "", shown: c.AdminUsername, destination: c.AdminUsername},
		{name: "ca_cert", set: c.CACert != "", shown: c.CACert, destination: c.CACert},
		{name: "tls_pins", set: len(c.TLSPins) > 0, shown: present(c.TLSPins), destination: setOf(c.TLSPins)},
		{name: "tls_server_name", set: c.TLSServerName != "", shown: c.TLSServerName, destination: c.TLSServerName},
		{name: "tls_insecure", set: c.Insecure, shown: c.Insecure, destination: strconv.FormatBool(c.Insecure)},
		{name: "request_timeout", set: c.RequestTimeout != 0, shown: seconds(c.RequestTimeout)},
		{name: "object_store", set: c.ObjectStore, shown: c.ObjectStore},
		{name: "key_tags", set: len(c.KeyTags) > 0, shown: present(c.KeyTags)},
	}
	for i := range fields {
		fields[i].kind = TypeNetHSM
	}
	return fields
}
