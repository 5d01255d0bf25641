package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// pinError fails the test unless err is a *hsm.PINError.
func pinError(t *testing.T, err error) *hsm.PINError {
	t.Helper()
	refused, ok := errors.AsType[*hsm.PINError](err)
	if !ok {
		t.Fatalf("the error is %v, want a *hsm.PINError", err)
	}
	return refused
}

// withPIN is a mount with another PIN.
func withPIN(pin string) func(*pkcs11.Config) {
	return func(c *pkcs11.Config) { c.PIN, c.Owner = []byte(pin), "mount with "+pin }
}

func find(t *testing.T, device hsm.Device, query hsm.KeyQuery) (hsm.Key, error) {
	t.Helper()
	return hsm.FindKey(patient(t), device, query)
}

// proved is an RSA key that knows what its token can do.
func proved(t *testing.T, key hsm.Key) hsm.Decrypter {
	t.Helper()
	prover, ok := key.(hsm.Prover)
	if !ok {
		t.Fatalf("a %T proves nothing", key)
	}
	if err := prover.Prove(patient(t)); err != nil {
		t.Fatalf("Prove: %v", err)
	}
	decrypter, ok := key.(hsm.Decrypter)
	if !ok {
		t.Fatalf("a %T decrypts nothing", key)
	}
	return decrypter
}

// ---- what the token is ----

func TestTwoTokensWithOneLabelAreToldApartBySerialAndSlot(t *testing.T) {
	first := pkcs11test.SoftHSM(t)
	second := first.Add(t, first.Label)
	second.GenerateKey(t, "rsa:2048", "on the second", "01")
	s := newSetting(t, first)
	by := func(change func(*pkcs11.Config)) (hsm.Info, error) {
		device := s.open(t, func(c *pkcs11.Config) { c.Serial = ""; change(c) })
		if _, err := find(t, device, hsm.KeyQuery{Label: "on the second"}); err != nil {
			return hsm.Info{}, err
		}
		return device.Info(patient(t))
	}
	if _, err := by(func(c *pkcs11.Config) { c.TokenLabel = first.Label }); !errors.Is(err, hsm.ErrAmbiguous) ||
		!strings.Contains(err.Error(), first.Serial) || !strings.Contains(err.Error(), second.Serial) {
		t.Errorf("by the common label: %v; want ErrAmbiguous that names both serials", err)
	}
	if info, err := by(func(c *pkcs11.Config) { c.Serial = second.Serial }); err != nil || info.Serial != second.Serial {
		t.Errorf("by serial: %+v, %v", info, err)
	}
	slot := second.Slot(t)
	if info, err := by(func(c *pkcs11.Config) { c.Slot = &slot }); err != nil || info.Serial != second.Serial {
		t.Errorf("by slot: %+v, %v", info, err)
	}
	if _, err := by(func(c *pkcs11.Config) { c.Serial = first.Serial }); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("the first token has the second one's key: %v", err)
	}
}

func TestATokenThatComesLater(t *testing.T) {
	card := pkcs11test.Card(t)
	card.Remove(t, pkcs11test.ReaderRemoved)
	device := newSetting(t, &card.Token).open(t)
	for range 2 {
		if _, err := device.FindKeys(patient(t), hsm.KeyQuery{}); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("without a token: %v, want ErrUnavailable", err)
		}
		if info, err := device.Info(patient(t)); err == nil || info.State != hsm.StateAbsent {
			t.Errorf("Info without a token: %+v, %v; want an error and %q", info, err, hsm.StateAbsent)
		}
	}
	card.Return(t)
	pkcs11test.Until(t, "the token answers", func() bool {
		_, err := device.FindKeys(patient(t), hsm.KeyQuery{})
		return err == nil
	})
}

func TestATokenOfAnotherSerialIsNotTakenForOurs(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	device := newSetting(t, token).open(t, func(c *pkcs11.Config) { c.Serial = "0123456789abcdef" })
	_, err := device.FindKeys(patient(t), hsm.KeyQuery{})
	if !errors.Is(err, hsm.ErrNotFound) || !strings.Contains(err.Error(), token.Serial) {
		t.Errorf("it gives %v; want ErrNotFound that names the token seen", err)
	}
}

// ---- what a look-up finds ----

func certificate(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "unseal"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "certificate.der")
	if err := os.WriteFile(file, der, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestOtherObjectsWithTheKeysLabelAreNoKeys(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	token.Tool(t, "--write-object", certificate(t), "--type", "cert", "--label", "unseal", "--id", "01")
	token.WriteObject(t, "nitroseal", "unseal", []byte("not a key"))
	device := newSetting(t, token).open(t)
	if key, err := find(t, device, hsm.KeyQuery{Label: "unseal"}); !errors.Is(err, hsm.ErrNotFound) {
		t.Fatalf("a certificate and a data object give %v, %v; want ErrNotFound", key, err)
	}
	token.GenerateKey(t, "rsa:2048", "unseal", "01")
	key, err := find(t, device, hsm.KeyQuery{Label: "unseal"})
	if err != nil {
		t.Fatalf("beside them the key is not found: %v", err)
	}
	if err := decrypts(patient(t), proved(t, key)); err != nil {
		t.Error(err)
	}
}

func TestAKeyOfAnUnusableKindIsSaidToBeOne(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	device := newSetting(t, token).open(t)
	for kind, says := range map[string]string{
		"rsa:1024": "1024", "EC:secp521r1": "P-256 and P-384", "EC:edwards25519": "",
	} {
		id := fmt.Sprintf("%02x", len(kind))
		token.GenerateKey(t, kind, kind, id)
		for name, query := range map[string]hsm.KeyQuery{"label": {Label: kind}, "id": {ID: id}} {
			key, err := find(t, device, query)
			if !errors.Is(err, hsm.ErrUnsupported) || !strings.Contains(err.Error(), says) {
				t.Errorf("%s by %s gives %v, %v; want ErrUnsupported that says %q", kind, name, key, err, says)
			}
		}
	}
	if keys, err := device.FindKeys(patient(t), hsm.KeyQuery{}); err != nil || len(keys) != 0 {
		t.Errorf("they spoil the list of all keys: %v, %v", keys, err)
	}
}

func TestAKeyDeletedBehindOurBack(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	key := rsaKey(t, newSetting(t, token).open(t))
	token.Tool(t, "--delete-object", "--type", "privkey", "--id", "01")
	if err := decrypts(patient(t), key); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("using it gives %v, want ErrNotFound", err)
	}
}

func TestAKeyReplacedBehindOurBackIsNotUsed(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	s := newSetting(t, token)
	key := rsaKey(t, s.open(t))
	token.Tool(t, "--delete-object", "--type", "privkey", "--id", "01")
	token.Tool(t, "--delete-object", "--type", "pubkey", "--id", "01")
	token.GenerateKey(t, "rsa:2048", "unseal", "01")
	if err := decrypts(patient(t), key); !errors.Is(err, hsm.ErrKeyChanged) && !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("using it gives %v, want ErrKeyChanged or ErrNotFound", err)
	}
}

// ---- room ----

func TestAFullToken(t *testing.T) {
	const deviceMemory = 0x31 // CKR_DEVICE_MEMORY
	card := pkcs11test.Card(t)
	device := newSetting(t, &card.Token).open(t)
	card.Fault(t, pkcs11test.Fails("C_GenerateKeyPair", deviceMemory), pkcs11test.Fails("C_CreateObject", deviceMemory))
	spec := hsm.KeySpec{Algorithm: hsm.ECDHP256, Label: "unseal", ID: "01"}
	if _, err := device.GenerateKey(patient(t), spec); !errors.Is(err, hsm.ErrFull) {
		t.Errorf("GenerateKey gives %v, want ErrFull", err)
	}
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "item"}
	if err := device.WriteObject(patient(t), ref, []byte("value")); !errors.Is(err, hsm.ErrFull) {
		t.Errorf("WriteObject gives %v, want ErrFull", err)
	}
	card.Mend(t, pkcs11test.Fails("C_GenerateKeyPair", 0), pkcs11test.Fails("C_CreateObject", 0))
	if _, err := device.GenerateKey(patient(t), spec); err != nil {
		t.Errorf("with room again: %v", err)
	}
	if err := device.WriteObject(patient(t), ref, []byte("value")); err != nil {
		t.Errorf("with room again: %v", err)
	}
}

// ---- objects ----

func TestObjectsArePrivateAndStayOnTheToken(t *testing.T) {
	card := pkcs11test.Card(t)
	device := newSetting(t, &card.Token).open(t)
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "prod/init/1"}
	if err := device.WriteObject(patient(t), ref, []byte("value")); err != nil {
		t.Fatal(err)
	}
	if err := device.WriteObject(patient(t), hsm.ObjectRef{Application: "nitroseal", Label: "empty"}, nil); err == nil {
		t.Error("an empty value was written; OpenSC answers CKR_ARGUMENTS_BAD to it")
	}
	public, err := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", card.Module, "--list-objects").CombinedOutput()
	if err != nil || strings.Contains(string(public), ref.Label) {
		t.Errorf("without a log-in pkcs11-tool shows %v\n%s", err, public)
	}
	if private := card.Tool(t, "--list-objects"); !strings.Contains(private, ref.Label) || !strings.Contains(private, "nitroseal") {
		t.Errorf("with one it shows\n%s", private)
	}
	if err := device.DeleteObject(patient(t), ref); err != nil {
		t.Fatal(err)
	}
	// Changing a value in place is refused by OpenSC and was seen to crash it.
	if n := card.Calls(t, "C_SetAttributeValue"); n != 0 {
		t.Errorf("C_SetAttributeValue was called %d times", n)
	}
}

func TestKeysAreMadeAndDeletedAfterAForeignDeauthentication(t *testing.T) {
	card := pkcs11test.Card(t)
	device := newSetting(t, &card.Token).open(t)
	if _, err := device.FindKeys(patient(t), hsm.KeyQuery{}); err != nil {
		t.Fatal(err)
	}
	card.Deauthenticate(t)
	key, err := device.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.ECDHP256, Label: "unseal", ID: "01"})
	if err != nil {
		t.Fatalf("GenerateKey: %v", err)
	}
	card.Deauthenticate(t)
	if err := device.DeleteKey(patient(t), key.Ref()); err != nil {
		t.Errorf("DeleteKey: %v", err)
	}
	if listed := card.Tool(t, "--list-objects"); strings.Contains(listed, "unseal") {
		t.Errorf("the token still holds\n%s", listed)
	}
}

// ---- PINs ----

func TestACardsTriesArePreserved(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	right := s.open(t)
	if _, err := right.FindKeys(patient(t), hsm.KeyQuery{}); err != nil {
		t.Fatal(err)
	}
	if err := right.Close(); err != nil { // and with it the log-in ends
		t.Fatal(err)
	}
	// A PIN of a length that no card takes costs nothing, and is not sent a second time either.
	for range 2 {
		_, err := s.open(t, withPIN("12345")).FindKeys(patient(t), hsm.KeyQuery{})
		_ = pinError(t, err)
	}
	if n := card.Calls(t, "C_Login"); n != 2 || card.Tries(t) != 3 {
		t.Errorf("%d log-ins were tried and %d tries are left, want 2 and 3", n, card.Tries(t))
	}
	_, err := s.open(t, withPIN("111111")).FindKeys(patient(t), hsm.KeyQuery{})
	if refused := pinError(t, err); refused.Barred {
		t.Errorf("the first wrong PIN was not sent: %v", refused)
	}
	if card.Tries(t) != 2 {
		t.Errorf("%d tries are left, want 2", card.Tries(t))
	}
	// Another wrong one is not even tried, while the PIN that worked here is, and restores the count.
	_, err = s.open(t, withPIN("222222")).FindKeys(patient(t), hsm.KeyQuery{})
	if refused := pinError(t, err); !refused.Barred || card.Tries(t) != 2 {
		t.Errorf("another PIN while the card shows a wrong one: %v, and %d tries are left", refused, card.Tries(t))
	}
	if _, err := s.open(t).FindKeys(patient(t), hsm.KeyQuery{}); err != nil {
		t.Errorf("the PIN that worked before: %v", err)
	}
	if card.Tries(t) != 3 {
		t.Errorf("%d tries are left, want 3", card.Tries(t))
	}
}

func TestALockedCardIsUsedAgainAfterItsUnblocking(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	card.SetTries(t, 0)
	device := s.open(t)
	_, err := device.FindKeys(patient(t), hsm.KeyQuery{})
	if refused := pinError(t, err); refused.TriesLeft != 0 || !errors.Is(err, hsm.ErrLocked) || !strings.Contains(err.Error(), "--init-pin") {
		t.Errorf("a locked card gives %v", refused)
	}
	if info, err := device.Info(patient(t)); err != nil || info.State != hsm.StateLocked || !info.PIN.Locked {
		t.Errorf("Info gives %+v, %v", info, err)
	}
	card.SetTries(t, 3) // as C_InitPIN does
	pkcs11test.Until(t, "the card is used again", func() bool {
		_, err := device.FindKeys(patient(t), hsm.KeyQuery{})
		return err == nil
	})
}

func TestAPINChangedByAnotherProgramIsSentOnce(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	if _, err := s.open(t).FindKeys(patient(t), hsm.KeyQuery{}); err != nil {
		t.Fatal(err)
	}
	if err := s.manager.Close(); err != nil {
		t.Fatal(err)
	}
	card.Tool(t, "--change-pin", "--new-pin", "975310")
	for i := range 3 { // the PIN was good here, so it is sent once, and then no more
		s.manager = pkcs11.New(pkcs11.Options{Modules: []string{card.Module}, StateDir: s.state, Env: card.Env})
		_, err := s.open(t).FindKeys(patient(t), hsm.KeyQuery{})
		if refused := pinError(t, err); refused.Barred != (i > 0) {
			t.Errorf("start %d: %v", i, refused)
		}
		if err := s.manager.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := card.WrongPINs(t); n != 1 {
		t.Errorf("the card got %d wrong PINs, want 1", n)
	}
}

func TestChangingThePINOfACard(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	device := s.open(t)
	if err := device.ChangePIN(patient(t), []byte("975310")); err != nil {
		t.Fatal(err)
	}
	if _, err := device.FindKeys(patient(t), hsm.KeyQuery{}); err != nil {
		t.Errorf("the device does not use the new PIN: %v", err)
	}
	if err := device.ChangePIN(patient(t), []byte("123")); err == nil {
		t.Error("a PIN that the card refuses was taken")
	}
	if _, err := device.FindKeys(patient(t), hsm.KeyQuery{}); err != nil {
		t.Errorf("after a refused change: %v", err)
	}
	if card.Tries(t) != 3 || card.WrongPINs(t) != 0 {
		t.Errorf("%d tries are left after %d wrong PINs", card.Tries(t), card.WrongPINs(t))
	}
}

// ---- another plugin process, killed ----

// The environment variables that make the test binary another plugin.
const (
	otherPluginModule = "NITROSEAL_TEST_MODULE"
	otherPluginSerial = "NITROSEAL_TEST_SERIAL"
	otherPluginState  = "NITROSEAL_TEST_STATE"
	otherPluginEnv    = "NITROSEAL_TEST_ENV"
	otherPluginPIN    = "NITROSEAL_TEST_PIN"
)

// TestOtherPlugin is no test: it is what the tests below run as another process. It uses the key with id 01 until it is
// killed, or until its first error.
func TestOtherPlugin(t *testing.T) {
	module := os.Getenv(otherPluginModule)
	if module == "" {
		t.Skip("run by other tests, as a process of its own")
	}
	manager := pkcs11.New(pkcs11.Options{
		Modules: []string{module}, StateDir: os.Getenv(otherPluginState), Env: strings.Split(os.Getenv(otherPluginEnv), ","),
	})
	device, err := manager.Open(t.Context(), pkcs11.Config{
		Module: module, Serial: os.Getenv(otherPluginSerial), PIN: []byte(os.Getenv(otherPluginPIN)), Owner: "other",
	})
	if err != nil {
		t.Fatal(err)
	}
	// A SoftHSM is not to be seen for a moment while another process logs in to it.
	var key hsm.Decrypter
	pkcs11test.Until(t, "the token is seen", func() bool {
		found, err := find(t, device, hsm.KeyQuery{ID: "01"})
		if errors.Is(err, hsm.ErrUnavailable) {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		key = proved(t, found)
		return true
	})
	for err == nil || errors.Is(err, hsm.ErrUnavailable) {
		err = decrypts(patient(t), key)
	}
	t.Fatal(err)
}

// otherPlugin starts the test binary as another plugin with the same state directory.
func (s *setting) otherPlugin(t *testing.T, pin string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestOtherPlugin$", "-test.v")
	cmd.Env = append(os.Environ(), otherPluginModule+"="+s.token.Module, otherPluginSerial+"="+s.token.Serial,
		otherPluginState+"="+s.state, otherPluginEnv+"="+strings.Join(s.token.Env, ","), otherPluginPIN+"="+pin)
	cmd.WaitDelay = patience
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // it tries for ever
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.Discard, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // a second one after the test's own is an error that says nothing
	})
	return cmd
}

// kill ends the other plugin and returns the module hosts that it had.
func kill(t *testing.T, cmd *exec.Cmd) []int {
	t.Helper()
	left := children(t, cmd.Process.Pid)
	if len(left) != 1 {
		t.Errorf("the other plugin has %d children, want its module host", len(left))
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // its status is that it was killed
	return left
}

// children returns the processes that all threads of a process have started and that still live.
func children(t *testing.T, pid int) []int {
	t.Helper()
	var found []int
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		content, err := os.ReadFile(thread)
		if err != nil {
			continue // a thread that ended meanwhile
		}
		for field := range strings.FieldsSeq(string(content)) {
			child, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			found = append(found, child)
		}
	}
	return found
}

// gone tells whether a process has ended, whether or not somebody waited for it.
func gone(pid int) bool {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(content), ") ")
	return strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}

func TestAPluginKilledBetweenTheLogInAndItsResult(t *testing.T) {
	for name, c := range map[string]struct {
		pin    string
		barred bool
	}{
		"a wrong PIN is not sent again":          {"111111", true},
		"the right PIN is, for all tries remain": {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			card := pkcs11test.Card(t, pkcs11test.Freezes("C_Login_answer"))
			s := newSetting(t, &card.Token)
			pin := c.pin
			if pin == "" {
				pin = card.PIN
			}
			other := s.otherPlugin(t, pin)
			pkcs11test.Until(t, "the card has checked the PIN", func() bool { return card.Calls(t, "C_Login_answer") == 1 })
			for _, host := range kill(t, other) {
				pkcs11test.Until(t, "the module host ends although its module hangs", func() bool { return gone(host) })
			}
			card.Mend(t, pkcs11test.Freezes("C_Login_answer"))

			_, err := s.open(t, withPIN(pin)).FindKeys(patient(t), hsm.KeyQuery{})
			if !c.barred {
				if err != nil {
					t.Errorf("the next start: %v", err)
				}
				return
			}
			if refused := pinError(t, err); !refused.Barred {
				t.Errorf("the next start: %v", refused)
			}
			if n := card.Calls(t, "C_Login"); n != 1 {
				t.Errorf("%d PINs were sent, want 1", n)
			}
		})
	}
}

func TestAPluginKilledWhileItsModuleHangsLeavesNoProcess(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	key := rsaKey(t, s.open(t))
	card.Fault(t, pkcs11test.Freezes("C_Decrypt"))
	before := card.Calls(t, "C_Decrypt")
	other := s.otherPlugin(t, card.PIN)
	pkcs11test.Until(t, "the other plugin's module hangs", func() bool { return card.Calls(t, "C_Decrypt") > before })
	for _, host := range kill(t, other) {
		pkcs11test.Until(t, "the module host ends", func() bool { return gone(host) })
	}
	card.Mend(t, pkcs11test.Freezes("C_Decrypt"))
	if err := decrypts(patient(t), key); err != nil {
		t.Errorf("the token is of no use to us now: %v", err)
	}
}

func TestTwoPluginsUseOneToken(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	key := rsaKey(t, s.open(t))
	s.otherPlugin(t, card.PIN)
	s.otherPlugin(t, card.PIN)
	logIns := card.Calls(t, "C_Login")
	pkcs11test.Until(t, "both others are logged in", func() bool { return card.Calls(t, "C_Login") >= logIns+2 })
	before := card.Operations(t)
	for range 20 {
		if err := decrypts(patient(t), key); err != nil {
			t.Fatal(err)
		}
	}
	pkcs11test.Until(t, "the others have decrypted as well", func() bool { return card.Operations(t) > before+40 })
	if card.WrongPINs(t) != 0 {
		t.Error("a wrong PIN was sent")
	}
}

// ---- losses in the middle ----

func TestATokenLostInTheMiddleOfAnOperation(t *testing.T) {
	for _, loss := range []pkcs11test.Loss{pkcs11test.LostInACommand, pkcs11test.CardRemoved, pkcs11test.ReaderRemoved} {
		t.Run(string(loss), func(t *testing.T) {
			card := pkcs11test.Card(t)
			key := rsaKey(t, newSetting(t, &card.Token).open(t))
			slow := pkcs11test.Slow(300 * time.Millisecond)
			card.Fault(t, slow)
			before := card.Operations(t)
			result := make(chan error, 1)
			go func() { result <- decrypts(patient(t), key) }()
			pkcs11test.Until(t, "the operation is inside the card", func() bool { return card.Operations(t) > before })
			card.Remove(t, loss)
			card.Return(t)
			// A decryption may be repeated, so it may succeed with the token that came back. What it must not do is blame
			// the ciphertext.
			if err := <-result; err != nil && !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("the operation gives %v", err)
			}
			card.Mend(t, slow)
			pkcs11test.Until(t, "the returned token decrypts", func() bool { return decrypts(patient(t), key) == nil })
			if n := card.WrongPINs(t); n != 0 || card.Tries(t) != 3 {
				t.Errorf("%d wrong PINs, %d tries left", n, card.Tries(t))
			}
		})
	}
}

func TestATokenPulledOutWhileMuchIsGoingOn(t *testing.T) {
	plug := pkcs11test.Unpluggable(t)
	// p11-kit's client was seen to leave one of several callers hanging when its server dies.
	limit := func(c *pkcs11.Config) { c.Parallel, c.DecryptLimit = 4, 2*time.Second }
	key := rsaKey(t, newSetting(t, &plug.Token).open(t, limit))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var all sync.WaitGroup
	var mu sync.Mutex
	done := 0
	for range 4 {
		all.Go(func() {
			for ctx.Err() == nil {
				err := decrypts(patient(t), key)
				if err != nil && !errors.Is(err, hsm.ErrUnavailable) {
					t.Errorf("an operation gives %v", err)
					return
				}
				if err == nil {
					mu.Lock()
					done++
					mu.Unlock()
				}
			}
		})
	}
	progress := func() {
		mu.Lock()
		from := done
		mu.Unlock()
		pkcs11test.Until(t, "decryptions go on", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return done > from+8
		})
	}
	for range 2 {
		progress()
		plug.Unplug(t)
		if err := decrypts(patient(t), key); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("unplugged it gives %v", err)
		}
		plug.Replug(t)
	}
	progress()
	stop()
	all.Wait()
}

func TestImpatientCallersCostNobodyAnything(t *testing.T) {
	card := pkcs11test.Card(t)
	key := rsaKey(t, newSetting(t, &card.Token).open(t))
	frozen := pkcs11test.Freezes("C_Decrypt") // so that whoever is inside stays there until all others have left
	card.Fault(t, frozen)
	before := hosts(t)
	from := card.Operations(t)
	var all sync.WaitGroup
	const impatient = 12
	for range impatient {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			defer cancel()
			begun := time.Now()
			if err := decrypts(ctx, key); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("an impatient caller gets %v", err)
			}
			if took := time.Since(begun); took > 10*time.Second {
				t.Errorf("an impatient caller waited %v", took)
			}
		})
	}
	all.Wait()
	card.Mend(t, frozen)
	if err := decrypts(patient(t), key); err != nil {
		t.Errorf("a patient one gets %v", err)
	}
	if n := card.Operations(t) - from; n > 2 { // the one that was inside, and ours
		t.Errorf("%d operations were done for callers who had left", n)
	}
	if now := hosts(t); !slices.Equal(now, before) {
		t.Errorf("the hosts %v became %v", before, now)
	}
}

func TestInfoOfACardThatWentAway(t *testing.T) {
	for _, loss := range []pkcs11test.Loss{pkcs11test.CardRemoved, pkcs11test.ReaderRemoved} {
		t.Run(string(loss), func(t *testing.T) {
			card := pkcs11test.Card(t)
			device := newSetting(t, &card.Token).open(t)
			if _, err := device.FindKeys(patient(t), hsm.KeyQuery{}); err != nil {
				t.Fatal(err)
			}
			card.Remove(t, loss) // C_GetTokenInfo goes on answering from its cache
			if info, err := device.Info(patient(t)); !errors.Is(err, hsm.ErrUnavailable) || info.State != hsm.StateAbsent {
				t.Errorf("Info gives %+v, %v; want ErrUnavailable and %q", info, err, hsm.StateAbsent)
			}
			card.Return(t)
			pkcs11test.Until(t, "Info finds it again", func() bool {
				info, err := device.Info(patient(t))
				return err == nil && info.State == hsm.StateOperational && info.Serial == card.Serial
			})
		})
	}
}

func TestTheLastWrongPINLocksTheCardAndSaysSo(t *testing.T) {
	card := pkcs11test.Card(t)
	card.SetTries(t, 1)
	device := newSetting(t, &card.Token).open(t, withPIN("111111"))
	_, err := device.FindKeys(patient(t), hsm.KeyQuery{})
	if refused := pinError(t, err); !refused.Barred || refused.TriesLeft != 1 || card.Calls(t, "C_Login") != 0 {
		t.Errorf("on the last try: %+v", refused)
	}
	if err := device.Unbar(patient(t)); err != nil { // a person insists
		t.Fatal(err)
	}
	_, err = device.FindKeys(patient(t), hsm.KeyQuery{})
	if refused := pinError(t, err); refused.Barred || refused.TriesLeft != 0 || !errors.Is(err, hsm.ErrLocked) ||
		!strings.Contains(refused.Detail, "--init-pin") {
		t.Errorf("the last wrong PIN gives %+v", refused)
	}
}

func TestALogInThatHangsIsResolvedByTheCardsTries(t *testing.T) {
	for name, c := range map[string]struct {
		pin    string
		barred bool
	}{"a wrong PIN": {"111111", true}, "the right PIN": {"648219", false}} {
		t.Run(name, func(t *testing.T) {
			card := pkcs11test.Card(t, pkcs11test.Freezes("C_Login_answer"))
			s := newSetting(t, &card.Token)
			device := s.open(t, withPIN(c.pin), func(c *pkcs11.Config) { c.DecryptLimit = 300 * time.Millisecond })
			if _, err := device.FindKeys(patient(t), hsm.KeyQuery{}); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("a log-in that hangs gives %v, want ErrUnavailable", err)
			}
			card.Mend(t, pkcs11test.Freezes("C_Login_answer"))
			if !c.barred {
				pkcs11test.Until(t, "the log-in works", func() bool {
					_, err := device.FindKeys(patient(t), hsm.KeyQuery{})
					return err == nil
				})
				return
			}
			pkcs11test.Until(t, "the PIN is barred", func() bool {
				_, err := device.FindKeys(patient(t), hsm.KeyQuery{})
				refused, ok := errors.AsType[*hsm.PINError](err)
				return ok && refused.Barred
			})
			if n := card.WrongPINs(t); n != 1 {
				t.Errorf("the card got %d wrong PINs, want 1", n)
			}
		})
	}
}

func TestAModuleThatHangsWhileItIsLoaded(t *testing.T) {
	for _, function := range []string{"C_Initialize", "C_GetFunctionList", "C_GetSlotList"} {
		t.Run(function, func(t *testing.T) {
			card := pkcs11test.Card(t, pkcs11test.Freezes(function))
			s := newSetting(t, &card.Token)
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			if _, err := s.open(t).FindKeys(ctx, hsm.KeyQuery{}); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("it gives %v, want the caller's deadline", err)
			}
			running := hosts(t)
			begun := time.Now()
			if err := s.manager.Close(); err != nil {
				t.Error(err)
			}
			if took := time.Since(begun); took > 10*time.Second {
				t.Errorf("Close took %v", took)
			}
			for _, host := range running {
				if !gone(host) {
					t.Errorf("the module host %d is left", host)
				}
			}
		})
	}
}

// TestACrashAnywhere lets the module crash in each function that the host calls, once.
func TestACrashAnywhere(t *testing.T) {
	for _, function := range []string{
		"C_GetFunctionList", "C_Initialize", "C_GetSlotList", "C_GetSlotInfo", "C_GetTokenInfo", "C_GetMechanismList",
		"C_GetMechanismInfo", "C_OpenSession", "C_CloseSession", "C_Login", "C_FindObjectsInit", "C_GetAttributeValue",
		"C_CreateObject", "C_DestroyObject", "C_DecryptInit", "C_Decrypt", "C_GenerateKeyPair", "C_GenerateRandom",
	} {
		t.Run(function, func(t *testing.T) {
			card := pkcs11test.Card(t, pkcs11test.CrashesOnce(function))
			device := newSetting(t, &card.Token).open(t)
			ref := hsm.ObjectRef{Application: "nitroseal", Label: "item"}
			var key hsm.Key
			// Each step is what a caller does who tries again after ErrUnavailable.
			again := func(what string, do func() error) {
				t.Helper()
				failures := 0
				pkcs11test.Until(t, what+" succeeds", func() bool {
					err := do()
					if err != nil && !errors.Is(err, hsm.ErrUnavailable) {
						t.Fatalf("%s gives %v, want ErrUnavailable at worst", what, err)
					}
					if err != nil {
						failures++
					}
					return err == nil
				})
				if failures > 1 && what != "finding" { // a host that dies at birth has a moment's rest
					t.Logf("%s failed %d times", what, failures)
				}
			}
			again("finding", func() error { _, err := device.FindKeys(patient(t), hsm.KeyQuery{}); return err })
			again("generating", func() (err error) {
				key, err = device.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.RSA2048, Label: "unseal", ID: "01"})
				if errors.Is(err, hsm.ErrExists) { // it was made before the crash
					key, err = find(t, device, hsm.KeyQuery{ID: "01"})
				}
				return err
			})
			again("proving", func() error {
				prover, ok := key.(hsm.Prover)
				if !ok {
					t.Fatalf("a %T proves nothing", key)
				}
				return prover.Prove(patient(t))
			})
			again("decrypting", func() error { return decrypts(patient(t), proved(t, key)) })
			again("writing", func() error {
				err := device.WriteObject(patient(t), ref, []byte("value"))
				if errors.Is(err, hsm.ErrExists) {
					return nil
				}
				return err
			})
			again("reading", func() error { _, err := device.ReadObject(patient(t), ref); return err })
			again("drawing", func() error { _, err := device.Random(patient(t), 8); return err })
			again("asking", func() error { _, err := device.Info(patient(t)); return err })
			again("deleting", func() error {
				err := device.DeleteObject(patient(t), ref)
				if errors.Is(err, hsm.ErrNotFound) {
					return nil
				}
				return err
			})
			keys, err := device.FindKeys(patient(t), hsm.KeyQuery{})
			if err != nil || len(keys) != 1 {
				t.Errorf("%d keys are on the token, %v; want the one", len(keys), err)
			}
			objects, err := device.Objects(patient(t), ref.Application)
			if err != nil || len(objects) != 0 {
				t.Errorf("%d objects are left, %v", len(objects), err)
			}
			if card.Tries(t) != 3 {
				t.Errorf("%d tries are left", card.Tries(t))
			}
		})
	}
}

func TestAGreedyMountDelaysAnotherByAFewOperations(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	greedy := rsaKey(t, s.open(t))
	modestDevice := s.open(t, func(c *pkcs11.Config) { c.Owner = "modest" })
	found, err := find(t, modestDevice, hsm.KeyQuery{ID: "01"})
	if err != nil {
		t.Fatal(err)
	}
	modest := proved(t, found)
	hash := greedy.OAEPHashes()[0]
	ciphertext := encrypted(t, greedy, hash) // by now: sixty encryptions would hold up the modest mount, too
	card.Fault(t, pkcs11test.Slow(100*time.Millisecond))
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	before := card.Operations(t)
	for range 60 {
		all.Go(func() { _, _ = greedy.DecryptOAEP(ctx, hash, ciphertext) }) // most are given up
	}
	pkcs11test.Until(t, "the greedy mount is at work", func() bool { return card.Operations(t) > before+2 })
	before = card.Operations(t)
	if _, err := modest.DecryptOAEP(patient(t), hash, ciphertext); err != nil {
		t.Errorf("the modest mount gets %v", err)
	}
	if n := card.Operations(t) - before; n > 6 {
		t.Errorf("the modest mount waited for %d operations", n)
	}
	stop()
	all.Wait()
}

func TestPluginsThatStartTogetherSendAWrongPINOnce(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	var all sync.WaitGroup
	for range 3 {
		other := s.otherPlugin(t, "111111")
		all.Go(func() { _ = other.Wait() }) // it ends with the error that it got
	}
	all.Wait()
	if n := card.Calls(t, "C_Login"); n != 1 || card.WrongPINs(t) != 1 || card.Tries(t) != 2 {
		t.Errorf("%d log-ins were tried with %d wrong PINs, and %d tries are left; want 1, 1 and 2", n, card.WrongPINs(t), card.Tries(t))
	}
}

func TestWithoutAStateDirectoryNoPINIsSent(t *testing.T) {
	card := pkcs11test.Card(t)
	for name, dir := range map[string]string{"none given": "", "one that is not there": filepath.Join(t.TempDir(), "missing")} {
		s := newSetting(t, &card.Token, func(o *pkcs11.Options) { o.StateDir = dir })
		_, err := s.open(t).FindKeys(patient(t), hsm.KeyQuery{})
		if !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "-state-dir") {
			t.Errorf("%s: it gives %v; want ErrUnavailable that names -state-dir", name, err)
		}
		if info, err := s.open(t).Info(patient(t)); err != nil || info.State != hsm.StateOperational {
			t.Errorf("%s: what needs no PIN gives %+v, %v", name, info, err)
		}
	}
	if n := card.Calls(t, "C_Login"); n != 0 {
		t.Errorf("%d PINs were sent", n)
	}
}

func TestTheHashThatAKeyIsProvedWith(t *testing.T) {
	for name, c := range map[string]struct {
		faults []pkcs11test.Fault
		want   crypto.Hash
	}{
		"OpenSC":                             {nil, crypto.SHA256},
		"announced and refused, as SoftHSM":  {[]pkcs11test.Fault{pkcs11test.SHA1Only}, crypto.SHA1},
		"raw RSA with an unpadding of ours":  {[]pkcs11test.Fault{pkcs11test.RawOnly}, crypto.SHA256},
		"a session that survives a failure":  {[]pkcs11test.Fault{pkcs11test.SHA1Only, pkcs11test.NoWedge}, crypto.SHA1},
		"a length query that costs nothing":  {[]pkcs11test.Fault{pkcs11test.FreeLengthQuery}, crypto.SHA256},
		"a label without OpenSC's (UserPIN)": {[]pkcs11test.Fault{pkcs11test.PlainLabel}, crypto.SHA256},
	} {
		t.Run(name, func(t *testing.T) {
			card := pkcs11test.Card(t, c.faults...)
			key := rsaKey(t, newSetting(t, &card.Token).open(t, func(c *pkcs11.Config) { c.Serial, c.TokenLabel = "", card.Label }))
			if hashes := key.OAEPHashes(); len(hashes) == 0 || hashes[0] != c.want {
				t.Errorf("the hashes are %v, want %v first", hashes, c.want)
			}
			before := card.Operations(t)
			if err := decrypts(patient(t), key); err != nil {
				t.Error(err)
			}
			if n := card.Operations(t) - before; n != 1 {
				t.Errorf("a decryption cost %d operations, want 1", n)
			}
		})
	}
}
