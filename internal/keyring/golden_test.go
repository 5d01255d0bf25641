package keyring

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

var update = flag.Bool("update", false, "make the golden files anew: records in the field are not made anew")

// goldenDevice holds the private keys of testdata in software.
type goldenDevice struct {
	*hsmtest.Memory
	keys []hsm.Key
}

func (d goldenDevice) FindKeys(_ context.Context, query hsm.KeyQuery) ([]hsm.Key, error) {
	var found []hsm.Key
	for _, key := range d.keys {
		ref := key.Ref()
		if (query.ID == "" || query.ID == ref.ID) && (query.Label == "" || query.Label == ref.Label) &&
			(query.Fingerprint == "" || query.Fingerprint == ref.Fingerprint) {
			found = append(found, key)
		}
	}
	return found, nil
}

type goldenKey struct {
	ref    hsm.KeyRef
	public crypto.PublicKey
}

func (k goldenKey) Ref() hsm.KeyRef          { return k.ref }
func (k goldenKey) Public() crypto.PublicKey { return k.public }
func (k goldenKey) Traits() hsm.Traits {
	return hsm.Traits{Sensitive: true, AlsoUsableFor: []string{"sign"}}
}

type goldenRSA struct {
	goldenKey
	private *rsa.PrivateKey
}

func (goldenRSA) OAEPHashes() []crypto.Hash { return []crypto.Hash{crypto.SHA256} }

func (k goldenRSA) DecryptOAEP(_ context.Context, hash crypto.Hash, ciphertext []byte) ([]byte, error) {
	return rsa.DecryptOAEP(hash.New(), nil, k.private, ciphertext, nil)
}

type goldenEC struct {
	goldenKey
	private *ecdh.PrivateKey
}

func (k goldenEC) Agree(_ context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	return k.private.ECDH(peer)
}

// newGoldenDevice reads private keys from testdata, and makes them where they are to be made anew.
func newGoldenDevice(t *testing.T, files ...string) hsm.Device {
	t.Helper()
	device := goldenDevice{Memory: hsmtest.NewMemory()}
	for _, file := range files {
		path := filepath.Join("testdata", file)
		if _, err := os.Stat(path); *update && errors.Is(err, os.ErrNotExist) {
			writeGoldenKey(t, path)
		}
		block, _ := pem.Decode(golden(t, file))
		if block == nil {
			t.Fatalf("%s is no PEM", path)
		}
		private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		label := strings.TrimSuffix(file, ".pem")
		switch private := private.(type) {
		case *rsa.PrivateKey:
			device.keys = append(device.keys, goldenRSA{newGoldenKey(t, label, &private.PublicKey), private})
		case *ecdsa.PrivateKey:
			agreeing, err := private.ECDH()
			if err != nil {
				t.Fatal(err)
			}
			device.keys = append(device.keys, goldenEC{newGoldenKey(t, label, agreeing.PublicKey()), agreeing})
		}
	}
	return device
}

func newGoldenKey(t *testing.T, label string, public crypto.PublicKey) goldenKey {
	t.Helper()
	kid, err := hsm.Fingerprint(public)
	if err != nil {
		t.Fatal(err)
	}
	return goldenKey{ref: hsm.KeyRef{Label: label, ID: "0" + label[len(label)-1:], Fingerprint: kid}, public: public}
}

func writeGoldenKey(t *testing.T, path string) {
	t.Helper()
	var private any
	var err error
	if strings.Contains(path, "rsa") {
		private, err = rsa.GenerateKey(rand.Reader, 2048)
	} else {
		private, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	writeGolden(t, filepath.Base(path), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func golden(t testing.TB, file string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", file))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func writeGolden(t *testing.T, file string, raw []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join("testdata", file), raw, 0o600); err != nil {
		t.Fatal(err)
	}
}

// makeGolden makes a key with two versions, a pending one and every acknowledgement.
func makeGolden(t *testing.T, all *devices) {
	t.Helper()
	records := newStore(t)
	moment := time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)
	k := New(Config{Records: records, Devices: all, Now: func() time.Time { return moment }})
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(k.Adopt(ctx, "prod", AdoptRequest{Device: "card", Label: "ec-1", By: "alice"}))
	sealed, err := k.Wrap(ctx, "prod", envelope.UseWrap, []byte("an old secret"), []byte("context"))
	must(nil, err)
	writeGolden(t, "version1.jwe", sealed.Envelope)
	must(k.Rotate(ctx, "prod", RotateRequest{Adopt: &AdoptRequest{Device: "card", Label: "rsa-2", RequestID: "r-2", By: "bob"}}))
	must(k.AddRecipient(ctx, "prod", AdoptRequest{Device: "spare", Label: "ec-3", RequestID: "r-3", By: "bob"}))
	must(k.Configure(ctx, "prod", Settings{
		DeletionAllowed: ptr(true), BackupConfirmed: ptr(true), AcceptSingleHSM: ptr(true), By: "carol",
	}))
	backup, err := k.Backup(ctx, "prod", "dora")
	must(nil, err)
	writeGolden(t, "keyrecord.json", backup.Record)
	writeGolden(t, "keyrecord.sha256", []byte(backup.SHA256+"\n"))
	sealed, err = k.Wrap(ctx, "prod", envelope.UseTransit, []byte("a new secret"), nil)
	must(nil, err)
	writeGolden(t, "version2.jwe", sealed.Envelope)
	must(k.Rotate(ctx, "prod", RotateRequest{
		Generate: &GenerateRequest{Device: "card", Algorithm: hsm.RSA4096, RequestID: "r-4", By: "erin"},
	}))
	entry, err := records.Get(ctx, recordPrefix+"prod")
	must(nil, err)
	writeGolden(t, "record.json", entry.Value)
}

// makeGoldenKept makes a key whose first version serves encrypt/ while the second is not ready: acknowledgements of the
// first are kept with it, and it has a recipient that the key record which was read lacks.
func makeGoldenKept(t *testing.T, all *devices) {
	t.Helper()
	records := newStore(t)
	moment := time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)
	k := New(Config{Records: records, Devices: all, Now: func() time.Time { return moment }})
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(k.Adopt(ctx, "prod", AdoptRequest{Device: "card", Label: "ec-1", By: "alice"}))
	must(k.Configure(ctx, "prod", Settings{BackupConfirmed: ptr(true), By: "carol"}))
	must(k.Backup(ctx, "prod", "dora"))
	must(k.AddRecipient(ctx, "prod", AdoptRequest{Device: "spare", Label: "ec-3", By: "bob"}))
	must(k.Rotate(ctx, "prod", RotateRequest{Adopt: &AdoptRequest{Device: "card", Label: "rsa-2", By: "bob"}}))
	entry, err := records.Get(ctx, recordPrefix+"prod")
	must(nil, err)
	writeGolden(t, "record-kept.json", entry.Value)
}

func TestWhatARecordKeepsOfOlderVersionsIsRead(t *testing.T) {
	if *update {
		all := &devices{}
		all.set("card", newGoldenDevice(t, "ec-1.pem", "rsa-2.pem"))
		all.set("spare", newGoldenDevice(t, "ec-3.pem"))
		makeGoldenKept(t, all)
	}
	raw := golden(t, "record-kept.json")
	rec, err := decodeRecord("prod", raw)
	if err != nil {
		t.Fatal(err)
	}
	again, err := rec.encode()
	if err != nil || !bytes.Equal(raw, again) {
		t.Errorf("encoded again it is something else (%v):\n%s", err, cmp.Diff(string(raw), string(again)))
	}
	key := describe(rec)
	if key.EncryptVersion != 1 || key.RecordRead != nil || key.BackupConfirmed != nil {
		t.Errorf("the key is %+v", key)
	}
	if v := key.Versions[0]; v.RecordRead == nil || v.RecordRead.By != "dora" || v.BackupConfirmed == nil || v.BackupConfirmed.By != "carol" {
		t.Errorf("version 1 is %+v", v)
	}
}

// makeGoldenLeased makes a key with a lease and two versions, an envelope of each, and one whose KEK was replaced since.
func makeGoldenLeased(t *testing.T, all *devices) {
	t.Helper()
	records := newStore(t)
	moment := time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)
	k := New(Config{Records: records, Devices: all, Now: func() time.Time { return moment }})
	defer func() { _ = k.Close() }()
	ctx := t.Context()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	encrypt := func(file, payload string) {
		t.Helper()
		must(nil, k.OpenLease(ctx, "prod"))
		sealed, err := k.Wrap(ctx, "prod", envelope.UseTransit, []byte(payload), nil)
		must(nil, err)
		if !sealed.Leased {
			t.Fatalf("%s is not leased", file)
		}
		writeGolden(t, file, sealed.Envelope)
	}
	must(k.Adopt(ctx, "prod", AdoptRequest{Device: "card", Label: "ec-1", By: "alice"}))
	must(k.Configure(ctx, "prod", Settings{AcceptSingleHSM: ptr(true), Lease: ptr(10 * time.Minute), By: "carol"}))
	must(k.Backup(ctx, "prod", "dora"))
	encrypt("leased1.jwe", "of the first KEK")
	must(k.AddRecipient(ctx, "prod", AdoptRequest{Device: "spare", Label: "ec-3", By: "bob"}))
	encrypt("leased2.jwe", "of the second KEK")
	must(k.Rotate(ctx, "prod", RotateRequest{Adopt: &AdoptRequest{Device: "card", Label: "rsa-2", By: "bob"}}))
	backup, err := k.Backup(ctx, "prod", "dora")
	must(nil, err)
	writeGolden(t, "keyrecord-leased.json", backup.Record)
	writeGolden(t, "keyrecord-leased.sha256", []byte(backup.SHA256+"\n"))
	encrypt("leased3.jwe", "of the second version")
	entry, err := records.Get(ctx, recordPrefix+"prod")
	must(nil, err)
	writeGolden(t, "record-leased.json", entry.Value)
}

func TestRecordsWithALeaseAndWhatWasSealedInOneAreRead(t *testing.T) {
	all := &devices{}
	all.set("card", newGoldenDevice(t, "ec-1.pem", "rsa-2.pem"))
	all.set("spare", newGoldenDevice(t, "ec-3.pem"))
	if *update {
		makeGoldenLeased(t, all)
	}
	raw := golden(t, "record-leased.json")
	rec, err := decodeRecord("prod", raw)
	if err != nil {
		t.Fatal(err)
	}
	again, err := rec.encode()
	if err != nil || !bytes.Equal(raw, again) {
		t.Errorf("encoded again it is something else (%v):\n%s", err, cmp.Diff(string(raw), string(again)))
	}
	if got := newKeyRecord(rec).Record; !bytes.Equal(got, golden(t, "keyrecord-leased.json")) {
		t.Errorf("its key record is something else:\n%s", cmp.Diff(string(golden(t, "keyrecord-leased.json")), string(got)))
	}
	key := describe(rec)
	if key.Lease != 10*time.Minute || key.Versions[0].KEK == "" || key.Versions[1].KEK == "" {
		t.Errorf("the key is %+v", key)
	}
	opens := func(t *testing.T, records store.Store) {
		t.Helper()
		k := New(Config{Records: records, Devices: all})
		defer func() { _ = k.Close() }()
		for file, want := range map[string]string{
			"leased1.jwe": "of the first KEK", "leased2.jwe": "of the second KEK", "leased3.jwe": "of the second version",
		} {
			opened, err := k.Unwrap(t.Context(), "prod", envelope.UseTransit, golden(t, file), nil)
			if err != nil || string(opened.Payload) != want || !opened.Leased {
				t.Errorf("%s opened %q: %v", file, opened.Payload, err)
			}
		}
	}
	t.Run("from the record", func(t *testing.T) {
		records := newStore(t)
		if _, err := records.Put(t.Context(), recordPrefix+"prod", raw, store.NoRevision); err != nil {
			t.Fatal(err)
		}
		opens(t, records)
	})
	t.Run("from the key record", func(t *testing.T) {
		records := newStore(t)
		_, err := New(Config{Records: records, Devices: all}).Restore(t.Context(), "prod", RestoreRequest{
			Record: golden(t, "keyrecord-leased.json"), SHA256: strings.TrimSpace(string(golden(t, "keyrecord-leased.sha256"))),
		})
		if err != nil {
			t.Fatal(err)
		}
		opens(t, records)
	})
}

func TestRecordsAndKeyRecordsOfEarlierReleasesAreRead(t *testing.T) {
	all := &devices{}
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	all.set("card", newGoldenDevice(t, "ec-1.pem", "rsa-2.pem"))
	all.set("spare", newGoldenDevice(t, "ec-3.pem"))
	if *update {
		makeGolden(t, all)
	}
	opens := func(t *testing.T, records store.Store) {
		t.Helper()
		k := New(Config{Records: records, Devices: all})
		first, err := k.Unwrap(t.Context(), "prod", envelope.UseWrap, golden(t, "version1.jwe"), []byte("context"))
		if err != nil || string(first.Payload) != "an old secret" {
			t.Errorf("version 1 opened %q: %v", first.Payload, err)
		}
		second, err := k.Unwrap(t.Context(), "prod", envelope.UseTransit, golden(t, "version2.jwe"), nil)
		if err != nil || string(second.Payload) != "a new secret" {
			t.Errorf("version 2 opened %q: %v", second.Payload, err)
		}
	}

	t.Run("a record", func(t *testing.T) {
		raw := golden(t, "record.json")
		rec, err := decodeRecord("prod", raw)
		if err != nil {
			t.Fatal(err)
		}
		again, err := rec.encode()
		if err != nil || !bytes.Equal(raw, again) {
			t.Errorf("encoded again it is something else (%v):\n%s", err, cmp.Diff(string(raw), string(again)))
		}
		if got := newKeyRecord(rec).Record; !bytes.Equal(got, golden(t, "keyrecord.json")) {
			t.Errorf("its key record is something else:\n%s", cmp.Diff(string(golden(t, "keyrecord.json")), string(got)))
		}
		records := newStore(t)
		if _, err := records.Put(t.Context(), recordPrefix+"prod", raw, store.NoRevision); err != nil {
			t.Fatal(err)
		}
		opens(t, records)
	})
	t.Run("a key record", func(t *testing.T) {
		records := newStore(t)
		_, err := New(Config{Records: records, Devices: all}).Restore(t.Context(), "prod", RestoreRequest{
			Record: golden(t, "keyrecord.json"), SHA256: strings.TrimSpace(string(golden(t, "keyrecord.sha256"))),
		})
		if err != nil {
			t.Fatal(err)
		}
		opens(t, records)
	})
}
