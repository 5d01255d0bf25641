package device

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestACredentialIsReadFromWhereSystemdPutIt(t *testing.T) {
	handed, secrets := t.TempDir(), t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", handed)
	for name, mode := range map[string]os.FileMode{"pin": 0o400, "open": 0o666} {
		path := filepath.Join(handed, name)
		if err := os.WriteFile(path, []byte("648219\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(secrets, "outside"), []byte("271828"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(secrets, "outside"), filepath.Join(handed, "link")); err != nil {
		t.Fatal(err)
	}
	files := SecretFiles{Dir: secrets, Credentials: true}
	if got, err := files.Read("credential:pin"); err != nil || string(got) != "648219" {
		t.Errorf("read %q, %v", got, err)
	}
	if got, err := files.ReadPEM("credential:pin"); err != nil || string(got) != "648219\n" {
		t.Errorf("read as a key: %q, %v", got, err)
	}
	if files.state("credential:pin").info == nil {
		t.Error("a credential that is replaced is not noticed")
	}
	for name, test := range map[string]struct{ path, says string }{
		"one that was not handed over":    {"credential:other", "cannot be read"},
		"one that others may write":       {"credential:open", "chmod go-w"},
		"one that leads out of the place": {"credential:link", "cannot be read"},
		"one above":                       {"credential:..", "no file name"},
		"a path":                          {"credential:../" + filepath.Base(secrets) + "/outside", "no file name"},
		"none":                            {"credential:", "no file name"},
	} {
		if got, err := files.Read(test.path); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: read %q, %v", name, got, err)
		}
	}
	t.Run("not by a mount, which could name those of Vault's own unit", func(t *testing.T) {
		if got, err := (SecretFiles{Dir: secrets}).Read("credential:pin"); !errors.Is(err, ErrConfig) {
			t.Errorf("read %q, %v", got, err)
		}
	})
	t.Run("where systemd did not start the program", func(t *testing.T) {
		t.Setenv("CREDENTIALS_DIRECTORY", "")
		if _, err := files.Read("credential:pin"); !errors.Is(err, ErrConfig) || !errors.Is(err, ErrNoCredentials) ||
			!strings.Contains(err.Error(), "LoadCredential=pin:FILE") {
			t.Errorf("read: %v", err)
		}
	})
}
