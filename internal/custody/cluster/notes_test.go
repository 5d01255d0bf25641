package cluster

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// What lies on the local disk is read by later releases, too.
func TestNotesOnTheLocalDiskKeepTheirForm(t *testing.T) {
	at := time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)
	for name, test := range map[string]struct {
		note any
		want string
	}{
		"an attempt": {
			attempt{Format: attemptFormat, What: whatRekey, Node: "https://vault-1:8200", Fingerprint: "00ff", By: "alice", At: at},
			`{"format":1,"what":"rekey","node":"https://vault-1:8200","fingerprint":"00ff","by":"alice","at":"2026-03-01T03:00:00Z"}`,
		},
		"an import": {
			importNote{
				Format: importFormat, Origin: "0123", Kind: KindUnseal, By: "alice", At: at, Given: 3, Shares: 5, Threshold: 3,
				Items: []importedItem{{Item: "unseal", Key: "prod", Replaces: 7, Envelope: json.RawMessage(`{"ciphertext":"x"}`)}}, Drop: []string{"unseal.office"},
			},
			`{"format":1,"origin":"0123","kind":"unseal","by":"alice","at":"2026-03-01T03:00:00Z","given":3,"shares":5,"threshold":3,` +
				`"items":[{"item":"unseal","key":"prod","replaces":7,"envelope":{"ciphertext":"x"}}],"drop":["unseal.office"]}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			raw, err := json.Marshal(test.note)
			if err != nil {
				t.Fatal(err)
			}
			if string(raw) != test.want {
				t.Errorf("it is\n%s\nwant\n%s", raw, test.want)
			}
		})
	}
}

// A note that is damaged, or of a later release, is neither believed nor removed: it says what was under way.
func TestDamagedNotesStopWhatTheyAreAbout(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	k := y.process()
	for _, text := range []string{"", "{", "{}", `{"format":2,"fingerprint":"00"}`, `{"format":1,"fingerprint":"00","more":1}`, `{"format":1,"fingerprint":"00"} {}`} {
		for _, path := range []string{"attempts/prod/unseal", "attempts/prod/root", "imports/prod"} {
			y.must(k.putLocal(t.Context(), path, []byte(text)))
			var err error
			switch path {
			case "attempts/prod/unseal":
				_, err = k.Rekey(t.Context(), y.Cluster, RekeyOptions{})
			case "attempts/prod/root":
				_, err = k.Root(t.Context(), y.Cluster, RootOptions{Revoke: true})
			default:
				_, err = k.Import(t.Context(), y.Cluster, ImportRequest{Shares: y.nodes[0].Shares(), Replace: true})
			}
			if !errors.Is(err, ErrFacts) || !strings.Contains(err.Error(), path) {
				t.Errorf("with %q in %s: %v", text, path, err)
			}
			if _, err := y.local.Get(t.Context(), path); errors.Is(err, store.ErrNotFound) {
				t.Errorf("%s is gone", path)
			}
			y.must(k.deleteLocal(t.Context(), path))
		}
	}
	y.wantOneSet(KindUnseal)
}
