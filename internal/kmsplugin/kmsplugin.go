// Package kmsplugin is OpenBao's seal plugin: an OpenBao whose root key opens only with a private-key operation in an HSM.
//
// OpenBao (2.6 and later) starts the plugin by the stanza `plugin "kms" "nitrokey"` and hands it the settings of
// `seal "nitrokey"`, with go-plugin's handshake, over mutual TLS that both make for that one run. Seven calls arrive:
// SetConfig makes a wrapper, which the others name: Type, KeyId, Encrypt, Decrypt, Init, Finalize ([Server]). A process
// that dies is started anew, and SetConfig and Init are sent again; so nothing of a wrapper needs to outlive the process.
//
// A wrapper is a wrapping key in memory, restored from the key record that the stanza names ([stanza]). What it seals are
// envelopes of use "seal", bound to the key's name and version and to the caller's own data: sealing is software, opening is
// one operation in an HSM. The record is taken without asking an HSM, because OpenBao ends when SetConfig fails, and an HSM
// that is away for a minute must not end it. The key that authenticates envelopes is opened in the background, so that
// sealing, for which OpenBao has ten seconds, does not wait for a slow card.
package kmsplugin

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"os"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin/pb"
)

// Handshake is what OpenBao and a seal plugin know each other by. The cookie is no secret: it keeps people from starting
// the program by hand.
var Handshake = plugin.HandshakeConfig{
	MagicCookieKey:   "OPENBAO_KMS_PLUGIN",
	MagicCookieValue: "39704a18-7da7-4bda-9a2d-f7c488d70328",
}

const (
	// Protocol is the version of the protocol between OpenBao and its plugins.
	Protocol = 1
	// Name is what OpenBao asks a plugin for that is to be a seal.
	Name = "wrapper"
	// Type is the kind of seal: what the stanzas are called.
	Type = "nitrokey"
)

// Options are what whoever starts the plugin decides, and no stanza of a seal.
type Options struct {
	// Devices opens HSMs. Secrets that stanzas name as files lie where it allows them.
	Devices *device.Registry
	// Modules are the PKCS#11 modules that may be loaded. The first is the default of a stanza where there is no other.
	Modules []string
	// SecretsDir and StateDir are for sentences about what is missing: the registry and the PKCS#11 provider use them.
	SecretsDir, StateDir string
	Logger               *slog.Logger // nil for none
}

// Started tells whether OpenBao started this process as a seal.
func Started() bool { return os.Getenv(Handshake.MagicCookieKey) == Handshake.MagicCookieValue }

// certificateVariable holds the certificate that OpenBao will show.
const certificateVariable = "PLUGIN_CLIENT_CERT"

// errNoCertificate says that the keys of OpenBao would cross a socket in the clear.
var errNoCertificate = errors.New("the program that started this one gave no certificate (" + certificateVariable +
	"); OpenBao always does, and without it root keys would cross a socket in the clear")

// Serve serves seals until OpenBao ends the plugin, and then ends them. Logger is go-plugin's.
func Serve(options Options, logger hclog.Logger) error {
	if os.Getenv(certificateVariable) == "" {
		return errNoCertificate
	}
	server := New(options)
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig:  Handshake,
		VersionedPlugins: map[int]plugin.PluginSet{Protocol: {Name: &Plugin{server: server}}},
		Logger:           logger,
		GRPCServer: func(given []grpc.ServerOption) *grpc.Server {
			return plugin.DefaultGRPCServer(append(given, grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(math.MaxInt32)))
		},
	})
	return server.Close()
}

// maxMessage is the largest message that is read, in bytes: an envelope has 128 KiB at most, and a stanza is small.
const maxMessage = 1 << 20

// Plugin is how go-plugin knows a seal; the zero value is the host's side of it.
type Plugin struct {
	plugin.NetRPCUnsupportedPlugin

	server *Server
}

var _ plugin.GRPCPlugin = (*Plugin)(nil)

// GRPCServer implements [plugin.GRPCPlugin].
func (p *Plugin) GRPCServer(_ *plugin.GRPCBroker, server *grpc.Server) error {
	pb.RegisterWrapperServer(server, p.server)
	return nil
}

// GRPCClient implements [plugin.GRPCPlugin]: it returns a [pb.WrapperClient].
func (p *Plugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, connection *grpc.ClientConn) (any, error) {
	return pb.NewWrapperClient(connection), nil
}

// Server answers OpenBao's calls. Its methods are safe for concurrent use.
type Server struct {
	pb.UnimplementedWrapperServer

	options Options

	mu     sync.Mutex // guards what follows
	seals  map[string]*seal
	calls  uint64 // counts them, for seal.used
	closed bool
	said   map[string]string // the newest error in the log since a success, by call
}

// maxSeals is how many wrappers a process keeps. OpenBao has two at most, and one more for each time that its telling a new
// process what the old one knew fails half-way, as it does while the HSM is away: those it forgets, and never finalizes.
const maxSeals = 16

// New returns a server without wrappers.
func New(options Options) *Server {
	if options.Logger == nil {
		options.Logger = slog.New(slog.DiscardHandler)
	}
	return &Server{options: options, seals: map[string]*seal{}, said: map[string]string{}}
}

// Close ends all wrappers: calls that run fail, and none comes after.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	seals := s.seals
	s.seals = map[string]*seal{}
	s.mu.Unlock()
	var errs []error
	for _, w := range seals {
		errs = append(errs, w.close())
	}
	return errors.Join(errs...)
}
