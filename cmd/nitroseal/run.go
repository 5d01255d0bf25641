package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/daemon"
)

func newRunCommand(a *app) *cobra.Command {
	logs := logFlags{format: logText, level: "info"}
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Stay, and keep the clusters of the configuration unsealed",
		Long: `Watch every node of every cluster of the configuration, and unseal each that is found sealed: after a power cut, an upgrade, a new pod.
Nodes that are new to a raft cluster are joined. It never initialises anything: "nitroseal init" does.

It listens on 127.0.0.1:9108 (block run of the configuration) for /healthz, /readyz and /metrics (Prometheus); where that is taken it says
so, unseals all the same, and tries it again every ten seconds. Started by systemd it tells when it is ready, and its watchdog that it is
alive. SIGHUP reads the configuration anew, with its certificates and secrets; where that is wrong, the one in use stays. SIGTERM and
Ctrl-C end it when what is under way has ended.

Each unsealing is written to the audit log before it is done. The daemon's own log goes to stderr.`,
		Example: `  nitroseal run
  nitroseal run --log-format json --log-level debug`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger, err := logs.logger(a)
			if err != nil {
				return err
			}
			// Where the reader of the log went away, writing it fails; without somebody who is told, it would end the process.
			signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
			a.log = logger
			return daemon.Run(cmd.Context(), daemon.Options{
				Build: a.buildSite, Logger: logger, Version: version,
			})
		},
	}
	logs.add(cmd)
	return cmd
}

// buildSite opens what the configuration says at this moment: each time it is read anew, so that a wrong one leaves the site in
// use as it is.
func (a *app) buildSite(ctx context.Context, hooks *daemon.Hooks) (*daemon.Site, error) {
	inner := newApp(a.stdin, a.stdout, a.stderr)
	inner.configPath, inner.log, inner.hooks, inner.observer = a.configPath, a.log, hooks, hooks
	inner.critical.reloads = true
	site, err := inner.site(ctx, nil)
	if err != nil {
		if closing := inner.close(); closing != nil {
			inner.log.Warn("closing what was opened for a configuration that is refused", "cause", closing)
		}
		return nil, err
	}
	site.Warm, site.Close = inner.warm, inner.close
	return site, nil
}

// warm opens the authentication keys of the clusters' wrapping keys, so that an unsealing costs one operation of an HSM.
func (a *app) warm(ctx context.Context) error {
	clusters, err := a.clusters(nil)
	if err != nil {
		return err
	}
	keys, err := a.keyring()
	if err != nil {
		return err
	}
	names := map[string]bool{}
	for _, c := range clusters {
		if c.Spread == nil {
			names[c.Key] = true
			continue
		}
		for _, name := range c.Spread.Keys {
			names[name] = true
		}
	}
	var problems []error
	for _, name := range slices.Sorted(maps.Keys(names)) {
		problems = append(problems, keys.Warm(ctx, name))
	}
	return errors.Join(problems...)
}

// The forms of the daemon's log.
const (
	logText = "text"
	logJSON = "json"
)

// logFlags say how the daemon logs.
type logFlags struct{ format, level string }

func (l *logFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.format, "log-format", l.format, "form of the log on stderr: text or json")
	cmd.Flags().StringVar(&l.level, "log-level", l.level, "what is logged: debug, info, warn or error")
	_ = cmd.RegisterFlagCompletionFunc("log-format", cobra.FixedCompletions([]cobra.Completion{logText, logJSON}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("log-level",
		cobra.FixedCompletions([]cobra.Completion{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
}

func (l *logFlags) logger(a *app) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(l.level)); err != nil {
		return nil, usage("--log-level is debug, info, warn or error")
	}
	options := &slog.HandlerOptions{Level: level}
	switch l.format {
	case logText:
		return slog.New(slog.NewTextHandler(a.stderr, options)), nil
	case logJSON:
		return slog.New(slog.NewJSONHandler(a.stderr, options)), nil
	}
	return nil, usage("--log-format is %s or %s", logText, logJSON)
}
