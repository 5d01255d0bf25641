package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	"vault-plugin-secrets-nitrokey/backend"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin"
	"vault-plugin-secrets-nitrokey/internal/memory"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// serve serves until the host ends the plugin.
func serve(as role, meta *api.PluginAPIClientMeta, given arguments) (err error) {
	logger := hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: os.Stderr, JSONFormat: true}) // the host applies its own level
	log := backend.NewLogger(logger)
	endWithHost(log)
	if given.mlock {
		if err := memory.LockAll(); err != nil {
			return fmt.Errorf("locking the memory, as -mlock asks for: %w", err)
		}
	}
	tokens := pkcs11.New(tokenOptions(as, given, log))
	netHSMs := nethsm.NewManager(log)
	defer func() { err = errors.Join(err, netHSMs.Close(), tokens.Close()) }() // the host has cleaned up by then, or is gone
	devices := device.New(device.Options{
		Openers: map[string]device.Opener{device.TypePKCS11: device.PKCS11(tokens), device.TypeNetHSM: device.NetHSM(netHSMs)},
		Secrets: device.SecretFiles{Dir: given.secretsDir, Credentials: as == roleSeal},
		NetHSMs: given.netHSMs,
		// Who may configure a mount need not be who registered the plugin. A seal and its plugin stand in one file.
		Strangers: as != roleSeal,
		Logger:    log,
	})
	if as == roleSeal {
		return kmsplugin.Serve(kmsplugin.Options{
			Devices: devices, Modules: given.modules, SecretsDir: given.secretsDir, StateDir: given.stateDir, Logger: log,
		}, logger)
	}
	return plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: backend.New(backend.Options{Devices: devices, StateDir: given.stateDir}),
		// Vaults before 1.12 do not speak AutoMTLS.
		TLSProviderFunc: api.VaultPluginTLSProvider(meta.GetTLSConfig()),
		Logger:          logger,
	})
}

// tokenOptions are how tokens are reached. What a seal's operator does about a PIN is done by the command: a seal has no
// paths.
func tokenOptions(as role, given arguments, log *slog.Logger) pkcs11.Options {
	options := pkcs11.Options{
		Modules: given.modules, StateDir: given.stateDir, Env: given.moduleEnv,
		HostPath: given.moduleHost, HostSHA256: given.moduleHostSHA256, Logger: log,
	}
	if as == roleSeal {
		options.Advice = sealAdvice
	}
	return options
}

// sealAdvice is what sentences about PINs tell the operator of a seal to do. The command shares the bars of PINs with the plugin
// where both have the same state directory.
var sealAdvice = pkcs11.Advice{
	Give: "put the right one into the file of pin_file, and log in once at your word (nitroseal device pin try NAME, with the plugin's " +
		"-state-dir as its state_dir)",
	Unbar:   "lift the bar (nitroseal device pin unbar NAME)",
	LastTry: "put the right one into the file of pin_file, and log in once with \"nitroseal device pin try NAME --last-try\"",
	Force:   "--last-try",
}
