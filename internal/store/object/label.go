package object

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// MaxNameLength is the longest name, in bytes. With the mark and the generation a label has at most 100: PKCS#15, after
// which cards are organised, ends at 255, and a card's memory is small.
const MaxNameLength = 80

// mark stands between name and generation in a label. No name contains it.
const mark = "#"

// label is the CKA_LABEL of one generation of a name: "material/prod/unseal#7".
func label(name string, generation uint64) string {
	return name + mark + strconv.FormatUint(generation, 10)
}

// parseLabel is the opposite of label. A label that no store of ours writes is not ok.
func parseLabel(text string) (name string, generation uint64, ok bool) {
	name, digits, found := strings.Cut(text, mark)
	if !found || checkName(name) != nil {
		return "", 0, false
	}
	generation, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || generation == 0 || label(name, generation) != text {
		return "", 0, false
	}
	return name, generation, true
}

func checkName(name string) error {
	if err := store.CheckName(name); err != nil {
		return err
	}
	if len(name) > MaxNameLength {
		return fmt.Errorf("%w %q: it has %d bytes, a data object takes %d", store.ErrInvalidName, name, len(name), MaxNameLength)
	}
	return nil
}

// version is one generation of a name on the HSM.
type version struct {
	ref        hsm.ObjectRef
	generation uint64
}

// versions picks those of name, the newest first. Two of one generation were written by programs that do not share a
// lock, and nobody can say which one counts.
func versions(refs []hsm.ObjectRef, name string) ([]version, error) {
	var found []version
	for _, ref := range refs {
		if n, generation, ok := parseLabel(ref.Label); ok && n == name {
			found = append(found, version{ref, generation})
		}
	}
	slices.SortFunc(found, func(a, b version) int {
		if a.generation > b.generation {
			return -1
		}
		return 1
	})
	for i := range found[:max(0, len(found)-1)] {
		if found[i].generation == found[i+1].generation {
			return nil, fmt.Errorf("%w: the HSM holds two objects labelled %q of the application %q; "+
				"read both (pkcs11-tool --read-object), decide, and delete one", store.ErrAmbiguous, found[i].ref.Label, found[i].ref.Application)
		}
	}
	return found, nil
}
