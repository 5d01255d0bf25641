package hsmtest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Capabilities says what the suite may expect of a device beyond the contract's minimum. What is false or nil is left
// out, not tested to be absent.
type Capabilities struct {
	// Algorithms are what GenerateKey makes. At least one; the suite runs with each.
	Algorithms []hsm.Algorithm
	// DuplicateLabels is true where two keys may have one label.
	DuplicateLabels bool
	// Objects is true for an hsm.ObjectStore.
	Objects bool
	// MaxObject is the size in bytes of the largest value that the suite writes; 1024 where it is 0.
	MaxObject int
	// DuplicateObject makes a second object of a name that exists, behind the device's back; nil where that cannot be.
	DuplicateObject func(t *testing.T, ref hsm.ObjectRef, value []byte)
	// Random is true for an hsm.Randomer.
	Random bool
	// Legacy is true where RSA keys are hsm.LegacyDecrypter and the token can do it.
	Legacy bool
	// Foreign makes a data object behind the device's back as another program does, without an application; nil where the
	// device is no hsm.ForeignObjects.
	Foreign func(t *testing.T, label string, value []byte)
	// Operations returns how many private-key operations the HSM has performed so far. With it the suite checks that
	// one call costs one operation; nil where nobody counts.
	Operations func(t *testing.T) int
}

// patience bounds every call of the suite: making an RSA key on a card takes half a minute.
const patience = 2 * time.Minute

// TestDevice checks that a device keeps the contract of package hsm. Each call of open returns a handle to the same
// token, which the suite closes.
func TestDevice(t *testing.T, open func(t *testing.T) hsm.Device, caps Capabilities) {
	t.Helper()
	if len(caps.Algorithms) == 0 {
		t.Fatal("the suite needs a device that makes keys: Capabilities.Algorithms is empty")
	}
	s := &suite{open: open, caps: caps}
	s.keys = s.makeKeys(t)

	t.Run("Info describes an operational device", s.testInfo)
	t.Run("a key is found by label, id, fingerprint and all three", s.testFind)
	t.Run("a look-up without a match finds nothing and makes nothing", s.testNotFound)
	if caps.DuplicateLabels {
		t.Run("two keys with one label are ambiguous and told apart by id", s.testAmbiguous)
	}
	for _, algorithm := range caps.Algorithms {
		t.Run(string(algorithm), func(t *testing.T) {
			t.Run("a generated key is guarded and usable for one purpose", func(t *testing.T) { s.testTraits(t, algorithm) })
			if isRSA(algorithm) {
				t.Run("decrypts what crypto/rsa encrypted", func(t *testing.T) { s.testDecrypt(t, algorithm) })
				t.Run("a block that does not decrypt is ErrCiphertext and harms nothing", func(t *testing.T) { s.testCorrupt(t, algorithm) })
				if caps.Legacy {
					t.Run("decrypts PKCS#1 v1.5 for those who take old values over", func(t *testing.T) { s.testLegacy(t, algorithm) })
				}
			} else {
				t.Run("agrees with crypto/ecdh", func(t *testing.T) { s.testAgree(t, algorithm) })
			}
		})
	}
	t.Run("a taken id is ErrExists and keeps its key", s.testTakenID)
	t.Run("of requests for one id that come together exactly one makes a key", s.testOneKeyForOneID)
	t.Run("an unknown algorithm is ErrUnsupported", s.testUnknownAlgorithm)
	t.Run("a key is deleted only by its id and its fingerprint", s.testDelete)
	if caps.Objects {
		t.Run("objects", s.testObjects)
	}
	if caps.Foreign != nil {
		t.Run("objects of other programs", s.testForeign)
	}
	if caps.Random {
		t.Run("random bytes come in the wanted number and differ", s.testRandom)
	}
	t.Run("an ended context is answered at once with its error", s.testContext)
	t.Run("many goroutines use one device", s.testConcurrency)
	t.Run("a closed device answers nothing", s.testClose)
}

// suite is one run against one token.
type suite struct {
	open func(t *testing.T) hsm.Device
	caps Capabilities
	keys map[hsm.Algorithm]hsm.KeyRef // one key of each algorithm, made first and removed last
}

func isRSA(a hsm.Algorithm) bool { return a == hsm.RSA2048 || a == hsm.RSA3072 || a == hsm.RSA4096 }

// context returns one that ends when the test has surely hung.
func (s *suite) context(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// device opens a handle that is closed when the test ends.
func (s *suite) device(t *testing.T) hsm.Device {
	t.Helper()
	device := s.open(t)
	t.Cleanup(func() {
		if err := device.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return device
}

// unique returns 16 random hexadecimal digits: an id on every device, and with a prefix a label.
func unique() string {
	random := make([]byte, 8)
	_, _ = rand.Read(random) // never fails: crypto/rand
	return hex.EncodeToString(random)
}

// generate makes a key and deletes it when the test ends, if the test has not.
func (s *suite) generate(t *testing.T, device hsm.Device, spec hsm.KeySpec) hsm.Key {
	t.Helper()
	key, err := device.GenerateKey(s.context(t), spec)
	if err != nil {
		t.Fatalf("GenerateKey(%+v): %v", spec, err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		cleaner := s.open(t)
		defer func() { _ = cleaner.Close() }()
		if err := cleaner.DeleteKey(ctx, key.Ref()); err != nil && !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("deleting %+v after the test: %v", key.Ref(), err)
		}
	})
	return key
}

func (s *suite) makeKeys(t *testing.T) map[hsm.Algorithm]hsm.KeyRef {
	t.Helper()
	device := s.device(t)
	keys := map[hsm.Algorithm]hsm.KeyRef{}
	for _, algorithm := range s.caps.Algorithms {
		id := unique()
		spec := hsm.KeySpec{Algorithm: algorithm, Label: "suite-" + id, ID: id}
		ref := s.generate(t, device, spec).Ref()
		if ref.ID != id || ref.Label != spec.Label {
			t.Fatalf("GenerateKey(%+v) made %+v", spec, ref)
		}
		keys[algorithm] = ref
	}
	return keys
}

// find returns the suite's own key of an algorithm, proved: what a device announces before that may be too much.
func (s *suite) find(t *testing.T, device hsm.Device, algorithm hsm.Algorithm) hsm.Key {
	t.Helper()
	key := s.findRef(t, device, s.keys[algorithm])
	if prover, ok := key.(hsm.Prover); ok {
		if err := prover.Prove(s.context(t)); err != nil {
			t.Fatalf("Prove: %v", err)
		}
	}
	return key
}

func (s *suite) findRef(t *testing.T, device hsm.Device, ref hsm.KeyRef) hsm.Key {
	t.Helper()
	key, err := hsm.FindKey(s.context(t), device, hsm.KeyQuery{ID: ref.ID, Fingerprint: ref.Fingerprint})
	if err != nil {
		t.Fatalf("FindKey(%+v): %v", ref, err)
	}
	return key
}

// count returns how many keys the token holds.
func (s *suite) count(t *testing.T, device hsm.Device) int {
	t.Helper()
	keys, err := device.FindKeys(s.context(t), hsm.KeyQuery{})
	if err != nil {
		t.Fatalf("FindKeys: %v", err)
	}
	return len(keys)
}

// oneOperation fails the test where do costs another number of private-key operations.
func (s *suite) oneOperation(t *testing.T, do func()) {
	t.Helper()
	if s.caps.Operations == nil {
		do()
		return
	}
	before := s.caps.Operations(t)
	do()
	if n := s.caps.Operations(t) - before; n != 1 {
		t.Errorf("one call cost %d private-key operations, want 1", n)
	}
}

func (s *suite) testInfo(t *testing.T) {
	info, err := s.device(t).Info(s.context(t))
	if err != nil {
		t.Fatalf("Info: %v", err)
	}
	if info.State != hsm.StateOperational {
		t.Errorf("state is %q, want %q", info.State, hsm.StateOperational)
	}
	if info.Label != strings.TrimSpace(info.Label) || info.Serial != strings.TrimSpace(info.Serial) {
		t.Errorf("label %q or serial %q has blanks around it", info.Label, info.Serial)
	}
}

func (s *suite) testFind(t *testing.T) {
	device := s.device(t)
	for algorithm, ref := range s.keys {
		for name, query := range map[string]hsm.KeyQuery{
			"label":       {Label: ref.Label},
			"id":          {ID: ref.ID},
			"fingerprint": {Fingerprint: ref.Fingerprint},
			"all three":   {Label: ref.Label, ID: ref.ID, Fingerprint: ref.Fingerprint},
		} {
			key, err := hsm.FindKey(s.context(t), device, query)
			if err != nil {
				t.Errorf("finding the %s key by %s: %v", algorithm, name, err)
				continue
			}
			if key.Ref() != ref {
				t.Errorf("finding the %s key by %s gives %+v, want %+v", algorithm, name, key.Ref(), ref)
			}
			fingerprint, err := hsm.Fingerprint(key.Public())
			if err != nil || fingerprint != ref.Fingerprint {
				t.Errorf("the public key of %+v has fingerprint %q, %v", ref, fingerprint, err)
			}
		}
	}
	keys, err := device.FindKeys(s.context(t), hsm.KeyQuery{})
	if err != nil {
		t.Fatalf("FindKeys: %v", err)
	}
	ids := make([]string, len(keys))
	for i, key := range keys {
		ids[i] = key.Ref().ID
	}
	if !slices.IsSorted(ids) {
		t.Errorf("keys are not in the order of their ids: %q", ids)
	}
	for _, ref := range s.keys {
		if !slices.Contains(ids, ref.ID) {
			t.Errorf("a query for all keys misses %+v", ref)
		}
	}
}

func (s *suite) testNotFound(t *testing.T) {
	device := s.device(t)
	before := s.count(t, device)
	ref := s.keys[s.caps.Algorithms[0]]
	for name, query := range map[string]hsm.KeyQuery{
		"unknown label":                         {Label: "suite-" + unique()},
		"unknown id":                            {ID: unique()},
		"unknown fingerprint":                   {Fingerprint: strings.Repeat("A", 43)},
		"label of one key and id of none":       {Label: ref.Label, ID: unique()},
		"id of one key and fingerprint of none": {ID: ref.ID, Fingerprint: strings.Repeat("A", 43)},
		"label that is only the beginning":      {Label: ref.Label[:len(ref.Label)-1]},
	} {
		keys, err := device.FindKeys(s.context(t), query)
		if err != nil || len(keys) != 0 {
			t.Errorf("%s: FindKeys gives %d keys, %v; want none and no error", name, len(keys), err)
		}
		if _, err := hsm.FindKey(s.context(t), device, query); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("%s: FindKey gives %v, want ErrNotFound", name, err)
		}
	}
	if after := s.count(t, device); after != before {
		t.Errorf("the token held %d keys before the look-ups and %d after", before, after)
	}
}

func (s *suite) testAmbiguous(t *testing.T) {
	device := s.device(t)
	algorithm := s.quickest()
	label := "suite-" + unique()
	first := s.generate(t, device, hsm.KeySpec{Algorithm: algorithm, Label: label, ID: unique()})
	second := s.generate(t, device, hsm.KeySpec{Algorithm: algorithm, Label: label, ID: unique()})
	if _, err := hsm.FindKey(s.context(t), device, hsm.KeyQuery{Label: label}); !errors.Is(err, hsm.ErrAmbiguous) {
		t.Errorf("FindKey by the common label gives %v, want ErrAmbiguous", err)
	}
	for _, want := range []hsm.KeyRef{first.Ref(), second.Ref()} {
		key, err := hsm.FindKey(s.context(t), device, hsm.KeyQuery{Label: label, ID: want.ID})
		if err != nil || key.Ref() != want {
			t.Errorf("FindKey by label and id gives %v, %v; want %+v", key, err, want)
		}
	}
}

// quickest returns the algorithm whose keys are made fastest.
func (s *suite) quickest() hsm.Algorithm {
	for _, quick := range []hsm.Algorithm{hsm.ECDHP256, hsm.ECDHP384} {
		if slices.Contains(s.caps.Algorithms, quick) {
			return quick
		}
	}
	return s.caps.Algorithms[0]
}

func (s *suite) testTraits(t *testing.T, algorithm hsm.Algorithm) {
	t.Helper()
	key := s.find(t, s.device(t), algorithm)
	traits := key.Traits()
	if traits.Extractable || !traits.Sensitive {
		t.Errorf("a generated key is extractable: %t, sensitive: %t", traits.Extractable, traits.Sensitive)
	}
	for _, use := range traits.AlsoUsableFor {
		// On a PKCS#11 token a key that may decrypt does so with every mechanism that the token has, and those are named with
		// it. Nothing else is to be possible.
		if traits.ForeignUsesRefused || !strings.Contains(use, "CKM_") {
			t.Errorf("a generated key is also usable for %q", use)
		}
	}
	switch public := key.Public().(type) {
	case *rsa.PublicKey:
		want := map[hsm.Algorithm]int{hsm.RSA2048: 2048, hsm.RSA3072: 3072, hsm.RSA4096: 4096}[algorithm]
		if public.N.BitLen() != want {
			t.Errorf("the modulus has %d bits, want %d", public.N.BitLen(), want)
		}
		if _, ok := key.(hsm.Decrypter); !ok {
			t.Errorf("an RSA key is no hsm.Decrypter: %T", key)
		}
	case *ecdh.PublicKey:
		want := map[hsm.Algorithm]ecdh.Curve{hsm.ECDHP256: ecdh.P256(), hsm.ECDHP384: ecdh.P384()}[algorithm]
		if public.Curve() != want {
			t.Errorf("the curve is %v, want %v", public.Curve(), want)
		}
		if _, ok := key.(hsm.Agreer); !ok {
			t.Errorf("an elliptic-curve key is no hsm.Agreer: %T", key)
		}
	default:
		t.Errorf("the public key is a %T", public)
	}
}

// decrypter returns the suite's RSA key of an algorithm.
func (s *suite) decrypter(t *testing.T, device hsm.Device, algorithm hsm.Algorithm) (hsm.Decrypter, *rsa.PublicKey) {
	t.Helper()
	key, ok := s.find(t, device, algorithm).(hsm.Decrypter)
	if !ok {
		t.Fatalf("the %s key is no hsm.Decrypter", algorithm)
	}
	return key, key.Public().(*rsa.PublicKey)
}

// encrypt is RSAES-OAEP by crypto/rsa.
func encrypt(t *testing.T, hash crypto.Hash, public *rsa.PublicKey, plaintext []byte) []byte {
	t.Helper()
	ciphertext, err := rsa.EncryptOAEP(hash.New(), rand.Reader, public, plaintext, nil)
	if err != nil {
		t.Fatalf("encrypting %d bytes: %v", len(plaintext), err)
	}
	return ciphertext
}

func (s *suite) testDecrypt(t *testing.T, algorithm hsm.Algorithm) {
	t.Helper()
	key, public := s.decrypter(t, s.device(t), algorithm)
	hashes := key.OAEPHashes()
	if len(hashes) == 0 {
		t.Fatal("OAEPHashes is empty")
	}
	for _, hash := range hashes {
		longest := public.Size() - 2*hash.Size() - 2 // RFC 8017, 7.1.1
		for _, size := range []int{1, 32, longest} {
			plaintext := make([]byte, size)
			_, _ = rand.Read(plaintext) // never fails: crypto/rand
			ciphertext := encrypt(t, hash, public, plaintext)
			s.oneOperation(t, func() {
				got, err := key.DecryptOAEP(s.context(t), hash, ciphertext)
				if err != nil || !bytes.Equal(got, plaintext) {
					t.Errorf("%v, %d bytes: DecryptOAEP gives %d bytes, %v", hash, size, len(got), err)
				}
			})
		}
	}
	if _, err := key.DecryptOAEP(s.context(t), crypto.MD4, make([]byte, public.Size())); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("a hash that OAEPHashes does not list gives %v, want ErrUnsupported", err)
	}
}

func (s *suite) testCorrupt(t *testing.T, algorithm hsm.Algorithm) {
	t.Helper()
	key, public := s.decrypter(t, s.device(t), algorithm)
	hash := key.OAEPHashes()[0]
	good := encrypt(t, hash, public, []byte("a secret of 23 bytes..."))
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 1
	foreign := encrypt(t, hash, &borrowRSA(t, public.N.BitLen()).PublicKey, []byte("for another key"))
	one := make([]byte, len(good))
	one[len(one)-1] = 1
	for name, block := range map[string][]byte{
		"with one bit flipped":       flipped,
		"made for another key":       foreign,
		"one byte short":             good[:len(good)-1],
		"one byte long":              append(bytes.Clone(good), 0),
		"of no bytes":                {},
		"of zeros":                   make([]byte, len(good)),
		"that is the number one":     one,
		"larger than the modulus":    bytes.Repeat([]byte{0xff}, len(good)),
		"that is the modulus itself": public.N.Bytes(),
	} {
		got, err := key.DecryptOAEP(s.context(t), hash, block)
		if !errors.Is(err, hsm.ErrCiphertext) || errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("a block %s gives %d bytes, %v; want ErrCiphertext", name, len(got), err)
		}
		got, err = key.DecryptOAEP(s.context(t), hash, good)
		if err != nil || string(got) != "a secret of 23 bytes..." {
			t.Fatalf("after a block %s a good one gives %d bytes, %v", name, len(got), err)
		}
	}
}

func (s *suite) testAgree(t *testing.T, algorithm hsm.Algorithm) {
	t.Helper()
	key, ok := s.find(t, s.device(t), algorithm).(hsm.Agreer)
	if !ok {
		t.Fatalf("the %s key is no hsm.Agreer", algorithm)
	}
	public := key.Public().(*ecdh.PublicKey)
	// Sixteen peers: about one shared x coordinate in sixteen begins with four zero bits, and a device that strips
	// leading zero bytes shows itself once in 256; the suite's many runs find it.
	for range 16 {
		peer, err := public.Curve().GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		want, err := peer.ECDH(public)
		if err != nil {
			t.Fatal(err)
		}
		s.oneOperation(t, func() {
			got, err := key.Agree(s.context(t), peer.PublicKey())
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("Agree gives %d bytes, %v; crypto/ecdh %d others", len(got), err, len(want))
			}
		})
	}
	other := ecdh.P384()
	if public.Curve() == other {
		other = ecdh.P256()
	}
	peer, err := other.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := key.Agree(s.context(t), peer.PublicKey()); err == nil {
		t.Error("Agree accepts a peer on another curve")
	}
}

func (s *suite) testTakenID(t *testing.T) {
	device := s.device(t)
	algorithm := s.quickest()
	taken := s.keys[algorithm]
	before := s.count(t, device)
	spec := hsm.KeySpec{Algorithm: algorithm, Label: "suite-" + unique(), ID: taken.ID}
	if key, err := device.GenerateKey(s.context(t), spec); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("GenerateKey with a taken id gives %v, %v; want ErrExists", key, err)
	}
	if after := s.count(t, device); after != before {
		t.Errorf("the token held %d keys before and %d after", before, after)
	}
	s.findRef(t, device, taken)

	free := s.generate(t, device, hsm.KeySpec{Algorithm: algorithm, Label: "suite-" + unique()})
	if free.Ref().ID == "" {
		t.Error("a key made without a wanted id has none")
	}
}

func (s *suite) testOneKeyForOneID(t *testing.T) {
	device := s.device(t)
	before := s.count(t, device)
	id := unique()
	const requests = 3
	var mu sync.Mutex
	var made []hsm.KeyRef
	var all sync.WaitGroup
	for range requests {
		all.Go(func() {
			key, err := device.GenerateKey(s.context(t), hsm.KeySpec{Algorithm: s.quickest(), Label: "suite-" + id, ID: id})
			switch {
			case err == nil:
				mu.Lock()
				made = append(made, key.Ref())
				mu.Unlock()
			case !errors.Is(err, hsm.ErrExists):
				t.Errorf("GenerateKey among others gives %v, want a key or ErrExists", err)
			}
		})
	}
	all.Wait()
	if after := s.count(t, device); len(made) != 1 || after != before+1 {
		t.Errorf("%d requests made %d keys, and the token holds %d more", requests, len(made), after-before)
	}
	for _, ref := range made {
		if err := device.DeleteKey(s.context(t), ref); err != nil {
			t.Errorf("DeleteKey(%+v): %v", ref, err)
		}
	}
}

func (s *suite) testUnknownAlgorithm(t *testing.T) {
	device := s.device(t)
	key, err := device.GenerateKey(s.context(t), hsm.KeySpec{Algorithm: "dsa-1024", Label: "suite-" + unique(), ID: unique()})
	if !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("GenerateKey gives %v, %v; want ErrUnsupported", key, err)
	}
}

func (s *suite) testDelete(t *testing.T) {
	device := s.device(t)
	id := unique()
	key := s.generate(t, device, hsm.KeySpec{Algorithm: s.quickest(), Label: "suite-" + id, ID: id})
	ref := key.Ref()
	other := s.keys[s.caps.Algorithms[0]]
	for name, wrong := range map[string]hsm.KeyRef{
		"no id":                     {Label: ref.Label, Fingerprint: ref.Fingerprint},
		"no fingerprint":            {Label: ref.Label, ID: ref.ID},
		"another key's id":          {Label: ref.Label, ID: other.ID, Fingerprint: ref.Fingerprint},
		"another key's fingerprint": {Label: ref.Label, ID: ref.ID, Fingerprint: other.Fingerprint},
		"an unknown id":             {Label: ref.Label, ID: unique(), Fingerprint: ref.Fingerprint},
		"nothing":                   {},
	} {
		if err := device.DeleteKey(s.context(t), wrong); err == nil {
			t.Errorf("DeleteKey with %s succeeds", name)
		}
		s.findRef(t, device, ref)
		s.findRef(t, device, other)
	}
	if err := device.DeleteKey(s.context(t), ref); err != nil {
		t.Fatalf("DeleteKey(%+v): %v", ref, err)
	}
	if _, err := hsm.FindKey(s.context(t), device, hsm.KeyQuery{ID: ref.ID}); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("after DeleteKey the look-up gives %v, want ErrNotFound", err)
	}
	if err := device.DeleteKey(s.context(t), ref); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("a second DeleteKey gives %v, want ErrNotFound", err)
	}
	if err := use(s.context(t), key); err == nil {
		t.Error("a deleted key still works")
	} else if errors.Is(err, hsm.ErrCiphertext) {
		t.Errorf("a deleted key blames the ciphertext: %v", err)
	}
	s.findRef(t, device, other)
}

// use performs one private-key operation that succeeds where the key and its device do.
func use(ctx context.Context, key hsm.Key) error {
	switch key := key.(type) {
	case hsm.Decrypter:
		hash := key.OAEPHashes()[0]
		want := []byte("round trip")
		ciphertext, err := rsa.EncryptOAEP(hash.New(), rand.Reader, key.Public().(*rsa.PublicKey), want, nil)
		if err != nil {
			return err
		}
		got, err := key.DecryptOAEP(ctx, hash, ciphertext)
		if err == nil && !bytes.Equal(got, want) {
			return fmt.Errorf("the round trip gave %d other bytes", len(got))
		}
		return err
	case hsm.Agreer:
		public := key.Public().(*ecdh.PublicKey)
		peer, err := public.Curve().GenerateKey(rand.Reader)
		if err != nil {
			return err
		}
		want, err := peer.ECDH(public)
		if err != nil {
			return err
		}
		got, err := key.Agree(ctx, peer.PublicKey())
		if err == nil && !bytes.Equal(got, want) {
			return fmt.Errorf("the agreement gave %d other bytes", len(got))
		}
		return err
	default:
		return fmt.Errorf("a key of type %T can do nothing", key)
	}
}

func (s *suite) testRandom(t *testing.T) {
	device, ok := s.device(t).(hsm.Randomer)
	if !ok {
		t.Fatal("the device is no hsm.Randomer")
	}
	for _, n := range []int{1, 32, 1024} {
		got, err := device.Random(s.context(t), n)
		if err != nil || len(got) != n {
			t.Errorf("Random(%d) gives %d bytes, %v", n, len(got), err)
		}
	}
	for _, n := range []int{-1, 0, 1025} {
		if got, err := device.Random(s.context(t), n); err == nil {
			t.Errorf("Random(%d) gives %d bytes and no error", n, len(got))
		}
	}
	first, err1 := device.Random(s.context(t), 32)
	second, err2 := device.Random(s.context(t), 32)
	if err1 != nil || err2 != nil || bytes.Equal(first, second) || bytes.Equal(first, make([]byte, 32)) {
		t.Errorf("two draws of 32 bytes are equal or zero, or failed: %v, %v", err1, err2)
	}
}

// calls returns one call of every method of a device and its keys, by name.
func (s *suite) calls(t *testing.T, device hsm.Device) map[string]func(ctx context.Context) error {
	t.Helper()
	calls := map[string]func(ctx context.Context) error{
		"Info":     func(ctx context.Context) error { _, err := device.Info(ctx); return err },
		"FindKeys": func(ctx context.Context) error { _, err := device.FindKeys(ctx, hsm.KeyQuery{}); return err },
		"GenerateKey": func(ctx context.Context) error {
			_, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: s.quickest(), Label: "suite-never", ID: unique()})
			return err
		},
		"DeleteKey": func(ctx context.Context) error {
			return device.DeleteKey(ctx, hsm.KeyRef{ID: unique(), Fingerprint: strings.Repeat("A", 43)})
		},
	}
	for algorithm := range s.keys {
		key := s.find(t, device, algorithm)
		calls["a private-key operation with "+string(algorithm)] = func(ctx context.Context) error { return use(ctx, key) }
	}
	if randomer, ok := device.(hsm.Randomer); ok && s.caps.Random {
		calls["Random"] = func(ctx context.Context) error { _, err := randomer.Random(ctx, 8); return err }
	}
	if objects, ok := device.(hsm.ObjectStore); ok && s.caps.Objects {
		ref := hsm.ObjectRef{Application: "suite-" + unique(), Label: "never"}
		calls["Objects"] = func(ctx context.Context) error { _, err := objects.Objects(ctx, ref.Application); return err }
		calls["ReadObject"] = func(ctx context.Context) error { _, err := objects.ReadObject(ctx, ref); return err }
		calls["WriteObject"] = func(ctx context.Context) error { return objects.WriteObject(ctx, ref, []byte("never")) }
		calls["DeleteObject"] = func(ctx context.Context) error { return objects.DeleteObject(ctx, ref) }
	}
	return calls
}

func (s *suite) testContext(t *testing.T) {
	device := s.device(t)
	before := s.count(t, device)
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	expired, cancelExpired := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancelExpired()
	for name, call := range s.calls(t, device) {
		for want, ctx := range map[error]context.Context{context.Canceled: cancelled, context.DeadlineExceeded: expired} {
			start := time.Now()
			if err := call(ctx); !errors.Is(err, want) {
				t.Errorf("%s with an ended context gives %v, want %v", name, err, want)
			}
			if took := time.Since(start); took > 2*time.Second {
				t.Errorf("%s with an ended context took %v", name, took)
			}
		}
	}
	if after := s.count(t, device); after != before {
		t.Errorf("the token held %d keys before the cancelled calls and %d after", before, after)
	}
	for algorithm := range s.keys {
		if err := use(s.context(t), s.find(t, device, algorithm)); err != nil {
			t.Errorf("after cancelled calls the %s key fails: %v", algorithm, err)
		}
	}
}

func (s *suite) testConcurrency(t *testing.T) {
	device := s.device(t)
	ctx := s.context(t)
	var wg sync.WaitGroup
	for algorithm := range s.keys {
		key := s.find(t, device, algorithm)
		for range 4 {
			wg.Go(func() {
				for range 3 {
					if err := use(ctx, key); err != nil {
						t.Errorf("the %s key among others: %v", algorithm, err)
					}
				}
			})
		}
	}
	for range 2 {
		wg.Go(func() {
			for range 3 {
				if _, err := device.FindKeys(ctx, hsm.KeyQuery{}); err != nil {
					t.Errorf("FindKeys among others: %v", err)
				}
				if _, err := device.Info(ctx); err != nil {
					t.Errorf("Info among others: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

func (s *suite) testClose(t *testing.T) {
	closing, staying := s.open(t), s.device(t)
	calls := s.calls(t, closing)
	var _ io.Closer = closing
	if err := closing.Close(); err != nil {
		t.Fatalf("Close: %v", err)
	}
	for name, call := range calls {
		if err := call(s.context(t)); err == nil {
			t.Errorf("%s works on a closed device", name)
		}
	}
	if err := closing.Close(); err != nil {
		t.Errorf("a second Close: %v", err)
	}
	for algorithm := range s.keys {
		if err := use(s.context(t), s.find(t, staying, algorithm)); err != nil {
			t.Errorf("closing one handle harms another: %v", err)
		}
	}
}
