package backend

import (
	"net/http"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// Whoever may keep and open secrets of their own in material/ must not come by the keys of a cluster, or lose them, on the way:
// that wants a word which policies can deny.
func TestMaterialOfClustersIsGuarded(t *testing.T) {
	m, nodes := newPlayed(t, nodetest.Alone, 1)
	m.write("clusters/prod/init", nil).ok(t)
	forged := fields{"fields": fields{"x": "YQ=="}}
	for _, item := range []string{"unseal", "recovery", "root", "unseal.office", "held.unseal"} {
		m.write("material/prod/"+item, forged).want(t, http.StatusBadRequest).says(t, "custody")
	}
	m.write("material/prod/unseal/open", nil).want(t, http.StatusBadRequest).says(t, "reveal_keys=true")
	m.delete("material/prod/unseal", nil).want(t, http.StatusBadRequest).says(t, "discard_keys=true")

	m.write("material/prod/notes", fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "files"}).ok(t)
	m.write("material/prod/notes/open", nil).ok(t)
	m.delete("material/prod/notes", nil).ok(t)

	// Nor where the cluster was forgotten: its keys are still what opens it.
	config := m.read("clusters/prod").ok(t)
	m.delete("clusters/prod", fields{"force": true}).ok(t)
	m.write("material/prod/unseal", forged).want(t, http.StatusBadRequest).says(t, "custody")
	m.write("material/prod/unseal/open", nil).want(t, http.StatusBadRequest).says(t, "reveal_keys=true")
	m.delete("material/prod/unseal", nil).want(t, http.StatusBadRequest).says(t, "discard_keys=true")
	m.write("clusters/prod", fields{
		"nodes": nodes[0].Address(), "ca_cert": config.text("ca_cert"), "key": "prod", "store": "files", "accept_destination": true,
	}).ok(t)
	nodes[0].Restart()
	m.write("clusters/prod/unseal", nil).ok(t)

	shown, _ := m.write("material/prod/unseal/open", fields{"reveal_keys": true}).ok(t).data["fields"].(map[string]any)
	if len(shown) < 5 {
		t.Errorf("%d fields are shown", len(shown))
	}
	m.delete("material/prod/unseal", fields{"discard_keys": true}).ok(t)
	m.read("material/prod/unseal").want(t, http.StatusNotFound)
}

// A mount that lost its records, or is a new one, finds in the store what it has no record of.
func TestKeysThatAMountHasNoRecordOfAreGuarded(t *testing.T) {
	m, _ := newCustody(t)
	m.write("clusters/prod", clusterOf(t, nil)).ok(t)
	m.keep("prod")
	for key := range m.stored() {
		if strings.HasPrefix(key, materialPrefix) {
			if err := m.storage.Delete(t.Context(), key); err != nil {
				t.Fatal(err)
			}
		}
	}
	m.write("clusters/prod", fields{"nodes": "https://evil.example:8200"}).want(t, http.StatusBadRequest).says(t, "accept_destination=true")
	m.delete("clusters/prod", nil).want(t, http.StatusBadRequest).says(t, "force=true")
	m.delete("clusters/prod", fields{"force": true}).ok(t)
	m.write("clusters/prod", clusterOf(t, nil)).want(t, http.StatusBadRequest).says(t, "accept_destination=true")
}
