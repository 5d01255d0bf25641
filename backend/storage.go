package backend

import (
	"context"
	"strings"

	"github.com/hashicorp/vault/sdk/logical"
)

// mountStorage is the mount's storage, whose refusal to write on this node keeps its identity. Between Vault and its
// plugins an error of the storage travels as text only, and Vault forwards a request to a node that may write only where
// the plugin answers with the sentinel itself: without this, the request would end as a 500.
type mountStorage struct{ logical.Storage }

func (s mountStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return identify(s.Storage.Put(ctx, entry))
}

func (s mountStorage) Delete(ctx context.Context, key string) error {
	return identify(s.Storage.Delete(ctx, key))
}

func identify(err error) error {
	if err != nil && strings.Contains(err.Error(), logical.ErrReadOnly.Error()) {
		return logical.ErrReadOnly
	}
	return err
}
