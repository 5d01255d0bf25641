package sealtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"
)

// What a Vault seals, in bytes.
const (
	rootSize     = 48 // the JSON of one share
	recoverySize = 32
	checkSize    = 13 // a text of the health check
	snapshotSize = 152
)

// Seal is a Vault as its seal server sees it. Its methods are called by one goroutine at a time.
type Seal struct {
	*client
	root, recovery sealed // what its storage keeps
}

// sealed is a value and what the seal server made of it.
type sealed struct {
	plaintext  []byte
	ciphertext string
}

// New makes a Vault that has no storage yet. Close ends its connections.
func New(config Config) *Seal { return &Seal{client: newClient(config)} }

// Close ends its connections.
func (s *Seal) Close() { s.http.CloseIdleConnections() }

// Start is the start of the process: the token is renewed twice and a byte is sealed. A refused renewal is taken as Vault
// takes it, without complaint; anything else that fails is the end of the process.
func (s *Seal) Start(ctx context.Context) error {
	if err := s.renew(ctx); err != nil {
		return err
	}
	if _, err := s.Encrypt(ctx, []byte("a")); err != nil {
		return fmt.Errorf("error parsing Seal configuration: %w", err)
	}
	return s.renew(ctx)
}

func (s *Seal) renew(ctx context.Context) error {
	got, err := s.call(ctx, Renew, "auth/token/renew-self", map[string]int{"increment": 0})
	var refused *StatusError
	switch {
	case errors.As(err, &refused):
		return nil // "unable to renew token, disabling renewal"
	case err != nil:
		return err
	case got.Auth == nil || got.Auth.ClientToken != s.config.Token:
		return fmt.Errorf("%w to %s: missing secret", ErrWrong, Renew)
	}
	return nil
}

// Init is `vault operator init` and the unsealing that it ends with.
func (s *Seal) Init(ctx context.Context) error {
	err := s.keep(ctx, &s.root, random(rootSize))
	if err == nil {
		err = s.Check(ctx)
	}
	if err == nil {
		err = s.keep(ctx, &s.recovery, random(recoverySize))
	}
	if err == nil {
		err = s.Unseal(ctx)
	}
	return err
}

// Prepare seals what [Seal.Init] stores and does nothing else: no operation in an HSM.
func (s *Seal) Prepare(ctx context.Context) error {
	if err := s.keep(ctx, &s.root, random(rootSize)); err != nil {
		return err
	}
	return s.keep(ctx, &s.recovery, random(recoverySize))
}

func (s *Seal) keep(ctx context.Context, into *sealed, plaintext []byte) error {
	ciphertext, err := s.Encrypt(ctx, plaintext)
	if err == nil {
		*into = sealed{plaintext, ciphertext}
	}
	return err
}

// Unseal is one try to unseal, and the first health check.
func (s *Seal) Unseal(ctx context.Context) error {
	if err := s.unseal(ctx); err != nil {
		return err
	}
	return s.Check(ctx)
}

// unseal opens the root key, learns the version of the wrapping key, and has sealed anew what was sealed under another one.
func (s *Seal) unseal(ctx context.Context) error {
	if err := s.open(ctx, s.root); err != nil {
		return err
	}
	version := ""
	for range 2 {
		probe, err := s.Encrypt(ctx, []byte{0})
		if err != nil {
			return err
		}
		version = Version(probe)
	}
	for _, kept := range []*sealed{&s.recovery, &s.root} {
		if kept.ciphertext == "" || Version(kept.ciphertext) == version {
			continue
		}
		if err := s.open(ctx, *kept); err != nil {
			return err
		}
		if err := s.keep(ctx, kept, kept.plaintext); err != nil {
			return err
		}
	}
	return nil
}

// Check is the health check, every ten minutes and every minute while it fails: a text is sealed and opened.
func (s *Seal) Check(ctx context.Context) error {
	var check sealed
	if err := s.keep(ctx, &check, random(checkSize)); err != nil {
		return err
	}
	return s.open(ctx, check)
}

// Snapshot is `vault operator raft snapshot save`: its sums are sealed. It returns what a restore opens.
func (s *Seal) Snapshot(ctx context.Context) (ciphertext string, err error) {
	return s.Encrypt(ctx, random(snapshotSize))
}

// PowerUp is a machine that has power again: the process starts, again and again while its seal does not answer, as a
// supervisor does it, unseals, again and again until it has, and is healthy when a health check has passed. It returns then, or
// with the last error when ctx ends. A wrong answer ends it at once.
func (s *Seal) PowerUp(ctx context.Context) error {
	for _, step := range []func(context.Context) error{s.Start, s.unseal, s.Check} {
		if err := s.until(ctx, step); err != nil {
			return err
		}
	}
	return nil
}

// until repeats a step until it is done.
func (s *Seal) until(ctx context.Context, step func(context.Context) error) error {
	for {
		err := step(ctx)
		if err == nil || errors.Is(err, ErrWrong) || !pause(ctx, s.config.UnsealWait) {
			return err
		}
	}
}

// Encrypt has a value sealed.
func (s *Seal) Encrypt(ctx context.Context, plaintext []byte) (ciphertext string, err error) {
	got, err := s.call(ctx, Encrypt, s.config.Mount+"/encrypt/"+s.config.Key, map[string][]byte{"plaintext": plaintext})
	if err != nil {
		return "", err
	}
	if strings.Count(got.Data.Ciphertext, ":") != 2 {
		return "", fmt.Errorf("%w to %s: %q is no ciphertext", ErrWrong, Encrypt, got.Data.Ciphertext)
	}
	return got.Data.Ciphertext, nil
}

// Decrypt has a ciphertext opened.
func (s *Seal) Decrypt(ctx context.Context, ciphertext string) (plaintext []byte, err error) {
	got, err := s.call(ctx, Decrypt, s.config.Mount+"/decrypt/"+s.config.Key, map[string]string{"ciphertext": ciphertext})
	if err != nil {
		return nil, err
	}
	return got.Data.Plaintext, nil
}

func (s *Seal) open(ctx context.Context, kept sealed) error {
	plaintext, err := s.Decrypt(ctx, kept.ciphertext)
	if err == nil && !bytes.Equal(plaintext, kept.plaintext) {
		err = fmt.Errorf("%w to %s: %d other bytes than the %d that were sealed", ErrWrong, Decrypt, len(plaintext), len(kept.plaintext))
	}
	return err
}

// Root is the ciphertext of the root key, which its storage keeps.
func (s *Seal) Root() string { return s.root.ciphertext }

// Waits changes how long the seal waits for an answer and between two tries, see [Config].
func (s *Seal) Waits(timeout, retry, unseal time.Duration) {
	s.config.Timeout, s.config.RetryWait, s.config.UnsealWait = timeout, retry, unseal
}

// Version is the part of a ciphertext that Vault takes as the id of its key: "v1".
func Version(ciphertext string) string {
	parts := strings.Split(ciphertext, ":")
	if len(parts) != 3 {
		return ""
	}
	return parts[1]
}

func random(size int) []byte {
	value := make([]byte, size)
	_, _ = rand.Read(value) // never fails
	return value
}
