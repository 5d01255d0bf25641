//go:build cgo

package modhost

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// stub builds testdata/stub.c with these faults.
func stub(t testing.TB, faults ...string) string {
	t.Helper()
	module := filepath.Join(t.TempDir(), "stub.so")
	args := []string{"-shared", "-fPIC", "-o", module, "testdata/stub.c"}
	for _, fault := range faults {
		args = append(args, "-D"+fault)
	}
	if out, err := exec.CommandContext(t.Context(), "gcc", args...).CombinedOutput(); err != nil {
		t.Fatalf("building a module: %v\n%s", err, out)
	}
	return module
}

func TestModulesThatCannotBeLoaded(t *testing.T) {
	noLibrary := filepath.Join(t.TempDir(), "notes.so")
	if err := os.WriteFile(noLibrary, []byte(strings.Repeat("this is no library\n", 100)), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		module string
		code   uint
		detail string
	}{
		"no such file":                      {"/nowhere/module.so", wire.CodeLoad, "/nowhere/module.so: cannot open shared object file"},
		"a file that is no library":         {noLibrary, wire.CodeLoad, "invalid ELF header"},
		"a directory":                       {t.TempDir(), wire.CodeLoad, "cannot read file data: Is a directory"},
		"a library that is no module":       {stub(t, "NO_SYMBOL"), wire.CodeLoad, "undefined symbol: C_GetFunctionList"},
		"a library that lacks another":      {stub(t, "MISSING"), wire.CodeLoad, "undefined symbol: nobody_has_this"},
		"one whose list cannot be had":      {stub(t, "LIST_FAILS"), wire.CodeLoad, "CKR_GENERAL_ERROR"},
		"one whose list can be had once":    {stub(t, "SECOND_LIST_FAILS"), wire.CodeLoad, "gave no list"},
		"one that gives no list":            {stub(t, "NO_LIST"), wire.CodeLoad, "gave no list"},
		"one of another version":            {stub(t, "VERSION=1"), wire.CodeLoad, "version 1"},
		"one that lacks a function":         {stub(t, "HOLE"), wire.CodeLoad, "holes"},
		"one that cannot initialise itself": {stub(t, "INITIALIZE=0x30"), 0x30, ""},
	} {
		t.Run(name, func(t *testing.T) {
			h := startHost(t)
			_, err := h.hello(c.module)
			if failure := asFailure(t, err); failure.Code != c.code || !strings.Contains(failure.Detail, c.detail) {
				t.Errorf("%v does not say %q", failure, c.detail)
			}
			// The host is alive, and waits for its end.
			_, err = h.hello(c.module)
			wantCode(t, err, wire.CodeBadRequest)
		})
	}
}

func TestWhatAModuleTellsOfItself(t *testing.T) {
	reply, err := startHost(t).hello(stub(t, "VERSION=3"))
	if err != nil {
		t.Fatal(err)
	}
	if reply.Version != wire.Version || reply.Manufacturer != "M" || reply.Library != "" || reply.CryptokiVersion != "2.40" {
		t.Errorf("got %+v", reply)
	}
}

func TestAModuleThatCrashesTakesOnlyItsHost(t *testing.T) {
	h := startHost(t)
	if _, err := h.hello(stub(t, "SLOTS=crash")); err != nil {
		t.Fatal(err)
	}
	if _, err := h.call(wire.OpSlots, nil, nil, nil); !errors.Is(err, errHostGone) {
		t.Errorf("got %v, want the end of the host", err)
	}
	h.waitExit()
	var exit *exec.ExitError
	if !errors.As(h.exit, &exit) {
		t.Errorf("the host ended with %v", h.exit)
	}
}

func TestAModuleThatRefuses(t *testing.T) {
	h := startHost(t)
	if _, err := h.hello(stub(t)); err != nil {
		t.Fatal(err)
	}
	_, err := h.call(wire.OpSlots, nil, nil, nil)
	if failure := asFailure(t, err); failure.Code != 0x54 || failure.Function != "C_GetSlotList" {
		t.Errorf("got %v", failure)
	}
	_, err = h.call(wire.OpLogin, wire.SlotRequest{}, []byte("123456"), nil)
	if failure := asFailure(t, err); failure.Code != 0x54 || failure.Function != "C_OpenSession" {
		t.Errorf("got %v", failure)
	}
}
