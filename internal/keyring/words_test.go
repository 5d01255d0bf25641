package keyring

import (
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

func TestSentencesSpeakTheWordsOfTheirEntrance(t *testing.T) {
	f := newFixture(t)
	f.Keyring = New(Config{Records: f.store, Devices: f.devices, Now: f.clock.Now, Words: &Words{
		Home: "THIS-DISK",
		Read: func(key string) string { return "READ-" + key },
		Set:  func(key, setting string) string { return "SET-" + key + "-" + setting },
		Ask:  func(what string) string { return "ASK-" + what },
	}})
	key := f.adopt()
	warned := strings.Join(key.Warnings, "\n")
	for _, want := range []string{"once THIS-DISK is lost", "READ-prod and keep it", "SET-prod-backup_confirmed"} {
		if !strings.Contains(warned, want) {
			t.Errorf("the warnings lack %q:\n%s", want, warned)
		}
	}
	f.one.SetTraits("02", hsm.Traits{Extractable: true})
	_, weak := f.Adopt(t.Context(), "weak", AdoptRequest{Device: "one", Label: "rsa", By: "alice"})
	deletion := f.Delete(t.Context(), "prod", DeleteRequest{By: "alice"})
	unread := f.Ready(t.Context(), "prod", PurposeCluster)
	f.backup()
	single := f.Ready(t.Context(), "prod", PurposeCluster)
	for _, test := range []struct {
		err, is error
		want    string
	}{
		{weak, ErrWeakKey, "ASK-accept_weak_key"},
		{deletion, ErrDeletionNotAllowed, "SET-prod-deletion_allowed"},
		{unread, ErrNotReady, "READ-prod"},
		{single, ErrNotReady, "SET-prod-accept_single_hsm"},
	} {
		if !errors.Is(test.err, test.is) || !strings.Contains(test.err.Error(), test.want) {
			t.Errorf("%v: want %v with %q", test.err, test.is, test.want)
		}
		for _, foreign := range []string{"mount", "keys/prod", "=true"} {
			if test.err != nil && strings.Contains(test.err.Error(), foreign) {
				t.Errorf("%v: %q is another entrance's word", test.err, foreign)
			}
		}
	}
}
