package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
)

// secretFlag is where one secret of a verb comes from: a file or an environment variable that flags name, else a prompt.
// No flag takes a secret itself: arguments are seen by every user of the machine and kept in a shell's history.
type secretFlag struct {
	name   string // of the flags: "passphrase" makes --passphrase-file and --passphrase-env
	prompt string // "Unlock passphrase of the NetHSM"
	again  bool   // a new secret is typed twice
	file   string
	env    string
}

// add adds the two flags to a verb.
func (s *secretFlag) add(cmd *cobra.Command, what string) {
	cmd.Flags().StringVar(&s.file, s.name+"-file", "", "file that holds "+what+`; "-" is standard input`)
	cmd.Flags().StringVar(&s.env, s.name+"-env", "", "environment variable that holds "+what)
	cmd.MarkFlagsMutuallyExclusive(s.name+"-file", s.name+"-env")
	_ = cmd.MarkFlagFilename(s.name + "-file")
}

// given tells whether one of the flags was.
func (s *secretFlag) given() bool { return s.file != "" || s.env != "" }

// secret reads the secret: from what the flags name, else from a person at the terminal. The caller wipes it.
func (a *app) secret(ctx context.Context, s *secretFlag) ([]byte, error) {
	switch {
	case s.file == "-":
		if err := a.takeStdin("--" + s.name + "-file"); err != nil {
			return nil, err
		}
		return interruptible(ctx, func() ([]byte, error) { return readSecret(a.stdin, "standard input") })
	case s.file != "":
		return interruptible(ctx, func() ([]byte, error) { return secretFile(s.file) }) // it may be a pipe
	case s.env != "":
		if !config.IsVariable(s.env) {
			return nil, usage("what --%s-env names is no environment variable; a secret itself is never an argument, where other users see it", s.name)
		}
		value := os.Getenv(s.env)
		if value == "" {
			return nil, usage("the environment variable %s, which --%s-env names, is not set", s.env, s.name)
		}
		return cutSecret([]byte(value), "the environment variable "+s.env)
	}
	return a.ask(ctx, s)
}

// ask asks the person at the terminal, without echo.
func (a *app) ask(ctx context.Context, s *secretFlag) ([]byte, error) {
	if !isTerminal(a.stdin) || a.stdinTaken {
		return nil, usage("%s is needed, and there is no terminal to ask at; name a file with --%s-file or an environment variable with --%s-env",
			s.prompt, s.name, s.name)
	}
	first, err := a.readHidden(ctx, s.prompt)
	if err != nil || !s.again {
		return first, err
	}
	second, err := a.readHidden(ctx, s.prompt+", once more")
	defer clear(second)
	if err == nil && !bytes.Equal(first, second) {
		err = errors.New("the two differ; nothing was changed")
	}
	if err != nil {
		clear(first)
		return nil, err
	}
	return first, nil
}

// readHidden reads a line without echo. Ctrl-C gives the terminal its echo back and ends the command.
func (a *app) readHidden(ctx context.Context, prompt string) ([]byte, error) {
	fd := int(a.stdin.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("preparing the terminal: %w", err)
	}
	_, _ = fmt.Fprintf(a.stderr, "%s: ", prompt)
	line, err := interruptible(ctx, func() ([]byte, error) { return term.ReadPassword(fd) })
	a.say("")
	switch {
	case ctx.Err() != nil:
		return nil, errors.Join(ctx.Err(), term.Restore(fd, before))
	case err != nil:
		return nil, fmt.Errorf("reading from the terminal: %w", err)
	case len(line) == 0:
		return nil, usage("nothing was typed; nothing was sent to the HSM")
	}
	return cutSecret(line, "the terminal")
}

// takeStdin makes sure that only one thing is read from standard input.
func (a *app) takeStdin(by string) error {
	if a.stdinTaken {
		return usage("%s is to be read from standard input, and so is something else; name a file for one of them", by)
	}
	a.stdinTaken = true
	return nil
}

// secretFile reads a secret from a file that a flag names, by the rule of the files that the configuration names; it may
// lie anywhere, since whoever types its name may read it. A pipe, as a shell makes for <(…), will do.
func secretFile(path string) ([]byte, error) {
	if strings.HasPrefix(path, device.CredentialPrefix) { // what the configuration names may come this way
		return device.SecretFiles{Credentials: true}.Read(path)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, usage("the secret file %s cannot be read: %w", path, pathless(err))
	}
	if info.Mode()&fs.ModeNamedPipe != 0 {
		file, err := os.Open(path)
		if err != nil {
			return nil, usage("the secret file %s cannot be read: %w", path, pathless(err))
		}
		defer file.Close()
		return readSecret(file, path)
	}
	absolute, err := filepath.Abs(path)
	if err != nil {
		return nil, usage("the secret file %s: %w", path, err)
	}
	if absolute, err = filepath.EvalSymlinks(absolute); err != nil {
		return nil, usage("the secret file %s cannot be read: %w", path, pathless(err))
	}
	return device.SecretFiles{Dir: filepath.Dir(absolute)}.Read(absolute)
}

// maxSecret is the size of the longest secret, in bytes: what a secret file may hold.
const maxSecret = 4096

// readSecret reads a secret to the end of a stream, without a final line break. An empty one is refused: it would cost a
// try.
func readSecret(r io.Reader, name string) ([]byte, error) {
	buffer := make([]byte, maxSecret+1)
	n, err := io.ReadFull(r, buffer)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		clear(buffer)
		return nil, fmt.Errorf("reading a secret from %s: %w", name, pathless(err))
	}
	if n > maxSecret {
		clear(buffer)
		return nil, usage("the secret from %s is longer than %d bytes; is it the right one?", name, maxSecret)
	}
	return cutSecret(buffer[:n], name)
}

// cutSecret refuses a secret that cannot be meant, and wipes it then. It may end with a line break, which is cut off.
func cutSecret(secret []byte, name string) ([]byte, error) {
	cut, trouble := device.CutSecret(secret)
	if trouble != "" {
		clear(secret)
		return nil, usage("the secret from %s %s; nothing was sent to the HSM", name, trouble)
	}
	return cut, nil
}
