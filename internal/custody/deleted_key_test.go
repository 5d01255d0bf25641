package custody_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// cachedKeys seals with keys that it remembers, as the mount's keyring does, and calls a hook after each sealing.
type cachedKeys struct {
	*keyring.Keyring
	sealed func()
}

func (c *cachedKeys) Seal(ctx context.Context, name string, context envelope.Context, payload []byte) (keyring.Sealed, error) {
	sealed, err := c.Keyring.Seal(ctx, name, context, payload)
	if c.sealed != nil {
		c.sealed()
	}
	return sealed, err
}

// hookStore calls a hook after each write.
type hookStore struct {
	store.Store
	put func()
}

func (h hookStore) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	revision, err := h.Store.Put(ctx, name, value, expected)
	h.put()
	return revision, err
}

func TestMaterialWhoseKeyIsDeletedMeanwhileIsNotTakenForStored(t *testing.T) {
	for _, moment := range []string{"before it is stored", "after it was stored"} {
		t.Run(moment, func(t *testing.T) {
			h := newHouse(t)
			h.put("prod", "unseal", "old")
			yes := true
			if _, err := h.keys.Configure(t.Context(), "other", keyring.Settings{DeletionAllowed: &yes}); err != nil {
				t.Fatal(err)
			}
			remove := func() {
				if err := h.keys.Delete(context.Background(), "other", keyring.DeleteRequest{}); err != nil {
					t.Error(err)
				}
			}
			keys, stores := &cachedKeys{Keyring: h.keys}, stores{"main": h.stores["main"]}
			if moment == "before it is stored" {
				keys.sealed = remove
			} else {
				stores["main"] = hookStore{h.stores["main"], remove}
			}
			keeper := custody.New(custody.Config{Keys: keys, Stores: storesOnly(stores), Records: h.records})
			_, err := keeper.Put(t.Context(), "prod", "unseal", text("new"), custody.PutOptions{Key: "other"})
			if !errors.Is(err, keyring.ErrKeyNotFound) {
				t.Fatalf("writing = %v, want ErrKeyNotFound", err)
			}
			if moment == "before it is stored" {
				h.wantOpen("prod", "unseal", "old")
			} else if !strings.Contains(err.Error(), "write it again with another key") {
				t.Errorf("%q does not say what to do", err)
			}
			h.put("prod", "unseal", "newest")
			h.wantOpen("prod", "unseal", "newest")
		})
	}
}

type storesOnly stores

func (s storesOnly) Store(_ context.Context, name string) (store.Store, error) { return s[name], nil }
