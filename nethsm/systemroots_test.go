package nethsm

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// asksByTheSystemsRoots names, in the environment, the node that a process of this test asks.
const asksByTheSystemsRoots = "NITROSEAL_TEST_ASKS_BY_THE_SYSTEMS_ROOTS"

// Without a CA and without pins the system's roots are trusted. Go reads them once for each process, so another process
// asks, whose system trusts the CA of the double and nobody else.
func TestTheSystemsRootsAreTrustedWhereNothingElseIsGiven(t *testing.T) {
	if url := os.Getenv(asksByTheSystemsRoots); url != "" {
		client := reach(t, Options{}, url).As(Credentials{
			Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase),
		})
		if err := ask(t.Context(), client); err != nil {
			t.Fatal(err)
		}
		return
	}
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	if err := ask(t.Context(), operatorOf(t, h, TLS{})); !errors.As(err, new(*CertificateError)) {
		t.Errorf("error = %v, want a CertificateError: no system trusts this CA", err)
	}
	roots := t.TempDir()
	if err := os.WriteFile(filepath.Join(roots, "ca.pem"), h.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	asks := exec.CommandContext(t.Context(), self, "-test.run=^"+t.Name()+"$")
	asks.Env = append(os.Environ(), asksByTheSystemsRoots+"="+h.URLs()[0], "SSL_CERT_FILE="+filepath.Join(roots, "ca.pem"), "SSL_CERT_DIR="+roots)
	if said, err := asks.CombinedOutput(); err != nil {
		t.Errorf("the node is not trusted: %v\n%s", err, said)
	}
}
