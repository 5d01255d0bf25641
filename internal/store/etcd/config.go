package etcd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// Config says where an etcd cluster is and who we are to it.
type Config struct {
	// Endpoints are the members' client URLs, https://host:port, or all of them http:// where etcd has no TLS: on loopback
	// addresses, or anywhere with Insecure.
	Endpoints []string
	// Insecure accepts http:// beyond loopback. Whoever is on the way can then read names and envelopes, put old ones back
	// and answer in etcd's place; what the envelopes hold stays sealed. TLS is verified in any case.
	Insecure bool
	// Prefix is the folder of all our keys, "nitroseal/prod" for example. It is required, keeps to store.CheckName and
	// so never begins with "/": a NetHSM that shares the etcd backs up and restores that range.
	Prefix string

	// Username and Password, where etcd asks for them. Over http:// they are sent to loopback addresses only.
	Username, Password string

	// CACert is the PEM of the authorities that may sign the members' certificates; without it, the system's do.
	CACert []byte
	// ClientCert and ClientKey are the PEM of our own certificate and its key: both or neither.
	ClientCert, ClientKey []byte
	// ServerName is the name expected in the members' certificates, where it is not the host of the endpoint.
	ServerName string

	// RequestTimeout bounds an operation whose context has no earlier deadline. Default 10 s.
	RequestTimeout time.Duration
}

const defaultRequestTimeout = 10 * time.Second

// Intervals after which a connection to a member that froze or vanished is given up. etcd tolerates one ping in 5 s.
const (
	keepAliveTime    = 10 * time.Second
	keepAliveTimeout = 5 * time.Second
)

// reconnect is how a member that is away is looked for: gRPC's own pauses grow to two minutes, and whoever asks for something
// waits connectLimit. An attempt may take as long as gRPC gives it by itself.
var reconnect = grpc.WithConnectParams(grpc.ConnectParams{
	Backoff:           backoff.Config{BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
	MinConnectTimeout: 20 * time.Second,
})

// client translates the configuration for etcd's client, or says what is wrong with it.
func (c Config) client() (clientv3.Config, error) {
	if err := store.CheckName(c.Prefix); err != nil {
		return clientv3.Config{}, fmt.Errorf("the prefix: %w", err)
	}
	secure, err := c.checkEndpoints()
	if err != nil {
		return clientv3.Config{}, err
	}
	if (c.Username == "") != (c.Password == "") {
		return clientv3.Config{}, errors.New("a user name and a password belong together; give both or neither")
	}
	config := clientv3.Config{
		Endpoints:            slices.Clone(c.Endpoints),
		Username:             c.Username,
		Password:             c.Password,
		DialTimeout:          c.RequestTimeout,
		DialKeepAliveTime:    keepAliveTime,
		DialKeepAliveTimeout: keepAliveTimeout,
		Logger:               zap.NewNop(),
		// One attempt. The client would repeat a transaction that a server answered with "canceled" or "deadline
		// exceeded", although it may have been applied: the repetition then looks like a conflict with somebody else.
		MaxUnaryRetries: 1,
		DialOptions:     []grpc.DialOption{reconnect},
	}
	switch {
	case secure:
		if config.TLS, err = c.tls(); err != nil {
			return clientv3.Config{}, err
		}
		if c.ServerName != "" {
			config.DialOptions = append(config.DialOptions, grpc.WithTransportCredentials(serverName(config.TLS)))
		}
		return config, nil
	case len(c.CACert)+len(c.ClientCert)+len(c.ClientKey)+len(c.ServerName) > 0:
		return clientv3.Config{}, errors.New("certificates are given, but the endpoints begin with http://; write https://")
	default:
		return config, nil
	}
}

func (c Config) checkEndpoints() (secure bool, err error) {
	if len(c.Endpoints) == 0 {
		return false, errors.New("no endpoint is given; give the URL of at least one member, https://host:2379")
	}
	for i, endpoint := range c.Endpoints {
		u, err := url.Parse(endpoint)
		if err != nil || (u.Scheme != "https" && u.Scheme != "http") || u.Host == "" || u.User != nil ||
			strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			return false, fmt.Errorf("endpoint %d is not of the form https://host:port", i+1) // it may hold a password
		}
		if u.Port() == "" {
			return false, fmt.Errorf("endpoint %q has no port; etcd's is 2379", endpoint)
		}
		if i > 0 && secure != (u.Scheme == "https") {
			return false, errors.New("some endpoints begin with https://, others with http://; use one of them for all")
		}
		secure = u.Scheme == "https"
		if !secure && c.Username != "" && !loopback(u.Hostname()) {
			return false, fmt.Errorf("endpoint %q would get the password in the clear; use https://", endpoint)
		}
		if !secure && !c.Insecure && !loopback(u.Hostname()) {
			return false, fmt.Errorf("endpoint %q is spoken to without TLS, so whoever is on the way can read names and envelopes and put old ones "+
				"back; use https://, or accept that with insecure=true", endpoint)
		}
	}
	if secure && c.Insecure {
		return false, errors.New("insecure=true belongs to endpoints with http://: certificates are verified in any case; set insecure=false, " +
			"and name the authority of etcd's certificates in ca_cert")
	}
	return secure, nil
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (c Config) tls() (*tls.Config, error) {
	config := &tls.Config{ServerName: c.ServerName, MinVersion: tls.VersionTLS12}
	if len(c.CACert) > 0 {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(c.CACert) {
			return nil, errors.New("the CA certificate holds no PEM certificate")
		}
	}
	if len(c.ClientCert) == 0 && len(c.ClientKey) == 0 {
		return config, nil
	}
	pair, err := tls.X509KeyPair(c.ClientCert, c.ClientKey)
	if err != nil {
		return nil, fmt.Errorf("the client certificate and its key: %w", err) // crypto/tls names no content
	}
	config.Certificates = []tls.Certificate{pair}
	return config, nil
}

// serverName makes gRPC expect the configured name in a certificate. etcd's client sets the host of the endpoint for
// each connection, and gRPC lets that win over the ServerName of a tls.Config.
func serverName(config *tls.Config) credentials.TransportCredentials {
	return namedServer{TransportCredentials: credentials.NewTLS(config), name: config.ServerName}
}

type namedServer struct {
	credentials.TransportCredentials

	name string
}

// ClientHandshake implements [credentials.TransportCredentials].
func (n namedServer) ClientHandshake(ctx context.Context, _ string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return n.TransportCredentials.ClientHandshake(ctx, n.name, conn)
}

// Clone implements [credentials.TransportCredentials].
func (n namedServer) Clone() credentials.TransportCredentials {
	return namedServer{TransportCredentials: n.TransportCredentials.Clone(), name: n.name}
}
