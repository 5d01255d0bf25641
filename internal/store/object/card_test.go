package object_test

import (
	"errors"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// A card that is full says OK and forgets (OpenSC 0.24 and later).
func TestFullCardKeepsTheOldValue(t *testing.T) {
	card, stateDir := pkcs11test.Card(t), t.TempDir()
	s := open(t, openToken(t, &card.Token, stateDir), stateDir)
	revision, err := s.Put(t.Context(), "a", []byte("old"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	card.Fault(t, pkcs11test.LostWrites)
	if _, err := s.Put(t.Context(), "a", []byte("new"), revision); !errors.Is(err, store.ErrFull) {
		t.Errorf("Put on a full card = %v, want ErrFull", err)
	}
	card.Mend(t, pkcs11test.LostWrites)
	entry, err := s.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "old" || entry.Revision != revision {
		t.Fatalf("Get = %q, %v, want the old value", entry.Value, err)
	}
	if _, err := s.Put(t.Context(), "a", []byte("new"), revision); err != nil {
		t.Errorf("Put after room was made = %v", err)
	}
}

// The module dies in the very call that writes or deletes; its host dies with it, and the store goes on with another.
func TestModuleThatCrashesInMidWriteLeavesOldOrNew(t *testing.T) {
	for _, function := range []string{"C_CreateObject", "C_DestroyObject"} {
		t.Run(function, func(t *testing.T) {
			card, stateDir := pkcs11test.Card(t), t.TempDir()
			device := openToken(t, &card.Token, stateDir)
			s := open(t, device, stateDir)
			revision, err := s.Put(t.Context(), "a", []byte("old"), store.NoRevision)
			if err != nil {
				t.Fatal(err)
			}
			card.Fault(t, pkcs11test.CrashesOnce(function))
			_, putErr := s.Put(t.Context(), "a", []byte("new"), revision)

			entry, err := s.Get(t.Context(), "a")
			if err != nil {
				t.Fatalf("Get after the crash = %v", err)
			}
			if found := string(entry.Value); found != "new" && (found != "old" || putErr == nil) {
				t.Fatalf("Get after the crash = %q, and Put was %v", found, putErr)
			}
			if _, err := s.Put(t.Context(), "a", []byte("next"), entry.Revision); err != nil {
				t.Fatalf("Put after the crash = %v", err)
			}
			if got := labels(t, device); len(got) != 1 {
				t.Errorf("the card holds %q, want one object", got)
			}
		})
	}
}

func TestCardThatWasAwayIsUsedAgain(t *testing.T) {
	card, stateDir := pkcs11test.Card(t), t.TempDir()
	s := open(t, openToken(t, &card.Token, stateDir), stateDir)
	revision, err := s.Put(t.Context(), "a", []byte("old"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	card.Remove(t, pkcs11test.ReaderRemoved)
	if _, err := s.Put(t.Context(), "a", []byte("new"), revision); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Put without the card = %v, want ErrUnavailable", err)
	}
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Get without the card = %v, want ErrUnavailable", err)
	}
	card.Return(t)
	entry, err := s.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "old" {
		t.Fatalf("Get from the returned card = %q, %v", entry.Value, err)
	}
	if _, err := s.Put(t.Context(), "a", []byte("new"), entry.Revision); err != nil {
		t.Errorf("Put on the returned card = %v", err)
	}
}
