package main

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// kept is a configuration whose cluster is in custody.
func kept(t *testing.T) (configuration string, n *nodetest.Node) {
	t.Helper()
	n = nodetest.Start(t, nodetest.Options{})
	configuration = inCustody(t, rsaToken(t), n)
	must(t, configuration, "init", "prod")
	return configuration, n
}

// alice is a person with a key, and the file with its public half.
func alice(t *testing.T) (entity *openpgp.Entity, path string) {
	t.Helper()
	entity, err := openpgp.NewEntity("Alice", "", "alice@example.org", nil)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), "alice.pgp")
	var public bytes.Buffer
	if err := errors.Join(entity.Serialize(&public), os.WriteFile(path, public.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	return entity, path
}

func reads(t *testing.T, entity *openpgp.Entity, text string) []byte {
	t.Helper()
	block, err := armor.Decode(strings.NewReader(text[strings.Index(text, "-----BEGIN PGP"):]))
	if err != nil {
		t.Fatal(err)
	}
	message, err := openpgp.ReadMessage(block.Body, openpgp.EntityList{entity}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(message.UnverifiedBody)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func TestWhatIsExportedCanBeImported(t *testing.T) {
	configuration, n := kept(t)
	entity, key := alice(t)
	plain := reads(t, entity, must(t, configuration, "export", "prod", "--pgp-key", key))
	for _, share := range n.Shares() {
		if !bytes.Contains(plain, base64.StdEncoding.AppendEncode(nil, share)) {
			t.Error("a share is missing")
		}
	}
	cmd := command(t, configuration, "import", "prod", "--replace", "--file", "-")
	cmd.Stdin = bytes.NewReader(plain)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "takes them") {
		t.Fatalf("import: %v\n%s", err, out)
	}
	n.Restart()
	must(t, configuration, "unseal", "prod")
	if n.Sealed() {
		t.Error("the node is sealed")
	}
}

func TestTheRootTokenIsNowhereButInTheCommand(t *testing.T) {
	configuration, n := kept(t)
	// The command tells the length of the token only; it also sees that nothing leads its Vault elsewhere.
	t.Setenv("VAULT_SKIP_VERIFY", "true")
	t.Setenv("VAULT_NAMESPACE", "team")
	out := must(t, configuration, "root", "prod", "--", "sh", "-c",
		`echo "${#VAULT_TOKEN} $VAULT_ADDR $VAULT_SKIP_VERIFY- $VAULT_NAMESPACE"; stat -c %a "$VAULT_CACERT"; echo "$VAULT_CACERT" >&2`)
	if want := fmt.Sprintf("28 %s - team\n600\n", n.Address()); !strings.Contains(out, want) {
		t.Errorf("it said %q, want %q", out, want)
	}
	lines := strings.Fields(out)
	if _, err := os.Stat(lines[len(lines)-1]); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the CA is left at %s", lines[len(lines)-1])
	}
	if n.Tokens() != 0 {
		t.Errorf("%d root tokens live", n.Tokens())
	}
	entity, key := alice(t)
	token := reads(t, entity, must(t, configuration, "root", "prod", "--pgp-key", key))
	if err := n.Client(t).LookupSelf(t.Context(), token); err != nil {
		t.Errorf("what Alice reads is no token: %v", err)
	}
}

func TestAnInterruptedCommandHasItsRootTokenRevoked(t *testing.T) {
	for name, signal := range map[string]os.Signal{"Ctrl-C": os.Interrupt, "SIGTERM": syscall.SIGTERM} {
		t.Run(name, func(t *testing.T) {
			configuration, n := kept(t)
			var said transcript
			cmd := command(t, configuration, "root", "prod", "--", "sh", "-c", `trap 'echo told; exit 3' TERM; echo ready; while :; do sleep 0.05; done`)
			cmd.Stdout, cmd.Stderr = &said, &said
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			until(t, "the command", func() bool { return strings.Contains(said.text(), "ready") })
			if n.Tokens() != 1 {
				t.Errorf("%d root tokens live, want the command's", n.Tokens())
			}
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			if got := code(t, cmd.Wait()); got != exitInterrupted || !strings.Contains(said.text(), "told") {
				t.Errorf("it ended with %d\n%s", got, said.text())
			}
			if n.Tokens() != 0 {
				t.Errorf("%d root tokens live", n.Tokens())
			}
		})
	}
}

func TestARootTokenThatIsLeftIsSaidAndRevoked(t *testing.T) {
	configuration, n := kept(t)
	n.Break("auth/token/revoke-self", -1, nodetest.Answer(http.StatusServiceUnavailable, 0, "try later"))
	out, err := command(t, configuration, "root", "prod", "--", "true").CombinedOutput()
	if got := code(t, err); got == 0 || !strings.Contains(string(out), "nitroseal root prod --revoke") {
		t.Errorf("it ended with %d\n%s", got, out)
	}
	n.Mend()
	if out, err := command(t, configuration, "verify").CombinedOutput(); code(t, err) != exitFailed || !strings.Contains(string(out), "still to be revoked") {
		t.Errorf("verify: %v\n%s", err, out)
	}
	must(t, configuration, "root", "prod", "--revoke")
	if n.Tokens() != 0 {
		t.Errorf("%d root tokens live", n.Tokens())
	}
	must(t, configuration, "verify", "--prove")
}

func TestARekeyThatIsInterruptedIsAsIfItHadNotBeen(t *testing.T) {
	configuration, n := kept(t)
	cmd, started := command(t, configuration, "rekey", "prod"), make(chan struct{})
	n.Break("sys/rekey/update", 1, nodetest.Then(func() { <-started; _ = cmd.Process.Kill() }))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	close(started)
	if err := cmd.Wait(); err == nil {
		t.Fatal("it was not killed")
	}
	if out := must(t, configuration, "rekey", "prod"); !strings.Contains(out, "has new keys") {
		t.Error(out)
	}
	n.Restart()
	must(t, configuration, "unseal", "prod")
	must(t, configuration, "verify", "--prove")
}

func TestSharesAreTypedHidden(t *testing.T) {
	configuration, n := kept(t)
	var typed []string
	for _, share := range n.Shares()[:3] {
		typed = append(typed, base64.StdEncoding.EncodeToString(share))
	}
	ours, theirs := terminal(t)
	var seen screen
	go seen.watch(ours) // ends with the terminal
	cmd := command(t, configuration, "import", "prod", "--replace")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs, theirs, theirs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, line := range []struct {
		number int
		text   string
	}{{1, typed[0]}, {2, "hunter2"}, {2, typed[0]}, {2, typed[1]}, {3, typed[2]}, {4, ""}} {
		prompt := fmt.Sprintf("Share %d (empty to end): ", line.number)
		until(t, prompt, func() bool { return strings.HasSuffix(seen.text(), prompt) && !echoes(t, theirs) })
		before := len(seen.text())
		if _, err := ours.WriteString(line.text + "\n"); err != nil {
			t.Fatal(err)
		}
		until(t, "an answer", func() bool { return len(seen.text()) > before })
	}
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, seen.text())
	}
	for _, wanted := range []string{"3 of 5 shares", "type it again", "typed already"} {
		if !strings.Contains(seen.text(), wanted) {
			t.Errorf("it does not say %q:\n%s", wanted, seen.text())
		}
	}
	for _, secret := range append(typed, "hunter2") {
		if strings.Contains(seen.text(), secret) {
			t.Error("what was typed is on the screen")
		}
	}
}
