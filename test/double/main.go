// Command double serves a NetHSM double for demonstrations, until it is told to stop (SIGINT, SIGTERM). It says where, one
// line for each thing, and then "ready":
//
//	url https://127.0.0.1:8443
//	pin 5c2f…
//	ca /some/where/ca.pem
//	ready
//
// Its users and passphrases are the constants of package nethsmtest. It is no HSM: private keys lie in its directory.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "double:", err)
		os.Exit(1) //nolint:forbidigo // this is main, and it ends the process
	}
}

func run(ctx context.Context, args []string) (err error) {
	var o nethsmtest.Options
	var unprovisioned bool
	var ca string
	flags := flag.NewFlagSet("double", flag.ContinueOnError)
	flags.StringVar(&o.Dir, "dir", "", "directory for its data; without one it forgets all at its end")
	flags.StringVar(&o.Listen, "listen", "127.0.0.1:0", "address of the first node; further nodes take the next ports")
	flags.IntVar(&o.Nodes, "nodes", 1, "number of nodes that share the data")
	flags.BoolVar(&unprovisioned, "unprovisioned", false, "start as it comes from the factory")
	flags.BoolVar(&o.UnattendedBoot, "unattended-boot", false, "come back Operational after a restart")
	flags.BoolVar(&o.Container, "container", false, "refuse what the software container cannot do")
	flags.BoolVar(&o.RealCosts, "real-costs", false, "let unlocking take as long as it really does")
	flags.DurationVar(&o.ServiceTime, "service-time", 0, "least time of an operation with a private key")
	flags.IntVar(&o.Parallel, "parallel", 0, "operations at a time for each node; 0: no limit")
	flags.StringVar(&ca, "ca", "", "file for the CA certificate; without one it goes to the directory, or to a temporary file")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unknown argument %q: there are only flags", flags.Arg(0))
	}
	o.Provisioned = !unprovisioned
	hsm, err := nethsmtest.Serve(o)
	if err != nil {
		return err
	}
	defer hsm.Close()
	file, temporary, err := writeCA(ca, o.Dir, hsm.CA())
	if err != nil {
		return err
	}
	if temporary {
		defer func() { err = errors.Join(err, os.Remove(file)) }()
	}
	if err := announce(hsm, file); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// writeCA stores the CA certificate where it was asked for; temporary says that nobody asked.
func writeCA(file, dir string, ca []byte) (name string, temporary bool, err error) {
	if file == "" && dir != "" {
		file = filepath.Join(dir, "ca.pem")
	}
	if file != "" {
		return file, false, os.WriteFile(file, ca, 0o644) //nolint:gosec // a certificate, for everybody
	}
	made, err := os.CreateTemp("", "nethsm-double-ca-*.pem")
	if err != nil {
		return "", false, err
	}
	_, err = made.Write(ca)
	return made.Name(), true, errors.Join(err, made.Close())
}

func announce(hsm *nethsmtest.HSM, ca string) error {
	var b strings.Builder
	for _, n := range hsm.Nodes() {
		fmt.Fprintf(&b, "url %s\npin %s\n", n.URL(), n.Pin())
	}
	fmt.Fprintf(&b, "ca %s\nready\n", ca)
	_, err := os.Stdout.WriteString(b.String())
	return err
}
