package openbao_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin/pb"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestRotatedAndForeignKeys(t *testing.T) {
	s := withToken(t, pkcs11test.SoftHSM(t))
	h := s.host
	bao := s.openBao(t)
	first := bao.configured(t, s.stanza(t, "prod"))
	old := first.mustEncrypt(t, rootKey, aad)

	h.Must(t, "key", "rotate", "prod", "--device", "hsm", "--generate", "--algorithm", "ecdh-p256")
	h.Must(t, "key", "backup", "prod", "--out", h.File("prod-2.record"))
	rotated := s.stanza(t, "prod", map[string]string{"key_record_file": h.File("prod-2.record")})
	second := bao.configured(t, rotated)

	t.Run("with the new record it seals with the new version and opens the old one", func(t *testing.T) {
		if id, err := second.keyID(t.Context()); err != nil || id != "prod/v2" {
			t.Errorf("KeyId: %q, %v; OpenBao seals its keys anew when it changes", id, err)
		}
		blob := second.mustEncrypt(t, rootKey, aad)
		if got := blob.GetKeyInfo().GetKeyId(); got != "prod/v2" {
			t.Errorf("the ciphertext names %q", got)
		}
		second.opens(t, blob, aad, rootKey)
		second.opens(t, old, aad, rootKey)
		first.opens(t, old, aad, rootKey) // a wrapper of before goes on
		_, err := first.decrypt(t.Context(), blob, []byte(aad))
		refused(t, err, codes.FailedPrecondition, "name the newest key record")
	})

	h.Must(t, "key", "generate", "other", "--device", "hsm", "--algorithm", "rsa-2048")
	h.Must(t, "key", "backup", "other", "--out", h.File("other.record"))
	other := bao.configured(t, s.stanza(t, "other"))
	foreign := other.mustEncrypt(t, rootKey, aad)
	h.Put(t, "value", []byte("a value of the command's"))
	wrapped := h.Must(t, "wrap", "prod", "--in", h.File("value"))

	for name, test := range map[string]struct {
		blob *pb.BlobInfo
		code codes.Code
		says string
	}{
		"a ciphertext of another key on the same HSM": {foreign, codes.InvalidArgument, "wrapping key"},
		"one that says to be of this key": {
			&pb.BlobInfo{Ciphertext: foreign.GetCiphertext(), KeyInfo: old.GetKeyInfo()}, codes.InvalidArgument, "wrapping key",
		},
		"an envelope that was wrapped":           {&pb.BlobInfo{Ciphertext: []byte(strings.TrimSpace(wrapped))}, codes.InvalidArgument, "use"},
		"a ciphertext of the seal transit":       {&pb.BlobInfo{Ciphertext: []byte("vault:v1:AAAA")}, codes.InvalidArgument, "malformed"},
		"a ciphertext of another kind of seal":   {&pb.BlobInfo{Ciphertext: []byte{1, 2}, Iv: []byte{3}}, codes.InvalidArgument, "malformed"},
		"no ciphertext":                          {&pb.BlobInfo{}, codes.InvalidArgument, "malformed"},
		"nothing at all":                         {nil, codes.InvalidArgument, "malformed"},
		"one with a bit changed":                 {flipped(old), codes.InvalidArgument, ""},
		"one cut short":                          {&pb.BlobInfo{Ciphertext: old.GetCiphertext()[:100]}, codes.InvalidArgument, "malformed"},
		"the authentication key of the key":      {&pb.BlobInfo{Ciphertext: authEnvelope(t, s, "prod")}, codes.InvalidArgument, "use"},
		"a megabyte, far more than any envelope": {&pb.BlobInfo{Ciphertext: make([]byte, 900<<10)}, codes.InvalidArgument, "malformed"},
		"more than a call may carry":             {&pb.BlobInfo{Ciphertext: make([]byte, 2<<20)}, codes.ResourceExhausted, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := second.decrypt(t.Context(), test.blob, []byte(aad))
			refused(t, err, test.code, test.says)
		})
	}
	t.Run("without OpenBao it is recovered by the HSM and the record", func(t *testing.T) {
		h.Put(t, "blob", old.GetCiphertext())
		recovered := h.Must(t, "recover", "--in", h.File("blob"), "--module", s.args[2][len("-pkcs11-module="):], "--serial", s.device["serial"],
			"--pin-file", h.File("pin"), "--state-dir", h.File("state"), "--module-env", "SOFTHSM2_CONF",
			"--key-record", h.File("prod-2.record"), "--key-record-sha256", rotated["key_record_sha256"])
		if recovered != rootKey {
			t.Error("it was recovered as something else")
		}
	})
	t.Run("a value that is too large to seal", func(t *testing.T) {
		_, err := second.encrypt(t.Context(), make([]byte, 64<<10+1), nil)
		refused(t, err, codes.InvalidArgument, "exceeds the limit")
		_, err = second.encrypt(t.Context(), []byte("x"), make([]byte, 5<<10))
		refused(t, err, codes.InvalidArgument, "exceeds the limit")
	})
	t.Run("the smallest and the largest", func(t *testing.T) {
		second.opens(t, second.mustEncrypt(t, "", ""), "", "")
		large := strings.Repeat("x", 64<<10)
		second.opens(t, second.mustEncrypt(t, large, aad), aad, large)
	})
}

// flipped is a ciphertext whose tag differs in one bit.
func flipped(blob *pb.BlobInfo) *pb.BlobInfo {
	text := string(blob.GetCiphertext())
	at := strings.Index(text, `"tag":"`) + len(`"tag":"`)
	changed := []byte(text)
	if changed[at] == 'A' {
		changed[at] = 'B'
	} else {
		changed[at] = 'A'
	}
	return &pb.BlobInfo{Ciphertext: changed, KeyInfo: blob.GetKeyInfo()}
}

// authEnvelope is the envelope of the authentication key of a key's first version, as its record has it.
func authEnvelope(t *testing.T, s *site, key string) []byte {
	t.Helper()
	content, err := os.ReadFile(s.host.File(key + ".record"))
	if err != nil {
		t.Fatal(err)
	}
	kept := vaulttest.Decode[struct {
		Versions []struct {
			AuthEnvelope json.RawMessage `json:"auth_envelope"`
		} `json:"versions"`
	}](t, string(content))
	return kept.Versions[0].AuthEnvelope
}

func TestWrappersAndCallsAtOnce(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	s := withToken(t, token)
	s.device["parallel"] = "4"
	bao, settings := s.openBao(t), s.stanza(t, "prod")
	const wrappers, callers, rounds = 3, 4, 5
	var all sync.WaitGroup
	for range wrappers {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			w, err := bao.configure(ctx, settings)
			if err != nil {
				t.Errorf("SetConfig: %v", err)
				return
			}
			var calls sync.WaitGroup
			for caller := range callers {
				calls.Go(func() {
					for round := range rounds {
						if err := roundTrip(ctx, w, fmt.Sprintf("%d/%d", caller, round)); err != nil {
							t.Error(err)
						}
					}
				})
			}
			calls.Wait()
			if err := w.finalize(ctx); err != nil {
				t.Errorf("Finalize: %v", err)
			}
		})
	}
	all.Wait()

	t.Run("Finalize fails the calls that run and waits for them", func(t *testing.T) {
		w := bao.configured(t, s.stanza(t, "prod"))
		blob := w.mustEncrypt(t, rootKey, aad)
		var calls sync.WaitGroup
		for range 8 {
			calls.Go(func() {
				for {
					if err := w.tryOpen(t.Context(), blob, aad, rootKey); err != nil {
						return
					}
				}
			})
		}
		if err := w.finalize(t.Context()); err != nil {
			t.Errorf("Finalize: %v", err)
		}
		calls.Wait()
	})
}

func roundTrip(ctx context.Context, w *wrapper, value string) error {
	blob, err := w.encrypt(ctx, []byte(value), []byte(value))
	if err != nil {
		return fmt.Errorf("Encrypt: %w", err)
	}
	if err := w.tryOpen(ctx, blob, value, value); err != nil {
		return fmt.Errorf("Decrypt: %w", err)
	}
	if err := w.tryOpen(ctx, blob, value+"!", value); err == nil {
		return errors.New("it opened for another use")
	}
	return nil
}

func TestSeveralHSMsAreDescribedByAFile(t *testing.T) {
	netHSM := nethsmtest.Start(t, nethsmtest.Options{Nodes: 1, Provisioned: true})
	token := pkcs11test.SoftHSM(t)
	s := withToken(t, token)
	h := s.host
	h.Put(t, "password", []byte(nethsmtest.OperatorPassphrase))
	h.Put(t, "nethsm-ca.pem", netHSM.CA())
	h.Put(t, "admin-password", []byte(nethsmtest.AdminPassphrase))
	h.Set(t, `device "rack"`, "type = \"nethsm\"\n urls = [%q]\n username = %q\n password_file = \"password\"\n admin_username = %q\n"+
		" admin_password_file = \"admin-password\"\n ca_cert_file = \"nethsm-ca.pem\"",
		netHSM.URLs()[0], nethsmtest.OperatorUser, nethsmtest.AdminUser)
	if _, _, err := netHSM.AddKey(nethsmtest.Key{ID: "second", Mechanisms: []string{"RSA_Decryption_OAEP_SHA256"}}); err != nil {
		t.Fatal(err)
	}
	h.Must(t, "key", "add-recipient", "prod", "--device", "rack", "--id", "second")
	h.Must(t, "key", "backup", "prod", "--out", h.File("both.record"))
	settings := s.stanza(t, "prod", map[string]string{"key_record_file": h.File("both.record"), "accept_single_hsm": ""})

	bao := s.openBao(t)
	_, err := bao.configure(t.Context(), settings)
	refused(t, err, codes.InvalidArgument, `"hsm", "rack"`, `"device"`)

	for name := range s.device {
		delete(settings, name)
	}
	settings["config"] = h.File("nitroseal.hcl")
	w := bao.configured(t, settings)
	blob := w.mustEncrypt(t, rootKey, aad)
	w.opens(t, blob, aad, rootKey)
	netHSM.Node(0).Stop()
	w.opens(t, blob, aad, rootKey) // by the stick
	if err := netHSM.Node(0).Start(); err != nil {
		t.Fatal(err)
	}
	h.Put(t, "pin", []byte("000000")) // the stick is of no use any more
	bao.kill(t)
	w.opens(t, blob, aad, rootKey) // by the rack

	t.Run("one of them is enough where the stanza says which", func(t *testing.T) {
		one := s.stanza(t, "prod", map[string]string{
			"key_record_file": h.File("both.record"), "accept_single_hsm": "", "device": "rack", "type": "nethsm", "serial": "", "pin_file": "",
			"urls": netHSM.URLs()[0], "username": nethsmtest.OperatorUser, "password_file": h.File("password"),
			"ca_cert_file": h.File("nethsm-ca.pem"),
		})
		bao.configured(t, one).opens(t, blob, aad, rootKey)
	})
}
