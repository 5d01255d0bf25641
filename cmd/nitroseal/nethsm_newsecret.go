package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/nethsm"
)

// generatedSize is how many random bytes a generated password is made of: 32 characters of base64.
const generatedSize = 24

// generateFlag makes the passwords whose files are not there yet.
type generateFlag bool

func (g *generateFlag) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar((*bool)(g), "generate", false,
		"make the passwords whose --…-file does not exist yet, and write them there (mode 0600)")
}

// missing tells whether the secret's file has to be made.
func (g generateFlag) missing(s *secretFlag) bool {
	if !g || s.file == "" || s.file == "-" {
		return false
	}
	_, err := os.Lstat(s.file)
	return errors.Is(err, fs.ErrNotExist)
}

// newSecret reads a secret that somebody chose, or makes one where its file is not there yet. It is wiped at the end.
func (a *app) newSecret(ctx context.Context, s *secretFlag, generate generateFlag) ([]byte, error) {
	if generate.missing(s) {
		return a.generateSecret(s.file)
	}
	if s.file == "" && s.env == "" && bool(generate) {
		return nil, usage("--generate writes what it makes to a file; name it with --%s-file", s.name)
	}
	secret, err := a.secret(ctx, s)
	if err == nil {
		a.wipeAtEnd(secret)
	}
	return secret, err
}

// account says where the password of a user comes from that a setup makes, or finds. A rehearsal makes nothing and asks
// nobody.
func (a *app) account(ctx context.Context, username string, s *secretFlag, generate generateFlag, rehearsal bool) (nethsm.Account, error) {
	account := nethsm.Account{Username: username}
	switch {
	case username == "" || rehearsal && !s.given():
		return account, nil
	case generate.missing(s):
		account.NewPassphrase = func() ([]byte, error) { return a.generateSecret(s.file) }
		return account, nil
	}
	secret, err := a.newSecret(ctx, s, generate)
	account.Passphrase = secret
	return account, err
}

// generateSecret makes a password and writes it to a new file, for good: what is to have it may exist a moment later, and
// then nobody else knows it.
func (a *app) generateSecret(path string) ([]byte, error) {
	random := make([]byte, generatedSize)
	defer clear(random)
	if _, err := rand.Read(random); err != nil {
		return nil, err
	}
	secret := base64.RawURLEncoding.AppendEncode(make([]byte, 0, 2*generatedSize), random)
	a.wipeAtEnd(secret)
	if err := writeSecret(path, secret); err != nil {
		return nil, usage("the generated password cannot be written to %s: %w", path, pathless(err))
	}
	a.say("nitroseal: made a password and wrote it to %s", path)
	return secret, nil
}

// writeSecret writes a new file with mode 0600. What fails leaves none.
func writeSecret(path string, secret []byte) (err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, file.Close()); err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	line := append(append(make([]byte, 0, len(secret)+1), secret...), '\n')
	defer clear(line)
	if _, err := file.Write(line); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}
