package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/server"
)

func newServeCommand(a *app) *cobra.Command {
	logs := logFlags{format: logText, level: "info"}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Stay, and answer Vaults and OpenBaos whose seal is \"transit\"",
		Long: `Serve the seal "transit" of Vaults and OpenBaos with the wrapping keys of this machine: what they seal needs no HSM, and what they open is one
operation of it (none while a key with a lease holds its own). Nothing else is answered; sys/health is for people and balancers.

It listens where the block serve of the configuration says, over TLS; the certificate is taken anew when its file changes. Who asks shows a
token ("nitroseal serve token create"). /healthz, /readyz and /metrics (Prometheus) are on 127.0.0.1:9109. Several servers may run side by
side with the same keys and the same store of tokens.

Start it before the Vaults: one that gets no answer at its start ends. Without an HSM the server starts all the same, and answers 503 until
one has answered once; from then on it seals without any, and answers 503 to what it cannot open until the HSM is back. Started by systemd
it is ready when the served keys can seal, and tells its watchdog that it is alive. SIGHUP reads the configuration anew; where that is
wrong, the one in use stays. SIGUSR1 forgets what leases hold, at once. SIGTERM and Ctrl-C end it when what is under way has ended.

What is opened is written to the audit log before it is done. The server's own log goes to stderr.`,
		Example: `  nitroseal serve
  nitroseal serve --log-format json --log-level debug`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := logs.logger(a)
			if err != nil {
				return err
			}
			// Where the reader of the log went away, writing it fails; without somebody who is told, it would end the process.
			signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
			a.log = logger
			err = server.Run(cmd.Context(), server.Options{Build: a.buildSealSite, Logger: logger, Version: version})
			if errors.Is(err, syscall.EADDRINUSE) {
				err = fmt.Errorf("%w; does another server run? \"nitroseal serve status\" asks it", err)
			}
			return err
		},
	}
	logs.add(cmd)
	cmd.AddCommand(newServeTokenCommand(a), newServeStatusCommand(a))
	return cmd
}

// buildSealSite opens what the configuration says at this moment: each time it is read anew, so that a wrong one leaves the site in
// use as it is.
func (a *app) buildSealSite(ctx context.Context, hooks *server.Hooks) (*server.Site, error) {
	inner := newApp(a.stdin, a.stdout, a.stderr)
	inner.configPath, inner.log, inner.observer, inner.serving = a.configPath, a.log, hooks, true
	site, err := inner.sealSite(ctx)
	if err != nil {
		if closing := inner.close(); closing != nil {
			inner.log.Warn("closing what was opened for a configuration that is refused", "cause", closing)
		}
		return nil, err
	}
	site.Close = inner.close
	return site, nil
}
