package object_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/object"
	"vault-plugin-secrets-nitrokey/internal/store/storetest"
)

// TestMain makes the test binary a module host where it is started as one.
func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	goleak.VerifyTestMain(m)
}

// openToken logs in to a token.
func openToken(t *testing.T, token *pkcs11test.Token, stateDir string) *pkcs11.Device {
	t.Helper()
	manager := pkcs11.New(pkcs11.Options{Modules: []string{token.Module}, StateDir: stateDir, Env: token.Env})
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Errorf("closing the manager: %v", err)
		}
	})
	device, err := manager.Open(t.Context(), pkcs11.Config{
		Module: token.Module, Serial: token.Serial, PIN: []byte(token.PIN), Owner: t.Name(),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = device.Close() }) // the manager closes it, too
	return device
}

// Every write costs two new module hosts, so the races are short.
func TestStoreOnSoftHSM(t *testing.T) {
	token, stateDir := pkcs11test.SoftHSM(t), t.TempDir()
	device := openToken(t, token, stateDir)
	places := 0
	storetest.TestStore(t, func(t *testing.T) storetest.Place {
		t.Helper()
		places++
		config := object.Config{Application: fmt.Sprintf("place%d", places), StateDir: stateDir, Serial: token.Serial}
		return func() store.Store {
			s, err := object.New(func(context.Context) (hsm.ObjectStore, error) { return device, nil }, config)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
	}, storetest.Capabilities{MaxValue: object.MaxValueSize, MaxName: object.MaxNameLength, Rounds: 3, Writers: 4})
}

func TestObjectsReadLikeAListOfContents(t *testing.T) {
	token, stateDir := pkcs11test.SoftHSM(t), t.TempDir()
	s := open(t, openToken(t, token, stateDir), stateDir)
	if _, err := s.Put(t.Context(), "material/prod/unseal", []byte(`{"jwe":"…"}`), store.NoRevision); err != nil {
		t.Fatal(err)
	}
	listed := token.Tool(t, "--list-objects", "--type", "data")
	for _, want := range []string{"material/prod/unseal#1", "'test'", "private"} {
		if !strings.Contains(listed, want) {
			t.Errorf("pkcs11-tool lists no %q:\n%s", want, listed)
		}
	}
	// The way back without this program: one line of header, then the envelope.
	read := token.Tool(t, "--read-object", "--type", "data",
		"--application-label", "test", "--label", "material/prod/unseal#1")
	if _, value, _ := strings.Cut(read, "\n"); !strings.HasSuffix(value, `{"jwe":"…"}`) {
		t.Errorf("pkcs11-tool reads:\n%s", read)
	}
}

func TestTwoMachinesWithOneTokenNoticeEachOther(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	one, two := t.TempDir(), t.TempDir() // state directories of different machines
	here, there := open(t, openToken(t, token, one), one), open(t, openToken(t, token, two), two)
	revision, err := here.Put(t.Context(), "a", []byte("1"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := there.Put(t.Context(), "a", []byte("2"), revision); err != nil {
		t.Fatal(err)
	}
	if _, err := here.Put(t.Context(), "a", []byte("3"), revision); !errors.Is(err, store.ErrConflict) {
		t.Errorf("Put = %v, want ErrConflict", err)
	}
	entry, err := here.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "2" {
		t.Errorf("Get = %q, %v", entry.Value, err)
	}
}
