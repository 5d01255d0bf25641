package bankvaults_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/bankvaults"
)

func TestNamesAreThoseOfBankVaults(t *testing.T) {
	for text, want := range map[string]bankvaults.Name{
		"vault-unseal-0": {Kind: bankvaults.Unseal}, "vault-unseal-255": {Kind: bankvaults.Unseal, Index: 255},
		"vault-recovery-7": {Kind: bankvaults.Recovery, Index: 7}, "vault-root": {Kind: bankvaults.Root}, "vault-test": {Kind: bankvaults.Test},
	} {
		if got, ok := bankvaults.ParseName(text); !ok || got != want || got.String() != text {
			t.Errorf("%s is read as %+v, %v", text, got, ok)
		}
	}
	for _, text := range []string{
		"", "vault", "vault-", "vault-unseal", "vault-unseal-", "vault-unseal-256", "vault-unseal-00", "vault-unseal-+1", "vault-unseal-1 ",
		"vault-unseal-1-2", "vault-root-0", "vault-test-1", "Vault-root", "vault-rooted", "vault-unseal--1", "vault-unseal-99999999999999999999",
	} {
		if got, ok := bankvaults.ParseName(text); ok {
			t.Errorf("%q is read as %v", text, got)
		}
	}
}

func FuzzParseName(f *testing.F) {
	f.Add("vault-unseal-0")
	f.Add("vault-root")
	f.Fuzz(func(t *testing.T, text string) {
		if name, ok := bankvaults.ParseName(text); ok && (name.String() != text || name.Index < 0 || name.Index >= bankvaults.MaxShares) {
			t.Errorf("%q is read as %v", text, name)
		}
	})
}

func TestEverythingThatBankVaultsKeepsComesOut(t *testing.T) {
	for name, test := range map[string]struct {
		format format
		accept bool
		old    int
	}{
		"the format since 1.33":                            {now, false, 0},
		"the format since 1.33, the older one accepted":    {now, true, 0},
		"the format before, accepted":                      {before, true, 7},
		"both formats after an update, the older accepted": {mixed(), true, 3},
	} {
		t.Run(name, func(t *testing.T) {
			k := newToken(t, test.format)
			k.put("vault-recovery-0", now(t, k.key, share("recovery", 0)))
			k.put("something else", []byte("of another program"))
			got, err := bankvaults.Decrypt(t.Context(), k.key, k.read(t), test.accept)
			if err != nil {
				t.Fatal(err)
			}
			defer got.Wipe()
			if len(got.Shares) != 5 || len(got.RecoveryShares) != 1 || string(got.RootToken) != rootToken || got.OldFormat != test.old {
				t.Errorf("it is %d shares, %d recovery shares, the token %q, %d of the older format", len(got.Shares), len(got.RecoveryShares),
					got.RootToken, got.OldFormat)
			}
			for i, s := range bankvaults.Values(got.Shares) {
				if !strings.HasPrefix(string(s), "unseal share number ") || s[len(s)-1] != byte(i+1) {
					t.Errorf("share %d is %q", i, s)
				}
			}
			if missing := got.Missing(); missing != nil {
				t.Errorf("missing: %v", missing)
			}
		})
	}
}

// mixed encrypts some values in one format and some in the other.
func mixed() format {
	n := 0
	return func(t *testing.T, key hsm.Key, text string) []byte {
		t.Helper()
		if n++; n <= 3 {
			return before(t, key, text)
		}
		return now(t, key, text)
	}
}

// TestAWrongBlockIsNoOracle: whatever is wrong with whichever block, the answer and the work are the same.
func TestAWrongBlockIsNoOracle(t *testing.T) {
	const operations = 9 // the seven kept ones in the newer format, and the one in question in both
	for name, wrong := range map[string]func(t *testing.T, k *token) []byte{
		"no padding at all":                    func(*testing.T, *token) []byte { return make([]byte, 256) },
		"the older format, and no share":       func(t *testing.T, k *token) []byte { t.Helper(); return before(t, k.key, "no share") },
		"the older format, and nothing":        func(t *testing.T, k *token) []byte { t.Helper(); return before(t, k.key, "") },
		"the newer format, and no share":       func(t *testing.T, k *token) []byte { t.Helper(); return now(t, k.key, "no share") },
		"the newer format, and the root token": func(t *testing.T, k *token) []byte { t.Helper(); return now(t, k.key, rootToken) },
		"a bit of a right block changed": func(t *testing.T, k *token) []byte {
			t.Helper()
			block := now(t, k.key, share("unseal", 5))
			block[200] ^= 1
			return block
		},
	} {
		t.Run(name, func(t *testing.T) {
			k := newToken(t, now)
			k.put("vault-unseal-5", wrong(t, k))
			copies := k.read(t)
			got, err := bankvaults.Decrypt(t.Context(), k.key, copies, true)
			if got != nil || err != bankvaults.ErrDecrypt { //nolint:errorlint // the very error, with nothing around it
				t.Errorf("it gives %v, %v", got, err)
			}
			if n := k.Operations(); n != operations {
				t.Errorf("%d operations: the whole list is worked through, and nothing twice", n)
			}
		})
	}
	t.Run("the older format, not accepted", func(t *testing.T) {
		k := newToken(t, before)
		if _, err := bankvaults.Decrypt(t.Context(), k.key, k.read(t), false); !errors.Is(err, bankvaults.ErrDecrypt) {
			t.Errorf("it gives %v", err)
		}
	})
}

func TestCopies(t *testing.T) {
	k := newToken(t, now)
	same := now(t, k.key, share("unseal", 0))
	k.put("vault-unseal-0", same)
	k.put("vault-unseal-0", same)
	t.Run("of the same value are one", func(t *testing.T) {
		copies := k.read(t)
		if len(copies) != 9 {
			t.Fatalf("%d copies are read, want 9", len(copies))
		}
		got, err := bankvaults.Decrypt(t.Context(), k.key, copies, false)
		if err != nil || len(got.Shares) != 5 {
			t.Fatalf("it gives %v, %v", got, err)
		}
		if n := k.Operations(); n != 8 {
			t.Errorf("%d operations, want 8: the same block is decrypted once", n)
		}
	})
	other := now(t, k.key, share("unseal", 9))
	k.put("vault-unseal-0", other)
	t.Run("of different values are an error that names them", func(t *testing.T) {
		_, err := bankvaults.Decrypt(t.Context(), k.key, k.read(t), false)
		var differ *bankvaults.DifferError
		if !errors.As(err, &differ) || !errors.Is(err, bankvaults.ErrDiffer) || len(differ.Copies) != 4 {
			t.Fatalf("it gives %v", err)
		}
		sum := bankvaults.Copy{Block: other}.Sum()
		if !strings.Contains(err.Error(), "vault-unseal-0") || !strings.Contains(err.Error(), sum) || strings.Contains(err.Error(), "vault-unseal-1") {
			t.Errorf("it says %q", err)
		}
	})
	t.Run("are chosen between by their sums, and the others left alone", func(t *testing.T) {
		name, sum, err := bankvaults.ParseUse("vault-unseal-0=" + bankvaults.Copy{Block: other}.Sum())
		if err != nil {
			t.Fatal(err)
		}
		test, _ := bankvaults.ParseName("vault-test")
		choice := bankvaults.Choice{Use: map[bankvaults.Name]string{name: sum}, Without: []bankvaults.Name{test}}
		chosen, left, err := choice.Apply(k.read(t))
		if err != nil || len(chosen) != 6 || len(left) != 4 {
			t.Fatalf("%d are chosen and %d left, %v", len(chosen), len(left), err)
		}
		got, err := bankvaults.Decrypt(t.Context(), k.key, chosen, false)
		if err != nil || got.Shares[0].Value[32] != 10 {
			t.Fatalf("it gives %v, %v", got, err)
		}
		var gone []string
		if err := bankvaults.Delete(t.Context(), k, chosen, func(c bankvaults.Copy) { gone = append(gone, c.Name.String()) }); err != nil {
			t.Fatal(err)
		}
		if len(gone) != 6 {
			t.Errorf("deleted: %q", gone)
		}
		if rest := k.read(t); len(rest) != 4 {
			t.Errorf("%d copies are there after the deletion, want the 4 that were not imported", len(rest))
		}
		if err := bankvaults.Delete(t.Context(), k, chosen, func(bankvaults.Copy) {}); err != nil {
			t.Errorf("deleting them again: %v", err)
		}
	})
}

func TestChoicesThatNameNothing(t *testing.T) {
	for _, text := range []string{"", "vault-unseal-0", "vault-unseal-0=", "vault-unseal-0=12", "vault-unseal-0=xxxxxxxx", "root=11223344"} {
		if _, _, err := bankvaults.ParseUse(text); !errors.Is(err, bankvaults.ErrChoice) {
			t.Errorf("%q gives %v", text, err)
		}
	}
	copies := newToken(t, now).read(t)
	root, recovery := bankvaults.Name{Kind: bankvaults.Root}, bankvaults.Name{Kind: bankvaults.Recovery}
	var all []bankvaults.Name
	for _, c := range copies {
		all = append(all, c.Name)
	}
	for name, choice := range map[string]bankvaults.Choice{
		"a copy that is not there":   {Use: map[bankvaults.Name]string{root: "00000000"}},
		"a name that is not there":   {Without: []bankvaults.Name{recovery}},
		"everything is left out":     {Without: all},
		"a copy of what is left out": {Use: map[bankvaults.Name]string{root: "00000000"}, Without: []bankvaults.Name{root}},
	} {
		if _, _, err := choice.Apply(copies); !errors.Is(err, bankvaults.ErrChoice) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhatShowsWithoutTheKeyIsSaid(t *testing.T) {
	k := newToken(t, now)
	k.put("vault-unseal-6", []byte("short"))
	if _, err := bankvaults.Decrypt(t.Context(), k.key, k.read(t), false); !errors.Is(err, bankvaults.ErrInvalid) || !strings.Contains(err.Error(), "vault-unseal-6") {
		t.Errorf("a block of another size: %v", err)
	}
	if k.Operations() != 0 {
		t.Error("the HSM was asked")
	}
	if _, err := bankvaults.Token(t.Context(), newEmpty(t)); !errors.Is(err, bankvaults.ErrNothing) || !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("an empty token: %v", err)
	}
	many := newEmpty(t)
	for range bankvaults.MaxBlocks + 1 {
		many.put("vault-test", []byte("x"))
	}
	if _, err := bankvaults.Token(t.Context(), many); !errors.Is(err, bankvaults.ErrInvalid) {
		t.Errorf("too many copies: %v", err)
	}
	large := newEmpty(t)
	large.put("vault-root", make([]byte, bankvaults.MaxBlock+1))
	if _, err := bankvaults.Token(t.Context(), large); !errors.Is(err, bankvaults.ErrInvalid) {
		t.Errorf("a large object: %v", err)
	}
}

func newEmpty(t *testing.T) *token {
	t.Helper()
	k := newToken(t, now)
	if err := bankvaults.Delete(t.Context(), k, k.read(t), func(bankvaults.Copy) {}); err != nil {
		t.Fatal(err)
	}
	return k
}

func TestADeviceThatFailsIsNoWrongBlock(t *testing.T) {
	k := newToken(t, now)
	copies := k.read(t)
	k.SetError(hsm.ErrUnavailable)
	if _, err := bankvaults.Decrypt(t.Context(), k.key, copies, true); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("it gives %v", err)
	}
	if _, err := bankvaults.Token(t.Context(), k); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("reading gives %v", err)
	}
	if err := bankvaults.Delete(t.Context(), k, copies, func(bankvaults.Copy) {}); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("deleting gives %v", err)
	}
	k.SetError(nil)
	k.SetHashes()
	if _, err := bankvaults.Decrypt(t.Context(), k.key, copies, false); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("a key that does no OAEP gives %v", err)
	}
}

// noRaw is a key on a token without CKM_RSA_X_509.
type noRaw struct{ hsm.Decrypter }

func (noRaw) DecryptPKCS1v15(context.Context, []byte) ([]byte, error) { return nil, hsm.ErrUnsupported }

// TestATokenThatDoesNotDecryptTheOlderFormat is no wrong block either, and no oracle: it works through the whole list.
func TestATokenThatDoesNotDecryptTheOlderFormat(t *testing.T) {
	k := newToken(t, mixed())
	got, err := bankvaults.Decrypt(t.Context(), noRaw{k.key.(hsm.Decrypter)}, k.read(t), true)
	if got != nil || !errors.Is(err, bankvaults.ErrDecrypt) || !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("it gives %v, %v", got, err)
	}
	if n := k.Operations(); n != 7 {
		t.Errorf("%d operations, want 7", n)
	}
	k = newToken(t, now)
	if got, err := bankvaults.Decrypt(t.Context(), noRaw{k.key.(hsm.Decrypter)}, k.read(t), true); err != nil || len(got.Shares) != 5 {
		t.Errorf("with nothing of the older format: %v, %v", got, err)
	}
	k.SetHashes()
	if _, err := bankvaults.Decrypt(t.Context(), noRaw{k.key.(hsm.Decrypter)}, k.read(t), true); errors.Is(err, bankvaults.ErrDecrypt) || !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("where nothing could be tried: %v", err)
	}
}

func TestMissingSharesAreNamed(t *testing.T) {
	m := &bankvaults.Material{Shares: []bankvaults.Share{{Index: 1}, {Index: 4}}, RecoveryShares: []bankvaults.Share{{Index: 0}, {Index: 2}}}
	var names []string
	for _, name := range m.Missing() {
		names = append(names, name.String())
	}
	if want := []string{"vault-unseal-0", "vault-unseal-2", "vault-unseal-3", "vault-recovery-1"}; !slices.Equal(names, want) {
		t.Errorf("missing are %q, want %q", names, want)
	}
}

func TestTheOldKeyIsKnownAgain(t *testing.T) {
	k := newToken(t, now)
	ref := k.key.Ref()
	if !bankvaults.SameKey(ref, []string{"another", ref.Fingerprint}) || bankvaults.SameKey(ref, []string{"another"}) || bankvaults.SameKey(hsm.KeyRef{}, []string{""}) {
		t.Error("it is not told from others")
	}
}
