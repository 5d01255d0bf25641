package openbao_test

import (
	"bytes"
	"os"
	"testing"

	"google.golang.org/grpc/codes"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin/pb"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// rootKey and aad are what OpenBao seals, and what it binds that to.
const (
	rootKey = `["MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="]`
	aad     = "core/hsm/barrier-unseal-keys"
)

func TestSealThroughTheRealProcess(t *testing.T) {
	for name, newSite := range map[string]func(*testing.T) *site{
		"SoftHSM": func(t *testing.T) *site {
			t.Helper()
			return withToken(t, pkcs11test.SoftHSM(t))
		},
		"a NetHSM of two nodes": func(t *testing.T) *site {
			t.Helper()
			return withNetHSM(t, nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			bao := s.openBao(t)
			w := bao.configured(t, s.stanza(t, "prod"))
			_, connection, id := w.current()
			kind, err := connection.Type(t.Context(), &pb.TypeRequest{WrapperId: id})
			if err != nil || kind.GetType() != "nitrokey" {
				t.Errorf("Type: %q, %v", kind.GetType(), err)
			}
			if got, err := w.keyID(t.Context()); err != nil || got != "prod/v1" {
				t.Errorf("KeyId: %q, %v", got, err)
			}
			if err := w.init(t.Context()); err != nil {
				t.Errorf("Init: %v", err)
			}
			blob := w.mustEncrypt(t, rootKey, aad)
			if got := blob.GetKeyInfo().GetKeyId(); got != "prod/v1" {
				t.Errorf("the ciphertext names the key %q, want what KeyId says", got)
			}
			w.opens(t, blob, aad, rootKey)

			_, err = w.decrypt(t.Context(), blob, []byte("core/recovery-key"))
			refused(t, err, codes.InvalidArgument, "made for something else")
			_, err = w.decrypt(t.Context(), blob, nil)
			refused(t, err, codes.InvalidArgument)

			if err := w.finalize(t.Context()); err != nil {
				t.Errorf("Finalize: %v", err)
			}
			refused(t, w.finalize(t.Context()), codes.NotFound)
			_, err = w.encrypt(t.Context(), []byte("x"), nil)
			refused(t, err, codes.NotFound, "no wrapper of that id")

			again := bao.configured(t, s.stanza(t, "prod")) // of the same process
			again.opens(t, blob, aad, rootKey)
			s.keepsSecrets(t, "the log", bao.log.String())
		})
	}
}

func TestAPluginThatWasKilledIsStartedAnewAndToldAgain(t *testing.T) {
	s := withToken(t, pkcs11test.SoftHSM(t))
	bao := s.openBao(t)
	w := bao.configured(t, s.stanza(t, "prod"))
	if err := w.init(t.Context()); err != nil {
		t.Fatal(err)
	}
	blob := w.mustEncrypt(t, rootKey, aad)
	for range 2 {
		ended := bao.kill(t)
		if len(ended) < 2 {
			t.Error("there was no module host")
		}
		w.opens(t, blob, aad, rootKey)
		gone(t, ended...)
	}
	w.opens(t, w.mustEncrypt(t, rootKey, aad), aad, rootKey)

	record, err := os.ReadFile(s.host.File("prod.record"))
	if err != nil {
		t.Fatal(err)
	}
	s.host.Put(t, "prod.record", bytes.Replace(record, []byte(`"prod"`), []byte(`"test"`), 1))
	bao.kill(t)
	_, err = w.decrypt(t.Context(), blob, []byte(aad))
	refused(t, err, codes.InvalidArgument, "its SHA-256 is")
	s.host.Put(t, "prod.record", record)
	w.opens(t, blob, aad, rootKey)
}
