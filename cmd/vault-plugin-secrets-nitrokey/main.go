// Command vault-plugin-secrets-nitrokey is the plugin binary. Vault and OpenBao start it as a secrets engine, and it serves
// all mounts of the plugin; OpenBao starts it as a seal as well, and it serves that. Which of the two is said by the cookie
// in its environment.
//
// Its arguments come from the plugin catalog or, for a seal, from OpenBao's configuration, so only who may register plugins
// can choose what is loaded and which files are read; whoever may write a mount's configuration cannot. Exit status: 0 after
// serving, -version or -help, 1 where serving failed or a person started it, 2 for wrong arguments.
package main

import (
	"errors"
	"flag"
	"io"
	"os"

	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	"vault-plugin-secrets-nitrokey/backend"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin"
)

func main() {
	modhost.RunIfStarted()
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, serve))
}

// role is what a host started this process for.
type role string

// The roles. A host that started it for none is a person.
const (
	roleNone   role = ""
	roleEngine role = "secrets engine"
	roleSeal   role = "seal"
)

// startedAs reads the cookies. A seal comes first: OpenBao sets that cookie for this process alone, the other one may be
// inherited.
func startedAs() role {
	switch {
	case kmsplugin.Started():
		return roleSeal
	case os.Getenv(plugin.HandshakeConfig.MagicCookieKey) == plugin.HandshakeConfig.MagicCookieValue:
		return roleEngine
	default:
		return roleNone
	}
}

// run is the program, which serves by serve; the result is its exit status.
func run(args []string, stdout, stderr io.Writer, serve func(role, *api.PluginAPIClientMeta, arguments) error) int {
	meta := new(api.PluginAPIClientMeta)
	given, err := parse(meta.FlagSet(), args, stderr)
	as := startedAs()
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case given.version:
		say(stdout, "%s\n", backend.Version)
		return 0
	case as == roleNone:
		explain(stderr)
		return 1
	}
	if err := serve(as, meta, given); err != nil {
		say(stderr, "serving the plugin: %v\n", err)
		return 1
	}
	return 0
}
