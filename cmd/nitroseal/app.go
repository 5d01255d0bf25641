package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/daemon"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// How long a command may take where --timeout does not say.
const (
	ordinaryTimeout = time.Minute
	generateTimeout = 15 * time.Minute // an RSA-4096 key takes a card minutes
)

// app is what the verbs share: the process's files, the global flags, and what is opened when a verb first needs it. Verbs
// use it from one goroutine; what a custodian uses of it from many, store and what lies behind it, guards itself.
type app struct {
	stdin, stdout, stderr *os.File

	configPath string
	format     format
	timeout    time.Duration
	log        *slog.Logger // instead of warnings for people; nil but for the daemon
	steps      bool         // people see the steps of what is done as well
	critical   criticalWork
	cancel     context.CancelCauseFunc // ends the command in good order; nil in tests

	configuration *config.Config
	set           *deviceSet
	keys          *keyring.Keyring
	stores        storeSet
	kept          *custody.Keeper
	acts          *audit.Log
	custody       *cluster.Custodian
	hooks         *daemon.Hooks   // what stores and critical work report to; nil but in the daemon
	observer      device.Observer // what devices report to; nil for nobody
	serving       bool            // it is the seal server's, which tells the keyring when another process wrote
	closing       sync.Mutex      // guards closers
	closers       []func() error
	begun         bool          // a verb began its work
	limit         time.Duration // that within gave it, 0 for none
	late          func() bool   // whether that time is up
	stdinTaken    bool
	warnings      waitingWarnings
}

func newApp(stdin, stdout, stderr *os.File) *app {
	a := &app{stdin: stdin, stdout: stdout, stderr: stderr, format: formatTable}
	a.critical.app = a
	return a
}

// config reads the configuration, once.
func (a *app) config() (*config.Config, error) {
	if a.configuration != nil {
		return a.configuration, nil
	}
	read, err := config.Load(a.configPath)
	if err != nil {
		return nil, err
	}
	a.configuration = read
	return read, nil
}

// deviceConfig returns a device of the configuration.
func (a *app) deviceConfig(name string) (config.Device, error) {
	c, err := a.config()
	if err != nil {
		return config.Device{}, err
	}
	found, ok := c.Device(name)
	if !ok {
		return config.Device{}, fmt.Errorf("device %q: %w; %s has %s", name, errNotFound, c.Path, names("device", deviceNames(c)))
	}
	return found, nil
}

// logger writes what an operator should know, warnings and errors, to stderr; the daemon has a log of its own.
func (a *app) logger() *slog.Logger {
	if a.log != nil {
		return a.log
	}
	return slog.New(personLog{app: a, waits: &a.warnings})
}

// patience is the value of --timeout. None would be a command that ends before it begins.
type patience time.Duration

// String is empty for no limit, so that the help shows none.
func (p *patience) String() string {
	if *p == 0 {
		return ""
	}
	return time.Duration(*p).String()
}

// Type implements pflag.Value.
func (p *patience) Type() string { return "duration" }

// Set implements pflag.Value.
func (p *patience) Set(value string) error {
	d, err := time.ParseDuration(value)
	if err != nil || d <= 0 {
		return errors.New(`it is a time with a unit, "90s" or "5m" for example`)
	}
	*p = patience(d)
	return nil
}

// within bounds the work of a verb: by --timeout, else by usual. Prompts come before it, people take their time.
func (a *app) within(ctx context.Context, usual time.Duration) (context.Context, context.CancelFunc) {
	if a.timeout > 0 {
		usual = a.timeout
	}
	ctx, cancel := context.WithTimeout(ctx, usual)
	a.limit, a.late = usual, func() bool { return errors.Is(context.Cause(ctx), context.DeadlineExceeded) }
	return ctx, cancel
}

// onClose remembers something to be closed at the end, the last one first.
func (a *app) onClose(closer func() error) {
	a.closing.Lock()
	defer a.closing.Unlock()
	a.closers = append(a.closers, closer)
}

func (a *app) close() error {
	var errs []error
	for {
		a.closing.Lock()
		last := len(a.closers) - 1
		if last < 0 {
			a.closing.Unlock()
			return errors.Join(errs...)
		}
		closer := a.closers[last]
		a.closers = a.closers[:last]
		a.closing.Unlock()
		errs = append(errs, closer())
	}
}

// report prints what the command warns of and its error, once, and returns the exit code.
func (a *app) report(err error) int {
	a.warnings.flush(a, err)
	code := exitCode(err)
	switch code {
	case exitOK:
	case exitInterrupted:
		a.say("nitroseal: interrupted: %v", err)
	case exitUnavailable:
		if a.late != nil && a.late() {
			err = fmt.Errorf("%w (not done within %v; --timeout gives it longer)", err, a.limit)
		}
		fallthrough
	default:
		a.say("nitroseal: %v", err)
	}
	return code
}

// say writes a line to a person, or several. Control characters, as an answer of a server may hold, do not reach the terminal.
// Where nobody listens, nothing can be done about it.
func (a *app) say(format string, args ...any) {
	lines := strings.Split(fmt.Sprintf(format, args...), "\n")
	for i := range lines {
		lines[i] = printable(lines[i])
	}
	_, _ = fmt.Fprintln(a.stderr, strings.Join(lines, "\n"))
}

// progress tells a waiting person what is going on; a log file is spared it.
func (a *app) progress(format string, args ...any) {
	if isTerminal(a.stderr) {
		a.say(format, args...)
	}
}

func isTerminal(file *os.File) bool { return term.IsTerminal(int(file.Fd())) }
