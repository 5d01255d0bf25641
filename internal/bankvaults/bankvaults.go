// Package bankvaults reads what Bank-Vaults left when it kept the keys of a Vault under an HSM, so that they can move.
//
// Bank-Vaults encrypted each value, a share as Vault prints it, the root token, a test word, with an RSA key on a PKCS#11
// token, as one block without any header, and wrote it under a fixed name ([Name]) as a data object on the same token
// ([Token]) or into a Kubernetes Secret ([Secret]). Since its version 1.33 a block is RSA-OAEP with SHA-1 and an empty
// label, before it was PKCS#1 v1.5. Nothing in a block says which, whose it is or who made it; names repeat on a token.
//
// PKCS#1 v1.5 is dangerous to accept: whoever can choose blocks and learns which of them are well-formed can, with some
// hundred thousand of them, open any block made for that key, those of OAEP too (Bleichenbacher, 1998; Manger, 2001). So
// [Decrypt] is no oracle for that: it runs only where a person with the token's PIN starts it, never for a request from
// elsewhere; it takes v1.5 only where told to; it works through all blocks, [MaxBlocks] of them at most, before it says
// anything; and whatever is wrong with whichever of them is the one [ErrDecrypt], which names none. Padding, form of the
// share or token, and test word are one question to it. It makes no promise about time beyond that.
//
// The values that come out were encrypted with a public key: anybody could have made them. A running Vault proves them.
// And the key has been an oracle for whoever could reach it, so it should not wrap anything of ours: see [SameKey].
package bankvaults

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
)

// DefaultKeyLabel is the label of the key pair that Bank-Vaults uses unless it is told another one.
const DefaultKeyLabel = "bank-vaults"

// Limits of what is read.
const (
	// MaxShares is how many shares of a kind there may be: Vault makes 255 at most.
	MaxShares = 256
	// MaxBlocks is how many different blocks one [Decrypt] takes: every name once, and some copies.
	MaxBlocks = 640
	// MaxBlock is the size of the largest block in bytes: RSA with 4096 bits.
	MaxBlock = 512
	// MaxSecret is the size of the largest Kubernetes document in bytes.
	MaxSecret = 2 << 20
)

var (
	// ErrNothing: nothing of Bank-Vaults' is there. It answers to hsm.ErrNotFound as well.
	ErrNothing error = nothing{}
	// ErrInvalid: what was given is nothing that Bank-Vaults, or kubectl, can have written.
	ErrInvalid = errors.New("not what Bank-Vaults writes")
	// ErrDecrypt is every failed decryption: this text and no other, whatever is wrong with whichever value.
	ErrDecrypt = errors.New("the values do not all decrypt, with this key, to what Bank-Vaults writes")
	// ErrChoice: a choice between copies, or what is to be left out, names nothing that is there.
	ErrChoice = errors.New("no such copy")
)

type nothing struct{}

func (nothing) Error() string { return "nothing that Bank-Vaults wrote is there" }

func (nothing) Is(target error) bool { return target == hsm.ErrNotFound }

// Kind is what a value is.
type Kind string

// The kinds of value.
const (
	Unseal   Kind = "unseal"   // a share of the unseal key
	Recovery Kind = "recovery" // a share of the recovery key
	Root     Kind = "root"     // the root token
	Test     Kind = "test"     // the word that Bank-Vaults writes to see whether it can
)

// kinds lists them in the order of names.
var kinds = []Kind{Unseal, Recovery, Root, Test}

// numbered tells whether there are several of a kind.
func (k Kind) numbered() bool { return k == Unseal || k == Recovery }

// Name is the name of a value: vault-unseal-3, vault-root.
type Name struct {
	Kind  Kind
	Index int // of a share, from 0; 0 for the others
}

// ParseName reads a name. What Bank-Vaults does not write is none.
func ParseName(text string) (Name, bool) {
	rest, ours := strings.CutPrefix(text, "vault-")
	if !ours {
		return Name{}, false
	}
	kind, digits, numbered := strings.Cut(rest, "-")
	name := Name{Kind: Kind(kind)}
	if numbered {
		index, err := strconv.ParseUint(digits, 10, 16)
		if err != nil || index >= MaxShares {
			return Name{}, false
		}
		name.Index = int(index)
	}
	for _, k := range kinds {
		// The comparison refuses another spelling of the number: 01, +1.
		if name.Kind == k && k.numbered() == numbered && name.String() == text {
			return name, true
		}
	}
	return Name{}, false
}

// String is the name as Bank-Vaults writes it.
func (n Name) String() string {
	if n.Kind.numbered() {
		return fmt.Sprintf("vault-%s-%d", n.Kind, n.Index)
	}
	return "vault-" + string(n.Kind)
}

// compare orders names: kinds in their order, shares by their number.
func (n Name) compare(other Name) int {
	order := func(n Name) int {
		for i, k := range kinds {
			if n.Kind == k {
				return i * MaxShares
			}
		}
		return len(kinds) * MaxShares
	}
	return order(n) + n.Index - order(other) - other.Index
}

// SameKey tells whether one of the HSM keys with these fingerprints is the key that Bank-Vaults used. A key that answers
// PKCS#1 v1.5 to other programs is an oracle for what is sealed to it.
func SameKey(legacy hsm.KeyRef, fingerprints []string) bool {
	for _, fingerprint := range fingerprints {
		if legacy.Fingerprint != "" && fingerprint == legacy.Fingerprint {
			return true
		}
	}
	return false
}
