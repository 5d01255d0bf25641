package kmsplugin

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// callLimit is how long a call may take where OpenBao sets no limit of its own: it unseals without one.
const callLimit = time.Minute

// by is what the records of the keyring name.
const by = "the seal stanza"

// seal is a wrapper: one configured seal.
type seal struct {
	key, keyID string
	metadata   map[string]string // what people are shown
	keys       *keyring.Keyring
	devices    *devices
	logger     *slog.Logger
	used       uint64 // the number of its newest call; Server.mu guards it

	life context.Context // ends with the wrapper
	end  context.CancelFunc

	mu      sync.Mutex // guards closed, and running against it
	closed  bool
	running sync.WaitGroup // calls, and the background
}

// newSeal makes a wrapper. It reads files and asks no HSM. After begin, close ends it.
func newSeal(ctx context.Context, options Options, wanted stanza, noEnvironment bool) (made *seal, err error) {
	record, err := readFile("key_record_file", wanted.record, maxRecord)
	if err != nil {
		return nil, err
	}
	s := &seal{
		key:     wanted.key,
		devices: newDevices(options),
		logger:  options.Logger.With("key", wanted.key),
	}
	s.life, s.end = context.WithCancel(context.WithoutCancel(ctx))
	s.keys = keyring.New(keyring.Config{
		Records: newRecords(), CacheRecords: true, SealAuthKeys: true,
		Devices: s.devices, Logger: options.Logger, Words: &words,
	})
	defer func() {
		if err != nil {
			_ = s.close() // nothing was opened yet
		}
	}()
	restored, err := s.restore(ctx, record, wanted)
	if err != nil {
		return nil, err
	}
	if err := s.devices.configure(wanted, namesOf(restored), noEnvironment); err != nil {
		return nil, err
	}
	version := restored.EncryptVersion
	s.keyID = keyID(s.key, version, len(restored.Versions[version-1].Recipients))
	s.metadata = map[string]string{
		"key": s.key, "key_id": s.keyID, "key_record_sha256": restored.RecordSHA256, "devices": strings.Join(s.devices.names(), ", "),
	}
	s.logger.Info("seal configured", "key_id", s.keyID, "versions", restored.LatestVersion, "devices", s.devices.names(),
		"record_sha256", restored.RecordSHA256)
	return s, nil
}

// restore takes the key from its record, with the operator's word about it.
func (s *seal) restore(ctx context.Context, record []byte, wanted stanza) (*keyring.Key, error) {
	if _, err := s.keys.Restore(ctx, s.key, keyring.RestoreRequest{
		Record: record, SHA256: wanted.recordSHA256, Deferred: true, By: by,
	}); err != nil {
		return nil, stanzaError("taking the key record of key_record_file", err)
	}
	restored, err := s.keys.Configure(ctx, s.key, keyring.Settings{
		AcceptSingleHSM: &wanted.acceptSingleHSM, BackupConfirmed: &wanted.backupConfirmed, By: by,
	})
	if err != nil {
		return nil, stanzaError("configuring the key", err)
	}
	if err := s.keys.Ready(ctx, s.key, keyring.PurposeEncrypt); err != nil {
		return nil, err
	}
	return restored, nil
}

// stanzaError is an error about what a stanza names: it is the operator's to mend, whatever it is.
func stanzaError(doing string, err error) error {
	return fmt.Errorf("%w: %s: %w", errStanza, doing, err)
}

// keyID names what seals, a version of a wrapping key: OpenBao seals its own keys anew when it changes. It changes with the
// number of recipients as well, "prod/v1+1" for one more, or a second HSM would open nothing that was sealed before it came.
func keyID(key string, version, recipients int) string {
	id := fmt.Sprintf("%s/v%d", key, version)
	if recipients > 1 {
		id += fmt.Sprintf("+%d", recipients-1)
	}
	return id
}

// namesOf lists the devices that a key's versions name.
func namesOf(key *keyring.Key) []string {
	var all []string
	for i := range key.Versions {
		for j := range key.Versions[i].Recipients {
			all = append(all, key.Versions[i].Recipients[j].Device)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// encrypt seals a value, bound to aad, and names what it is sealed with.
func (s *seal) encrypt(ctx context.Context, plaintext, aad []byte) (sealed []byte, id string, err error) {
	made, err := s.keys.Seal(ctx, s.key, envelope.Context{Use: envelope.UseSeal, Caller: aad}, plaintext)
	if err != nil {
		return nil, "", err
	}
	return made.Envelope, keyID(s.key, made.Version, made.Recipients), nil
}

// decrypt opens what encrypt sealed with the same aad. The caller wipes it.
func (s *seal) decrypt(ctx context.Context, sealed, aad []byte) ([]byte, error) {
	opened, err := s.keys.Open(ctx, s.key, sealed, envelope.Context{Use: envelope.UseSeal, Caller: aad})
	if errors.Is(err, keyring.ErrVersionUnknown) {
		return nil, fmt.Errorf("%w; name the newest key record in key_record_file, with its SHA-256", err)
	}
	if err != nil {
		return nil, err
	}
	return opened.Payload, nil
}

// prove seals a random value and opens it in the HSM.
func (s *seal) prove(ctx context.Context) error {
	probe, aad := make([]byte, 32), []byte("nitroseal: proof before a cluster is initialised")
	_, _ = rand.Read(probe) // never fails
	sealed, _, err := s.encrypt(ctx, probe, aad)
	if err != nil {
		return err
	}
	opened, err := s.decrypt(ctx, sealed, aad)
	if err != nil {
		return fmt.Errorf("proving that what is sealed can be opened: %w", err)
	}
	if subtle.ConstantTimeCompare(probe, opened) != 1 {
		return errProof
	}
	s.logger.Info("proved that what is sealed can be opened", "key_id", s.keyID)
	return nil
}

// begin opens the authentication key in the background. OpenBao gives a sealing ten seconds, which are too few for two
// operations of a slow card; and a wrong PIN shows in the log before it is needed. After it the wrapper must be closed.
func (s *seal) begin() {
	s.running.Go(s.warm)
}

// The pauses between two tries of the background: the first, and the longest.
const (
	firstPause   = 2 * time.Second
	longestPause = time.Minute
)

// warm tries until the authentication key is open or the wrapper ends. A PIN that was wrong is not sent again by that.
func (s *seal) warm() {
	said := ""
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		ctx, cancel := context.WithTimeout(s.life, callLimit)
		err := s.keys.Warm(ctx, s.key)
		cancel()
		switch {
		case s.life.Err() != nil:
			return
		case err == nil:
			s.logger.Info("seal ready", "key_id", s.keyID)
			return
		case err.Error() != said:
			said = err.Error()
			s.logger.Warn("the HSM cannot open the seal now; it is tried again", "error", err)
		}
		select {
		case <-s.life.Done():
			return
		case <-time.After(pause):
		}
	}
}

// enter begins a call: its ctx ends with the caller's, with the wrapper, or when the call took too long. done ends the
// call.
func (s *seal) enter(ctx context.Context) (within context.Context, done func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, errFinalized
	}
	s.running.Add(1)
	within, cancel := context.WithTimeout(ctx, callLimit)
	stop := context.AfterFunc(s.life, cancel)
	return within, func() {
		stop()
		cancel()
		s.running.Done()
	}, nil
}

// close ends the wrapper: calls that run fail, and their HSM is given back. A second close does nothing.
func (s *seal) close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	s.end()
	s.running.Wait()
	return errors.Join(s.keys.Close(), s.devices.close())
}

// words are how the sentences of the keyring name what an operator of OpenBao does.
var words = keyring.Words{
	Home: "the machine that has it",
	Read: func(key string) string { return "print it with \"nitroseal key backup " + key + "\"" },
	Set:  func(_, setting string) string { return "write " + setting + " = \"true\" into the seal stanza" },
	Ask:  func(what string) string { return what },
}
