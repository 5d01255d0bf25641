package hsmtest_test

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
)

func TestMemoryKeepsTheContract(t *testing.T) {
	memory := hsmtest.NewMemory()
	hsmtest.TestDevice(t, func(*testing.T) hsm.Device { return memory.Attach() }, hsmtest.Capabilities{
		Algorithms:      []hsm.Algorithm{hsm.RSA2048, hsm.RSA3072, hsm.ECDHP256, hsm.ECDHP384},
		DuplicateLabels: true,
		Objects:         true,
		MaxObject:       64 << 10,
		DuplicateObject: func(_ *testing.T, ref hsm.ObjectRef, value []byte) { memory.AddObject(ref, value) },
		Random:          true,
		Legacy:          true,
		Foreign: func(_ *testing.T, label string, value []byte) {
			memory.AddObject(hsm.ObjectRef{Label: label}, value)
		},
		Operations: func(*testing.T) int { return memory.Operations() },
	})
	keys, err := memory.FindKeys(t.Context(), hsm.KeyQuery{})
	if err != nil || len(keys) != len([]string{"rsa2048", "rsa3072", "p256", "p384"}) {
		t.Errorf("the suite leaves %d keys, %v; its own four go when the test ends", len(keys), err)
	}
}

func TestKeysOfOneTestDiffer(t *testing.T) {
	memory := hsmtest.NewMemory()
	first := memory.AddRSA(t, "same", "01", 2048)
	second := hsmtest.NewMemory().AddRSA(t, "same", "01", 2048)
	if first.Ref().Fingerprint == second.Ref().Fingerprint {
		t.Error("two devices of one test have the same key")
	}
	memory.AddRSA(t, "same", "02", 2048)
	if _, err := hsm.FindKey(t.Context(), memory, hsm.KeyQuery{Label: "same"}); !errors.Is(err, hsm.ErrAmbiguous) {
		t.Errorf("FindKey gives %v, want ErrAmbiguous", err)
	}
}

func TestEveryCallFailsWhileAnErrorIsSet(t *testing.T) {
	memory := hsmtest.NewMemory()
	key := memory.AddEC(t, "key", "01", ecdh.P256()).(hsm.Agreer)
	memory.SetError(hsm.ErrUnavailable)
	if _, err := memory.Info(t.Context()); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("Info gives %v", err)
	}
	if _, err := key.Agree(t.Context(), key.Public().(*ecdh.PublicKey)); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("Agree gives %v", err)
	}
	memory.SetError(nil)
	if _, err := key.Agree(t.Context(), key.Public().(*ecdh.PublicKey)); err != nil {
		t.Errorf("Agree after the fault gives %v", err)
	}
	if memory.Operations() != 1 {
		t.Errorf("%d operations, want 1: the refused one never reached the token", memory.Operations())
	}
}

func TestUnbarLiftsABarAndNothingElse(t *testing.T) {
	memory := hsmtest.NewMemory()
	memory.SetError(&hsm.PINError{TriesLeft: -1, Barred: true, Detail: "barred"})
	if err := memory.Unbar(t.Context()); err != nil {
		t.Errorf("Unbar gives %v", err)
	}
	if _, err := memory.Info(t.Context()); err != nil {
		t.Errorf("Info after Unbar gives %v", err)
	}
	memory.SetError(&hsm.PINError{TriesLeft: 0, Detail: "locked"})
	if err := memory.Unbar(t.Context()); !errors.Is(err, hsm.ErrLocked) {
		t.Errorf("Unbar of a locked token gives %v, want ErrLocked", err)
	}
}

func TestDelayEndsWithTheContext(t *testing.T) {
	memory := hsmtest.NewMemory()
	key := memory.AddRSA(t, "key", "01", 2048).(hsm.Decrypter)
	block, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, key.Public().(*rsa.PublicKey), []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		memory.Delay(8 * time.Second)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := key.DecryptOAEP(ctx, crypto.SHA256, block); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("DecryptOAEP gives %v, want the deadline", err)
		}
		if took := time.Since(start); took != time.Second {
			t.Errorf("it took %v, want 1s", took)
		}
		if got, err := key.DecryptOAEP(t.Context(), crypto.SHA256, block); err != nil || string(got) != "secret" {
			t.Errorf("DecryptOAEP gives %q, %v", got, err)
		}
	})
}

func TestSwitchesOfATestKey(t *testing.T) {
	memory := hsmtest.NewMemory()
	memory.AddRSA(t, "key", "01", 2048)
	memory.SetHashes(crypto.SHA1)
	memory.SetTraits("01", hsm.Traits{Extractable: true, AlsoUsableFor: []string{"sign"}})
	key, err := hsm.FindKey(t.Context(), memory, hsm.KeyQuery{ID: "01"})
	if err != nil {
		t.Fatal(err)
	}
	if traits := key.Traits(); !traits.Extractable || traits.Sensitive || !slices.Equal(traits.AlsoUsableFor, []string{"sign"}) {
		t.Errorf("traits are %+v", traits)
	}
	if hashes := key.(hsm.Decrypter).OAEPHashes(); !slices.Equal(hashes, []crypto.Hash{crypto.SHA1}) {
		t.Errorf("hashes are %v", hashes)
	}
	memory.SetCapacity(1)
	if _, err := memory.GenerateKey(t.Context(), hsm.KeySpec{Algorithm: hsm.ECDHP256}); !errors.Is(err, hsm.ErrFull) {
		t.Errorf("GenerateKey gives %v, want ErrFull", err)
	}
	if err := memory.WriteObject(t.Context(), hsm.ObjectRef{Label: "x"}, []byte("x")); !errors.Is(err, hsm.ErrFull) {
		t.Errorf("WriteObject gives %v, want ErrFull", err)
	}
}
