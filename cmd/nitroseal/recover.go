package main

import (
	"context"
	"crypto/aes"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newRecoverCommand(a *app) *cobra.Command {
	var r recovery
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Open an envelope with nothing but the HSM",
		Long: `Open an envelope of any kind with nothing but an HSM that it was sealed to: no Vault, no etcd, no configuration. It may be as wrap
or encrypt/ answered, as etcdctl prints it with --print-value-only, a data object's value, or a file of a store or of the
state directory, where keys of a cluster may wait for their store.

Whoever knows the public key can make an envelope. What only your keyring could make is told by the key record: give it with
--key-record, and the SHA-256 that was noted down when it was made with --key-record-sha256. Without one, --unauthenticated
opens all the same, and says so.

The value goes to standard output as it is, unless that is a terminal. An item of material is several fields: --out-dir writes
each as a file, --output json prints them in base64, as "vault operator unseal" takes shares.

A wrong PIN is sent once at most, which the state directory remembers: give the one that the programs on this machine use.`,
		Example: `  nitroseal recover --in unseal.jwe --module /usr/lib/x86_64-linux-gnu/opensc-pkcs11.so --serial DENK0100001 \
    --pin-file pin --key-record prod.json --key-record-sha256 51f9… --out-dir /dev/shm/prod
  etcdctl get --print-value-only nitroseal/prod/unseal | nitroseal recover --url https://nethsm:8443 --ca-cert ca.pem \
    --username operator --password-file password --unauthenticated -o json`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return r.run(cmd.Context(), a) },
	}
	r.add(cmd)
	return cmd
}

// recovery is one run of recover, as its flags describe it.
type recovery struct {
	in, item        string
	record          string
	recordSHA256    string
	unauthenticated bool
	hsm             recoveryHSM
	out             recoveryOutput
}

func (r *recovery) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&r.in, "in", "", `file that holds the envelope (default "-": standard input)`)
	flags.StringVar(&r.item, "item", "", "which envelope, where the file holds the keys of a cluster that its store has not taken yet")
	flags.StringVar(&r.record, "key-record", "", "file that holds the key record, which proves who made the envelope")
	flags.StringVar(&r.recordSHA256, "key-record-sha256", "", "the SHA-256 of the key record, in hexadecimal, as it was noted down")
	flags.BoolVar(&r.unauthenticated, "unauthenticated", false, "open it although anybody could have made it")
	cmd.MarkFlagsMutuallyExclusive("key-record", "unauthenticated")
	r.hsm.add(cmd)
	r.out.add(cmd)
}

func (r *recovery) run(ctx context.Context, a *app) error {
	if err := r.out.check(a); err != nil {
		return err
	}
	if r.record == "" && !r.unauthenticated {
		return usage("nothing says who made the envelope; give the key record with --key-record, or --unauthenticated to open what anybody " +
			"could have made")
	}
	if r.record == "" && r.recordSHA256 != "" {
		return usage("--key-record-sha256 is that of a key record; name its file with --key-record")
	}
	text, err := a.input(ctx, r.in, maxRecovered, "the envelope")
	if err != nil {
		return err
	}
	raw, err := cutEnvelope(text, r.item)
	if err != nil {
		return err
	}
	sealed, err := envelope.Parse(raw)
	if err != nil {
		return fmt.Errorf("reading the envelope: %w", err)
	}
	made := sealed.Context()
	a.progress("It says that it is %s.", describeContext(made))
	auth, err := r.authEnvelope(ctx, a, made)
	if err != nil {
		return err
	}
	// Prompts come before the time that the work may take.
	open, err := r.hsm.prepare(ctx, a)
	if err != nil {
		return err
	}
	if err := r.out.makeDir(); err != nil {
		return err
	}
	ctx, cancel := a.within(ctx, ordinaryTimeout)
	defer cancel()
	device, err := open(ctx)
	if err != nil {
		return err
	}
	payload, err := r.open(ctx, device, sealed, auth)
	if err != nil {
		return err
	}
	defer clear(payload)
	if auth == nil {
		a.say("NOT AUTHENTICATED: this came out of an envelope that anybody who knows the public key could have made. Before you use it, make sure " +
			"that you know where the envelope comes from.")
	}
	return r.out.write(a, made, payload, auth != nil)
}

// authEnvelope returns the envelope that holds the authentication key, from the key record; nil where nothing is to be
// authenticated.
func (r *recovery) authEnvelope(ctx context.Context, a *app, made envelope.Context) (*envelope.Envelope, error) {
	if r.record == "" {
		return nil, nil
	}
	raw, err := a.input(ctx, r.record, envelope.MaxSize*4, "the key record")
	if err != nil {
		return nil, err
	}
	record, err := keyring.ReadKeyRecord(raw)
	if err != nil {
		return nil, fmt.Errorf("reading the key record %s: %w", r.record, err)
	}
	switch {
	case r.recordSHA256 == "":
		a.say("The key record's SHA-256 is %s. Compare it with the one that was noted down when the record was made: whoever made another record "+
			"could have made the envelope as well.", record.SHA256)
	case !equalHex(r.recordSHA256, record.SHA256):
		return nil, fmt.Errorf("the key record %s: %w: its SHA-256 is %s; compare it with the one that was noted down", r.record,
			keyring.ErrRecordMismatch, record.SHA256)
	}
	if record.Name != made.Key {
		return nil, usage("%s is the record of the wrapping key %q, and the envelope says that it was made with %q", r.record, record.Name, made.Key)
	}
	sealed, known := record.AuthEnvelopes[made.Version]
	if !known {
		return nil, usage("%s does not know version %d of the wrapping key %q, which the envelope says it was made with; give a newer record",
			r.record, made.Version, made.Key)
	}
	auth, err := envelope.Parse(sealed)
	if err != nil {
		return nil, fmt.Errorf("reading the key record %s: %w", r.record, err)
	}
	want := envelope.Context{Use: envelope.UseAuth, Key: made.Key, Version: made.Version}
	if err := auth.Context().Differs(want); err != nil {
		return nil, fmt.Errorf("reading the key record %s: %w", r.record, err)
	}
	return auth, nil
}

// open opens an envelope with one private-key operation, or two where the authentication key has to be opened first. One
// that was sealed in a lease carries a key encryption key, and that is what the HSM opens. The caller wipes the payload.
func (r *recovery) open(ctx context.Context, device hsm.Device, sealed, auth *envelope.Envelope) ([]byte, error) {
	forHSM := sealed
	var kek *envelope.KEK
	if _, leased := sealed.KEKID(); leased {
		var err error
		if kek, err = sealed.KEK(); err != nil {
			return nil, fmt.Errorf("reading the envelope: %w", err)
		}
		forHSM = kek.Envelope()
	}
	key, recipient, err := r.hsm.findKey(ctx, device, forHSM)
	if err != nil {
		return nil, err
	}
	authKey, err := openAuthKey(ctx, key, auth, sealed.Context().Version)
	if err != nil {
		return nil, err
	}
	if authKey != nil {
		defer clear(authKey[:])
	}
	payload, err := openRecovered(ctx, forHSM, recipient, key, authKey)
	if err != nil || kek == nil {
		return payload, err
	}
	defer clear(payload)
	return openLeased(sealed, kek, payload, authKey)
}

// openAuthKey opens the authentication key with one private-key operation; nil where nothing is to be authenticated. The
// caller wipes it.
func openAuthKey(ctx context.Context, key hsm.Key, auth *envelope.Envelope, version int) (*envelope.AuthKey, error) {
	if auth == nil {
		return nil, nil //nolint:nilnil // documented
	}
	to, known := recipientOf(auth, key)
	if !known {
		return nil, usage("the key record's version %d is not sealed to the key %q on this HSM; give a newer record, or another HSM", version,
			key.Ref().Label)
	}
	opened, err := auth.Open(ctx, auth.Context(), to, key, nil)
	if err != nil {
		return nil, fmt.Errorf("opening the authentication key: %w", err)
	}
	defer clear(opened)
	var authKey envelope.AuthKey
	copy(authKey[:], opened)
	return &authKey, nil
}

// openRecovered opens an envelope with one private-key operation, whoever made it where authKey is nil. The caller wipes the
// payload.
func openRecovered(
	ctx context.Context, sealed *envelope.Envelope, to envelope.Recipient, key hsm.Key, authKey *envelope.AuthKey,
) ([]byte, error) {
	if authKey == nil {
		return sealed.OpenUnauthenticated(ctx, sealed.Context(), to, key)
	}
	payload, err := sealed.Open(ctx, sealed.Context(), to, key, authKey)
	return payload, forged(err)
}

// openLeased opens an envelope with the key encryption key that it carries, which the HSM opened. The caller wipes both.
func openLeased(sealed *envelope.Envelope, kek *envelope.KEK, key []byte, authKey *envelope.AuthKey) ([]byte, error) {
	if err := kek.Check(key); err != nil {
		return nil, forged(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("preparing the key encryption key: %w", err)
	}
	if authKey == nil {
		return sealed.OpenLeasedUnauthenticated(sealed.Context(), block)
	}
	payload, err := sealed.OpenLeased(sealed.Context(), block, authKey)
	return payload, forged(err)
}

// forged says in a word that people do not overlook what an envelope that is not authentic is.
func forged(err error) error {
	if errors.Is(err, envelope.ErrNotAuthentic) {
		return fmt.Errorf("FORGED, or made with another wrapping key of that name: %w", err)
	}
	return err
}
