package main

import (
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/device"
)

// arguments are the plugin's own, as the catalog or OpenBao's configuration holds them.
type arguments struct {
	modules          list
	moduleEnv        list
	moduleHost       string
	moduleHostSHA256 string
	netHSMs          list
	secretsDir       string
	stateDir         string
	mlock            bool
	version          bool
}

// list is a flag that may be given several times.
type list []string

func (l *list) String() string { return strings.Join(*l, " ") }

func (l *list) Set(value string) error {
	if value == "" {
		return fmt.Errorf("it is empty")
	}
	*l = append(*l, value)
	return nil
}

// parse reads the arguments into the flags that every plugin has. What is wrong with them is written to stderr.
func parse(flags *flag.FlagSet, args []string, stderr io.Writer) (arguments, error) {
	var given arguments
	flags.SetOutput(stderr)
	flags.Usage = func() { usage(stderr) }
	flags.Var(&given.modules, "pkcs11-module", "")
	flags.Var(&given.moduleEnv, "module-env", "")
	flags.StringVar(&given.moduleHost, "module-host", "", "")
	flags.StringVar(&given.moduleHostSHA256, "module-host-sha256", "", "")
	flags.Var(&given.netHSMs, "nethsm-url", "")
	flags.StringVar(&given.secretsDir, "secrets-dir", "", "")
	flags.StringVar(&given.stateDir, "state-dir", "", "")
	flags.BoolVar(&given.mlock, "mlock", false, "")
	flags.BoolVar(&given.version, "version", false, "")
	if err := flags.Parse(args); err != nil {
		return given, err
	}
	err := given.check(flags.Args())
	if err != nil {
		say(stderr, "%s\n", err)
	}
	return given, err
}

func (a arguments) check(rest []string) error {
	paths := map[string]string{"-secrets-dir": a.secretsDir, "-state-dir": a.stateDir, "-module-host": a.moduleHost}
	for _, module := range a.modules {
		if !filepath.IsAbs(module) {
			return fmt.Errorf("-pkcs11-module=%s is not an absolute path", module)
		}
	}
	for name, path := range paths {
		if path != "" && !filepath.IsAbs(path) {
			return fmt.Errorf("%s=%s is not an absolute path", name, path)
		}
	}
	for _, url := range a.netHSMs {
		if err := device.CheckURL(url); err != nil {
			return fmt.Errorf("-nethsm-url: %w", err)
		}
	}
	for _, name := range a.moduleEnv {
		if strings.Contains(name, "=") {
			return fmt.Errorf("-module-env=%s names a variable and sets none; set it where Vault runs, or with -env when you register (env of the plugin stanza)", name)
		}
	}
	switch {
	case (a.moduleHost == "") != (a.moduleHostSHA256 == ""):
		return fmt.Errorf("-module-host and -module-host-sha256 belong together")
	case len(rest) > 0:
		return fmt.Errorf("unknown argument %q; all arguments begin with \"-\"", rest[0])
	}
	return nil
}

const usageText = `Usage: vault-plugin-secrets-nitrokey [arguments]

Vault and OpenBao start this program. The arguments are given when it is registered, each as -args=ARGUMENT; for a seal of
OpenBao in its configuration, as args = ["ARGUMENT", …] of the stanza plugin "kms" "nitrokey":

  -pkcs11-module=PATH       a PKCS#11 module that mounts may use; repeat it for more
  -secrets-dir=DIR          the directory under which the files lie that mounts may name as pin_file, password_file and so
                            on; none without it
  -nethsm-url=URL           a node that devices of type nethsm may name; repeat it for more. Without it they may name any
                            node, but those of mounts no file of -secrets-dir: whoever may write devices/ could have it
                            sent to a server of their own
  -state-dir=DIR            where a PIN is remembered that was wrong, so that it is sent once only, and where stores of
                            type "file" lie; must be the same for all plugins on this machine, and survive restarts.
                            Without it no PIN is sent at all
  -module-env=NAME          an environment variable that modules get, SOFTHSM2_CONF for example; repeat it for more
  -module-host=PATH         a program that can load modules, where this one was built without cgo
  -module-host-sha256=HEX   its SHA-256
  -mlock                    lock all memory of this process; it does not start where that is not permitted (CAP_IPC_LOCK).
                            Vault asks for it by itself unless disable_mlock is set, OpenBao does not
  -version                  print the version and exit

  -ca-cert, -ca-path, -client-cert, -client-key, -tls-server-name, -tls-skip-verify
                            how to reach Vault; for Vaults before 1.12 only
`

func usage(w io.Writer) { say(w, "%s", usageText) }

// say writes to a person. Where nobody listens, nothing can be done about it.
func say(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }
