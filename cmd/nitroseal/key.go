package main

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

func newKeyCommand(a *app) *cobra.Command {
	return group("key", "Look after wrapping keys", `A wrapping key is a named set of HSM keys that open what it seals: it has versions, and each version has one recipient or more,
a key pair in an HSM. What is known of it lies in the state directory and holds no secret. Its key record, which "key backup"
prints, brings it back on another machine, together with one of its HSMs.`,
		newKeyListCommand(a), newKeyShowCommand(a), newKeyAdoptCommand(a), newKeyGenerateCommand(a), newKeyAbandonCommand(a),
		newKeyRotateCommand(a), newKeyAddRecipientCommand(a), newKeyConfigureCommand(a), newKeyBackupCommand(a), newKeyRestoreCommand(a),
		newKeyPublicCommand(a), newKeyDeleteCommand(a))
}

// keyView is a wrapping key as JSON. Its members are those of the plugin's keys/:name.
type keyView struct {
	Name                 string           `json:"name"`
	State                string           `json:"state"`
	Created              string           `json:"created"`
	CreatedBy            string           `json:"created_by"`
	LatestVersion        int              `json:"latest_version"`
	MinDecryptionVersion int              `json:"min_decryption_version"`
	DeletionAllowed      bool             `json:"deletion_allowed"`
	Lease                int64            `json:"lease"` // in seconds; 0: every decrypt is an HSM operation
	HSMs                 int              `json:"hsms"`  // on how many the newest version opens
	Versions             []keyVersionView `json:"versions"`
	RecordSHA256         string           `json:"record_sha256"`
	RecordRead           *acknowledgment  `json:"record_read"`
	BackupConfirmed      *acknowledgment  `json:"backup_confirmed"`
	AcceptSingleHSM      *acknowledgment  `json:"accept_single_hsm"`
	AcceptWeakKey        *acknowledgment  `json:"accept_weak_key"`
	Pending              *pendingView     `json:"pending"`
	Warnings             []string         `json:"warnings"`
}

// acknowledgment says who took note of something, and when; null where nobody did.
type acknowledgment struct {
	By string `json:"by"`
	At string `json:"at"`
}

type keyVersionView struct {
	Version         int             `json:"version"`
	Created         string          `json:"created"`
	CreatedBy       string          `json:"created_by"`
	Recipients      []recipientView `json:"recipients"`
	RecordRead      *acknowledgment `json:"record_read"`
	BackupConfirmed *acknowledgment `json:"backup_confirmed"`
	KEK             string          `json:"kek"` // kid of the key encryption key; empty where there is none
}

type recipientView struct {
	Device             string   `json:"device"`
	Serial             string   `json:"serial"`
	KeyLabel           string   `json:"key_label"`
	KeyID              string   `json:"key_id"`
	KID                string   `json:"kid"`
	Algorithm          string   `json:"algorithm"`
	Kind               string   `json:"kind"`
	PublicKey          string   `json:"public_key"` // PEM
	WeaknessesAccepted []string `json:"weaknesses_accepted"`
	AlsoUsableFor      []string `json:"also_usable_for"`
	Generated          bool     `json:"generated"`
	Added              string   `json:"added"`
	AddedBy            string   `json:"added_by"`
}

type pendingView struct {
	Device    string `json:"device"`
	Algorithm string `json:"algorithm"`
	KeyLabel  string `json:"key_label"`
	KeyID     string `json:"key_id"`
	Version   int    `json:"version"`
	Since     string `json:"since"`
	By        string `json:"by"`
	LastError string `json:"last_error"`
}

func showKey(key *keyring.Key) (keyView, error) {
	view := keyView{
		Name: key.Name, State: string(key.State), Created: stamp(key.Created), CreatedBy: key.CreatedBy, LatestVersion: key.LatestVersion,
		MinDecryptionVersion: key.MinDecryptionVersion, DeletionAllowed: key.DeletionAllowed, Versions: []keyVersionView{},
		Lease:        int64(key.Lease / time.Second),
		RecordSHA256: key.RecordSHA256, RecordRead: acknowledged(key.RecordRead), BackupConfirmed: acknowledged(key.BackupConfirmed),
		AcceptSingleHSM: acknowledged(key.AcceptSingleHSM), AcceptWeakKey: acknowledged(key.AcceptWeakKey), Warnings: list(key.Warnings),
	}
	if p := key.Pending; p != nil {
		view.Pending = &pendingView{
			Device: p.Device, Algorithm: string(p.Algorithm), KeyLabel: p.Label, KeyID: p.ID, Version: p.Version, Since: stamp(p.Since),
			By: p.By, LastError: p.LastError,
		}
	}
	for _, v := range key.Versions {
		shown := keyVersionView{
			Version: v.Number, Created: stamp(v.Created), CreatedBy: v.CreatedBy, Recipients: []recipientView{},
			RecordRead: acknowledged(v.RecordRead), BackupConfirmed: acknowledged(v.BackupConfirmed), KEK: v.KEK,
		}
		for _, r := range v.Recipients {
			public, err := encodePEM(r)
			if err != nil {
				return keyView{}, err
			}
			shown.Recipients = append(shown.Recipients, recipientView{
				Device: r.Device, Serial: r.Serial, KeyLabel: r.Label, KeyID: r.ID, KID: r.KID, Algorithm: string(r.Algorithm),
				Kind: string(r.Kind), PublicKey: public, WeaknessesAccepted: list(r.WeaknessesAccepted),
				AlsoUsableFor: list(r.AlsoUsableFor), Generated: r.Generated, Added: stamp(r.Added), AddedBy: r.AddedBy,
			})
		}
		view.Versions = append(view.Versions, shown)
		view.HSMs = keyring.CountHSMs(v.Recipients)
	}
	return view, nil
}

func acknowledged(given *keyring.Acknowledgement) *acknowledgment {
	if given == nil {
		return nil
	}
	return &acknowledgment{given.By, stamp(given.At)}
}

// encodePEM is a recipient's public key as openssl reads it.
func encodePEM(r keyring.Recipient) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(r.Public)
	if err != nil {
		return "", fmt.Errorf("encoding the public key of the recipient on device %q: %w", r.Device, err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), nil
}

// printKey prints a wrapping key as it is now, and on the terminal what should be done next.
func (a *app) printKey(key *keyring.Key) error {
	view, err := showKey(key)
	if err != nil {
		return err
	}
	return a.print(view, func(t *table) {
		t.row(view.Name, view.State)
		t.field("  created", view.Created+" by "+view.CreatedBy)
		if p := view.Pending; p != nil {
			t.row("  pending", fmt.Sprintf("version %d, %s on device %s, since %s", p.Version, p.Algorithm, p.Device, p.Since))
			t.field("  last error", p.LastError)
		}
		for _, v := range slices.Backward(view.Versions) {
			t.row(fmt.Sprintf("  version %d", v.Version), v.Created+" by "+v.CreatedBy)
			for _, r := range v.Recipients {
				origin := "adopted"
				if r.Generated {
					origin = "generated"
				}
				t.row("    device "+r.Device, strings.Join([]string{r.Kind, r.Algorithm, "label " + r.KeyLabel, "id " + r.KeyID, origin}, ", "))
				t.row("      kid", r.KID)
			}
			t.field("    kek", v.KEK)
		}
		if view.MinDecryptionVersion > 1 {
			t.row("  opens from", fmt.Sprintf("version %d", view.MinDecryptionVersion))
		}
		if key.Lease > 0 {
			t.row("  lease", key.Lease.String())
		}
		for _, note := range []struct {
			what string
			by   *acknowledgment
		}{
			{"record read", view.RecordRead},
			{"backup confirmed", view.BackupConfirmed},
			{"single HSM accepted", view.AcceptSingleHSM},
			{"weak key accepted", view.AcceptWeakKey},
		} {
			if note.by != nil {
				t.row("  "+note.what, note.by.At+" by "+note.by.By)
			}
		}
		if view.DeletionAllowed {
			t.row("  deletion", "allowed")
		}
		t.field("  record sha256", view.RecordSHA256)
		for _, warning := range view.Warnings {
			t.row("  warning", warning)
		}
	})
}

// byName is a verb on one wrapping key whose answer is the key.
func (a *app) byName(cmd *cobra.Command, work func(cmd *cobra.Command, keys *keyring.Keyring, name string) (*keyring.Key, error)) *cobra.Command {
	cmd.Args = arguments("KEY")
	if cmd.ValidArgsFunction == nil {
		cmd.ValidArgsFunction = a.completeKeys
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		keys, err := a.keyring()
		if err != nil {
			return err
		}
		key, err := work(cmd, keys, args[0])
		if err != nil {
			return err
		}
		return a.printKey(key)
	}
	return cmd
}
