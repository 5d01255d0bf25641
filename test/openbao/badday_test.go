package openbao_test

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin/pb"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestAWrongPINIsSentOnceHoweverOftenOpenBaoAsks(t *testing.T) {
	card := pkcs11test.Card(t, pkcs11test.SHA1Only)
	s := withToken(t, &card.Token)
	bao := s.openBao(t)
	blob := bao.configured(t, s.stanza(t, "prod")).mustEncrypt(t, rootKey, aad)
	bao.stop()
	const wrongPIN = "999999"
	s.host.Put(t, "pin", []byte(wrongPIN))
	s.secret = append(s.secret, wrongPIN)

	bao = s.openBao(t)
	w := bao.configured(t, s.stanza(t, "prod")) // OpenBao would end if this failed, and be started anew again and again
	for respawn := range 3 {
		for range 10 {
			_, err := w.decrypt(t.Context(), blob, []byte(aad))
			refused(t, err, codes.FailedPrecondition, "not sent again from this machine")
			s.keepsSecrets(t, "the error", err.Error())
		}
		if respawn < 2 {
			bao.kill(t)
		}
	}
	if sent := card.WrongPINs(t); sent != 1 {
		t.Errorf("the card was sent a wrong PIN %d times, want once", sent)
	}
	s.keepsSecrets(t, "the log", bao.log.String())

	// The way back is the one that the error names.
	_, err := w.decrypt(t.Context(), blob, []byte(aad))
	refused(t, err, codes.FailedPrecondition, "nitroseal device pin try")
	s.host.Put(t, "pin", []byte(card.PIN))
	s.host.Must(t, "device", "pin", "try", "hsm")
	eventuallyOpens(t, w, blob)
	if sent := card.WrongPINs(t); sent != 1 {
		t.Errorf("the card was sent a wrong PIN %d times after all", sent)
	}
}

// eventuallyOpens waits until the seal opens what it sealed, as OpenBao does: it asks again and again.
func eventuallyOpens(t *testing.T, w *wrapper, blob *pb.BlobInfo) {
	t.Helper()
	vaulttest.Eventually(t, vaulttest.Patience, "the seal to open", func() error { return w.tryOpen(t.Context(), blob, aad, rootKey) })
}

func TestATokenThatIsPulledOutIsUsedAgainWhenItIsBack(t *testing.T) {
	plug := pkcs11test.Unpluggable(t)
	s := withToken(t, &plug.Token)
	bao := s.openBao(t)
	w := bao.configured(t, s.stanza(t, "prod"))
	blob := w.mustEncrypt(t, rootKey, aad)
	w.opens(t, blob, aad, rootKey)
	for range 2 {
		plug.Unplug(t)
		_, err := w.decrypt(t.Context(), blob, []byte(aad))
		refused(t, err, codes.Unavailable)
		w.mustEncrypt(t, "sealing is software", aad)
		plug.Replug(t)
		eventuallyOpens(t, w, blob)
	}

	// A plugin that is started while the token is away takes its stanza all the same.
	plug.Unplug(t)
	bao.kill(t)
	_, err := w.decrypt(t.Context(), blob, []byte(aad))
	refused(t, err, codes.Unavailable)
	_, err = w.encrypt(t.Context(), []byte("x"), nil)
	refused(t, err, codes.Unavailable)
	plug.Replug(t)
	eventuallyOpens(t, w, blob)
	w.mustEncrypt(t, "x", "")
}

func TestANetHSMThatIsAwayAtTheStart(t *testing.T) {
	netHSM := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
	s := withNetHSM(t, netHSM)
	bao := s.openBao(t)
	w := bao.configured(t, s.stanza(t, "prod"))
	blob := w.mustEncrypt(t, rootKey, aad)
	w.opens(t, blob, aad, rootKey)

	netHSM.Node(0).Stop()
	w.opens(t, blob, aad, rootKey) // the other node
	netHSM.Node(1).Stop()
	_, err := w.decrypt(t.Context(), blob, []byte(aad))
	refused(t, err, codes.Unavailable)
	if err := w.init(t.Context()); err == nil {
		t.Error("a cluster may be initialised although nothing that is sealed can be opened")
	}
	bao.kill(t)
	_, err = w.decrypt(t.Context(), blob, []byte(aad))
	refused(t, err, codes.Unavailable)
	if id, err := w.keyID(t.Context()); err != nil || id != "prod/v1" {
		t.Errorf("KeyId without an HSM: %q, %v", id, err)
	}
	for _, node := range netHSM.Nodes() {
		if err := node.Start(); err != nil {
			t.Fatal(err)
		}
	}
	eventuallyOpens(t, w, blob)
	w.mustEncrypt(t, "x", "")
	s.keepsSecrets(t, "the log", bao.log.String())

	t.Run("locked, it says so", func(t *testing.T) {
		for _, node := range netHSM.Nodes() {
			node.SetState(nethsmtest.Locked)
		}
		// Until each node has been asked, one that was away may still be taken for away.
		vaulttest.Eventually(t, vaulttest.Patience, "the seal to say so", func() error {
			_, err := w.decrypt(t.Context(), blob, []byte(aad))
			if status.Code(err) == codes.Unavailable {
				return err
			}
			refused(t, err, codes.FailedPrecondition, "the NetHSM is Locked")
			return nil
		})
		s.host.Put(t, "unlock", []byte(nethsmtest.UnlockPassphrase))
		unlocks := bao.configured(t, s.stanza(t, "prod", map[string]string{"unlock_passphrase_file": s.host.File("unlock")}))
		eventuallyOpens(t, unlocks, blob)
	})
}

func TestAnHSMThatHangsCostsACallItsTimeAndNoMore(t *testing.T) {
	card := pkcs11test.Card(t, pkcs11test.SHA1Only)
	s := withToken(t, &card.Token)
	bao := s.openBao(t)
	w := bao.configured(t, s.stanza(t, "prod"))
	blob := w.mustEncrypt(t, rootKey, aad)

	card.Fault(t, pkcs11test.Freezes("C_Decrypt"))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := w.decrypt(ctx, blob, []byte(aad))
	refused(t, err, codes.DeadlineExceeded)
	if took := time.Since(began); took > 10*time.Second { // the module has twice as long
		t.Errorf("a call with a deadline of 300 ms took %s", took)
	}
	w.mustEncrypt(t, "others go on", aad)
	if err := w.finalize(t.Context()); err != nil {
		t.Errorf("Finalize while the card hangs: %v", err)
	}
	card.Mend(t, pkcs11test.Freezes("C_Decrypt"))
	eventuallyOpens(t, bao.configured(t, s.stanza(t, "prod")), blob)
}

func TestWhatIsWrongIsSaidAndEndsNoPlugin(t *testing.T) {
	s := withToken(t, pkcs11test.SoftHSM(t))
	bao := s.openBao(t)
	good := bao.configured(t, s.stanza(t, "prod"))
	blob := good.mustEncrypt(t, rootKey, aad)
	pid := bao.pid(t)
	outside := t.TempDir() + "/pin"
	if err := os.WriteFile(outside, []byte(s.secret[0]), 0o600); err != nil {
		t.Fatal(err)
	}
	s.host.Put(t, "writable", []byte(s.secret[0]))
	if err := os.Chmod(s.host.File("writable"), 0o666); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		changes map[string]string
		says    string
	}{
		"a setting that is not known":        {map[string]string{"key_label": "x"}, `"key_label" is no setting`},
		"a PIN in the clear":                 {map[string]string{"pin": s.secret[0]}, "pin_file"},
		"no key":                             {map[string]string{"key": ""}, `"key" is missing`},
		"another key than the record's":      {map[string]string{"key": "other"}, "it is the record of key"},
		"no record":                          {map[string]string{"key_record_file": ""}, "nitroseal key backup"},
		"a record that is not there":         {map[string]string{"key_record_file": "/nowhere"}, "cannot be read"},
		"another SHA-256":                    {map[string]string{"key_record_sha256": strings.Repeat("ab", 32)}, "do not restore it"},
		"one HSM without a word about it":    {map[string]string{"accept_single_hsm": ""}, `write accept_single_hsm = "true"`},
		"a device that the record lacks":     {map[string]string{"device": "stick"}, `names no device "stick"`},
		"a module that is not allowed":       {map[string]string{"module": "/usr/lib/evil.so"}, "-pkcs11-module=/usr/lib/evil.so"},
		"a PIN file outside of secrets-dir":  {map[string]string{"pin_file": outside}, "does not lie under the secrets directory"},
		"a PIN file that others may write":   {map[string]string{"pin_file": s.host.File("writable")}, "may be written by others"},
		"a PIN file that is not there":       {map[string]string{"pin_file": s.host.File("nothing")}, "cannot be read"},
		"no token":                           {map[string]string{"serial": ""}, "no token is chosen"},
		"a number that is none":              {map[string]string{"parallel": "many"}, `"parallel" is not a number`},
		"settings of another kind of device": {map[string]string{"username": "operator"}, "belongs to devices of type"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := bao.configure(t.Context(), s.stanza(t, "prod", test.changes))
			if name == "one HSM without a word about it" {
				refused(t, err, codes.FailedPrecondition, test.says)
			} else {
				refused(t, err, codes.InvalidArgument, test.says)
			}
			s.keepsSecrets(t, "the error", err.Error())
		})
	}
	good.opens(t, blob, aad, rootKey)
	if now := bao.pid(t); now != pid {
		t.Error("the plugin was started anew meanwhile")
	}
	s.keepsSecrets(t, "the log", bao.log.String())

	t.Run("a plugin without state directory sends no PIN", func(t *testing.T) {
		bare := newOpenBao(t, s.binary, []string{s.args[0], s.args[2]}, s.env...)
		_, err := bare.configure(t.Context(), s.stanza(t, "prod"))
		refused(t, err, codes.InvalidArgument, "-state-dir=DIR")
	})
	t.Run("a plugin without secrets directory reads no file", func(t *testing.T) {
		bare := newOpenBao(t, s.binary, s.args[1:], s.env...)
		_, err := bare.configure(t.Context(), s.stanza(t, "prod"))
		refused(t, err, codes.InvalidArgument, "-secrets-dir=DIR")
	})
}
