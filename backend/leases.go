package backend

import (
	"fmt"
	"time"

	"github.com/hashicorp/vault/sdk/framework"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// A wrapping key with a lease keeps its opened key encryption key in this process's memory. The leases end before their time
// where Vault ends the mount (it seals, unmounts, reloads the plugin: clean), and where somebody takes an HSM out of use
// (locks the device or deletes it): whoever does that wants nothing to open any more.

// leaseField is the setting of a wrapping key.
func leaseField() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type: framework.TypeDurationSecond,
		Description: fmt.Sprintf("How long decrypt/ goes on without the HSM after one operation in it: 0, the default, makes every opening an "+
			"operation in the HSM; %v to %v hold an opened key encryption key in this process's memory for that time.",
			keyring.MinLease, keyring.MaxLease),
	}
}

// leasesField describes what a wrapping key's leases are shown as.
func leasesField() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type: framework.TypeSlice,
		Description: "The key encryption keys that this process holds open now, each with its version, kek (its id), until, and locked: " +
			"whether its memory is kept out of swap space.",
	}
}

// showLeases shows the open leases of a wrapping key.
func (b *backend) showLeases(name string) []any {
	shown := []any{}
	for _, lease := range b.keys.Leases() {
		if lease.Key == name {
			shown = append(shown, map[string]any{
				"version": lease.Version, "kek": lease.KID, "until": stamp(lease.Until), "locked": lease.Locked,
			})
		}
	}
	return shown
}

// leasesHealth shows all leases, by the names of their wrapping keys.
func (b *backend) leasesHealth() map[string]any {
	shown := map[string]any{}
	for _, lease := range b.keys.Leases() {
		if shown[lease.Key] == nil {
			shown[lease.Key] = b.showLeases(lease.Key)
		}
	}
	return shown
}

// seconds is a time as fields of TypeDurationSecond are read.
func seconds(d time.Duration) int64 { return int64(d / time.Second) }
