package keyring

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func TestWhatIsWrappedUnwrapsWithEveryKindOfKey(t *testing.T) {
	for _, test := range []struct {
		name      string
		label     string
		hashes    []crypto.Hash
		algorithm envelope.Algorithm
	}{
		{"an elliptic-curve key agrees", "ec", nil, envelope.ECDHESA256KW},
		{"an RSA key decrypts with SHA-256", "rsa", []crypto.Hash{crypto.SHA256, crypto.SHA1}, envelope.RSAOAEP256},
		{"an RSA key of a token that knows SHA-1 only", "rsa", []crypto.Hash{crypto.SHA1}, envelope.RSAOAEP},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			f.one.SetHashes(test.hashes...)
			key, err := f.Adopt(t.Context(), "prod", AdoptRequest{Device: "one", Label: test.label, By: "alice"})
			if err != nil {
				t.Fatal(err)
			}
			if got := key.Versions[0].Recipients[0].Algorithm; got != test.algorithm {
				t.Errorf("algorithm %q, want %q", got, test.algorithm)
			}
			if got := f.unwrapped(f.wrap("secret")); got != "secret" {
				t.Errorf("unwrapped %q", got)
			}
		})
	}
}

func TestOnlyOpeningCostsAnOperation(t *testing.T) {
	f := newFixture(t)
	count := f.operations()
	f.adopt()
	if got := count(); got != [2]int{2, 0} {
		t.Errorf("adopting cost %v operations, want 2 on device one: the proof and the authentication envelope", got)
	}
	f.addTwo()

	count = f.operations()
	raw := f.wrap("secret")
	if got := count(); got != [2]int{} {
		t.Errorf("wrapping cost %v operations, want none", got)
	}
	f.unwrapped(raw)
	if got := count(); got != [2]int{1, 0} {
		t.Errorf("unwrapping cost %v operations, want one", got)
	}

	want := envelope.Context{Use: envelope.UseMaterial, Cluster: "c1", Name: "unseal", Generation: 3}
	sealed, err := f.Seal(t.Context(), "prod", want, []byte(`{"a":"1","b":"2"}`))
	if err != nil {
		t.Fatal(err)
	}
	count = f.operations()
	opened, err := f.Open(t.Context(), "prod", sealed.Envelope, want)
	if err != nil || string(opened.Payload) != `{"a":"1","b":"2"}` {
		t.Fatalf("opening material: %q, %v", opened.Payload, err)
	}
	if got := count(); got != [2]int{1, 0} {
		t.Errorf("opening material cost %v operations, want one", got)
	}

	count = f.operations()
	if _, err := f.Rewrap(t.Context(), "prod", raw, envelope.Context{Use: envelope.UseWrap, Caller: []byte("ctx")}); err != nil {
		t.Fatal(err)
	}
	if got := count(); got != [2]int{} {
		t.Errorf("a rewrap that changes nothing cost %v operations", got)
	}
}

func TestAnEnvelopeOpensForWhatItWasMadeForAndNothingElse(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.backup()
	if _, err := f.Configure(t.Context(), "prod", Settings{AcceptSingleHSM: ptr(true), By: "alice"}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Adopt(t.Context(), "other", AdoptRequest{Device: "one", Label: "ec", By: "alice"}); err != nil {
		t.Fatal(err)
	}
	for _, use := range []envelope.Use{envelope.UseWrap, envelope.UseTransit, envelope.UseMaterial, envelope.UseSeal} {
		c := envelope.Context{Use: use, Caller: []byte("mine")}
		if use == envelope.UseMaterial {
			c.Cluster, c.Name, c.Generation = "c1", "n1", 1
		}
		sealed, err := f.Seal(t.Context(), "prod", c, []byte("secret"))
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := f.Open(t.Context(), "prod", sealed.Envelope, c); err != nil || string(opened.Payload) != "secret" {
			t.Errorf("use %q does not open its own: %v", use, err)
		}
		count := f.operations()
		for _, other := range envelope.Uses() {
			wrong := c
			wrong.Use = other
			if other == use {
				wrong.Caller = []byte("theirs")
			}
			if _, err := f.Open(t.Context(), "prod", sealed.Envelope, wrong); !errors.Is(err, envelope.ErrContext) && (!isOwnUse(other) || !errors.Is(err, ErrInvalid)) {
				t.Errorf("use %q opened as %+v: %v", use, wrong, err)
			}
		}
		if _, err := f.Open(t.Context(), "other", sealed.Envelope, c); !errors.Is(err, envelope.ErrContext) {
			t.Errorf("use %q opened with another key over the same HSM key: %v", use, err)
		}
		for _, change := range []func(*envelope.Context){
			func(c *envelope.Context) { c.Cluster = "c2" },
			func(c *envelope.Context) { c.Name = "n2" },
			func(c *envelope.Context) { c.Generation = 2 },
			func(c *envelope.Context) { c.Version = 2 },
		} {
			wrong := c
			change(&wrong)
			if _, err := f.Open(t.Context(), "prod", sealed.Envelope, wrong); !errors.Is(err, envelope.ErrContext) {
				t.Errorf("use %q opened as %+v: %v", use, wrong, err)
			}
		}
		if got := count(); got != [2]int{} {
			t.Errorf("refusing cost %v operations", got)
		}
	}
}

// A forger has the public keys and can write the store; what is missing is the authentication key.
func TestAnEnvelopeMadeWithThePublicKeyAloneDoesNotOpen(t *testing.T) {
	f := newFixture(t)
	key := f.adopt()
	f.addTwo()
	rcpt := key.Versions[0].Recipients[0]
	forged, err := envelope.Seal(envelope.Context{Use: envelope.UseWrap, Key: "prod", Version: 1},
		[]envelope.Recipient{{KID: rcpt.KID, Algorithm: rcpt.Algorithm, Public: rcpt.Public}}, envelope.NewAuthKey(), []byte("evil"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, forged, nil); !errors.Is(err, envelope.ErrNotAuthentic) {
		t.Errorf("a forged envelope: %v, want ErrNotAuthentic", err)
	}
}

func TestAdoptionRefusesWhatItShould(t *testing.T) {
	for _, test := range []struct {
		name    string
		prepare func(f *fixture)
		request AdoptRequest
		want    error
	}{
		{"no device named", nil, AdoptRequest{Label: "ec"}, ErrInvalid},
		{"no key named", nil, AdoptRequest{Device: "one"}, ErrInvalid},
		{"a device that is not configured", nil, AdoptRequest{Device: "three", Label: "ec"}, ErrNoDevice},
		{"a label that no key has", nil, AdoptRequest{Device: "one", Label: "nope"}, hsm.ErrNotFound},
		{
			"a label that two keys have", func(f *fixture) { f.one.AddEC(f.t, "ec", "03", ecdh.P256()) },
			AdoptRequest{Device: "one", Label: "ec"},
			hsm.ErrAmbiguous,
		},
		{
			"an extractable key", func(f *fixture) { f.one.SetTraits("01", hsm.Traits{Extractable: true, Sensitive: true}) },
			AdoptRequest{Device: "one", Label: "ec"},
			ErrWeakKey,
		},
		{
			"a key that is not sensitive", func(f *fixture) { f.one.SetTraits("01", hsm.Traits{}) },
			AdoptRequest{Device: "one", Label: "ec"},
			ErrWeakKey,
		},
		{"a key that the device lets sign", func(f *fixture) {
			f.one.SetTraits("02", hsm.Traits{Sensitive: true, AlsoUsableFor: []string{"sign"}, ForeignUsesRefused: true})
		}, AdoptRequest{Device: "one", ID: "02"}, ErrWeakKey},
		{"an RSA key without any OAEP", func(f *fixture) { f.one.SetHashes() }, AdoptRequest{Device: "one", Label: "rsa"}, ErrUnusableKey},
		{
			"an RSA key of an odd size", func(f *fixture) { f.one.AddRSA(f.t, "odd", "09", 2176) },
			AdoptRequest{Device: "one", Label: "odd"},
			ErrUnusableKey,
		},
		{
			"a curve that envelopes do not know", func(f *fixture) { f.devices.set("one", oddDevice{}) },
			AdoptRequest{Device: "one", Label: "ec"},
			ErrUnusableKey,
		},
		{
			"an HSM that is away", func(f *fixture) { f.one.SetError(hsm.ErrUnavailable) },
			AdoptRequest{Device: "one", Label: "ec"},
			hsm.ErrUnavailable,
		},
		{
			"an HSM that wants another PIN", func(f *fixture) { f.one.SetError(&hsm.PINError{TriesLeft: 0, Detail: "locked; unlock it"}) },
			AdoptRequest{Device: "one", Label: "ec"},
			hsm.ErrLocked,
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			if test.prepare != nil {
				test.prepare(f)
			}
			_, err := f.Adopt(t.Context(), "prod", test.request)
			if !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if names, _ := f.List(t.Context()); len(names) != 0 {
				t.Errorf("a refused adoption left %v", names)
			}
		})
	}
}

// oddDevice has one key on a curve that nobody else here knows.
type oddDevice struct{ *hsmtest.Memory }

type oddKey struct{ hsm.Key }

func (oddKey) Public() crypto.PublicKey {
	key, _ := ecdh.P521().GenerateKey(rand.Reader)
	return key.PublicKey()
}
func (oddKey) Ref() hsm.KeyRef    { return hsm.KeyRef{Label: "ec", ID: "01"} }
func (oddKey) Traits() hsm.Traits { return hsm.Traits{Sensitive: true} }

func (oddDevice) FindKeys(context.Context, hsm.KeyQuery) ([]hsm.Key, error) {
	return []hsm.Key{oddKey{}}, nil
}

func TestAWeakKeyIsAdoptedWhenSomebodyAcceptsIt(t *testing.T) {
	f := newFixture(t)
	f.one.SetTraits("01", hsm.Traits{Extractable: true, Sensitive: true, AlsoUsableFor: []string{"sign"}})
	key, err := f.Adopt(t.Context(), "prod", AdoptRequest{Device: "one", Label: "ec", AcceptWeak: true, By: "alice"})
	if err != nil {
		t.Fatal(err)
	}
	rcpt := key.Versions[0].Recipients[0]
	if !slices.Equal(rcpt.WeaknessesAccepted, []string{"extractable"}) || !slices.Equal(rcpt.AlsoUsableFor, []string{"sign"}) {
		t.Errorf("recorded %v and %v", rcpt.WeaknessesAccepted, rcpt.AlsoUsableFor)
	}
	if key.AcceptWeakKey == nil || key.AcceptWeakKey.By != "alice" || !key.AcceptWeakKey.At.Equal(f.clock.Now()) {
		t.Errorf("who accepted it: %+v", key.AcceptWeakKey)
	}
	if !slices.ContainsFunc(key.Warnings, func(w string) bool { return strings.Contains(w, "extractable") }) {
		t.Errorf("no warning says so: %q", key.Warnings)
	}
}

func TestAKeyOfATokenThatAlsoSignsIsAdoptedWithAWarning(t *testing.T) {
	f := newFixture(t)
	f.one.SetTraits("02", hsm.Traits{Sensitive: true, AlsoUsableFor: []string{"sign", "decrypt v1.5"}})
	key, err := f.Adopt(t.Context(), "prod", AdoptRequest{Device: "one", Label: "rsa", By: "alice"})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(key.Warnings, func(w string) bool { return strings.Contains(w, "decrypt v1.5") }) {
		t.Errorf("no warning says so: %q", key.Warnings)
	}
}

func TestRepeatsOfARequestAreHarmless(t *testing.T) {
	f := newFixture(t)
	first := f.adopt()
	again := f.adopt()
	if first.RecordSHA256 != again.RecordSHA256 {
		t.Error("a repeated adoption changed the key")
	}
	if _, err := f.Adopt(t.Context(), "prod", AdoptRequest{Device: "two", Label: "ec"}); !errors.Is(err, ErrKeyExists) {
		t.Errorf("another adoption under the same name: %v, want ErrKeyExists", err)
	}

	request := AdoptRequest{Device: "two", Label: "ec", RequestID: "r1", By: "bob"}
	for range 3 {
		if _, err := f.AddRecipient(t.Context(), "prod", request); err != nil {
			t.Fatal(err)
		}
	}
	request.RequestID = ""
	if _, err := f.AddRecipient(t.Context(), "prod", request); !errors.Is(err, ErrSameKey) {
		t.Errorf("the same HSM key once more: %v, want ErrSameKey", err)
	}

	rotation := RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "rsa", RequestID: "r2", By: "bob"}}
	for range 3 {
		key, err := f.Rotate(t.Context(), "prod", rotation)
		if err != nil || key.LatestVersion != 2 {
			t.Fatalf("rotating: %+v, %v", key, err)
		}
	}
	rotation.Adopt.RequestID = ""
	if _, err := f.Rotate(t.Context(), "prod", rotation); !errors.Is(err, ErrSameKey) {
		t.Errorf("rotating to the same HSM key: %v, want ErrSameKey", err)
	}
	rotation.Adopt.RequestID, rotation.Adopt.Device = "r2", "one"
	if _, err := f.Rotate(t.Context(), "prod", rotation); !errors.Is(err, ErrRequestReused) {
		t.Errorf("another rotation with the same request id: %v, want ErrRequestReused", err)
	}
}

func TestRotationKeepsOldEnvelopesOpenDownToTheMinimum(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	old := f.wrap("old")
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "rsa"}}); err != nil {
		t.Fatal(err)
	}
	current := f.wrap("new")
	if f.unwrapped(old) != "old" || f.unwrapped(current) != "new" {
		t.Error("an envelope changed")
	}
	want := envelope.Context{Use: envelope.UseWrap, Caller: []byte("ctx")}
	rewrapped, err := f.Rewrap(t.Context(), "prod", old, want)
	if err != nil || !rewrapped.Changed || rewrapped.FromVersion != 1 || rewrapped.Version != 2 || rewrapped.Device != "one" {
		t.Fatalf("rewrapping: %+v, %v", rewrapped, err)
	}

	if _, err := f.Configure(t.Context(), "prod", Settings{MinDecryptionVersion: ptr(2)}); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, old, []byte("ctx")); !errors.Is(err, ErrVersionTooOld) {
		t.Errorf("an envelope below the minimum: %v, want ErrVersionTooOld", err)
	}
	if _, err := f.Seal(t.Context(), "prod", envelope.Context{Use: envelope.UseWrap, Version: 1}, nil); !errors.Is(err, ErrVersionTooOld) {
		t.Errorf("sealing below the minimum: %v, want ErrVersionTooOld", err)
	}
	if f.unwrapped(rewrapped.Envelope) != "old" {
		t.Error("the rewrapped envelope changed")
	}
	for _, bad := range []int{-1, 0, 3} {
		if _, err := f.Configure(t.Context(), "prod", Settings{MinDecryptionVersion: &bad}); !errors.Is(err, ErrInvalid) {
			t.Errorf("min_decryption_version %d: %v, want ErrInvalid", bad, err)
		}
	}
}

func TestAVersionHasAsManyRecipientsAsAnEnvelopeHolds(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	for i := 2; i <= envelope.MaxRecipients+1; i++ {
		label := fmt.Sprintf("ec%d", i)
		f.two.AddEC(t, label, fmt.Sprintf("a%02d", i), ecdh.P256())
		_, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "two", Label: label})
		if i <= envelope.MaxRecipients && err != nil {
			t.Fatal(err)
		}
		if i > envelope.MaxRecipients && !errors.Is(err, ErrTooLarge) {
			t.Errorf("recipient %d: %v, want ErrTooLarge", i, err)
		}
	}
	raw := f.wrap("secret")
	count := f.operations()
	if got := f.unwrapped(raw); got != "secret" || count() != [2]int{1, 0} {
		t.Errorf("opened %q for %v operations", got, count())
	}
}

func TestTheKeyringsOwnUseIsNotForOthers(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	if _, err := f.Seal(t.Context(), "prod", envelope.Context{Use: envelope.UseAuth}, make([]byte, 32)); !errors.Is(err, ErrInvalid) {
		t.Errorf("sealing with use auth: %v, want ErrInvalid", err)
	}
	rec, _, err := f.load(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	count := f.operations()
	for name, attempt := range map[string]func() error{
		"opening": func() error {
			_, err := f.Open(t.Context(), "prod", rec.Versions[0].AuthEnvelope, envelope.Context{Use: envelope.UseAuth})
			return err
		},
		"rewrapping": func() error {
			_, err := f.Rewrap(t.Context(), "prod", rec.Versions[0].AuthEnvelope, envelope.Context{Use: envelope.UseAuth})
			return err
		},
	} {
		if err := attempt(); !errors.Is(err, ErrInvalid) || count() != [2]int{} {
			t.Errorf("%s the authentication envelope: %v and %v operations", name, err, count())
		}
	}
	for _, use := range []envelope.Use{envelope.UseAuth, envelope.UseMaterial, envelope.UseKEK, "", "x"} {
		if _, err := f.Wrap(t.Context(), "prod", use, nil, nil); !errors.Is(err, ErrInvalid) {
			t.Errorf("wrapping with use %q: %v, want ErrInvalid", use, err)
		}
		if _, err := f.Unwrap(t.Context(), "prod", use, f.wrap("x"), nil); !errors.Is(err, ErrInvalid) {
			t.Errorf("unwrapping with use %q: %v, want ErrInvalid", use, err)
		}
	}
}

func TestAnAddedRecipientNeedsARewrapAndOpensAlone(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	want := envelope.Context{Use: envelope.UseWrap, Caller: []byte("ctx")}
	old := f.wrap("secret")
	f.addTwo()
	rewrapped, err := f.Rewrap(t.Context(), "prod", old, want)
	if err != nil || !rewrapped.Changed || rewrapped.Recipients != 2 {
		t.Fatalf("rewrapping to both recipients: %+v, %v", rewrapped, err)
	}
	f.devices.set("one", nil)
	if got := f.unwrapped(rewrapped.Envelope); got != "secret" {
		t.Errorf("unwrapped %q", got)
	}
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, old, []byte("ctx")); err == nil {
		t.Error("an envelope of the first recipient alone opened without it")
	}
}

func TestOpeningFailsOverWhereAnotherHSMCanHelp(t *testing.T) {
	for _, test := range []struct {
		name string
		ruin func(f *fixture)
	}{
		{"the device is no longer configured", func(f *fixture) { f.devices.set("one", nil) }},
		{"the device does not answer", func(f *fixture) { f.one.SetError(hsm.ErrUnavailable) }},
		{"the device is locked", func(f *fixture) { f.one.SetError(hsm.ErrLocked) }},
		{"the PIN is barred", func(f *fixture) { f.one.SetError(&hsm.PINError{TriesLeft: -1, Barred: true, Detail: "barred"}) }},
		{"the HSM key was deleted", func(f *fixture) {
			keys, _ := f.one.FindKeys(f.t.Context(), hsm.KeyQuery{Label: "ec"})
			if err := f.one.DeleteKey(f.t.Context(), keys[0].Ref()); err != nil {
				f.t.Fatal(err)
			}
		}},
		{"another key has the recorded id", func(f *fixture) {
			other := hsmtest.NewMemory()
			other.AddEC(f.t, "ec", "01", ecdh.P256())
			f.devices.set("one", other)
		}},
		{"the device hangs", func(f *fixture) { f.one.Delay(time.Hour) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // the second device gets its share of the second, however slow the machine is
				f := newFixture(t)
				f.adopt()
				f.addTwo()
				raw := f.wrap("secret")
				f.unwrapped(raw) // the key on device one is known now
				test.ruin(f)
				count := f.operations()
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				opened, err := f.Unwrap(ctx, "prod", envelope.UseWrap, raw, []byte("ctx"))
				if err != nil || string(opened.Payload) != "secret" || opened.Device != "two" {
					t.Fatalf("opened %q on %q: %v", opened.Payload, opened.Device, err)
				}
				if got := count(); got[1] != 1 {
					t.Errorf("cost %v operations, want one on device two", got)
				}
			})
		})
	}
}

func TestAFailedDeviceIsAskedLastForAWhileAndUsedAgainWhenItIsBack(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.addTwo()
	raw := f.wrap("secret")
	opener := func() string {
		t.Helper()
		opened, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx"))
		if err != nil {
			t.Fatal(err)
		}
		return opened.Device
	}
	f.one.SetError(hsm.ErrUnavailable)
	if got := opener(); got != "two" {
		t.Fatalf("opened on %q", got)
	}
	f.one.SetError(nil)
	if got := opener(); got != "two" {
		t.Errorf("a device that failed just now was asked first: opened on %q", got)
	}
	f.clock.advance(unhealthyFor)
	if got := opener(); got != "one" {
		t.Errorf("a returned device is not used again: opened on %q", got)
	}
}

func TestAForgedEnvelopeIsNotTriedElsewhere(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.addTwo()
	rec, _, err := f.load(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	// The public keys are public, so anyone can do this.
	forged, err := envelope.Seal(envelope.Context{Use: envelope.UseWrap, Key: "prod", Version: 1, Caller: []byte("ctx")},
		rec.newest().sealTo(), envelope.NewAuthKey(), []byte("forged"))
	if err != nil {
		t.Fatal(err)
	}
	count := f.operations()
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, forged, []byte("ctx")); !errors.Is(err, envelope.ErrNotAuthentic) {
		t.Errorf("a forged envelope: %v, want ErrNotAuthentic", err)
	}
	if got := count(); got != [2]int{1, 0} {
		t.Errorf("it cost %v operations, want one", got)
	}
}

func TestAllHSMsAwayIsOneErrorThatNamesEachDevice(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.addTwo()
	raw := f.wrap("secret")
	f.one.SetError(hsm.ErrUnavailable)
	f.two.SetError(&hsm.PINError{TriesLeft: 2, Detail: "the PIN is wrong; store the right one"})
	_, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx"))
	var pin *hsm.PINError
	if !errors.Is(err, hsm.ErrUnavailable) || !errors.As(err, &pin) {
		t.Fatalf("got %v, want both devices' errors in it", err)
	}
	for _, word := range []string{`"prod"`, `"one"`, `"two"`} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not name %s", err, word)
		}
	}
	if strings.Contains(err.Error(), "\n") {
		t.Errorf("%q has more than one line", err)
	}
}

func TestAReplacedHSMKeyIsNotUsed(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	raw := f.wrap("secret")
	f.unwrapped(raw)
	other := hsmtest.NewMemory()
	other.AddEC(t, "ec", "01", ecdh.P256())
	f.devices.set("one", other)
	if _, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx")); !errors.Is(err, hsm.ErrKeyChanged) {
		t.Errorf("got %v, want ErrKeyChanged", err)
	}
	if other.Operations() != 0 {
		t.Error("the other key was used")
	}
	f.devices.set("one", f.one.Attach()) // the same token, opened anew
	if got := f.unwrapped(raw); got != "secret" {
		t.Errorf("unwrapped %q", got)
	}
}

func TestEncryptAndClustersWantAKeyThatSurvives(t *testing.T) {
	strict := []Purpose{PurposeEncrypt, PurposeCluster}
	check := func(t *testing.T, f *fixture, ready bool) {
		t.Helper()
		for _, purpose := range strict {
			err := f.Ready(t.Context(), "prod", purpose)
			if ready && err != nil || !ready && !errors.Is(err, ErrNotReady) {
				t.Errorf("%s: %v", purpose, err)
			}
		}
		for _, purpose := range []Purpose{PurposeWrap, PurposeMaterial} {
			if err := f.Ready(t.Context(), "prod", purpose); err != nil {
				t.Errorf("%s: %v", purpose, err)
			}
		}
		_, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("x"), nil)
		if ready != (err == nil) {
			t.Errorf("wrapping for transit: %v", err)
		}
	}
	for _, test := range []struct {
		name  string
		steps func(f *fixture)
		ready bool
	}{
		{"nothing done", func(*fixture) {}, false},
		{"the record read, one HSM", func(f *fixture) { f.backup() }, false},
		{"single HSM accepted, the record not read", func(f *fixture) { f.configure(Settings{AcceptSingleHSM: ptr(true)}) }, false},
		{"single HSM accepted, the record read", func(f *fixture) { f.configure(Settings{AcceptSingleHSM: ptr(true)}); f.backup() }, true},
		{"backup confirmed, the record read", func(f *fixture) { f.configure(Settings{BackupConfirmed: ptr(true)}); f.backup() }, true},
		{"the confirmation taken back", func(f *fixture) {
			f.configure(Settings{BackupConfirmed: ptr(true)})
			f.backup()
			f.configure(Settings{BackupConfirmed: ptr(false)})
		}, false},
		{"two HSMs, the record read", func(f *fixture) { f.addTwo(); f.backup() }, true},
		{"two HSMs, the record read before the second", func(f *fixture) { f.backup(); f.addTwo() }, false},
		{"two keys on one HSM", func(f *fixture) {
			if _, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "one", Label: "rsa"}); err != nil {
				t.Fatal(err)
			}
			f.backup()
		}, false},
		{"one HSM under two names", func(f *fixture) {
			f.devices.set("alias", f.one.Attach())
			if _, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "alias", Label: "rsa"}); err != nil {
				t.Fatal(err)
			}
			f.backup()
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t)
			f.adopt()
			test.steps(f)
			check(t, f, test.ready)
		})
	}
}

func TestAConfirmationHoldsForTheVersionItWasGivenFor(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.configure(Settings{BackupConfirmed: ptr(true), AcceptSingleHSM: ptr(true)})
	f.backup()
	key, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "ec"}})
	if err != nil {
		t.Fatal(err)
	}
	if key.BackupConfirmed != nil {
		t.Error("a backup of the old HSM key is taken for one of the new")
	}
	if key.RecordRead != nil {
		t.Error("the key record that was read is taken for the one with the new version")
	}
	if key.AcceptSingleHSM == nil {
		t.Error("a single HSM is no longer accepted")
	}
}

func TestARewrapForTransitAsksNoHSMWhereItCouldNotSeal(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.configure(Settings{AcceptSingleHSM: ptr(true)})
	f.backup()
	sealed, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	f.rotate("two", "ec")
	f.configure(Settings{AcceptSingleHSM: ptr(false)})
	count := f.operations()
	_, err = f.Rewrap(t.Context(), "prod", sealed.Envelope, envelope.Context{Use: envelope.UseTransit})
	if !errors.Is(err, ErrNotReady) || count() != [2]int{} {
		t.Errorf("got %v and %v operations, want ErrNotReady and none", err, count())
	}
	if opened, err := f.Unwrap(t.Context(), "prod", envelope.UseTransit, sealed.Envelope, nil); err != nil ||
		string(opened.Payload) != "secret" {
		t.Errorf("the old envelope: %v", err)
	}
}

func (f *fixture) configure(settings Settings) *Key {
	f.t.Helper()
	settings.By = "alice"
	key, err := f.Configure(f.t.Context(), "prod", settings)
	if err != nil {
		f.t.Fatalf("configuring: %v", err)
	}
	return key
}

func TestAcknowledgementsRememberWhoAndWhen(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	when := f.clock.Now()
	f.configure(Settings{BackupConfirmed: ptr(true)})
	f.clock.advance(time.Hour)
	key := f.configure(Settings{BackupConfirmed: ptr(true), AcceptSingleHSM: ptr(true)})
	if got := key.BackupConfirmed; got == nil || got.By != "alice" || !got.At.Equal(when) {
		t.Errorf("backup_confirmed: %+v, want alice's first", got)
	}
	if got := key.AcceptSingleHSM; got == nil || !got.At.Equal(when.Add(time.Hour)) {
		t.Errorf("accept_single_hsm: %+v", got)
	}
	f.backup()
	key, err := f.Get(t.Context(), "prod")
	if err != nil || key.RecordRead == nil || key.RecordRead.By != "carol" {
		t.Errorf("record_read: %+v, %v", key.RecordRead, err)
	}
}

func TestDeletingIsGuarded(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	if err := f.Delete(t.Context(), "prod", DeleteRequest{}); !errors.Is(err, ErrDeletionNotAllowed) {
		t.Errorf("without deletion_allowed: %v", err)
	}
	f.configure(Settings{DeletionAllowed: ptr(true), AcceptSingleHSM: ptr(true)})
	f.backup()
	if _, err := f.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("x"), nil); err != nil {
		t.Fatal(err)
	}
	if err := f.Delete(t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true}); !errors.Is(err, ErrInUse) {
		t.Errorf("the HSM key of a version that served encrypt/: %v, want ErrInUse", err)
	}
	if err := f.Delete(t.Context(), "prod", DeleteRequest{}); err != nil {
		t.Errorf("the record alone: %v", err)
	}
	if got := hsmKeys(t, f.one); !slices.Equal(got, []string{"01", "02"}) {
		t.Errorf("HSM keys left: %v", got)
	}
	if err := f.Delete(t.Context(), "prod", DeleteRequest{}); !errors.Is(err, ErrKeyNotFound) {
		t.Errorf("a key that is gone: %v, want ErrKeyNotFound", err)
	}

	made := f.generate().Versions[0].Recipients[0]
	if _, err := f.Adopt(t.Context(), "other", AdoptRequest{Device: "one", ID: made.ID}); err != nil {
		t.Fatal(err)
	}
	f.configure(Settings{DeletionAllowed: ptr(true)})
	if err := f.Delete(t.Context(), "prod", DeleteRequest{DeleteHSMKeys: true}); !errors.Is(err, ErrInUse) {
		t.Errorf("an HSM key that another wrapping key has: %v, want ErrInUse", err)
	}
	if key, err := f.Get(t.Context(), "prod"); err != nil || key.State != StateReady {
		t.Errorf("a refused deletion left %+v, %v", key, err)
	}
}

func TestNamesAreCheckedBeforeAnythingElse(t *testing.T) {
	f := newFixture(t)
	for _, name := range []string{"", ".", "..", "a/b", "-x", "ü", "a b", strings.Repeat("x", 65)} {
		if _, err := f.Adopt(t.Context(), name, AdoptRequest{Device: "one", Label: "ec"}); !errors.Is(err, ErrInvalid) {
			t.Errorf("adopting %q: %v", name, err)
		}
		if _, err := f.Get(t.Context(), name); !errors.Is(err, ErrInvalid) {
			t.Errorf("reading %q: %v", name, err)
		}
		if err := f.Delete(t.Context(), name, DeleteRequest{}); !errors.Is(err, ErrInvalid) {
			t.Errorf("deleting %q: %v", name, err)
		}
	}
}

func TestListIsSorted(t *testing.T) {
	f := newFixture(t)
	for _, name := range []string{"b", "c", "a"} {
		if _, err := f.Adopt(t.Context(), name, AdoptRequest{Device: "one", Label: "ec"}); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := f.List(t.Context()); err != nil || !slices.Equal(names, []string{"a", "b", "c"}) {
		t.Errorf("listed %v, %v", names, err)
	}
}

func TestTheCacheReadsTheStoreOnceAndForgetsWhenTold(t *testing.T) {
	f := newFixture(t)
	counting := &crashStore{Store: f.store, crash: &crash{}}
	cached := New(Config{Records: counting, Devices: f.devices, CacheRecords: true})
	f.adopt()
	seal := func() Sealed {
		t.Helper()
		sealed, err := cached.Wrap(t.Context(), "prod", envelope.UseWrap, []byte("x"), nil)
		if err != nil {
			t.Fatal(err)
		}
		return sealed
	}
	seal()
	calls := counting.crash.calls
	seal()
	if counting.crash.calls != calls {
		t.Error("a cached record was read again")
	}
	// Another process rotates. Its envelopes open at once, because an unknown version is looked up in the store.
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "ec"}}); err != nil {
		t.Fatal(err)
	}
	if sealed := seal(); sealed.Version != 1 {
		t.Errorf("sealed with version %d before it was told", sealed.Version)
	}
	if _, err := cached.Unwrap(t.Context(), "prod", envelope.UseWrap, f.wrap("new"), []byte("ctx")); err != nil {
		t.Errorf("an envelope of the new version: %v", err)
	}
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "rsa"}}); err != nil {
		t.Fatal(err)
	}
	cached.Invalidate("prod")
	if sealed := seal(); sealed.Version != 3 {
		t.Errorf("sealed with version %d after it was told", sealed.Version)
	}
	if _, err := cached.Configure(t.Context(), "prod", Settings{MinDecryptionVersion: ptr(2)}); err != nil {
		t.Fatal(err)
	}
	if key, err := cached.Get(t.Context(), "prod"); err != nil || key.MinDecryptionVersion != 2 {
		t.Errorf("its own write is not seen: %+v, %v", key, err)
	}
}

func TestTheRecordInTheStoreIsTheOnlyPlaceOfTheAuthenticationKey(t *testing.T) {
	f := newFixture(t)
	key := f.adopt()
	rec, _, err := f.load(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	secret := base64.StdEncoding.EncodeToString(rec.Versions[0].AuthKey)
	backup := f.backup()
	if strings.Contains(string(backup.Record), secret) || strings.Contains(string(backup.Record), strings.TrimRight(secret, "=")) {
		t.Error("the key record holds the authentication key")
	}
	if backup.SHA256 != key.RecordSHA256 {
		t.Errorf("the key record's SHA-256 is %s, at creation %s was shown", backup.SHA256, key.RecordSHA256)
	}
}

func TestNobodyIsWarnedOfWhatTheyAccepted(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	f.backup()
	for _, accepted := range []bool{false, true, false} {
		key := f.configure(Settings{AcceptSingleHSM: &accepted})
		if warned := strings.Contains(strings.Join(key.Warnings, " "), "one HSM only"); warned == accepted {
			t.Errorf("accepted: %v, the warnings are %q", accepted, key.Warnings)
		}
	}
}

func TestAnErrorNamesADeviceOnce(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	raw := f.wrap("secret")
	f.devices.set("one", nil)
	f.restart()
	_, err := f.Unwrap(t.Context(), "prod", envelope.UseWrap, raw, []byte("ctx"))
	if err == nil || strings.Count(err.Error(), `device "one"`) != 1 {
		t.Errorf("got %v", err)
	}
}
