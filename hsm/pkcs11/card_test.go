package pkcs11_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// rsaKey makes a key on the token and returns it proved.
func rsaKey(t *testing.T, device *pkcs11.Device) hsm.Decrypter {
	t.Helper()
	made, err := device.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.RSA2048, Label: "unseal", ID: "01"})
	if err != nil {
		t.Fatalf("GenerateKey: %v", err)
	}
	prover, ok := made.(hsm.Prover)
	if !ok {
		t.Fatalf("a %T proves nothing", made)
	}
	if err := prover.Prove(patient(t)); err != nil {
		t.Fatalf("Prove: %v", err)
	}
	key, ok := made.(hsm.Decrypter)
	if !ok {
		t.Fatalf("a %T decrypts nothing", made)
	}
	return key
}

var message = []byte("a message of ours")

// encrypt makes a ciphertext of our message.
func encrypt(key hsm.Decrypter, hash crypto.Hash) ([]byte, error) {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("the public key is a %T", key.Public())
	}
	return rsa.EncryptOAEP(hash.New(), rand.Reader, public, message, nil)
}

// encrypted is [encrypt] where it must succeed.
func encrypted(t *testing.T, key hsm.Decrypter, hash crypto.Hash) []byte {
	t.Helper()
	ciphertext, err := encrypt(key, hash)
	if err != nil {
		t.Fatal(err)
	}
	return ciphertext
}

// decrypts says what is wrong with a decryption.
func decrypts(ctx context.Context, key hsm.Decrypter) error {
	hash := key.OAEPHashes()[0]
	ciphertext, err := encrypt(key, hash)
	if err != nil {
		return err
	}
	got, err := key.DecryptOAEP(ctx, hash, ciphertext)
	if err == nil && !bytes.Equal(got, message) {
		err = fmt.Errorf("it decrypts to %q", got)
	}
	return err
}

// hosts are the processes that this one has started as module hosts.
func hosts(t *testing.T) []int {
	t.Helper()
	var found []int
	threads, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		children, err := os.ReadFile(thread)
		if err != nil {
			continue // a thread that ended meanwhile
		}
		for field := range strings.FieldsSeq(string(children)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			name, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			if err == nil && strings.HasPrefix(string(name), "nitroseal-module-host\x00") {
				found = append(found, pid)
			}
		}
	}
	return found
}

func TestCardKeepsTheContract(t *testing.T) {
	for name, faults := range map[string][]pkcs11test.Fault{
		"with OAEP of its own":               nil,
		"with raw RSA and our own unpadding": {pkcs11test.RawOnly},
		"with raw RSA that gives numbers":    {pkcs11test.RawOnly, pkcs11test.RawNumbers},
	} {
		t.Run(name, func(t *testing.T) {
			card := pkcs11test.Card(t, faults...)
			s := newSetting(t, &card.Token)
			hsmtest.TestDevice(t, func(t *testing.T) hsm.Device {
				t.Helper()
				device, err := s.manager.Open(t.Context(), pkcs11.Config{
					Module: card.Module, TokenLabel: card.Label, PIN: []byte(card.PIN), Owner: t.Name(),
				})
				if err != nil {
					t.Fatalf("Open: %v", err)
				}
				return device
			}, hsmtest.Capabilities{
				Algorithms: []hsm.Algorithm{hsm.RSA2048, hsm.ECDHP256}, DuplicateLabels: true, Objects: true, Random: true, Legacy: true,
				Foreign:    func(t *testing.T, label string, value []byte) { t.Helper(); card.WriteForeignObject(t, label, value) },
				Operations: func(t *testing.T) int { t.Helper(); return card.Operations(t) },
				DuplicateObject: func(t *testing.T, ref hsm.ObjectRef, value []byte) {
					t.Helper()
					card.WriteObject(t, ref.Application, ref.Label, value)
				},
			})
		})
	}
}

func TestALostCardIsUsedAgain(t *testing.T) {
	for _, loss := range []pkcs11test.Loss{
		pkcs11test.CardRemoved, pkcs11test.ReaderRemoved, pkcs11test.DaemonRestart, pkcs11test.LostInACommand,
	} {
		t.Run(string(loss)+", and a call while it was away", func(t *testing.T) {
			card := pkcs11test.Card(t)
			key := rsaKey(t, newSetting(t, &card.Token).open(t))
			card.Remove(t, loss)
			err := decrypts(patient(t), key)
			if away := loss == pkcs11test.CardRemoved || loss == pkcs11test.ReaderRemoved; away != errors.Is(err, hsm.ErrUnavailable) || !away && err != nil {
				t.Errorf("after the loss: %v", err)
			}
			card.Return(t)
			pkcs11test.Until(t, "the returned card decrypts", func() bool { return decrypts(patient(t), key) == nil })
		})
		t.Run(string(loss)+", and no call while it was away", func(t *testing.T) {
			card := pkcs11test.Card(t)
			key := rsaKey(t, newSetting(t, &card.Token).open(t))
			card.Remove(t, loss)
			card.Return(t)
			if err := decrypts(patient(t), key); err != nil {
				t.Errorf("the first decryption after the return: %v", err)
			}
			if n := card.WrongPINs(t); n != 0 {
				t.Errorf("%d wrong PINs", n)
			}
		})
	}
}

func TestAWrongPINIsSentToACardOnce(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	wrong := func(c *pkcs11.Config) { c.PIN, c.Owner = []byte("000000"), "careless" }
	attempt := func(manager *pkcs11.Manager) *hsm.PINError {
		t.Helper()
		config := pkcs11.Config{Module: card.Module, Serial: card.Serial}
		wrong(&config)
		device, err := manager.Open(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = device.Close() }()
		_, err = device.FindKeys(patient(t), hsm.KeyQuery{})
		refusal, ok := errors.AsType[*hsm.PINError](err)
		if !ok {
			t.Fatalf("a wrong PIN gives %v, want a *hsm.PINError", err)
		}
		return refusal
	}
	if refusal := attempt(s.manager); refusal.Barred {
		t.Errorf("the first attempt: %+v", refusal)
	}
	if refusal := attempt(s.manager); !refusal.Barred {
		t.Errorf("the second attempt: %+v", refusal)
	}
	restarted := pkcs11.New(pkcs11.Options{Modules: []string{card.Module}, StateDir: s.state, Env: card.Env})
	if refusal := attempt(restarted); !refusal.Barred {
		t.Errorf("an attempt after a restart: %+v", refusal)
	}
	if err := restarted.Close(); err != nil {
		t.Error(err)
	}
	if n := card.WrongPINs(t); n != 1 {
		t.Errorf("the card got %d wrong PINs, want 1", n)
	}
	// The right PIN is not known to be right here yet, and the card shows that a try was used: a person says so.
	device := s.open(t)
	if err := device.Unbar(patient(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := device.FindKeys(patient(t), hsm.KeyQuery{}); err != nil {
		t.Errorf("the right PIN after Unbar: %v", err)
	}
	if tries := card.Tries(t); tries != 3 {
		t.Errorf("%d tries are left, want 3", tries)
	}
}

func TestALockedPINIsNotSentAnything(t *testing.T) {
	card := pkcs11test.Card(t)
	device := newSetting(t, &card.Token).open(t)
	card.SetTries(t, 0)
	_, err := device.FindKeys(patient(t), hsm.KeyQuery{})
	if refusal, ok := errors.AsType[*hsm.PINError](err); !ok || refusal.TriesLeft != 0 || !errors.Is(err, hsm.ErrLocked) {
		t.Errorf("a locked PIN gives %v", err)
	}
	if n := card.Calls(t, "C_Login"); n != 0 {
		t.Errorf("%d log-ins were tried", n)
	}
}

func TestTwoMountsWithTwoPINsOnOneToken(t *testing.T) {
	card := pkcs11test.Card(t)
	s := newSetting(t, &card.Token)
	good := s.open(t)
	bad := s.open(t, func(c *pkcs11.Config) { c.PIN, c.Owner = []byte("000000"), "other" })
	key := rsaKey(t, good)
	_, err := bad.FindKeys(patient(t), hsm.KeyQuery{})
	if refusal, ok := errors.AsType[*hsm.PINError](err); !ok || !refusal.Barred {
		t.Errorf("another PIN beside a log-in gives %v", err)
	}
	if err := decrypts(patient(t), key); err != nil {
		t.Error(err)
	}
	if n := card.WrongPINs(t); n != 0 {
		t.Errorf("the card got %d wrong PINs, want none", n)
	}
}

func TestAFrozenCardCostsTheCallerItsDeadlineAndTheHostItsLife(t *testing.T) {
	card := pkcs11test.Card(t)
	const limit = 3 * time.Second
	device := newSetting(t, &card.Token).open(t, func(c *pkcs11.Config) { c.DecryptLimit = limit })
	key := rsaKey(t, device)
	before := hosts(t)
	card.Fault(t, pkcs11test.Freezes("C_Decrypt"))
	ctx, cancel := context.WithTimeout(t.Context(), limit/7)
	defer cancel()
	if err := decrypts(ctx, key); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an impatient caller gets %v", err)
	}
	if now := hosts(t); !slices.Equal(now, before) {
		t.Errorf("its impatience cost a host: %v became %v", before, now)
	}
	pkcs11test.Until(t, "the host is killed", func() bool { return !slices.Contains(hosts(t), before[0]) })
	card.Mend(t, pkcs11test.Freezes("C_Decrypt"))
	if err := decrypts(patient(t), key); err != nil {
		t.Errorf("after the thaw: %v", err)
	}
}

func TestACrashingModuleHarmsOneOperation(t *testing.T) {
	card := pkcs11test.Card(t)
	key := rsaKey(t, newSetting(t, &card.Token).open(t))
	card.Fault(t, pkcs11test.CrashesOnce("C_Decrypt"))
	if err := decrypts(patient(t), key); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the operation in the crash gives %v, want ErrUnavailable", err)
	}
	if err := decrypts(patient(t), key); err != nil {
		t.Errorf("the next one: %v", err)
	}
}

func TestAKilledHostHarmsTheOldestOperation(t *testing.T) {
	card := pkcs11test.Card(t)
	device := newSetting(t, &card.Token).open(t, func(c *pkcs11.Config) { c.Parallel = 4 })
	key := rsaKey(t, device)
	frozen := pkcs11test.Freezes("C_Decrypt")
	card.Fault(t, frozen)
	started := card.Calls(t, "C_Decrypt")
	errs := make([]error, 4)
	var all sync.WaitGroup
	for i := range errs {
		all.Go(func() { errs[i] = decrypts(patient(t), key) })
	}
	pkcs11test.Until(t, "all are inside", func() bool { return card.Calls(t, "C_Decrypt") == started+len(errs) })
	running := hosts(t)
	signal := func(number syscall.Signal) {
		for _, pid := range running {
			if err := syscall.Kill(pid, number); err != nil && !errors.Is(err, syscall.ESRCH) {
				t.Fatal(err)
			}
		}
	}
	signal(syscall.SIGSTOP) // so that nothing comes back from it when the card thaws
	card.Mend(t, frozen)
	signal(syscall.SIGKILL)
	all.Wait()
	var failed int
	for _, err := range errs {
		switch {
		case err == nil:
		case errors.Is(err, hsm.ErrUnavailable):
			failed++
		default:
			t.Errorf("an operation gives %v", err)
		}
	}
	if failed != 1 {
		t.Errorf("%d of %d operations failed, want the oldest alone: %v", failed, len(errs), errs)
	}
}

func TestLostWrites(t *testing.T) {
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "prod"}
	t.Run("a card that keeps nothing is full", func(t *testing.T) {
		card := pkcs11test.Card(t, pkcs11test.LostWrites)
		device := newSetting(t, &card.Token).open(t)
		if err := device.WriteObject(patient(t), ref, []byte("value")); !errors.Is(err, hsm.ErrFull) {
			t.Errorf("writing gives %v, want ErrFull", err)
		}
	})
	for name, faults := range map[string][]pkcs11test.Fault{
		"refused after another program selected the applet": nil,
		"lost after another program selected the applet":    {pkcs11test.LostAfterDeauthentication},
	} {
		t.Run(name, func(t *testing.T) {
			card := pkcs11test.Card(t, faults...)
			device := newSetting(t, &card.Token).open(t)
			if _, err := device.Objects(patient(t), ref.Application); err != nil {
				t.Fatal(err)
			}
			card.Deauthenticate(t)
			if err := device.WriteObject(patient(t), ref, []byte("value")); err != nil {
				t.Fatalf("writing: %v", err)
			}
			if got, err := device.ReadObject(patient(t), ref); err != nil || string(got) != "value" {
				t.Errorf("reading gives %q, %v", got, err)
			}
			card.Deauthenticate(t)
			if err := device.DeleteObject(patient(t), ref); err != nil {
				t.Errorf("deleting: %v", err)
			}
			if labels, err := device.Objects(patient(t), ref.Application); err != nil || len(labels) != 0 {
				t.Errorf("what is left is %v, %v", labels, err)
			}
		})
	}
}

func TestAnUnpluggedTokenIsUsedAgain(t *testing.T) {
	plug := pkcs11test.Unpluggable(t)
	key := rsaKey(t, newSetting(t, &plug.Token).open(t))
	for range 2 {
		plug.Unplug(t)
		if err := decrypts(patient(t), key); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("unplugged it gives %v, want ErrUnavailable", err)
		}
		plug.Replug(t)
		returned := time.Now()
		pkcs11test.Until(t, "the returned token decrypts", func() bool { return decrypts(patient(t), key) == nil })
		t.Logf("in use again %v after its return", time.Since(returned))
	}
}

func TestOneDecryptionIsOneCallOfCDecrypt(t *testing.T) {
	spy := pkcs11test.Spied(t, pkcs11test.SoftHSM(t))
	key := rsaKey(t, newSetting(t, &spy.Token).open(t))
	before := spy.Calls(t)["C_Decrypt"]
	if err := decrypts(patient(t), key); err != nil {
		t.Fatal(err)
	}
	if n := spy.Calls(t)["C_Decrypt"] - before; n != 1 {
		t.Errorf("one decryption called C_Decrypt %d times", n)
	}
}

func TestAHostInheritsNothing(t *testing.T) {
	t.Setenv("OF_THE_PLUGIN", "secret")
	token := pkcs11test.SoftHSM(t)
	ours, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = ours.Close(), theirs.Close() }()
	inherited, err := syscall.Dup(int(theirs.Fd())) // without close-on-exec, as something that this process inherited itself
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = syscall.Close(inherited) }()

	device := newSetting(t, token).open(t)
	if _, err := device.Random(patient(t), 8); err != nil {
		t.Fatal(err)
	}
	running := hosts(t)
	if len(running) != 1 {
		t.Fatalf("%d hosts run, want 1", len(running))
	}
	dir := fmt.Sprintf("/proc/%d/", running[0])
	// The host is not dumpable, so that only root may look into it.
	environment, err := os.ReadFile(dir + "environ")
	if errors.Is(err, os.ErrPermission) {
		t.Skip("only root may look into a module host")
	}
	if err != nil || strings.Contains(string(environment), "OF_THE_PLUGIN") || !strings.Contains(string(environment), "SOFTHSM2_CONF=") {
		t.Errorf("the host's environment is %q, %v", environment, err)
	}
	pipe, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", inherited))
	if err != nil {
		t.Fatal(err)
	}
	descriptors, err := os.ReadDir(dir + "fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range descriptors {
		leads, err := os.Readlink(dir + "fd/" + d.Name())
		if err != nil {
			continue
		}
		if leads == pipe {
			t.Errorf("descriptor %s of the host is ours", d.Name())
		}
		if n, _ := strconv.Atoi(d.Name()); n <= 2 && leads != os.DevNull {
			t.Errorf("descriptor %d of the host leads to %s", n, leads)
		}
	}
}

func TestAHostFromItsOwnBinary(t *testing.T) {
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	binary = filepath.Join(t.TempDir(), "host") // in directories that others cannot write to, whatever the umask is
	if err := errors.Join(os.Chmod(filepath.Dir(binary), 0o755), os.Chmod(filepath.Dir(filepath.Dir(binary)), 0o755),
		os.WriteFile(binary, content, 0o700)); err != nil {
		t.Fatal(err)
	}
	token := pkcs11test.SoftHSM(t)
	with := func(path, digest string) *pkcs11.Device {
		return newSetting(t, token, func(o *pkcs11.Options) { o.HostPath, o.HostSHA256 = path, digest }).open(t)
	}
	if _, err := with(binary, hex.EncodeToString(sum[:])).Random(patient(t), 8); err != nil {
		t.Errorf("the right binary: %v", err)
	}
	sum[0] ^= 1
	if _, err := with(binary, hex.EncodeToString(sum[:])).Random(patient(t), 8); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "was replaced") {
		t.Errorf("a replaced binary gives %v", err)
	}
	if _, err := with(binary, "beef").Random(patient(t), 8); err == nil {
		t.Error("a digest that is none was taken")
	}
	if _, err := with(filepath.Join(t.TempDir(), "none"), hex.EncodeToString(sum[:])).Random(patient(t), 8); err == nil {
		t.Error("a binary that is not there was run")
	}
}

func TestTheHostEndsWithItsLastDevice(t *testing.T) {
	s := newSetting(t, pkcs11test.SoftHSM(t))
	first, second := s.open(t), s.open(t)
	for _, device := range []*pkcs11.Device{first, second} {
		if _, err := device.Random(patient(t), 8); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(hosts(t)); n != 1 {
		t.Errorf("%d hosts for two devices of one module, want 1", n)
	}
	if err := first.Close(); err != nil || len(hosts(t)) != 1 {
		t.Errorf("the first Close gives %v and leaves %d hosts, want 1", err, len(hosts(t)))
	}
	begun := time.Now()
	if err := second.Close(); err != nil || len(hosts(t)) != 0 {
		t.Errorf("the last Close gives %v and leaves %d hosts, want none", err, len(hosts(t)))
	}
	if took := time.Since(begun); took > 1900*time.Millisecond { // a host that is not asked to end is killed after two seconds
		t.Errorf("it took %v", took)
	}
}

func TestUsersOfAModuleThatCannotBeLoadedHearWhy(t *testing.T) {
	card := pkcs11test.Card(t, pkcs11test.Fails("C_GetFunctionList", 0x5))
	_, err := newSetting(t, &card.Token).open(t).Info(patient(t))
	if !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "C_GetFunctionList") {
		t.Errorf("it gives %v", err)
	}
}
