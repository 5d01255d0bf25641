package pkcs11test_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// attempt runs pkcs11-tool through a module and returns what it prints, failed or not.
func attempt(t *testing.T, module, pin string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "pkcs11-tool", append([]string{"--module", module, "--login", "--pin", pin}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestCardLocksAfterThreeWrongPINs(t *testing.T) {
	card := pkcs11test.Card(t)
	if info := card.ToolThrough(t, "--list-slots"); !strings.Contains(info, card.Label+" (UserPIN)") {
		t.Errorf("the label has no (UserPIN):\n%s", info)
	}
	for i, step := range []struct {
		pin, answer string
		tries       int
		flag        string
	}{
		{"12345", "CKR_PIN_LEN_RANGE", 3, ""},
		{"111111", "CKR_PIN_INCORRECT", 2, "user PIN count low"},
		{"222222", "CKR_PIN_INCORRECT", 1, "final user PIN try"},
		{card.PIN, "", 3, ""},
		{"111111", "CKR_PIN_INCORRECT", 2, "user PIN count low"},
		{"222222", "CKR_PIN_INCORRECT", 1, "final user PIN try"},
		{"333333", "CKR_PIN_LOCKED", 0, "user PIN locked"},
		{card.PIN, "CKR_PIN_LOCKED", 0, "user PIN locked"},
	} {
		out, _ := attempt(t, card.Module, step.pin, "--list-objects")
		if !strings.Contains(out, step.answer) || (step.answer == "" && strings.Contains(out, "CKR_")) {
			t.Errorf("step %d: the answer is\n%s\nwant %s", i, out, step.answer)
		}
		if card.Tries(t) != step.tries {
			t.Errorf("step %d: %d tries are left, want %d", i, card.Tries(t), step.tries)
		}
		shown, _ := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", card.Module, "--list-slots").CombinedOutput()
		if step.flag != "" && !strings.Contains(string(shown), step.flag) {
			t.Errorf("step %d: the token does not show %q:\n%s", i, step.flag, shown)
		}
	}
	if n := card.WrongPINs(t); n != 5 {
		t.Errorf("%d wrong PINs were counted, want 5", n)
	}
}

func TestCardCountsOperationsAndLosesWrites(t *testing.T) {
	card := pkcs11test.Card(t)
	card.GenerateKey(t, "rsa:2048", "key", "01")
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	if err := os.WriteFile(in, make([]byte, 256), 0o600); err != nil {
		t.Fatal(err)
	}
	card.ToolThrough(t, "--decrypt", "--mechanism", "RSA-X-509", "--id", "01", "--input-file", in, "--output-file", out)
	if card.Operations(t) < 1 {
		t.Error("a decryption was not counted as an operation")
	}

	value := filepath.Join(dir, "value")
	if err := os.WriteFile(value, []byte("value"), 0o600); err != nil {
		t.Fatal(err)
	}
	write := func(label string) {
		card.ToolThrough(t, "--write-object", value, "--type", "data", "--private", "--label", label)
	}
	card.Fault(t, pkcs11test.LostWrites)
	write("lost")
	card.Mend(t, pkcs11test.LostWrites)
	write("kept")
	if listed := card.ToolThrough(t, "--list-objects"); strings.Contains(listed, "lost") || !strings.Contains(listed, "kept") {
		t.Errorf("another process sees\n%s", listed)
	}
	card.Fault(t, pkcs11test.Fails("C_CreateObject", 0x31))
	if out, err := attempt(t, card.Module, card.PIN, "--write-object", value, "--type", "data", "--label", "full"); err == nil ||
		!strings.Contains(out, "CKR_DEVICE_MEMORY") {
		t.Errorf("a full card says %v\n%s", err, out)
	}
}

func TestCardGoesAwayFreezesAndCrashes(t *testing.T) {
	card := pkcs11test.Card(t)
	listSlots := func() string {
		out, _ := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", card.Module, "--list-slots").CombinedOutput()
		return string(out)
	}
	card.Remove(t, pkcs11test.ReaderRemoved)
	if out := listSlots(); strings.Contains(out, card.Label) {
		t.Errorf("a token that is away shows\n%s", out)
	}
	card.Return(t)
	if out := listSlots(); !strings.Contains(out, card.Label) {
		t.Errorf("a token that came back shows\n%s", out)
	}

	card.Fault(t, pkcs11test.Fails("C_GetFunctionList", 0x5))
	if out := listSlots(); strings.Contains(out, card.Label) {
		t.Errorf("a module without a function list shows\n%s", out)
	}
	card.Mend(t, pkcs11test.Fails("C_GetFunctionList", 0x5))

	card.Fault(t, pkcs11test.CrashesOnce("C_Login"))
	if out, err := attempt(t, card.Module, card.PIN, "--list-objects"); err == nil {
		t.Errorf("a crash passes unseen:\n%s", out)
	}
	if out, err := attempt(t, card.Module, card.PIN, "--list-objects"); err != nil {
		t.Errorf("the second call crashes as well: %v\n%s", err, out)
	}

	card.Fault(t, pkcs11test.Freezes("C_Login"))
	done := make(chan error, 1)
	go func() {
		_, err := attempt(t, card.Module, card.PIN, "--list-objects")
		done <- err
	}()
	pkcs11test.Until(t, "the third log-in is under way", func() bool { return card.Calls(t, "C_Login") >= 3 })
	select {
	case err := <-done:
		t.Errorf("a frozen card answers: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	card.Mend(t, pkcs11test.Freezes("C_Login"))
	if err := <-done; err != nil {
		t.Errorf("a card that thawed: %v", err)
	}
}

func TestPlugIsPulledAndGivenBack(t *testing.T) {
	plug := pkcs11test.Unpluggable(t)
	plug.GenerateKey(t, "rsa:2048", "key", "01")
	if listed, err := attempt(t, plug.Module, plug.PIN, "--list-objects"); err != nil || !strings.Contains(listed, "key") {
		t.Fatalf("through the server: %v\n%s", err, listed)
	}
	plug.Unplug(t)
	if listed, _ := attempt(t, plug.Module, plug.PIN, "--list-objects"); strings.Contains(listed, "Private Key") {
		t.Fatalf("a token that was pulled lists\n%s", listed)
	}
	plug.Replug(t)
	if listed, err := attempt(t, plug.Module, plug.PIN, "--list-objects"); err != nil || !strings.Contains(listed, "key") {
		t.Fatalf("after its return: %v\n%s", err, listed)
	}
}

func TestSpyCountsCalls(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	token.GenerateKey(t, "rsa:2048", "key", "01")
	spy := pkcs11test.Spied(t, token)
	spy.ToolThrough(t, "--list-objects")
	calls := spy.Calls(t)
	if calls["C_Login"] != 1 || calls["C_FindObjectsInit"] == 0 || calls["C_Decrypt"] != 0 {
		t.Errorf("the spy counted %v", calls)
	}
}
