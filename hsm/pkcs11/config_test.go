package pkcs11

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

func TestWhatAUserCanMendIsAnErrorOfTheConfiguration(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open.so")
	safe := filepath.Join(dir, "safe.so")
	for path, mode := range map[string]os.FileMode{open: 0o666, safe: 0o600} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	missing := filepath.Join(dir, "missing.so")
	slot := uint(1)
	for name, test := range map[string]struct {
		options Options
		config  Config
		says    string
	}{
		"a module that is not allowed":         {Options{Modules: []string{safe}}, Config{Module: open, Serial: "S"}, "not among those"},
		"no module allowed at all":             {Options{}, Config{Module: safe, Serial: "S"}, "-pkcs11-module"},
		"a module that is not there":           {Options{Modules: []string{missing}}, Config{Module: missing, Serial: "S"}, "there is no PKCS#11 module"},
		"a module that others may write":       {Options{Modules: []string{open}}, Config{Module: open, Serial: "S"}, "chmod go-w"},
		"a module that is a folder":            {Options{Modules: []string{dir}}, Config{Module: dir, Serial: "S"}, "not a regular file"},
		"no token chosen":                      {Options{Modules: []string{safe}}, Config{Module: safe}, "exactly one"},
		"two ways to the token":                {Options{Modules: []string{safe}}, Config{Module: safe, Serial: "S", Slot: &slot}, "exactly one"},
		"an environment that makes it talk":    {Options{Modules: []string{safe}, Env: []string{"OPENSC_DEBUG"}}, Config{Module: safe, Serial: "S"}, "OPENSC_DEBUG"},
		"less than no operation at one time":   {Options{Modules: []string{safe}}, Config{Module: safe, Serial: "S", Parallel: -1}, "-1"},
		"a limit that ended before it started": {Options{Modules: []string{safe}}, Config{Module: safe, Serial: "S", DecryptLimit: -1}, "negative"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(test.options).Open(t.Context(), test.config)
			if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("Open = %v, want an ErrConfig that says %q", err, test.says)
			}
		})
	}
	manager := New(Options{Modules: []string{safe}})
	if err := manager.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := manager.Open(t.Context(), Config{Module: safe, Serial: "S"}); errors.Is(err, ErrConfig) || !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("a manager that was closed gives %v: no configuration is wrong", err)
	}
}
