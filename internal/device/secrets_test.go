package device

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

func inTheClear(s Secrets) string {
	return fmt.Sprintf("%s/%s/%s/%s", s.PIN, s.Password, s.AdminPassword, s.UnlockPassphrase)
}

// fileConfig is a NetHSM whose secrets all lie in files of dir, and what they hold.
func fileConfig(t *testing.T, dir string) Config {
	t.Helper()
	config := validNetHSM()
	for _, secret := range config.SecretFields() {
		if *secret.Value != "" {
			must(t, os.WriteFile(filepath.Join(dir, secret.Name), []byte("planted "+secret.Name+"\n"), 0o600))
			*secret.Value, *secret.File = "", secret.Name
		}
	}
	return config
}

func TestEverySecretFileIsReadAnewWhenItChanges(t *testing.T) {
	dir := t.TempDir()
	config := fileConfig(t, dir)
	var opened []string
	var devices []*fakeDevice
	handle, err := New(Options{
		Secrets: SecretFiles{Dir: dir},
		Openers: map[string]Opener{TypeNetHSM: func(_ context.Context, _ string, _ Config, secrets Secrets) (hsm.Device, error) {
			opened = append(opened, inTheClear(secrets))
			devices = append(devices, &fakeDevice{})
			return devices[len(devices)-1], nil
		}},
	}).Open("mount", "net", config)
	must(t, err)
	use := func() {
		t.Helper()
		_, err := handle.Device(t.Context())
		must(t, err)
	}
	use()
	use()
	for i, file := range []string{"password", "admin_password", "unlock_passphrase"} {
		must(t, os.WriteFile(filepath.Join(dir, file), fmt.Appendf(nil, "rotated %d", i), 0o600))
		use()
		use()
		if !devices[i].closed.Load() {
			t.Errorf("after %s changed, the device opened before is still open", file)
		}
	}
	want := []string{
		"/planted password/planted admin_password/planted unlock_passphrase",
		"/rotated 0/planted admin_password/planted unlock_passphrase",
		"/rotated 0/rotated 1/planted unlock_passphrase",
		"/rotated 0/rotated 1/rotated 2",
	}
	if !slices.Equal(opened, want) {
		t.Errorf("opened with %q, want %q", opened, want)
	}
	must(t, os.Remove(filepath.Join(dir, "admin_password")))
	use()
	must(t, os.WriteFile(filepath.Join(dir, "admin_password"), []byte("rotated 1"), 0o600))
	must(t, os.Chtimes(filepath.Join(dir, "admin_password"), time.Time{}, time.Unix(1, 0)))
	use()
	if len(opened) != len(want) {
		t.Errorf("a file that was away for a moment opened the device anew: %q", opened)
	}
	must(t, handle.Close())
}

func TestSecretsPrintAsNothingAndAreWipedAfterTheOpening(t *testing.T) {
	var kept Secrets
	handle, err := New(Options{Openers: map[string]Opener{
		TypeNetHSM: func(_ context.Context, _ string, _ Config, secrets Secrets) (hsm.Device, error) {
			if printed := fmt.Sprintf("%v %+v %s %q", secrets, secrets, secrets, &secrets); strings.Contains(printed, "planted") {
				t.Errorf("they print as %s", printed)
			}
			kept = secrets
			return &fakeDevice{}, nil
		},
	}}).Open("mount", "net", validNetHSM())
	must(t, err)
	_, err = handle.Device(t.Context())
	must(t, err)
	if left := strings.Trim(inTheClear(kept), "/\x00"); left != "" || len(kept.Password) == 0 {
		t.Errorf("after the opening the secrets hold %q", left)
	}
	must(t, handle.Close())
}

func TestSecretsThatLookAlikeTogetherAreToldApart(t *testing.T) {
	key := []byte("key")
	one := Secrets{Password: []byte("ab"), AdminPassword: []byte("c")}
	other := Secrets{Password: []byte("a"), AdminPassword: []byte("bc")}
	if one.digest(key) == other.digest(key) || one.digest(key) != (Secrets{Password: []byte("ab"), AdminPassword: []byte("c")}).digest(key) {
		t.Error("the digests do not tell them apart")
	}
}

func TestEverySecretFileIsChecked(t *testing.T) {
	dir := t.TempDir()
	registry := New(Options{Secrets: SecretFiles{Dir: dir}, Openers: map[string]Opener{TypeNetHSM: nil}})
	config := fileConfig(t, dir)
	must(t, registry.Check(config))
	for _, file := range []string{"password", "admin_password", "unlock_passphrase"} {
		content, err := os.ReadFile(filepath.Join(dir, file))
		must(t, err)
		must(t, os.Remove(filepath.Join(dir, file)))
		if err := registry.Check(config); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), file) {
			t.Errorf("without %s: %v", file, err)
		}
		must(t, os.WriteFile(filepath.Join(dir, file), content, 0o600))
	}
	if err := registry.Check(valid()); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), `type "pkcs11" cannot be opened here`) {
		t.Errorf("a type without an opener: %v", err)
	}
}

func TestTheConfiguredPassphraseIsGivenToWhoeverUnlocks(t *testing.T) {
	dir := t.TempDir()
	inFile := fileConfig(t, dir)
	for name, test := range map[string]struct {
		config Config
		want   string
	}{
		"in the configuration": {validNetHSM(), "planted-passphrase"},
		"in a file":            {inFile, "planted unlock_passphrase"},
		"of a token":           {valid(), ""},
	} {
		t.Run(name, func(t *testing.T) {
			handle, err := New(Options{
				Secrets: SecretFiles{Dir: dir}, Openers: map[string]Opener{TypeNetHSM: nil, TypePKCS11: nil},
			}).Open("mount", "net", test.config)
			must(t, err)
			if got, err := handle.UnlockPassphrase(); err != nil || string(got) != test.want {
				t.Errorf("got %q, %v", got, err)
			}
			must(t, handle.Close())
		})
	}
	must(t, os.Remove(filepath.Join(dir, "unlock_passphrase")))
	handle, err := New(Options{Secrets: SecretFiles{Dir: dir}, Openers: map[string]Opener{TypeNetHSM: nil}}).Open("mount", "net", inFile)
	must(t, err)
	if _, err := handle.UnlockPassphrase(); !errors.Is(err, ErrConfig) {
		t.Errorf("without its file: %v", err)
	}
	must(t, handle.Close())
}
