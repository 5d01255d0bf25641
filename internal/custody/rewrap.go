package custody

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Progress is one step of a [Keeper.Rewrap].
type Progress struct {
	Done, Total int // items looked at, and to be looked at
	Item        Ref
	Rewrapped   bool
	Err         error // why this item could not be rewrapped
}

// Report is what a [Keeper.Rewrap] has done.
type Report struct {
	Items     int // envelopes of the wrapping key
	Rewrapped int
	SingleHSM int // of Items, those that open on one HSM only after it
	// Failed are the items that are as they were, with the reasons.
	Failed   []Progress
	Warnings []string
}

// Rewrap seals all items of a wrapping key anew, to all recipients of its newest version, where they are not yet. Each
// one costs one private-key operation and becomes a new generation. What fails is passed over and reported. It may be
// stopped at any point and begun again, and goes on with what is left; items may be written meanwhile. progress may be
// nil.
func (k *Keeper) Rewrap(ctx context.Context, key, by string, progress func(Progress)) (Report, error) {
	refs, warnings, err := k.List(ctx, "")
	if err != nil {
		return Report{}, err
	}
	report := Report{Warnings: warnings}
	for done, ref := range refs {
		if err := ctx.Err(); err != nil {
			return report, fmt.Errorf("rewrapping the material of key %q: stopped after %d of %d: %w; run it again to go on", key, done, len(refs), err)
		}
		step := Progress{Done: done + 1, Total: len(refs), Item: ref}
		i, rewrapped, err := k.rewrap(ctx, ref, key, by)
		step.Rewrapped, step.Err = rewrapped, err
		switch {
		case err != nil:
			report.Failed = append(report.Failed, step)
		case i.exists() && i.claimed.Key == key:
			report.Items++
			if rewrapped {
				report.Rewrapped++
			}
			if _, devices, _, _ := k.recipients(ctx, i); devices == 1 {
				report.SingleHSM++
			}
		}
		if progress != nil {
			progress(step)
		}
	}
	return report, nil
}

// rewrap seals one item anew where that is due, and returns it as it is then.
func (k *Keeper) rewrap(ctx context.Context, ref Ref, key, by string) (i *item, rewrapped bool, err error) {
	for range maxConflicts {
		if i, err = k.look(ctx, ref.Cluster, ref.Name, ""); err != nil {
			return nil, rewrapped, err
		}
		if i.key() != key || i.state == "" {
			return i, rewrapped, nil
		}
		if err := i.problem(); err != nil {
			return nil, rewrapped, err
		}
		outdated, err := k.outdated(ctx, i)
		if err != nil || !outdated {
			return i, rewrapped, err
		}
		payload, err := k.unseal(ctx, i)
		if err != nil {
			return nil, rewrapped, err
		}
		if i.state == StateAhead {
			if i, err = k.caughtUp(ctx, i, payload, by); err != nil || i == nil {
				clear(payload)
				if err != nil {
					return nil, rewrapped, err
				}
				continue
			}
		}
		// The request that wrote the item is kept with the new envelope, which holds the same: its repeat has happened.
		_, err = k.replace(ctx, i, payload, change{key: key, by: by, request: i.writer()})
		clear(payload)
		if err != nil && !errors.Is(err, store.ErrConflict) {
			return nil, rewrapped, err
		}
		rewrapped = rewrapped || err == nil // the next look tells what lies there now
	}
	return nil, rewrapped, fmt.Errorf("rewrapping %s: %w: it changes all the time; try again", describe(ref.Cluster, ref.Name), ErrConflict)
}

// caughtUp notes that what another host wrote has been opened here, and returns the item as the record knows it then: nil
// where it has changed meanwhile.
func (k *Keeper) caughtUp(ctx context.Context, i *item, payload []byte, by string) (*item, error) {
	fields, err := decodeFields(payload)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", describe(i.cluster, i.name), err)
	}
	fields.Wipe()
	k.catchUp(ctx, i, fields.Names(), by)
	now, err := k.look(ctx, i.cluster, i.name, "")
	if err != nil || now.state != StateCurrent || now.entry.Revision != i.entry.Revision {
		return nil, err
	}
	return now, nil
}

// outdated tells whether an envelope is not sealed to exactly the recipients of its key's newest version.
func (k *Keeper) outdated(ctx context.Context, i *item) (bool, error) {
	key, err := k.keys.Get(ctx, i.claimed.Key)
	if err != nil {
		return false, fmt.Errorf("looking at %s: %w", describe(i.cluster, i.name), err)
	}
	if i.claimed.Version != key.LatestVersion || len(key.Versions) == 0 {
		return true, nil
	}
	recipients := i.envelope.Recipients()
	newest := key.Versions[len(key.Versions)-1]
	for _, recipient := range recipients {
		if !slices.ContainsFunc(newest.Recipients, func(r keyring.Recipient) bool { return r.KID == recipient.KID }) {
			return true, nil
		}
	}
	return len(recipients) != len(newest.Recipients), nil
}
