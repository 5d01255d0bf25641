package test

import (
	"context"
	"os"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestMain(m *testing.M) {
	modhost.RunIfStarted()
	if order := os.Getenv(workerVariable); order != "" {
		os.Exit(work(order))
	}
	os.Exit(vaulttest.Main(m))
}

func TestVaultItselfSurvivesARestart(t *testing.T) {
	vault := vaulttest.Start(t, vaulttest.Options{})
	if err := vault.Client(t).Sys().Mount("kv", &kvMount); err != nil {
		t.Fatal(err)
	}
	kv := vault.Client(t).KVv1("kv")
	if err := kv.Put(context.Background(), "a", map[string]any{"b": "c"}); err != nil {
		t.Fatal(err)
	}
	vault.Restart(t)
	vault.Kill(t)
	vault.Resume(t)
	vault.Seal(t)
	vault.Unseal(t)
	secret, err := vault.Client(t).KVv1("kv").Get(context.Background(), "a")
	if err != nil || secret.Data["b"] != "c" {
		t.Fatal(secret, err)
	}
}

var kvMount = api.MountInput{Type: "kv"}
