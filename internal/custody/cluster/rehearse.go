package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// ready returns nil where the wrapping keys may seal a cluster: each is ready for it, and of a spread no two share an HSM.
func (k *Custodian) ready(ctx context.Context, c *Cluster) error {
	places := map[string]string{} // by HSM, the key that has a recipient there
	for _, name := range c.keys() {
		if err := k.keyring.Ready(ctx, name, keyring.PurposeCluster); err != nil {
			return fmt.Errorf("cluster %q: %w", c.Name, err)
		}
		if c.Spread == nil {
			continue
		}
		key, err := k.keyring.Get(ctx, name)
		if err != nil {
			return fmt.Errorf("cluster %q: %w", c.Name, err)
		}
		for _, recipient := range key.Versions[len(key.Versions)-1].Recipients {
			place := recipient.Serial
			if place == "" {
				place = "device " + recipient.Device
			}
			if other, taken := places[place]; taken && other != name {
				return fmt.Errorf("cluster %q: %w", c.Name, invalid("the spread %q: its keys %q and %q both open on the HSM of device %q, which would count "+
					"twice; take keys on different HSMs", c.Spread, other, name, recipient.Device))
			}
			places[place] = name
		}
	}
	return nil
}

// Sizes of what initialising stores, roughly and never too little, in bytes.
const (
	shareSize   = 128  // with the name of its field
	messageSize = 2048 // a share encrypted to a person
	factsSize   = 2048
)

// rehearse does with a secret of no value what will be done with the keys, before there are any (promise 2): it is written to
// the local disk, and sealed, stored, read back, opened by each wrapping key and deleted. Room is taken for two sets, as a
// rekey will need. Each key costs one operation of an HSM.
func (k *Custodian) rehearse(ctx context.Context, c *Cluster, kind Kind) error {
	shares, _ := c.sizes(kind)
	secret := make([]byte, 2*(shares*shareSize+len(c.People)*messageSize)+factsSize)
	_, _ = rand.Read(secret) // never fails, says its documentation
	if err := k.rehearseLocal(ctx, c, secret); err != nil {
		return fmt.Errorf("rehearsing the initialisation of cluster %q on the local disk: %w", c.Name, err)
	}
	for i, key := range c.keys() {
		if err := k.rehearseItem(ctx, c, key, i, secret); err != nil {
			return fmt.Errorf("rehearsing the initialisation of cluster %q with key %q and store %q: %w", c.Name, key, c.Store, err)
		}
	}
	return nil
}

// errReadBack: what was read back is not what was written.
var errReadBack = fmt.Errorf("something else was read back than was written: %w", store.ErrCorrupt)

// rehearsalName is where a rehearsal writes on the local disk.
func rehearsalName(c *Cluster) string { return "rehearsal/" + c.Name }

// clearRehearsal removes what a rehearsal of this host left that was cut off, where no other one follows.
func (k *Custodian) clearRehearsal(ctx context.Context, c *Cluster) error {
	left, err := k.local.Get(ctx, rehearsalName(c))
	if err == nil {
		err = k.local.Delete(ctx, rehearsalName(c), left.Revision)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	for i := range c.keys() {
		name, err := k.rehearsalItem(ctx, i)
		if err == nil {
			err = k.dropRehearsal(ctx, c, name)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (k *Custodian) rehearseLocal(ctx context.Context, c *Cluster, secret []byte) error {
	name := rehearsalName(c)
	left, err := k.local.Get(ctx, name) // by a rehearsal that was cut off
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	if _, err := k.local.Put(ctx, name, secret, left.Revision); err != nil {
		return err
	}
	now, err := k.local.Get(ctx, name)
	if err == nil && !bytes.Equal(now.Value, secret) {
		err = errReadBack
	}
	if err != nil {
		return err
	}
	return k.local.Delete(ctx, name, now.Revision)
}

// rehearsalItem is the item of a rehearsal: each host has its own.
func (k *Custodian) rehearsalItem(ctx context.Context, key int) (string, error) {
	id, err := k.hostID(ctx)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(id))
	return fmt.Sprintf("rehearsal.%s.%d", hex.EncodeToString(sum[:4]), key), nil
}

func (k *Custodian) rehearseItem(ctx context.Context, c *Cluster, key string, index int, secret []byte) error {
	name, err := k.rehearsalItem(ctx, index)
	if err != nil {
		return err
	}
	if err := k.dropRehearsal(ctx, c, name); err != nil { // by one that was cut off
		return err
	}
	fields := custody.Fields{"rehearsal": secret}
	if _, err := k.keeper.Put(ctx, c.Name, name, fields, custody.PutOptions{Key: key, Store: c.Store, By: k.host}); err != nil {
		return err
	}
	back, _, err := k.keeper.Open(ctx, c.Name, name, custody.ReadOptions{Store: c.Store, By: k.host})
	if err != nil {
		return err
	}
	if !bytes.Equal(back["rehearsal"], secret) {
		return errReadBack
	}
	return k.dropRehearsal(ctx, c, name)
}

// dropRehearsal deletes the item of a rehearsal. One that is not there is fine.
func (k *Custodian) dropRehearsal(ctx context.Context, c *Cluster, name string) error {
	metadata, err := k.keeper.Get(ctx, c.Name, name, custody.ReadOptions{Store: c.Store})
	if errors.Is(err, custody.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	options := custody.DeleteOptions{Store: c.Store, By: k.host}
	if metadata.State == custody.StateUnrecorded {
		options.CAS = &metadata.Generation
	}
	err = k.keeper.Delete(ctx, c.Name, name, options)
	if errors.Is(err, custody.ErrNotFound) {
		return nil
	}
	return err
}
