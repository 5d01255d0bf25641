// Command vault-plugin-secrets-nitrokey is the plugin binary: Vault starts it, and it serves all mounts of the plugin.
//
// Its arguments come from Vault's plugin catalog, so only who may register plugins can choose what is loaded and which
// files are read; whoever may write a mount's configuration cannot. Exit status: 0 after serving, -version or -help, 1
// where serving failed or a person started it, 2 for wrong arguments.
package main

import (
	"errors"
	"flag"
	"io"
	"os"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	"vault-plugin-secrets-nitrokey/backend"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/nethsm"
)

func main() {
	modhost.RunIfStarted()
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, serve))
}

// run is the program, which serves by serve; the result is its exit status.
func run(args []string, stdout, stderr io.Writer, serve func(*api.PluginAPIClientMeta, arguments) error) int {
	meta := new(api.PluginAPIClientMeta)
	given, err := parse(meta.FlagSet(), args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case given.version:
		say(stdout, "%s\n", backend.Version)
		return 0
	case os.Getenv(plugin.HandshakeConfig.MagicCookieKey) != plugin.HandshakeConfig.MagicCookieValue:
		explain(stderr)
		return 1
	}
	if err := serve(meta, given); err != nil {
		say(stderr, "serving the plugin: %v\n", err)
		return 1
	}
	return 0
}

// serve serves until Vault ends the plugin.
func serve(meta *api.PluginAPIClientMeta, given arguments) (err error) {
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: os.Stderr, JSONFormat: true}) // Vault applies its own level
	log := backend.NewLogger(logger)
	endWithVault(log)
	tokens := pkcs11.New(pkcs11.Options{
		Modules: given.modules, StateDir: given.stateDir, Env: given.moduleEnv,
		HostPath: given.moduleHost, HostSHA256: given.moduleHostSHA256, Logger: log,
	})
	netHSMs := nethsm.NewManager(log)
	defer func() { err = errors.Join(err, netHSMs.Close(), tokens.Close()) }() // Vault has cleaned up the mounts by then, or is gone
	devices := device.New(device.Options{
		Openers:   map[string]device.Opener{device.TypePKCS11: device.PKCS11(tokens), device.TypeNetHSM: device.NetHSM(netHSMs)},
		Secrets:   device.SecretFiles{Dir: given.secretsDir},
		NetHSMs:   given.netHSMs,
		Strangers: true, // who may configure a mount need not be who registered the plugin
		Logger:    log,
	})
	return plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: backend.New(backend.Options{Devices: devices, StateDir: given.stateDir}),
		// Vaults before 1.12 do not speak AutoMTLS.
		TLSProviderFunc: api.VaultPluginTLSProvider(meta.GetTLSConfig()),
		Logger:          logger,
	})
}
