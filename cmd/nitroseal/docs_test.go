package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestTheConfigurationThatTheReadmeShowsIsRight(t *testing.T) {
	readme, err := os.ReadFile(filepath.Join(vaulttest.Root(), "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, shown, found := strings.Cut(string(readme), "```hcl\n")
	shown, _, closed := strings.Cut(shown, "```")
	if !found || !closed {
		t.Fatal("the README shows no configuration")
	}
	dir := t.TempDir()
	for name, content := range map[string]string{
		"nitroseal.hcl": strings.ReplaceAll(shown, "/etc/nitroseal/", dir+"/"), "vault-ca.pem": string(vaulttest.NewAuthority(t).PEM),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read, err := config.Load(filepath.Join(dir, "nitroseal.hcl"))
	if err != nil {
		t.Fatal(err)
	}
	if len(read.Clusters) != 1 {
		t.Fatalf("it has %d clusters", len(read.Clusters))
	}
	if _, err := newCluster(read.Clusters[0]); err != nil {
		t.Error(err)
	}
}
