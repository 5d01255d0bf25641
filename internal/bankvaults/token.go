package bankvaults

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Token reads the data objects that Bank-Vaults left on a token, every copy of every name, whatever application they
// claim. Objects of other names are not read. Errors: [ErrNothing], [ErrInvalid], and the device's own.
func Token(ctx context.Context, objects hsm.ForeignObjects) ([]Copy, error) {
	labels, err := objects.ForeignLabels(ctx)
	if err != nil {
		return nil, err
	}
	var copies []Copy
	for _, label := range slices.Compact(labels) { // sorted
		name, known := ParseName(label)
		if !known {
			continue
		}
		found, err := objects.ReadForeign(ctx, label)
		if errors.Is(err, hsm.ErrNotFound) {
			continue // deleted just now
		}
		if err != nil {
			return nil, err
		}
		for _, o := range found {
			if len(o.Value) > MaxBlock {
				return nil, fmt.Errorf("%w: a data object %s has %d bytes; an encrypted value has 256 to %d", ErrInvalid, name, len(o.Value), MaxBlock)
			}
			copies = append(copies, Copy{Name: name, From: describe(o), Block: o.Value})
		}
		if len(copies) > MaxBlocks {
			return nil, fmt.Errorf("%w: more than %d data objects of its names", ErrInvalid, MaxBlocks)
		}
	}
	if len(copies) == 0 {
		return nil, fmt.Errorf("%w: no data object on the token has a label such as vault-unseal-0 or vault-root", ErrNothing)
	}
	sortCopies(copies)
	return copies, nil
}

func describe(o hsm.ForeignObject) string {
	if o.Application == "" {
		return "a data object without an application"
	}
	return fmt.Sprintf("a data object of application %.64q", o.Application)
}

// Delete removes copies from the token, those of one name and value together, and tells of each name when it is gone. A copy
// that is gone already is no error: an earlier run deleted it.
func Delete(ctx context.Context, objects hsm.ForeignObjects, copies []Copy, gone func(Copy)) error {
	type once struct {
		name  Name
		block string
	}
	done := map[once]bool{}
	for _, c := range copies {
		what := once{c.Name, string(c.Block)}
		if !done[what] {
			if err := objects.DeleteForeign(ctx, c.Name.String(), c.Block); err != nil && !errors.Is(err, hsm.ErrNotFound) {
				return fmt.Errorf("deleting %s: %w; what was not deleted yet is still there, and running it again goes on", c, err)
			}
			done[what] = true
		}
		gone(c)
	}
	return nil
}
