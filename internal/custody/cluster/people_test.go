package cluster

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	v1 "github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
)

// today is when the people of these tests live.
var today = time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)

// newPerson makes a key as a person has one, made a year ago.
func newPerson(t *testing.T, name string, change func(*packet.Config)) *openpgp.Entity {
	t.Helper()
	config := &packet.Config{
		Algorithm: packet.PubKeyAlgoEdDSA, Curve: packet.Curve25519,
		Time: func() time.Time { return today.AddDate(-1, 0, 0) },
	}
	if change != nil {
		change(config)
	}
	entity, err := openpgp.NewEntity(name, "", strings.ToLower(name)+"@example.org", config)
	if err != nil {
		t.Fatal(err)
	}
	return entity
}

// publicKey is what a person gives away: the binary form.
func publicKey(t *testing.T, entity *openpgp.Entity) []byte {
	t.Helper()
	var binary bytes.Buffer
	if err := entity.Serialize(&binary); err != nil {
		t.Fatal(err)
	}
	return binary.Bytes()
}

func armored(t *testing.T, kind string, binary []byte) []byte {
	t.Helper()
	var text bytes.Buffer
	w, err := armor.Encode(&text, kind, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(binary); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return append(text.Bytes(), '\n')
}

func privateKey(t *testing.T, entity *openpgp.Entity) []byte {
	t.Helper()
	var binary bytes.Buffer
	if err := entity.SerializePrivateWithoutSigning(&binary, nil); err != nil {
		t.Fatal(err)
	}
	return binary.Bytes()
}

// decrypt opens an armored message as its recipient does.
func decrypt(t *testing.T, entity *openpgp.Entity, message []byte) []byte {
	t.Helper()
	block, err := armor.Decode(bytes.NewReader(message))
	if err != nil {
		t.Fatalf("the message is not armored: %v", err)
	}
	read, err := openpgp.ReadMessage(block.Body, openpgp.EntityList{entity}, nil, nil)
	if err != nil {
		t.Fatalf("the recipient cannot open the message: %v", err)
	}
	plaintext, err := io.ReadAll(read.UnverifiedBody)
	if err != nil {
		t.Fatal(err)
	}
	return plaintext
}

// vaultEncrypts does what Vault does with a share, or with a token, and a key that it was given.
func vaultEncrypts(t *testing.T, key string, plaintext []byte) []byte {
	t.Helper()
	binary, err := base64.StdEncoding.DecodeString(key)
	if err != nil {
		t.Fatal(err)
	}
	entity, err := v1.ReadEntity(packet.NewReader(bytes.NewReader(binary)))
	if err != nil {
		t.Fatalf("Vault could not read the key: %v", err)
	}
	var message bytes.Buffer
	body, err := v1.Encrypt(&message, []*v1.Entity{entity}, nil, nil, nil)
	if err != nil {
		t.Fatalf("Vault could not encrypt to the key: %v", err)
	}
	if _, err := body.Write(plaintext); err != nil {
		t.Fatal(err)
	}
	if err := body.Close(); err != nil {
		t.Fatal(err)
	}
	return message.Bytes()
}

func TestReadPGPKey(t *testing.T) {
	alice, bob := newPerson(t, "Alice", nil), newPerson(t, "Bob", nil)
	binary := publicKey(t, alice)
	both := append(bytes.Clone(binary), publicKey(t, bob)...)
	text := armored(t, openpgp.PublicKeyType, binary)
	damaged := bytes.Clone(text)
	copy(damaged[len(damaged)/2:], "!!!!")

	for name, test := range map[string]struct {
		raw  []byte
		want string // in the error; "" for none
	}{
		"a binary key":                      {binary, ""},
		"an armored key":                    {text, ""},
		"a key in base64":                   {[]byte(base64.StdEncoding.EncodeToString(binary) + "\n"), ""},
		"an armored key in a letter":        {append([]byte("Here it is, Alice\n\n"), text...), ""},
		"two keys, binary":                  {both, "more than one key"},
		"two keys in one armor":             {armored(t, openpgp.PublicKeyType, both), "more than one key"},
		"two armors":                        {append(bytes.Clone(text), armored(t, openpgp.PublicKeyType, publicKey(t, bob))...), "more than one key"},
		"a private key":                     {privateKey(t, alice), "PRIVATE key"},
		"an armored private key":            {armored(t, openpgp.PrivateKeyType, privateKey(t, alice)), "PRIVATE key"},
		"a private key under a false title": {armored(t, openpgp.PublicKeyType, privateKey(t, alice)), "PRIVATE key"},
		"nothing":                           {nil, "cannot be read"},
		"a sentence":                        {[]byte("keybase:alice"), "cannot be read"},
		"a damaged armor":                   {damaged, "armor"},
		"half a key":                        {binary[:len(binary)/2], "cannot be read"},
		"more than anybody has":             {make([]byte, maxPGPKey+1), "export that one key"},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := ReadPGPKey(test.raw)
			if test.want != "" {
				if !errors.Is(err, ErrPGPKey) || !strings.Contains(err.Error(), test.want) {
					t.Fatalf("ReadPGPKey = %v, want ErrPGPKey with %q", err, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := hex.EncodeToString(alice.PrimaryKey.Fingerprint); key.Fingerprint != want {
				t.Errorf("Fingerprint = %s, want %s", key.Fingerprint, want)
			}
			if want := "Alice <alice@example.org>"; key.Identity != want {
				t.Errorf("Identity = %q, want %q", key.Identity, want)
			}
		})
	}
}

func TestKeysThatNothingMustBeEncryptedTo(t *testing.T) {
	at := func(years int) *packet.Config {
		return &packet.Config{Time: func() time.Time { return today.AddDate(years, 0, 0) }}
	}
	revoked := newPerson(t, "Revoked", nil)
	if err := revoked.Revoke(packet.KeyRetired, "", at(0)); err != nil {
		t.Fatal(err)
	}
	subkeyRevoked := newPerson(t, "Subkey", nil)
	if err := subkeyRevoked.Subkeys[0].Revoke(packet.KeyRetired, "", at(0)); err != nil {
		t.Fatal(err)
	}
	signsOnly := newPerson(t, "Signer", nil)
	signsOnly.Subkeys = nil

	for name, test := range map[string]struct {
		entity *openpgp.Entity
		want   string // in the error; "" for none
	}{
		"a good key":                     {newPerson(t, "Alice", nil), ""},
		"an RSA key":                     {newPerson(t, "Rivest", func(c *packet.Config) { c.Algorithm = packet.PubKeyAlgoRSA }), ""},
		"a revoked key":                  {revoked, "was revoked"},
		"a key that has expired":         {newPerson(t, "Late", func(c *packet.Config) { c.KeyLifetimeSecs = 3600 }), "has expired"},
		"a revoked subkey":               {subkeyRevoked, "no subkey to encrypt to"},
		"a key that can only sign":       {signsOnly, "no subkey to encrypt to"},
		"a key from the future":          {newPerson(t, "Early", func(c *packet.Config) { c.Time = at(1).Time }), "ask its owner"},
		"a key that anybody could break": {newPerson(t, "Weak", func(c *packet.Config) { c.Algorithm, c.RSABits = packet.PubKeyAlgoRSA, 1024 }), "ask its owner"},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := ReadPGPKey(publicKey(t, test.entity))
			if err != nil {
				t.Fatalf("ReadPGPKey = %v; whether it may be used is another question", err)
			}
			_, forVault := key.forVault(today)
			message, encrypting := encryptTo([]*PGPKey{key}, []byte("x"), today)
			for _, err := range []error{forVault, encrypting} {
				switch {
				case test.want == "" && err != nil:
					t.Fatal(err)
				case test.want != "" && (!errors.Is(err, ErrPGPKey) || !strings.Contains(err.Error(), test.want)):
					t.Errorf("error = %v, want ErrPGPKey with %q", err, test.want)
				}
			}
			if test.want != "" && message != nil {
				t.Error("there is a message all the same")
			}
		})
	}
}

// Where a key has several subkeys, Vault would choose one by its own rules, those of an old Vault by older ones.
func TestVaultGetsNoKeyToChoose(t *testing.T) {
	alice := newPerson(t, "Alice", nil)
	if err := alice.AddEncryptionSubkey(&packet.Config{
		Algorithm: packet.PubKeyAlgoRSA, RSABits: 1024,
		Time: func() time.Time { return today.AddDate(0, -1, 0) },
	}); err != nil {
		t.Fatal(err)
	}
	if err := alice.AddUserId("Mallory", "", "mallory@example.org", &packet.Config{Time: func() time.Time { return today.AddDate(-2, 0, 0) }}); err != nil {
		t.Fatal(err)
	}
	key, err := ReadPGPKey(publicKey(t, alice))
	if err != nil {
		t.Fatal(err)
	}
	given, err := key.forVault(today)
	if err != nil {
		t.Fatal(err)
	}
	binary, err := base64.StdEncoding.DecodeString(given)
	if err != nil {
		t.Fatal(err)
	}
	entity, err := v1.ReadEntity(packet.NewReader(bytes.NewReader(binary)))
	if err != nil {
		t.Fatal(err)
	}
	if len(entity.Subkeys) != 1 || entity.Subkeys[0].PublicKey.PubKeyAlgo == packet.PubKeyAlgoRSA || len(entity.Identities) != 1 {
		t.Errorf("Vault gets %d subkeys and %d identities, want the strong subkey and one identity", len(entity.Subkeys), len(entity.Identities))
	}
	if hex.EncodeToString(entity.PrimaryKey.Fingerprint) != key.Fingerprint {
		t.Error("its fingerprint is another one")
	}
	message := armored(t, openpgp.MessageType, vaultEncrypts(t, given, []byte("00ff")))
	if got := decrypt(t, alice, message); string(got) != "00ff" {
		t.Errorf("Alice reads %q", got)
	}
}

func TestAnyOfTheRecipientsOpensAMessage(t *testing.T) {
	alice, bob := newPerson(t, "Alice", nil), newPerson(t, "Bob", func(c *packet.Config) { c.Algorithm = packet.PubKeyAlgoRSA })
	var keys []*PGPKey
	for _, person := range []*openpgp.Entity{alice, bob} {
		key, err := ReadPGPKey(publicKey(t, person))
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, key)
	}
	message, err := encryptTo(keys, []byte("a share"), today)
	if err != nil {
		t.Fatal(err)
	}
	for _, person := range []*openpgp.Entity{alice, bob} {
		if got := decrypt(t, person, message); string(got) != "a share" {
			t.Errorf("%v reads %q", person.PrimaryKey.KeyIdString(), got)
		}
	}
	if bytes.Contains(message, []byte("a share")) {
		t.Error("the message holds the plaintext")
	}
	if _, err := encryptTo(nil, []byte("a share"), today); !errors.Is(err, ErrPGPKey) {
		t.Errorf("encrypting to nobody = %v, want ErrPGPKey", err)
	}
}

func init() { // making RSA keys would take most of the time of the tests
	ownKeyKind = packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Curve: packet.Curve25519}
}

func TestOwnKeyOpensWhatVaultEncryptsToIt(t *testing.T) {
	fast := ownKeyKind
	defer func() { ownKeyKind = fast }()
	ownKeyKind = packet.Config{Algorithm: packet.PubKeyAlgoRSA, RSABits: 2048}
	own, err := newOwnKey(time.Now()) // Vault goes by its own clock
	if err != nil {
		t.Fatal(err)
	}
	share := bytes.Repeat([]byte{0xa5}, 33)
	message := vaultEncrypts(t, own.forVault(), []byte(hex.EncodeToString(share)))
	got, err := own.openShare(message)
	if err != nil || !bytes.Equal(got, share) {
		t.Fatalf("openShare = %x, %v", got, err)
	}
	token := []byte("hvs.0123456789")
	if got, err := own.open(vaultEncrypts(t, own.forVault(), token)); err != nil || !bytes.Equal(got, token) {
		t.Fatalf("open = %q, %v", got, err)
	}

	other, err := newOwnKey(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if own.fingerprint() == other.fingerprint() || len(own.fingerprint()) != 40 {
		t.Errorf("fingerprints %s and %s", own.fingerprint(), other.fingerprint())
	}
	cut := message[:len(message)-4]
	changed := bytes.Clone(message)
	changed[len(changed)-1] ^= 1
	for name, message := range map[string][]byte{
		"to somebody else":   vaultEncrypts(t, other.forVault(), []byte(hex.EncodeToString(share))),
		"cut short":          cut,
		"changed":            changed,
		"no message":         []byte("hello"),
		"nothing":            nil,
		"too long":           vaultEncrypts(t, own.forVault(), bytes.Repeat([]byte("a"), maxPGPMessage+1)),
		"no hexadecimal":     vaultEncrypts(t, own.forVault(), []byte("not hexadecimal!")),
		"an empty one":       vaultEncrypts(t, own.forVault(), nil),
		"half a hexadecimal": vaultEncrypts(t, own.forVault(), []byte("abc")),
	} {
		t.Run(name, func(t *testing.T) {
			if got, err := own.openShare(message); err == nil {
				t.Fatalf("openShare = %x, want an error", got)
			} else if strings.Contains(err.Error(), "a5a5") || strings.Contains(err.Error(), "not hexadecimal!") {
				t.Errorf("the error tells the plaintext: %v", err)
			}
		})
	}
}

// GnuPG, which people have, reads our messages and gives us keys.
func TestGnuPGAgrees(t *testing.T) {
	gpg, err := exec.LookPath("gpg")
	if err != nil {
		t.Skip("gpg is not installed")
	}
	home := t.TempDir()
	run := func(stdin []byte, args ...string) []byte {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), gpg, append([]string{"--homedir", home, "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""}, args...)...)
		cmd.Stdin = bytes.NewReader(stdin)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %q: %v: %s", args, err, &stderr)
		}
		return out
	}
	t.Cleanup(func() {
		if killer, err := exec.LookPath("gpgconf"); err == nil {
			_ = exec.Command(killer, "--homedir", home, "--kill", "all").Run() //nolint:noctx // the test's own context is over
		}
	})
	run(nil, "--quick-gen-key", "Alice <alice@example.org>", "future-default", "default", "1y")
	for _, args := range [][]string{{"--export"}, {"--armor", "--export"}} {
		key, err := ReadPGPKey(run(nil, append(args, "alice@example.org")...))
		if err != nil {
			t.Fatalf("gpg %q: %v", args, err)
		}
		message, err := encryptTo([]*PGPKey{key}, []byte("a share"), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if got := run(message, "--decrypt"); string(got) != "a share" {
			t.Errorf("gpg reads %q", got)
		}
		given, err := key.forVault(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "share.pgp")
		if err := os.WriteFile(file, vaultEncrypts(t, given, []byte("00ff")), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := run(nil, "--decrypt", file); string(got) != "00ff" {
			t.Errorf("gpg reads %q of Vault's message", got)
		}
		binary, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text, err := armorMessage(binary)
		if err != nil {
			t.Fatal(err)
		}
		if got := run(text, "--decrypt"); string(got) != "00ff" {
			t.Errorf("gpg reads %q of Vault's message in armor", got)
		}
	}
	private := run(nil, "--armor", "--export-secret-keys", "alice@example.org")
	if _, err := ReadPGPKey(private); !errors.Is(err, ErrPGPKey) {
		t.Errorf("a private key = %v, want ErrPGPKey", err)
	}
}

// Whatever lies in a person's file, it is read or refused.
func FuzzReadPGPKey(f *testing.F) {
	alice, err := openpgp.NewEntity("Alice", "", "alice@example.org", &packet.Config{Algorithm: packet.PubKeyAlgoEdDSA, Curve: packet.Curve25519})
	if err != nil {
		f.Fatal(err)
	}
	var binary bytes.Buffer
	if err := alice.Serialize(&binary); err != nil {
		f.Fatal(err)
	}
	f.Add(binary.Bytes())
	f.Add([]byte("-----BEGIN PGP PUBLIC KEY BLOCK-----\n\nmDMEaA==\n-----END PGP PUBLIC KEY BLOCK-----\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		key, err := ReadPGPKey(raw)
		if err != nil {
			if !errors.Is(err, ErrPGPKey) {
				t.Errorf("error = %v, want ErrPGPKey", err)
			}
			return
		}
		if strings.ContainsAny(key.String(), "\n\r\x1b") {
			t.Errorf("its name would write on the terminal: %q", key)
		}
		if _, err := encryptTo([]*PGPKey{key}, []byte("x"), time.Now()); err != nil && !errors.Is(err, ErrPGPKey) {
			t.Logf("encrypting to it: %v", err) // a key that promises what it cannot do
		}
	})
}
