package bankvaults

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	_ "crypto/sha1" //nolint:gosec // the hash of Bank-Vaults' OAEP, whose security does not rest on collisions
	"errors"
	"fmt"
	"slices"

	"vault-plugin-secrets-nitrokey/hsm"
)

// testWord is the value of vault-test.
var testWord = []byte("vault-test")

// Material is what came out, in the clear. Whoever asked for it wipes it.
type Material struct {
	// Shares and RecoveryShares are in the order of their numbers, decoded from what Vault printed. Numbers may be missing.
	Shares, RecoveryShares []Share
	// RootToken is nil where there is none.
	RootToken []byte
	// OldFormat is how many different values were encrypted with PKCS#1 v1.5.
	OldFormat int
}

// Share is a share of a key.
type Share struct {
	Index int // of its name
	Value []byte
}

// Wipe overwrites everything.
func (m *Material) Wipe() {
	for _, share := range slices.Concat(m.Shares, m.RecoveryShares) {
		clear(share.Value)
	}
	clear(m.RootToken)
}

// Values returns the bare shares of a list, which stay its own.
func Values(shares []Share) [][]byte {
	values := make([][]byte, len(shares))
	for i, share := range shares {
		values[i] = share.Value
	}
	return values
}

// Missing returns the names that lie between those that are there: somebody lost them, or they were left out.
func (m *Material) Missing() (names []Name) {
	for kind, shares := range map[Kind][]Share{Unseal: m.Shares, Recovery: m.RecoveryShares} {
		next := 0
		for _, share := range shares {
			for ; next < share.Index; next++ {
				names = append(names, Name{kind, next})
			}
			next = share.Index + 1
		}
	}
	slices.SortFunc(names, Name.compare)
	return names
}

// Decrypt opens all copies with the key that Bank-Vaults used: one private-key operation for each different block, two
// where acceptPKCS1v15 lets it try the older format after the newer. Nothing comes out unless all of them open and are
// what their names promise; copies of one name must agree.
//
// Errors: [ErrDecrypt] for all that is wrong with any block's content, beside hsm.ErrUnsupported where the token cannot
// do one of the formats; [DifferError]; [ErrInvalid] for what shows without
// the key; and the device's own where it cannot work at all.
func Decrypt(ctx context.Context, key hsm.Key, copies []Copy, acceptPKCS1v15 bool) (*Material, error) {
	ways, err := waysToDecrypt(key, acceptPKCS1v15)
	if err != nil {
		return nil, err
	}
	if err := checkSizes(key, copies); err != nil {
		return nil, err
	}
	opened := make(map[string]value, len(copies))
	defer func() {
		for _, v := range opened {
			clear(v.content)
		}
	}()
	good, tried := true, false
	var untried error
	for _, c := range copies {
		// The name belongs to the question: one block under two names may be right for one of them only.
		id := c.Name.String() + "\x00" + string(c.Block)
		if _, known := opened[id]; known {
			continue
		}
		v, err := open(ctx, ways, c)
		if err != nil {
			return nil, err // the device does not work; it says nothing about a block
		}
		opened[id] = v
		good, tried = good && v.content != nil, tried || v.tried
		if v.untried != nil {
			untried = v.untried
		}
	}
	switch {
	case good:
		return collect(copies, opened)
	case !tried:
		return nil, untried
	case untried != nil:
		return nil, fmt.Errorf("%w, and not every format could be tried: %w", ErrDecrypt, untried)
	}
	return nil, ErrDecrypt
}

// value is what a block holds; content is nil where it is not what its name promises.
type value struct {
	content []byte
	old     bool
	// tried is true where the device decrypted in some format, untried why it did not in another one. Both are the key's and
	// the token's, whatever the block.
	tried   bool
	untried error
}

// way decrypts in one format.
type way struct {
	old     bool
	decrypt func(ctx context.Context, block []byte) ([]byte, error)
}

func waysToDecrypt(key hsm.Key, acceptPKCS1v15 bool) (ways []way, _ error) {
	if oaep, ok := key.(hsm.Decrypter); ok { // its OAEPHashes are the best ones: SHA-1 may work and not be listed
		ways = append(ways, way{decrypt: func(ctx context.Context, block []byte) ([]byte, error) {
			return oaep.DecryptOAEP(ctx, crypto.SHA1, block)
		}})
	}
	if acceptPKCS1v15 {
		legacy, ok := key.(hsm.LegacyDecrypter)
		if !ok {
			return nil, fmt.Errorf("decrypting PKCS#1 v1.5 with the key %q: %w", key.Ref().Label, hsm.ErrUnsupported)
		}
		ways = append(ways, way{old: true, decrypt: legacy.DecryptPKCS1v15})
	}
	if ways == nil {
		return nil, fmt.Errorf("decrypting RSA-OAEP with SHA-1 with the key %q: %w", key.Ref().Label, hsm.ErrUnsupported)
	}
	return ways, nil
}

// checkSizes compares what everybody can see.
func checkSizes(key hsm.Key, copies []Copy) error {
	public, ok := key.Public().(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("the key %q is no RSA key, which Bank-Vaults uses: %w", key.Ref().Label, hsm.ErrUnsupported)
	}
	different := map[string]bool{}
	for _, c := range copies {
		if len(c.Block) != public.Size() {
			return fmt.Errorf("%w: %s has %d bytes, and a block of the key %q has %d; is it another key?", ErrInvalid, c, len(c.Block),
				key.Ref().Label, public.Size())
		}
		different[c.Name.String()+"\x00"+string(c.Block)] = true
	}
	if len(different) > MaxBlocks {
		return fmt.Errorf("%w: %d values; %d are decrypted at most", ErrInvalid, len(different), MaxBlocks)
	}
	return nil
}

// open tries the ways one after the other. An error is the device's; a block that does not open in any way is a value
// without content.
func open(ctx context.Context, ways []way, c Copy) (v value, _ error) {
	for _, w := range ways {
		plaintext, err := w.decrypt(ctx, c.Block)
		switch {
		case errors.Is(err, hsm.ErrCiphertext):
			v.tried = true
			continue
		case errors.Is(err, hsm.ErrUnsupported): // the other format may do: a key can be made for one alone
			v.untried = err
			continue
		case err != nil:
			return value{}, err
		}
		v.tried = true
		content := c.Name.read(plaintext)
		clear(plaintext)
		if content != nil {
			return value{content: content, old: w.old, tried: true}, nil
		}
	}
	return v, nil
}

// read returns what a value of this name holds, nil where it is not what it should be.
func (n Name) read(plaintext []byte) []byte {
	switch {
	case n.Kind == Test && bytes.Equal(plaintext, testWord),
		n.Kind == Root && validToken(plaintext):
		return bytes.Clone(plaintext)
	case n.Kind.numbered():
		if share, ok := decodeShare(plaintext); ok {
			return share
		}
	}
	return nil
}

// collect makes the material of values that all opened.
func collect(copies []Copy, opened map[string]value) (*Material, error) {
	byName := map[Name][]byte{}
	differing := map[Name]bool{}
	m := &Material{}
	counted := map[string]bool{}
	for _, c := range copies {
		id := c.Name.String() + "\x00" + string(c.Block)
		v := opened[id]
		if v.old && !counted[id] {
			m.OldFormat++
		}
		counted[id] = true
		if first, known := byName[c.Name]; known && !bytes.Equal(first, v.content) {
			differing[c.Name] = true
		}
		byName[c.Name] = v.content
	}
	if len(differing) > 0 {
		e := &DifferError{}
		for _, c := range copies {
			if differing[c.Name] {
				e.Copies = append(e.Copies, c)
			}
		}
		return nil, e
	}
	for name, content := range byName {
		switch name.Kind {
		case Unseal:
			m.Shares = append(m.Shares, Share{name.Index, bytes.Clone(content)})
		case Recovery:
			m.RecoveryShares = append(m.RecoveryShares, Share{name.Index, bytes.Clone(content)})
		case Root:
			m.RootToken = bytes.Clone(content)
		case Test:
		}
	}
	byIndex := func(a, b Share) int { return a.Index - b.Index }
	slices.SortFunc(m.Shares, byIndex)
	slices.SortFunc(m.RecoveryShares, byIndex)
	return m, nil
}
