// Package autounseal tells the stories of Vaults that unseal themselves by an HSM: real Vaults, unmodified, whose stanza
// seal "transit" names a mount of the plugin in another Vault, or `nitroseal serve`.
//
// A story is a function of the table in stories_test.go. It gets a [SealServer] and a wrapping key of its own there, so that
// stories of one server are told at the same time: they wait for elections and for Vault's own pauses more than they work.
// Those that harm the server are told after them, one by one. [tell] tells them all; every server tells the same table with a
// SoftHSM and with a NetHSM double. What is told of one server alone is a [tale] as well.
package autounseal

import (
	"flag"
	"os"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	flag.Parse()
	// Two cores are enough for more than two stories at a time.
	if given := flag.Lookup("test.parallel"); given.Value.String() == given.DefValue {
		if err := flag.Set("test.parallel", "8"); err != nil {
			panic(err)
		}
	}
	os.Exit(vaulttest.Main(m))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
