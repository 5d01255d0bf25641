package bankvaults

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Copy is one value as it was found: still encrypted, and no secret to who lacks the key.
type Copy struct {
	Name Name
	// From says where it was found.
	From  string
	Block []byte
}

// Sum tells copies of a name apart: the first eight hexadecimal digits of the SHA-256 of the block.
func (c Copy) Sum() string {
	sum := sha256.Sum256(c.Block)
	return hex.EncodeToString(sum[:4])
}

// String names the copy for people.
func (c Copy) String() string { return fmt.Sprintf("%s (copy %s, %s)", c.Name, c.Sum(), c.From) }

func sortCopies(copies []Copy) {
	slices.SortStableFunc(copies, func(a, b Copy) int {
		return cmp.Or(a.Name.compare(b.Name), cmp.Compare(a.Sum(), b.Sum()), cmp.Compare(a.From, b.From))
	})
}

// Choice is what a person decided about copies.
type Choice struct {
	// Use says for a name which copy counts, by its [Copy.Sum].
	Use map[Name]string
	// Without are names that are left alone.
	Without []Name
}

// ParseUse reads "vault-unseal-0=1f2e3d4c".
func ParseUse(text string) (Name, string, error) {
	left, sum, found := strings.Cut(text, "=")
	name, known := ParseName(left)
	if decoded, err := hex.DecodeString(sum); !found || !known || err != nil || len(decoded) != 4 {
		return Name{}, "", fmt.Errorf("%w: a choice is a name and a copy of it, vault-unseal-0=1f2e3d4c for example", ErrChoice)
	}
	return name, strings.ToLower(sum), nil
}

// Apply returns the copies that count and those that are left alone. What the choice names has to be there.
func (c Choice) Apply(copies []Copy) (chosen, left []Copy, err error) {
	missing := map[string]bool{}
	for name, sum := range c.Use {
		missing[name.String()+"="+sum] = true
	}
	for _, name := range c.Without {
		missing[name.String()] = true
	}
	for _, found := range copies {
		sum, decided := c.Use[found.Name]
		switch {
		case slices.Contains(c.Without, found.Name):
			delete(missing, found.Name.String())
			left = append(left, found)
		case decided && sum != found.Sum():
			left = append(left, found)
		default:
			delete(missing, found.Name.String()+"="+sum)
			chosen = append(chosen, found)
		}
	}
	for what := range missing {
		return nil, nil, fmt.Errorf("%w: %s", ErrChoice, what)
	}
	if len(chosen) == 0 && len(copies) > 0 {
		return nil, nil, fmt.Errorf("%w: nothing is left to be imported", ErrChoice)
	}
	return chosen, left, nil
}

// ErrDiffer is what every [DifferError] is.
var ErrDiffer = errors.New("copies of one name hold different values")

// DifferError says which names have copies that decrypt to different values. Nobody but a person can say which count.
type DifferError struct {
	// Copies are those of the names in question.
	Copies []Copy
}

func (e *DifferError) Error() string {
	lines := make([]string, len(e.Copies))
	for i, c := range e.Copies {
		lines[i] = c.String()
	}
	return fmt.Sprintf("%v, from more than one initialisation perhaps: %s", ErrDiffer, strings.Join(lines, ", "))
}

// Is makes it answer to [ErrDiffer].
func (e *DifferError) Is(target error) bool { return target == ErrDiffer }
