package object_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/object"
	"vault-plugin-secrets-nitrokey/internal/store/storetest"
)

// open opens a store over a device. Stores with one state directory share a lock.
func open(t *testing.T, device hsm.ObjectStore, stateDir string) *object.Store {
	t.Helper()
	s, err := object.New(func(context.Context) (hsm.ObjectStore, error) { return device, nil },
		object.Config{Application: "test", StateDir: stateDir, Serial: "DENK0100001"})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ref(label string) hsm.ObjectRef { return hsm.ObjectRef{Application: "test", Label: label} }

func labels(t *testing.T, device hsm.ObjectStore) []string {
	t.Helper()
	refs, err := device.Objects(t.Context(), "test")
	if err != nil {
		t.Fatal(err)
	}
	var labels []string
	for _, ref := range refs {
		labels = append(labels, ref.Label)
	}
	return labels
}

func TestStore(t *testing.T) {
	storetest.TestStore(t, func(t *testing.T) storetest.Place {
		t.Helper()
		token, stateDir := hsmtest.NewMemory(), t.TempDir()
		return func() store.Store { return open(t, token.Attach(), stateDir) }
	}, storetest.Capabilities{MaxValue: object.MaxValueSize, MaxName: object.MaxNameLength})
}

func TestOnlyTheNewestGenerationIsKept(t *testing.T) {
	token := hsmtest.NewMemory()
	s := open(t, token, t.TempDir())
	revision := store.NoRevision
	for i := 1; i <= 12; i++ {
		next, err := s.Put(t.Context(), "material/prod/unseal", []byte("x"), revision)
		if err != nil {
			t.Fatal(err)
		}
		revision = next
		if got, want := labels(t, token), fmt.Sprintf("material/prod/unseal#%d", i); len(got) != 1 || got[0] != want {
			t.Fatalf("the token holds %q, want %q", got, want)
		}
	}
}

func TestFullTokenKeepsTheOldValue(t *testing.T) {
	token := hsmtest.NewMemory()
	s := open(t, token, t.TempDir())
	revision, err := s.Put(t.Context(), "a", []byte("old"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	token.SetCapacity(1)
	if _, err := s.Put(t.Context(), "a", []byte("new"), revision); !errors.Is(err, store.ErrFull) || !errors.Is(err, hsm.ErrFull) {
		t.Errorf("Put = %v, want ErrFull", err)
	}
	entry, err := s.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "old" || entry.Revision != revision {
		t.Errorf("Get = %q, %v, want the old value", entry.Value, err)
	}
}

func TestLeftoverOfACrashMakesRoomForTheNextWrite(t *testing.T) {
	token := hsmtest.NewMemory()
	s := open(t, token, t.TempDir())
	if _, err := s.Put(t.Context(), "a", []byte("old"), store.NoRevision); err != nil {
		t.Fatal(err)
	}
	token.AddObject(ref("a#2"), []byte("cut sh"))
	token.SetCapacity(2)
	entry, err := s.Get(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "a", []byte("new"), entry.Revision); err != nil {
		t.Errorf("Put = %v", err)
	}
	if got := labels(t, token); len(got) != 1 || got[0] != "a#3" {
		t.Errorf("the token holds %q, want a#3", got)
	}
}

func TestTwoObjectsOfOneGenerationAreAmbiguousAndKept(t *testing.T) {
	token := hsmtest.NewMemory()
	s := open(t, token, t.TempDir())
	revision, err := s.Put(t.Context(), "a", []byte("ours"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	value, err := token.ReadObject(t.Context(), ref("a#1"))
	if err != nil {
		t.Fatal(err)
	}
	token.AddObject(ref("a#1"), value)
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrAmbiguous) {
		t.Errorf("Get = %v, want ErrAmbiguous", err)
	}
	if _, err := s.Put(t.Context(), "a", nil, revision); !errors.Is(err, store.ErrAmbiguous) {
		t.Errorf("Put = %v, want ErrAmbiguous", err)
	}
	if err := s.Delete(t.Context(), "a", revision); !errors.Is(err, store.ErrAmbiguous) {
		t.Errorf("Delete = %v, want ErrAmbiguous", err)
	}
	if got := labels(t, token); len(got) != 2 {
		t.Errorf("the token holds %q, want both", got)
	}
	if names, err := s.List(t.Context(), ""); err != nil || len(names) != 1 {
		t.Errorf("List = %q, %v, want the name once", names, err)
	}
}

// meddler is a token on which somebody without our lock writes right after us.
type meddler struct {
	hsm.ObjectStore

	after func(written hsm.ObjectRef)
}

func (m meddler) WriteObject(ctx context.Context, ref hsm.ObjectRef, value []byte) error {
	err := m.ObjectStore.WriteObject(ctx, ref, value)
	m.after(ref)
	return err
}

func TestWriterWithoutOurLockIsNoticed(t *testing.T) {
	token := hsmtest.NewMemory()
	device := meddler{token, func(written hsm.ObjectRef) { token.AddObject(written, []byte("theirs")) }}
	s := open(t, device, t.TempDir())
	if _, err := s.Put(t.Context(), "a", []byte("ours"), store.NoRevision); !errors.Is(err, store.ErrAmbiguous) {
		t.Errorf("Put = %v, want ErrAmbiguous", err)
	}
	if got := labels(t, token); len(got) != 2 {
		t.Errorf("the token holds %q, want both", got)
	}
}

// refuser finds an object in the way of a write: what there returns of the bytes to be written, none for nil.
type refuser struct {
	hsm.ObjectStore
	there func(framed []byte) []byte
	read  error // what reading it gives instead
}

func (r refuser) WriteObject(ctx context.Context, ref hsm.ObjectRef, framed []byte) error {
	if there := r.there(framed); there != nil {
		if err := r.ObjectStore.WriteObject(ctx, ref, there); err != nil {
			return err
		}
	}
	return hsm.ErrExists
}

func (r refuser) ReadObject(ctx context.Context, ref hsm.ObjectRef) ([]byte, error) {
	if r.read != nil {
		return nil, r.read
	}
	return r.ObjectStore.ReadObject(ctx, ref)
}

func TestAnObjectInTheWayOfAWriteIsOursOrAConflict(t *testing.T) {
	same := func(framed []byte) []byte { return framed }
	for name, test := range map[string]struct {
		there func(framed []byte) []byte
		read  error
		want  error
	}{
		"another machine's value":  {there: func([]byte) []byte { return []byte("of another machine") }, want: store.ErrConflict},
		"the very value":           {there: same},
		"one that is gone again":   {there: func([]byte) []byte { return nil }, want: store.ErrUnavailable},
		"one that does not answer": {there: same, read: hsm.ErrUnavailable, want: store.ErrUnavailable},
		"two of them":              {there: same, read: hsm.ErrAmbiguous, want: store.ErrAmbiguous},
	} {
		t.Run(name, func(t *testing.T) {
			token := hsmtest.NewMemory()
			s := open(t, refuser{ObjectStore: token, there: test.there, read: test.read}, t.TempDir())
			revision, err := s.Put(t.Context(), "a", []byte("value"), store.NoRevision)
			if !errors.Is(err, test.want) {
				t.Fatalf("Put = %v, want %v", err, test.want)
			}
			if test.want == nil {
				entry, err := s.Get(t.Context(), "a")
				if err != nil || string(entry.Value) != "value" || entry.Revision != revision {
					t.Errorf("Get = %+v, %v; want the value at revision %q", entry, err, revision)
				}
			}
		})
	}
}

func TestApplicationsAreApart(t *testing.T) {
	token, stateDir := hsmtest.NewMemory(), t.TempDir()
	device := func(context.Context) (hsm.ObjectStore, error) { return token, nil }
	one, err := object.New(device, object.Config{Application: "one", StateDir: stateDir, Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	two, err := object.New(device, object.Config{StateDir: stateDir, Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one.Put(t.Context(), "a", nil, store.NoRevision); err != nil {
		t.Fatal(err)
	}
	if _, err := two.Get(t.Context(), "a"); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("Get in another application = %v, want ErrNotFound", err)
	}
}

func TestForeignObjectsAreLeftAlone(t *testing.T) {
	token := hsmtest.NewMemory()
	foreign := []string{"a", "a#", "a#0", "a#01", "a#x", "a#1#2", "#1", "a b#1", "a#18446744073709551616", strings.Repeat("n", 81) + "#1"}
	for _, label := range foreign {
		token.AddObject(ref(label), []byte("foreign"))
	}
	s := open(t, token, t.TempDir())
	if names, err := s.List(t.Context(), ""); err != nil || len(names) != 0 {
		t.Errorf("List = %q, %v, want none", names, err)
	}
	revision, err := s.Put(t.Context(), "a", nil, store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), "a", revision); err != nil {
		t.Fatal(err)
	}
	if got := labels(t, token); len(got) != len(foreign) {
		t.Errorf("the token holds %q, want the foreign ones", got)
	}
}

func TestNothingWholeIsCorruptAndKept(t *testing.T) {
	token := hsmtest.NewMemory()
	token.AddObject(ref("a#1"), []byte("damaged"))
	s := open(t, token, t.TempDir())
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Get = %v, want ErrCorrupt", err)
	}
	if _, err := s.Put(t.Context(), "a", nil, "1"); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Put = %v, want ErrCorrupt", err)
	}
	if err := s.Delete(t.Context(), "a", "1"); !errors.Is(err, store.ErrCorrupt) {
		t.Errorf("Delete = %v, want ErrCorrupt", err)
	}
	if got := labels(t, token); len(got) != 1 {
		t.Errorf("the token holds %q", got)
	}
}

func TestErrorsOfTheHSMKeepTheirMeaning(t *testing.T) {
	tests := map[string]struct{ hsm, want error }{
		"away":          {hsm.ErrUnavailable, store.ErrUnavailable},
		"locked":        {hsm.ErrLocked, store.ErrDenied},
		"wrong PIN":     {&hsm.PINError{TriesLeft: 2, Detail: "wrong PIN"}, store.ErrDenied},
		"no objects":    {hsm.ErrUnsupported, hsm.ErrUnsupported},
		"anything else": {errors.New("CKR_GENERAL_ERROR"), store.ErrUnavailable},
		"too late":      {context.DeadlineExceeded, context.DeadlineExceeded},
	}
	for sentence, test := range tests {
		t.Run(sentence, func(t *testing.T) {
			token := hsmtest.NewMemory()
			token.SetError(test.hsm)
			s := open(t, token, t.TempDir())
			_, getErr := s.Get(t.Context(), "a")
			_, putErr := s.Put(t.Context(), "a", nil, store.NoRevision)
			_, listErr := s.List(t.Context(), "")
			deleteErr := s.Delete(t.Context(), "a", "1")
			for doing, err := range map[string]error{"Get": getErr, "Put": putErr, "List": listErr, "Delete": deleteErr} {
				if !errors.Is(err, test.want) || !errors.Is(err, test.hsm) {
					t.Errorf("%s = %v, want %q and the HSM's own error", doing, err, test.want)
				}
			}
		})
	}
}

func TestDeviceThatCannotBeOpened(t *testing.T) {
	s, err := object.New(func(context.Context) (hsm.ObjectStore, error) { return nil, hsm.ErrUnavailable },
		object.Config{StateDir: t.TempDir(), Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Get = %v, want ErrUnavailable", err)
	}
}

func TestConfiguration(t *testing.T) {
	for sentence, config := range map[string]object.Config{
		"no serial number":         {StateDir: t.TempDir()},
		"no state directory":       {Serial: "1"},
		"application with a space": {Application: "a b", StateDir: t.TempDir(), Serial: "1"},
		"application too long":     {Application: strings.Repeat("a", 65), StateDir: t.TempDir(), Serial: "1"},
	} {
		if _, err := object.New(nil, config); err == nil {
			t.Errorf("%s: New = nil", sentence)
		}
	}
	dir := t.TempDir()
	s, err := object.New(func(context.Context) (hsm.ObjectStore, error) { return hsmtest.NewMemory(), nil },
		object.Config{StateDir: filepath.Join(dir, "state"), Serial: "../x y"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "a", nil, store.NoRevision); err != nil {
		t.Fatal(err)
	}
	if found, err := filepath.Glob(filepath.Join(dir, "state", "*.lock")); err != nil || len(found) != 1 {
		t.Errorf("lock files: %q, %v", found, err)
	}
}

func TestReadersSeeAWholeValueWhileItIsReplaced(t *testing.T) {
	token, stateDir := hsmtest.NewMemory(), t.TempDir()
	writer := open(t, token.Attach(), stateDir)
	revision, err := writer.Put(t.Context(), "a", bytes.Repeat([]byte{0}, 1000), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			reader := open(t, token.Attach(), stateDir)
			for ctx.Err() == nil {
				entry, err := reader.Get(t.Context(), "a")
				if errors.Is(err, store.ErrUnavailable) {
					continue // it changed faster than it could be read, and says so
				}
				if err != nil || len(entry.Value) != 1000 || !bytes.Equal(entry.Value, bytes.Repeat(entry.Value[:1], 1000)) {
					t.Errorf("Get = %d bytes, %v", len(entry.Value), err)
					return
				}
			}
		})
	}
	for i := range 200 {
		if revision, err = writer.Put(t.Context(), "a", bytes.Repeat([]byte{byte(i)}, 1000), revision); err != nil {
			t.Error(err)
			break
		}
	}
	stop()
	group.Wait()
}
