package token

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/store"
)

func TestNoTokenIsGoodThatNobodyHolds(t *testing.T) {
	spec := Spec{Name: "prod", Keys: []string{"prod"}}
	full := errors.New("the disk is full")
	for sentence, test := range map[string]struct {
		keep  error
		fails func(shelf *shelf) func(operation, name string) error
		left  int
	}{
		"the holder's copy cannot be kept": {keep: full},
		"the store is full": {fails: func(*shelf) func(string, string) error {
			return func(operation, _ string) error {
				if operation == "put" {
					return store.ErrFull
				}
				return nil
			}
		}},
		"the store writes it, and says that it did not": {fails: func(shelf *shelf) func(string, string) error {
			return func(operation, name string) error {
				if operation != "put" {
					return nil
				}
				_, err := shelf.Store.Put(t.Context(), name, []byte("written"), store.NoRevision)
				return errors.Join(store.ErrUnavailable, err)
			}
		}},
		"the store writes it, and is gone": {left: 1, fails: func(shelf *shelf) func(string, string) error {
			return func(operation, name string) error {
				if operation == "put" {
					_, _ = shelf.Store.Put(t.Context(), name, []byte("written"), store.NoRevision)
				}
				return store.ErrUnavailable
			}
		}},
	} {
		t.Run(sentence, func(t *testing.T) {
			shelf := newShelf(t)
			if test.fails != nil {
				shelf.fail(test.fails(shelf))
			}
			var kept []byte
			_, text, err := Create(t.Context(), shelf, spec, func(text []byte) error { kept = text; return test.keep })
			if err == nil || text != nil {
				t.Fatalf("created %q, %v", text, err)
			}
			if strings.Trim(string(kept), "\x00") != "" {
				t.Error("the secret was not wiped")
			}
			shelf.fail(nil)
			names, err2 := shelf.List(t.Context(), folder)
			if err2 != nil || len(names) != test.left {
				t.Errorf("left are %q, %v", names, err2)
			}
			if test.left > 0 && !strings.Contains(err.Error(), "revoke "+strings.TrimPrefix(names[0], folder)) {
				t.Errorf("the error %q does not say what to do", err)
			}
		})
	}
}

func TestATokenPastedInPlaceOfItsIDIsNotRepeated(t *testing.T) {
	shelf := newShelf(t)
	made, text := prod(t, shelf)
	_, err := Revoke(t.Context(), shelf, text)
	if !errors.Is(err, ErrInvalid) || strings.Contains(err.Error(), text[len(text)-secretChars:]) || !strings.Contains(err.Error(), made.ID) {
		t.Errorf("error %v", err)
	}
	for _, part := range []string{text[:len(text)-3], text + "x", text[3:]} {
		if _, err := Revoke(t.Context(), shelf, part); !errors.Is(err, ErrInvalid) || strings.Contains(err.Error(), part[14:]) {
			t.Errorf("a part of it: %v", err)
		}
	}
	if _, err := Revoke(t.Context(), shelf, "prod"); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "token list") {
		t.Errorf("error %v", err)
	}
}

func TestTheOthersAreRevokedAlthoughOneIsNotThere(t *testing.T) {
	shelf := newShelf(t)
	one, _ := prod(t, shelf)
	two, _ := prod(t, shelf)
	revoked, err := Revoke(t.Context(), shelf, one.ID, "aaaaaaaaaa", two.ID, one.ID)
	if !errors.Is(err, ErrUnknown) || !slices.Equal(revoked, []string{one.ID, two.ID}) {
		t.Errorf("revoked %q, %v", revoked, err)
	}
}

func TestTheListIsByNameAndThenByAge(t *testing.T) {
	shelf := newShelf(t)
	for _, name := range []string{"b", "a", "c"} {
		create(t, shelf, Spec{Name: name, Keys: []string{"prod"}})
	}
	listed, err := List(t.Context(), shelf)
	var names []string
	for _, one := range listed {
		names = append(names, one.Name)
	}
	if err != nil || !slices.Equal(names, []string{"a", "b", "c"}) {
		t.Errorf("%q, %v", names, err)
	}
	shelf.leave()
	if _, err := List(t.Context(), shelf); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("a store that is away: %v", err)
	}
}
