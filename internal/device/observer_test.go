package device

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// ear remembers what it is told.
type ear struct {
	mu    sync.Mutex
	heard []string
}

func (e *ear) DeviceOperation(device, operation string, _ time.Duration, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	word := device + " " + operation
	if err != nil {
		word += " failed"
	}
	e.heard = append(e.heard, word)
}

func (e *ear) told() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	told := strings.Join(e.heard, ", ")
	e.heard = nil
	return told
}

func TestAnObserverIsToldOfOperationsAndNothingElseChanges(t *testing.T) {
	e := &ear{}
	memory := hsmtest.NewMemory()
	r := New(Options{Observer: e, Openers: map[string]Opener{
		TypePKCS11: func(context.Context, string, Config, Secrets) (hsm.Device, error) { return memory, nil },
	}})
	handle, err := r.Open("mount", "stick", valid())
	must(t, err)
	defer func() { must(t, handle.Close()) }()
	device, err := handle.Device(t.Context())
	must(t, err)
	if again, _ := handle.Device(t.Context()); again != device {
		t.Error("it is another device at every call, and who remembers keys of it forgets them")
	}
	for name, ok := range map[string]bool{
		"objects": is[hsm.ObjectStore](device), "random": is[hsm.Randomer](device), "PINs": is[hsm.PINChanger](device),
		"no passphrase": !is[hsm.Unlocker](device), "no nodes": !is[hsm.Clustered](device),
	} {
		if !ok {
			t.Errorf("ability %q changed", name)
		}
	}

	for _, algorithm := range []hsm.Algorithm{hsm.RSA2048, hsm.ECDHP256} {
		key, err := device.GenerateKey(t.Context(), hsm.KeySpec{Algorithm: algorithm, Label: string(algorithm), ID: map[hsm.Algorithm]string{hsm.RSA2048: "01", hsm.ECDHP256: "02"}[algorithm]})
		must(t, err)
		if _, err := hsm.Prove(t.Context(), key); err != nil {
			t.Error(err)
		}
		if _, agrees := key.(hsm.Agreer); agrees != (algorithm == hsm.ECDHP256) {
			t.Errorf("%s agrees: %v", algorithm, agrees)
		}
	}
	told := e.told()
	for _, want := range []string{"stick generate", "stick decrypt", "stick agree"} {
		if !strings.Contains(told, want) {
			t.Errorf("no %q in %q", want, told)
		}
	}

	key, err := hsm.FindKey(t.Context(), device, hsm.KeyQuery{Label: string(hsm.RSA2048)})
	must(t, err)
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		t.Fatalf("the key is a %T", key.Public())
	}
	block, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, []byte("secret"), nil)
	must(t, err)
	plain, err := key.(hsm.Decrypter).DecryptOAEP(t.Context(), crypto.SHA256, block)
	must(t, err)
	if string(plain) != "secret" {
		t.Errorf("got %q", plain)
	}
	_, err = key.(hsm.Decrypter).DecryptOAEP(t.Context(), crypto.SHA256, make([]byte, 256))
	if !errors.Is(err, hsm.ErrCiphertext) {
		t.Errorf("got %v", err)
	}
	if _, err = device.Info(t.Context()); err != nil {
		t.Error(err)
	}
	must(t, device.DeleteKey(t.Context(), key.Ref()))
	if got, want := e.told(), "stick find, stick decrypt, stick decrypt failed, stick info, stick delete"; got != want {
		t.Errorf("told %q, want %q", got, want)
	}
}

// The providers' own types must be among those that are observed, with all that they can do.
func TestTheDevicesThatThereAreCanBeObserved(t *testing.T) {
	for name, device := range map[string]hsm.Device{
		"token":  (*pkcs11.Device)(nil),
		"NetHSM": (*nethsm.Device)(nil),
	} {
		observed := observe(name, device, &ear{})
		if observed == device {
			t.Errorf("a %s goes unobserved", name)
		}
		before, after := abilities(device), abilities(observed)
		if !slices.Equal(before, after) {
			t.Errorf("a %s could %v and can %v", name, before, after)
		}
	}
	plain := struct{ hsm.Device }{}
	if observe("plain", plain, &ear{}) != hsm.Device(plain) || observe("plain", plain, nil) != hsm.Device(plain) {
		t.Error("a device with other abilities is changed")
	}
	if _, proves := observeKey(fakeKey{}, watch{"stick", &ear{}}).(hsm.Prover); !proves {
		t.Error("a key that proves itself cannot any more")
	}
}

func abilities(device hsm.Device) []bool {
	return []bool{
		is[hsm.ObjectStore](device), is[hsm.Randomer](device), is[hsm.PINChanger](device), is[hsm.Unlocker](device), is[hsm.Clustered](device),
	}
}

func is[T any](value any) bool {
	_, ok := value.(T)
	return ok
}
