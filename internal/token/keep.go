package token

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// folder is where the items lie in a store.
const folder = "serve/tokens/"

// unsure is how long taking back a token may take whose making failed halfway, although the caller's time is up.
const unsure = 5 * time.Second

// Create makes a token, and returns its text, which nobody can have again and the caller wipes. keep is given the text before the
// token is stored, so that no token is good that nobody holds; where it fails, nothing is stored. keep may be nil.
func Create(ctx context.Context, in store.Store, spec Spec, keep func(text []byte) error) (Token, []byte, error) {
	t, text, err := spec.make(time.Now())
	if err != nil {
		return Token{}, nil, err
	}
	raw, err := encode(&t)
	if err == nil && keep != nil {
		err = keep(text)
	}
	if err != nil {
		clear(text)
		return Token{}, nil, err
	}
	if _, err := in.Put(ctx, folder+t.ID, raw, store.NoRevision); err != nil {
		clear(text)
		err = fmt.Errorf("storing token %q: %w", t.Name, err)
		if !errors.Is(err, store.ErrConflict) {
			err = takeBack(ctx, in, t.ID, err)
		}
		return Token{}, nil, err
	}
	return t, text, nil
}

// takeBack removes an item whose writing failed and may have happened all the same.
func takeBack(ctx context.Context, in store.Store, id string, failure error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unsure)
	defer cancel()
	if err := remove(ctx, in, id); err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("%w; it may be there all the same, and nobody needs it: revoke %s", failure, id)
	}
	return failure
}

func remove(ctx context.Context, from store.Store, id string) error {
	entry, err := from.Get(ctx, folder+id)
	if err != nil {
		return err
	}
	return from.Delete(ctx, folder+id, entry.Revision)
}

// CheckIDs returns [ErrInvalid] where one of these is no id of a token. What may be a token itself is not repeated.
func CheckIDs(ids ...string) error {
	for _, id := range ids {
		switch of := split(id); {
		case isID(id):
		case of != "":
			return fmt.Errorf("%w: this is a token itself, which now stands where it should not; its id is %s, the part after %q", ErrInvalid, of, prefix)
		case strings.HasPrefix(id, prefix) || len(id) > 2*idLength:
			return fmt.Errorf("%w: this is no id, and may be a part of a token; \"nitroseal serve token list\" shows the ids", ErrInvalid)
		default:
			return fmt.Errorf("%w: %q is no id; \"nitroseal serve token list\" shows the ids", ErrInvalid, id)
		}
	}
	return nil
}

// Revoke takes tokens out of the store. Servers do not know them any more within seconds. Ids that are not there are told together, when
// the others are gone; the result is what was revoked.
func Revoke(ctx context.Context, in store.Store, ids ...string) (revoked []string, err error) {
	if err := CheckIDs(ids...); err != nil {
		return nil, err
	}
	var errs []error
	for i, id := range ids {
		if slices.Contains(ids[:i], id) {
			continue
		}
		switch err := remove(ctx, in, id); {
		case errors.Is(err, store.ErrNotFound):
			errs = append(errs, fmt.Errorf("%w: %s", ErrUnknown, id))
		case err != nil:
			errs = append(errs, fmt.Errorf("revoking token %s: %w", id, err))
		default:
			revoked = append(revoked, id)
		}
	}
	return revoked, errors.Join(errs...)
}

// Listed is an item of the store.
type Listed struct {
	Token // only its ID where there is an error
	Err   error
}

// List returns all items, by name and then by age. Those that are no tokens are there with an error; nobody can use them, and
// Revoke removes them, but for those that the store itself calls damaged: its error says what to do about these.
func List(ctx context.Context, in store.Store) ([]Listed, error) {
	ids, err := list(ctx, in)
	if err != nil {
		return nil, err
	}
	var all []Listed
	for _, id := range ids {
		t, err := get(ctx, in, id)
		switch {
		case errors.Is(err, store.ErrNotFound): // revoked meanwhile
		case errors.Is(err, ErrMalformed):
			all = append(all, Listed{Token{ID: id}, err})
		case err != nil:
			return nil, err
		default:
			all = append(all, Listed{t, nil})
		}
	}
	slices.SortStableFunc(all, func(a, b Listed) int {
		if by := strings.Compare(a.Name, b.Name); by != 0 {
			return by
		}
		return a.Created.Compare(b.Created)
	})
	return all, nil
}

// list returns the ids of all items.
func list(ctx context.Context, in store.Store) ([]string, error) {
	names, err := in.List(ctx, folder)
	if err != nil {
		return nil, fmt.Errorf("listing the tokens: %w", err)
	}
	var ids []string
	for _, name := range names {
		if id := strings.TrimPrefix(name, folder); isID(id) { // all else was not written here
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// get reads an item, which must be of the id that it lies under.
func get(ctx context.Context, from store.Store, id string) (Token, error) {
	entry, err := from.Get(ctx, folder+id)
	if errors.Is(err, store.ErrCorrupt) || errors.Is(err, store.ErrAmbiguous) {
		return Token{}, fmt.Errorf("%w: token %s: %w", ErrMalformed, id, err)
	}
	if err != nil {
		return Token{}, fmt.Errorf("reading token %s: %w", id, err)
	}
	t, err := decode(entry.Value)
	if err == nil && t.ID != id {
		err = fmt.Errorf("%w: it is that of token %s", ErrMalformed, t.ID)
	}
	if err != nil {
		return Token{}, fmt.Errorf("token %s: %w", id, err)
	}
	return t, nil
}
