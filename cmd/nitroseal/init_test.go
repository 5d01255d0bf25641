package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

// A person may be called as the file of the root token is, and a file may come after the look whether it is there.
func TestAMessageIsNeverWrittenOverAnother(t *testing.T) {
	messages, c := messageFolder{dir: t.TempDir()}, &cluster.Cluster{Name: "prod", People: []cluster.Person{{Name: rootMessage}}}
	if err := messages.check(c); err != nil {
		t.Fatal(err)
	}
	path, err := messages.put(c, rootMessage, []byte("the share"))
	if err != nil || path != filepath.Join(messages.dir, "prod-root-token.asc") {
		t.Fatalf("put = %q, %v", path, err)
	}
	path, err = messages.put(c, rootMessage, []byte("the token"))
	if path != "" || err == nil || !strings.Contains(err.Error(), "is there already") || !strings.Contains(err.Error(), "printed") {
		t.Errorf("put again = %q, %v", path, err)
	}
	if kept, err := os.ReadFile(filepath.Join(messages.dir, "prod-root-token.asc")); err != nil || string(kept) != "the share" {
		t.Errorf("the file holds %q, %v", kept, err)
	}
}
