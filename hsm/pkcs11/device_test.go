package pkcs11

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func TestLossesAreMendedByANewHost(t *testing.T) {
	for name, code := range map[string]uint{
		"removed":                    ckrDeviceRemoved,
		"reader gone":                ckrTokenNotPresent,
		"returned without a call":    ckrGeneralError,
		"p11-kit's server gone":      ckrDeviceError,
		"session gone":               ckrSessionHandleInvalid,
		"key handle gone":            ckrKeyHandleInvalid,
		"object handle gone":         ckrObjectHandleInvalid,
		"log-in gone":                ckrUserNotLoggedIn,
		"library not initialised":    ckrCryptokiNotInitialized,
		"session wedged":             ckrOperationActive,
		"a failure without a reason": ckrFunctionFailed,
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			k := key(t, f.open(t, m, module))
			f.follow(func(h *fakeHost, r wire.Frame) bool {
				return h.number == 1 && r.Op == wire.OpDecryptOAEP && h.fail(r, code)
			})
			if err := f.decrypts(patient(t), k); err != nil {
				t.Errorf("after CKR 0x%x: %v", code, err)
			}
			if f.born() != 2 || f.count(wire.OpLogin) != 2 {
				t.Errorf("%d hosts and %d log-ins, want 2 and 2", f.born(), f.count(wire.OpLogin))
			}
		})
	}
}

func TestAReturnValueThatNobodyForesawEndsItsHost(t *testing.T) {
	for name, code := range map[string]uint{
		"CKR_HOST_MEMORY": 0x02, "CKR_FUNCTION_CANCELED": 0x50, "CKR_CANT_LOCK": 0x0A, "CKR_MUTEX_BAD": 0x1A0,
		"a vendor's own": 0x80000201, "one that PKCS#11 does not have": 0x4711,
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module)
			k := key(t, d)
			f.follow(func(h *fakeHost, r wire.Frame) bool {
				return h.number == 1 && r.Op != wire.OpSlots && h.fail(r, code)
			})
			if err := f.decrypts(patient(t), k); err != nil {
				t.Errorf("decrypting: %v", err)
			}
			if f.born() != 2 {
				t.Errorf("%d hosts were born, want a second one", f.born())
			}
			f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpGenerateKey && h.fail(r, code) })
			_, err := d.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "02"})
			if !errors.Is(err, hsm.ErrUnavailable) || f.count(wire.OpGenerateKey) != 1 {
				t.Errorf("generating gives %v after %d tries; want ErrUnavailable and one", err, f.count(wire.OpGenerateKey))
			}
		})
	}
}

func TestARefusalKeepsItsHost(t *testing.T) {
	for name, code := range map[string]uint{
		"arguments": ckrArgumentsBad, "a template": ckrTemplateInconsistent, "an attribute": ckrAttributeValueInvalid,
		"a mechanism": ckrMechanismInvalid, "no room": ckrDeviceMemory, "the host's own": wire.CodeBadRequest,
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module)
			k := key(t, d)
			f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpGenerateKey && h.fail(r, code) })
			if _, err := d.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "02"}); err == nil {
				t.Error("what the token refused is done")
			}
			if err := f.decrypts(patient(t), k); err != nil || f.born() != 1 {
				t.Errorf("afterwards %v, and %d hosts were born", err, f.born())
			}
		})
	}
}

func TestATokenIsFoundAgainInAnotherSlot(t *testing.T) {
	f, m, module := newFake(t)
	slot := uint(7)
	d := f.open(t, m, module, func(c *Config) { c.Serial, c.Slot = "", &slot })
	k := key(t, d)
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if h.number == 1 {
			return r.Op == wire.OpDecryptOAEP && h.fail(r, ckrDeviceRemoved)
		}
		h.mu.Lock()
		h.slot = 9
		h.mu.Unlock()
		return false
	})
	if err := f.decrypts(patient(t), k); err != nil {
		t.Errorf("a token that returned in slot 9: %v", err)
	}
}

func TestARemovedTokenIsUsedAgainWhenItReturns(t *testing.T) {
	f, m, module := newFake(t)
	k := key(t, f.open(t, m, module))
	f.do(func() { f.present = false })
	err := f.decrypts(patient(t), k)
	if !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("a removed token gives %v, want ErrUnavailable", err)
	}
	f.do(func() { f.present = true })
	returned := time.Now()
	eventually(t, "it decrypts again", func() bool { return f.decrypts(patient(t), k) == nil })
	if took := time.Since(returned); took > 10*time.Second {
		t.Errorf("it was in use again after %v, want about a second", took)
	}
}

func TestAKeyThatChangedIsNotUsed(t *testing.T) {
	f, m, module := newFake(t)
	k := key(t, f.open(t, m, module))
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if h.number == 1 {
			return r.Op == wire.OpDecryptOAEP && h.fail(r, ckrKeyHandleInvalid)
		}
		if r.Op == wire.OpFindKeys {
			forged := h.key()
			forged.Modulus = other.N.Bytes()
			h.answer(r, wire.Keys{Keys: []wire.Key{forged}}, nil)
			return true
		}
		return false
	})
	if err := f.decrypts(patient(t), k); !errors.Is(err, hsm.ErrKeyChanged) {
		t.Errorf("another key under the same name gives %v, want ErrKeyChanged", err)
	}
	if n := f.count(wire.OpDecryptOAEP); n != 1 {
		t.Errorf("%d decryptions, want 1: the other key must not see the ciphertext", n)
	}
}

func TestACorruptCiphertextCostsNoHost(t *testing.T) {
	f, m, module := newFake(t)
	k := key(t, f.open(t, m, module))
	corrupt := f.ciphertext("message")
	corrupt[100] ^= 1
	for range 3 {
		if _, err := k.DecryptOAEP(patient(t), crypto.SHA256, corrupt); !errors.Is(err, hsm.ErrCiphertext) || errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("a corrupt ciphertext gives %v, want ErrCiphertext", err)
		}
	}
	if f.born() != 1 {
		t.Errorf("%d hosts were born for it", f.born())
	}
	if n := f.count(wire.OpDecryptOAEP); n != 6 {
		t.Errorf("%d decryptions for three corrupt ciphertexts, want one probe for each", n)
	}
	for name, block := range map[string][]byte{
		"too short": corrupt[1:], "too long": append([]byte{0}, corrupt...), "empty": nil, "above the modulus": bytes.Repeat([]byte{0xff}, 256),
	} {
		if _, err := k.DecryptOAEP(patient(t), crypto.SHA256, block); !errors.Is(err, hsm.ErrCiphertext) {
			t.Errorf("a block that is %s gives %v, want ErrCiphertext", name, err)
		}
	}
	if n := f.count(wire.OpDecryptOAEP); n != 6 {
		t.Error("blocks that cannot be ciphertexts reached the token")
	}
}

func TestProveFindsTheHashThatWorks(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	k := key(t, d)
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if r.Op != wire.OpDecryptOAEP || !bytes.Contains(r.Meta, []byte(`"Hash":592`)) { // CKM_SHA256
			return false
		}
		return h.fail(r, ckrGeneralError)
	})
	if err := k.Prove(patient(t)); err != nil {
		t.Fatalf("Prove: %v", err)
	}
	if got := k.OAEPHashes(); !slices.Equal(got, []crypto.Hash{crypto.SHA1}) {
		t.Errorf("it works with %v, want SHA-1", got)
	}
	if n := f.count(wire.OpDecryptOAEP); n != 2 {
		t.Errorf("the proof cost %d operations, want 2", n)
	}
	if f.born() != 1 {
		t.Error("the proof cost a host")
	}
	if err := k.Prove(patient(t)); err != nil || f.count(wire.OpDecryptOAEP) != 3 {
		t.Errorf("the second proof costs %d operations more and gives %v, want 1", f.count(wire.OpDecryptOAEP)-2, err)
	}
	if again := key(t, d).OAEPHashes(); !slices.Equal(again, []crypto.Hash{crypto.SHA1}) {
		t.Errorf("a key found again knows %v", again)
	}
}

func TestChoosingAToken(t *testing.T) {
	slots := []wire.Slot{
		{ID: 0},
		{ID: 1, Present: true, Failure: &wire.Error{Function: "C_GetTokenInfo", Code: ckrDeviceError}},
		{ID: 2, Present: true, Token: wire.Token{Label: "unseal (UserPIN)   ", Serial: "A1  "}},
		{ID: 3, Present: true, Token: wire.Token{Label: "twin\x00\x00", Serial: "B1"}},
		{ID: 4, Present: true, Token: wire.Token{Label: "twin (UserPIN)", Serial: "B2"}},
	}
	slot := func(n uint) *uint { return &n }
	for name, test := range map[string]struct {
		config Config
		want   uint
		err    error
	}{
		"by serial":                           {config: Config{Serial: "A1"}, want: 2},
		"by label without OpenSC's addition":  {config: Config{TokenLabel: "unseal"}, want: 2},
		"by label with it":                    {config: Config{TokenLabel: "unseal (UserPIN)"}, want: 2},
		"by label with trailing blanks":       {config: Config{TokenLabel: "unseal   "}, want: 2},
		"by slot":                             {config: Config{Slot: slot(4)}, want: 4},
		"two tokens of one label":             {config: Config{TokenLabel: "twin"}, err: hsm.ErrAmbiguous},
		"no such serial":                      {config: Config{Serial: "C1"}, err: hsm.ErrNotFound},
		"an empty slot":                       {config: Config{Slot: slot(0)}, err: hsm.ErrNotFound},
		"a slot that answers with an error":   {config: Config{Slot: slot(1)}, err: hsm.ErrNotFound},
		"the beginning of a label":            {config: Config{TokenLabel: "uns"}, err: hsm.ErrNotFound},
		"a token that is away may come again": {config: Config{Serial: "C1"}, err: hsm.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevice(New(Options{}), nil, test.config)
			got, err := d.choose(slots)
			if !errors.Is(err, test.err) {
				t.Fatalf("choose gives %v, want %v", err, test.err)
			}
			if test.err == nil && got.ID != test.want {
				t.Errorf("choose gives slot %d, want %d", got.ID, test.want)
			}
			if test.err != nil && !strings.Contains(err.Error(), `serial "B2"`) {
				t.Errorf("the error does not name the tokens seen: %v", err)
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		env    []string
		change func(*Config)
		want   string
	}{
		"no token chosen":        {change: func(c *Config) { c.Serial = "" }, want: "exactly one"},
		"a token chosen twice":   {change: func(c *Config) { c.TokenLabel = "unseal" }, want: "exactly one"},
		"OpenSC's debug log":     {env: []string{"OPENSC_DEBUG"}, want: "plaintext"},
		"an environment value":   {env: []string{"A=b"}, want: "no name"},
		"a module not listed":    {change: func(c *Config) { c.Module = "/bin/true" }, want: "-pkcs11-module"},
		"a negative parallelism": {change: func(c *Config) { c.Parallel = -1 }, want: "1 is right for a card"},
	} {
		t.Run(name, func(t *testing.T) {
			_, m, module := newFake(t)
			m.options.Env = test.env
			config := Config{Module: module, Serial: fakeSerial}
			if test.change != nil {
				test.change(&config)
			}
			_, err := m.Open(t.Context(), config)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("Open gives %v, want a sentence with %q", err, test.want)
			}
		})
	}
}

func TestFailingHostsAreStartedAtADecreasingRate(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	broken := true
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if r.Op != wire.OpHello {
			return false
		}
		h.mu.Lock()
		fails := broken
		h.mu.Unlock()
		return fails && h.fail(r, wire.CodeLoad)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	pace := time.NewTicker(time.Millisecond)
	defer pace.Stop()
	for ctx.Err() == nil {
		<-pace.C
		begun := time.Now()
		if _, err := d.Random(ctx, 8); !errors.Is(err, hsm.ErrUnavailable) && ctx.Err() == nil {
			t.Fatalf("a module that cannot be loaded gives %v, want ErrUnavailable", err)
		}
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("a caller waited %v to hear it", took)
		}
	}
	if got := f.born(); got < 3 || got > 12 {
		t.Errorf("%d hosts were born in 1.5 s, want a handful", got)
	}
	f.do(func() { broken = false })
	mended := time.Now()
	eventually(t, "it works again", func() bool { _, err := d.Random(patient(t), 8); return err == nil })
	if took := time.Since(mended); took > 10*time.Second {
		t.Errorf("it was in use again after %v, want within a second", took)
	}
}

func TestAWriteIsBelievedOnlyWhenAFreshHostReadsIt(t *testing.T) {
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "prod"}
	t.Run("a kept value costs one fresh host, which takes over", func(t *testing.T) {
		f, m, module := newFake(t)
		d := f.open(t, m, module)
		if err := d.WriteObject(patient(t), ref, []byte("value")); err != nil {
			t.Fatal(err)
		}
		if f.born() != 2 || f.count(wire.OpCreateObject) != 1 {
			t.Errorf("%d hosts and %d writes, want 2 and 1", f.born(), f.count(wire.OpCreateObject))
		}
		got, err := d.ReadObject(patient(t), ref)
		if err != nil || string(got) != "value" || f.born() != 2 {
			t.Errorf("reading gives %q, %v, on host %d", got, err, f.born())
		}
		if err := d.WriteObject(patient(t), ref, []byte("other")); !errors.Is(err, hsm.ErrExists) {
			t.Errorf("writing again gives %v, want ErrExists", err)
		}
		if err := d.DeleteObject(patient(t), ref); err != nil {
			t.Errorf("deleting: %v", err)
		}
		if _, err := d.ReadObject(patient(t), ref); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("reading a deleted object gives %v, want ErrNotFound", err)
		}
	})
	t.Run("a lost write is written once more", func(t *testing.T) {
		f, m, module := newFake(t)
		d := f.open(t, m, module)
		f.follow(func(h *fakeHost, r wire.Frame) bool {
			if h.number > 1 || r.Op != wire.OpCreateObject {
				return false
			}
			h.answer(r, nil, nil) // OK, and nothing written
			return true
		})
		if err := d.WriteObject(patient(t), ref, []byte("value")); err != nil {
			t.Fatal(err)
		}
		if f.count(wire.OpCreateObject) != 2 || f.born() != 3 {
			t.Errorf("%d writes on %d hosts, want 2 on 3", f.count(wire.OpCreateObject), f.born())
		}
	})
	t.Run("a token that keeps nothing is full", func(t *testing.T) {
		f, m, module := newFake(t)
		d := f.open(t, m, module)
		f.follow(func(h *fakeHost, r wire.Frame) bool {
			if r.Op != wire.OpCreateObject {
				return false
			}
			h.answer(r, nil, nil)
			return true
		})
		if err := d.WriteObject(patient(t), ref, []byte("value")); !errors.Is(err, hsm.ErrFull) {
			t.Errorf("writing gives %v, want ErrFull", err)
		}
	})
	t.Run("a lost deletion is repeated", func(t *testing.T) {
		f, m, module := newFake(t)
		d := f.open(t, m, module)
		f.objects[ref.Label] = "value"
		f.follow(func(h *fakeHost, r wire.Frame) bool {
			if h.number > 1 || r.Op != wire.OpDestroyObject {
				return false
			}
			h.answer(r, nil, nil)
			return true
		})
		if err := d.DeleteObject(patient(t), ref); err != nil {
			t.Fatal(err)
		}
		if len(f.objects) != 0 {
			t.Error("the object is still there")
		}
	})
	t.Run("a write whose log-in was lost is repeated on a new host", func(t *testing.T) {
		f, m, module := newFake(t)
		d := f.open(t, m, module)
		f.follow(func(h *fakeHost, r wire.Frame) bool {
			return h.number == 1 && r.Op == wire.OpCreateObject && h.fail(r, ckrUserNotLoggedIn)
		})
		if err := d.WriteObject(patient(t), ref, []byte("value")); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("a write of unknown outcome is not repeated", func(t *testing.T) {
		f, m, module := newFake(t)
		d := f.open(t, m, module)
		f.follow(func(h *fakeHost, r wire.Frame) bool {
			return r.Op == wire.OpCreateObject && h.fail(r, ckrDeviceRemoved)
		})
		if err := d.WriteObject(patient(t), ref, []byte("value")); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("writing gives %v, want ErrUnavailable", err)
		}
		if f.count(wire.OpCreateObject) != 1 {
			t.Errorf("it was sent %d times", f.count(wire.OpCreateObject))
		}
	})
}

func TestAWriteThatHappenedAlthoughTheTokenSaidNoIsDone(t *testing.T) {
	ref := hsm.ObjectRef{Application: "a", Label: "l"}
	for name, test := range map[string]struct {
		stored string // by the module that then says that the log-in was gone
		want   error
	}{
		"our value":         {"value", nil},
		"another's value":   {"other", hsm.ErrExists},
		"a half of a value": {"va", hsm.ErrExists},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module)
			f.follow(func(h *fakeHost, r wire.Frame) bool {
				if r.Op != wire.OpCreateObject || h.number > 1 {
					return false
				}
				h.do(func() { h.objects[ref.Label] = test.stored })
				return h.fail(r, ckrUserNotLoggedIn)
			})
			if err := d.WriteObject(patient(t), ref, []byte("value")); !errors.Is(err, test.want) {
				t.Errorf("WriteObject = %v, want %v", err, test.want)
			}
			if n := f.count(wire.OpCreateObject); n != 1 {
				t.Errorf("it was sent %d times, want once", n)
			}
			if err := d.WriteObject(patient(t), ref, []byte("value")); !errors.Is(err, hsm.ErrExists) {
				t.Errorf("another write of the name = %v, want ErrExists", err)
			}
		})
	}
}

func TestInfoNeverLogsIn(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module, func(c *Config) { c.PIN = nil })
	info, err := d.Info(patient(t))
	if err != nil {
		t.Fatal(err)
	}
	if info.State != hsm.StateOperational || info.Serial != fakeSerial || !slices.Contains(info.Mechanisms, "CKM_RSA_PKCS_OAEP") {
		t.Errorf("Info is %+v", info)
	}
	f.do(func() { f.flags |= ckfUserPINLocked })
	if info, err = d.Info(patient(t)); err != nil || info.State != hsm.StateLocked || !info.PIN.Locked {
		t.Errorf("with a locked PIN Info is %+v, %v", info, err)
	}
	f.do(func() { f.present = false })
	info, err = d.Info(patient(t))
	if info.State != hsm.StateAbsent || !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("without the token Info is %+v, %v", info, err)
	}
	if f.count(wire.OpLogin) != 0 {
		t.Error("it logged in")
	}
}

func TestTraitsTellOtherUses(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if r.Op != wire.OpFindKeys {
			return false
		}
		k := h.key()
		k.Uses = []string{"decrypt", "sign", "unwrap"}
		certificate := wire.Key{Label: "unseal", ID: "02", Unusable: "an AES key"}
		h.answer(r, wire.Keys{Keys: []wire.Key{k, certificate}}, nil)
		return true
	})
	want := []string{"decrypt v1.5 (CKM_RSA_PKCS)", "sign", "unwrap"}
	if got := key(t, d).Traits().AlsoUsableFor; !slices.Equal(got, want) {
		t.Errorf("also usable for %q, want %q", got, want)
	}
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if r.Op != wire.OpFindKeys {
			return false
		}
		h.answer(r, wire.Keys{Keys: []wire.Key{{Label: "unseal", ID: "02", Unusable: "an AES key"}}}, nil)
		return true
	})
	if _, err := d.FindKeys(patient(t), hsm.KeyQuery{Label: "unseal"}); !errors.Is(err, hsm.ErrUnsupported) || !strings.Contains(err.Error(), "AES") {
		t.Errorf("a label that names an AES key alone gives %v, want ErrUnsupported and why", err)
	}
}
