package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// RewrapOptions say what is looked at.
type RewrapOptions struct {
	By string
	// Progress is told of each envelope after it was looked at; nil for nobody.
	Progress func(RewrapStep)
}

// RewrapStep is one envelope that was looked at.
type RewrapStep struct {
	Done, All int    // envelopes looked at, and to be looked at
	Cluster   string // that it is of
	Item      string // its name; "held/…" for one that waits on the local disk
	Key       string // that it is sealed with now
	Rewrapped bool
	Err       error // why it is as it was; nil where nothing was due
}

// RewrapResult is what [Custodian.Rewrap] has done.
type RewrapResult struct {
	Envelopes int // looked at
	Rewrapped int
	SingleHSM int // of those in stores, that open on one HSM only
	Failed    []RewrapStep
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// Rewrap seals what is in custody of these clusters anew, to all recipients of the newest version of its wrapping key, where
// it is not yet: in the store and on the local disk, cluster by cluster and item by item in the order of their names. Each one
// costs one private-key operation. What fails is passed over and reported. It may be stopped at any point and begun again, and
// goes on with what is left. Which wrapping key has which shares of a spread stays as it is: changing that is a rekey's.
func (k *Custodian) Rewrap(ctx context.Context, clusters []*Cluster, options RewrapOptions) (RewrapResult, error) {
	r := &rewrapping{k: k, options: options}
	for _, c := range clusters {
		if err := c.Check(); err != nil {
			return RewrapResult{}, err
		}
		if err := r.plan(ctx, c); err != nil {
			return r.result, err
		}
	}
	for i, due := range r.due {
		if err := ctx.Err(); err != nil {
			return r.result, fmt.Errorf("rewrapping: stopped after %d of %d envelopes: %w; run it again to go on", i, len(r.due), err)
		}
		step := RewrapStep{Done: i + 1, All: len(r.due), Cluster: due.c.Name, Item: due.name}
		step.Key, step.Rewrapped, step.Err = due.rewrap(ctx)
		r.result.Envelopes++
		if step.Rewrapped {
			r.result.Rewrapped++
		}
		if step.Err != nil {
			r.result.Failed = append(r.result.Failed, step)
		}
		if options.Progress != nil {
			options.Progress(step)
		}
	}
	return r.result, nil
}

// rewrapping is one call of Rewrap.
type rewrapping struct {
	k       *Custodian
	options RewrapOptions
	due     []rewrapItem
	result  RewrapResult
}

// rewrapItem is an envelope to be looked at.
type rewrapItem struct {
	c      *Cluster
	name   string
	rewrap func(ctx context.Context) (key string, rewrapped bool, err error)
}

// plan lists the envelopes of a cluster.
func (r *rewrapping) plan(ctx context.Context, c *Cluster) error {
	refs, warnings, err := r.k.keeper.List(ctx, c.Name)
	if err != nil {
		return err
	}
	r.result.Warnings = append(r.result.Warnings, warnings...)
	wanted := map[string]string{itemRoot: c.keys()[0]} // the configuration's wrapping key, by item
	for _, kind := range []Kind{KindUnseal, KindRecovery} {
		for _, key := range c.keys() {
			wanted[c.item(kind, key)] = key
		}
	}
	for _, ref := range refs {
		if _, isKeys := kindOfItem(ref.Name); isKeys && wanted[ref.Name] == "" {
			r.result.Warnings = append(r.result.Warnings, fmt.Sprintf("Cluster %q: %q belongs to another key or spread than the configuration names, and was "+
				"rewrapped where it is: `nitroseal rekey %s` deals the shares anew, to %s.", c.Name, ref.Name, c.Name, strings.Join(c.keys(), ", ")))
		}
		r.due = append(r.due, rewrapItem{c, ref.Name, func(ctx context.Context) (string, bool, error) {
			return r.stored(ctx, c, ref.Name, wanted[ref.Name])
		}})
	}
	return r.planLocal(ctx, c)
}

// planLocal lists what waits on the local disk.
func (r *rewrapping) planLocal(ctx context.Context, c *Cluster) error {
	held, err := r.k.heldItems(ctx, c)
	if err != nil {
		return err
	}
	for _, item := range held {
		path := heldPrefix(c.Name) + item
		r.due = append(r.due, rewrapItem{c, "held/" + item, func(ctx context.Context) (string, bool, error) {
			return r.local(ctx, c, path, heldContext(c.Name, item))
		}})
	}
	r.due = append(r.due, rewrapItem{c, "held/token", func(ctx context.Context) (string, bool, error) {
		return r.local(ctx, c, leftTokenPath(c), leftTokenContext(c))
	}})
	// An import is finished before anything else, and then sealed as it should be.
	if left, err := r.k.ImportLeft(ctx, c); err != nil {
		return err
	} else if left {
		r.result.Warnings = append(r.result.Warnings, fmt.Sprintf("Cluster %q: an import was cut off and is still sealed as it was; `nitroseal import %s` "+
			"finishes it.", c.Name, c.Name))
	}
	if _, err := r.k.local.Get(ctx, leftTokenPath(c)); errors.Is(err, store.ErrNotFound) {
		r.due = r.due[:len(r.due)-1]
	}
	return nil
}

// maxRewraps is how often an item is tried that others write at the same time.
const maxRewraps = 4

// stored rewraps an item of the store. wanted is the wrapping key that the configuration names for it, "" for the one it has.
func (r *rewrapping) stored(ctx context.Context, c *Cluster, name, wanted string) (key string, rewrapped bool, err error) {
	for range maxRewraps {
		metadata, err := r.k.keeper.Get(ctx, c.Name, name, custody.ReadOptions{Store: c.Store, By: r.options.By})
		if errors.Is(err, custody.ErrNotFound) {
			return "", rewrapped, nil // it was deleted meanwhile
		}
		if err != nil {
			return "", rewrapped, err
		}
		key := metadata.Key
		if wanted != "" {
			key = wanted
		}
		due, err := r.outdated(ctx, metadata, key)
		if err != nil {
			return key, rewrapped, err
		}
		if !due {
			if metadata.HSMs == 1 {
				r.result.SingleHSM++
			}
			return key, rewrapped, nil
		}
		// What opens a cluster goes to no version of a key that it would not have been begun with.
		if IsItem(name) {
			if err := r.k.keyring.Ready(ctx, key, keyring.PurposeCluster); err != nil {
				return key, rewrapped, fmt.Errorf("rewrapping %q of cluster %q, which stays as it is: %w", name, c.Name, err)
			}
		}
		err = r.anew(ctx, c, name, key)
		if err != nil && !errors.Is(err, custody.ErrConflict) {
			return key, rewrapped, err
		}
		rewrapped = rewrapped || err == nil // the next look tells how it is now
	}
	return "", rewrapped, fmt.Errorf("rewrapping %q of cluster %q: %w: it changes all the time; try again", name, c.Name, custody.ErrConflict)
}

// outdated tells whether an envelope is not sealed to exactly the recipients of the newest version of a key.
func (r *rewrapping) outdated(ctx context.Context, metadata custody.Metadata, key string) (bool, error) {
	described, err := r.k.keyring.Get(ctx, key)
	if err != nil {
		return false, fmt.Errorf("looking at %q of cluster %q: %w", metadata.Name, metadata.Cluster, err)
	}
	if metadata.Key != key || metadata.Version != described.LatestVersion || len(described.Versions) == 0 {
		return true, nil
	}
	newest := described.Versions[len(described.Versions)-1].Recipients
	if len(metadata.KIDs) != len(newest) {
		return true, nil
	}
	for _, recipient := range newest {
		if !slices.Contains(metadata.KIDs, recipient.KID) {
			return true, nil
		}
	}
	return false, nil
}

// anew opens an item and writes it as it is, in a new envelope.
func (r *rewrapping) anew(ctx context.Context, c *Cluster, name, key string) (err error) {
	end, err := r.k.act(ctx, "rewrap", c, "", r.options.By, map[string]string{"item": name, "key": key})
	if err != nil {
		return err
	}
	defer func() { end(err) }()
	fields, metadata, err := r.k.keeper.Open(ctx, c.Name, name, custody.ReadOptions{Store: c.Store, By: r.options.By})
	if err != nil {
		return err
	}
	defer fields.Wipe()
	_, err = r.k.keeper.Put(ctx, c.Name, name, fields, custody.PutOptions{Key: key, Store: c.Store, CAS: &metadata.Generation, By: r.options.By})
	return err
}

// local rewraps an envelope on the local disk, with the wrapping key that it has.
func (r *rewrapping) local(ctx context.Context, c *Cluster, path string, made envelope.Context) (key string, rewrapped bool, err error) {
	unlock, err := r.k.lock(ctx, c)
	if err != nil {
		return "", false, err
	}
	defer unlock()
	entry, err := r.k.local.Get(ctx, path)
	if errors.Is(err, store.ErrNotFound) {
		return "", false, nil // it was stored meanwhile
	}
	if err != nil {
		return "", false, fmt.Errorf("rewrapping %q on the local disk: %w", path, err)
	}
	parsed, err := envelope.Parse(entry.Value)
	if err != nil {
		return "", false, fmt.Errorf("rewrapping %q on the local disk: %w", path, err)
	}
	claimed := custody.Metadata{Cluster: c.Name, Name: path, Key: parsed.Context().Key, Version: parsed.Context().Version}
	for _, recipient := range parsed.Recipients() {
		claimed.KIDs = append(claimed.KIDs, recipient.KID)
	}
	key = claimed.Key
	due, err := r.outdated(ctx, claimed, key)
	if err != nil || !due {
		return key, false, err
	}
	if err := r.k.keyring.Ready(ctx, key, keyring.PurposeCluster); err != nil {
		return key, false, fmt.Errorf("rewrapping %q on the local disk, which stays as it is: %w", path, err)
	}
	opened, err := r.k.keyring.Open(ctx, key, entry.Value, made)
	if err != nil {
		return key, false, fmt.Errorf("rewrapping %q on the local disk: %w", path, err)
	}
	defer clear(opened.Payload)
	anew, err := r.k.keyring.Seal(ctx, key, made, opened.Payload)
	if err != nil {
		return key, false, fmt.Errorf("rewrapping %q on the local disk: %w", path, err)
	}
	if _, err := r.k.local.Put(ctx, path, anew.Envelope, entry.Revision); err != nil {
		return key, false, fmt.Errorf("rewrapping %q on the local disk: %w", path, err)
	}
	return key, true, nil
}
