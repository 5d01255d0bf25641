// Command nitroseal is the operator's command: it seals and opens values, looks after HSMs and wrapping keys, makes a
// NetHSM ready, keeps clusters of Vault and OpenBao unsealed, and serves the seal of those that unseal themselves.
//
// What it does lies in the rooms below it: devices in internal/device, wrapping keys in internal/keyring, configuration
// in internal/config, clusters in internal/custody and internal/daemon, the seal server in internal/server. Here are flags,
// prompts, tables and exit codes, one file a verb. The program may itself be the module host, the process that loads a
// vendor's PKCS#11 module: then it never comes to the command.
//
// Results go to stdout, everything else to stderr. Exit codes are listed in exit.go.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
)

func main() {
	modhost.RunIfStarted()
	// PINs and plaintexts are in memory: no core dump of it. Where that cannot be had, the work goes on.
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{})
	os.Exit(run(os.Args[1:]))
}

// run is the command with the process's own files; the result is its exit code.
func run(args []string) int {
	// The first signal ends what is under way in an orderly manner, the second one ends the process at once, but for work that
	// cannot be left as it is, see criticalWork.
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	defer context.AfterFunc(ctx, stop)()

	a := newApp(os.Stdin, os.Stdout, os.Stderr)
	a.cancel = cancel
	root := newRootCommand(a)
	root.SetArgs(longFlags(root, args))
	err := root.ExecuteContext(ctx)
	if err != nil && !a.begun {
		err = usage("%w", err)
	}
	if closing := a.close(); err == nil {
		err = closing
	}
	return a.report(err)
}
