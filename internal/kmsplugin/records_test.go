package kmsplugin

import (
	"testing"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/storetest"
)

func TestRecordsAreAStore(t *testing.T) {
	storetest.TestStore(t, func(*testing.T) storetest.Place {
		place := newRecords()
		return func() store.Store { return place }
	}, storetest.Capabilities{})
}
