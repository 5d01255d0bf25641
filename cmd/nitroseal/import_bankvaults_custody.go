package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/bankvaults"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// takeOver takes the material into custody unless it is there already, opens what is stored, and compares. Where old objects
// are to be deleted afterwards, the running Vault must have proved all keys.
func (m *bankVaultsMove) takeOver(ctx context.Context, a *app, c *cluster.Cluster, material *bankvaults.Material, view *bankVaultsView) error {
	custodian, err := a.custodian()
	if err != nil {
		return err
	}
	kept, err := a.keeps(ctx, c, material)
	if err != nil && (!m.replace || ctx.Err() != nil) { // what is replaced need not open any more
		return err
	}
	if kept, err = m.withoutShares(ctx, custodian, c, material, kept); err != nil {
		return err
	}
	view.Already = kept
	all := false
	if !kept {
		if all, err = m.importProved(ctx, a, custodian, c, material, view); err != nil {
			return err
		}
	}
	switch {
	case m.deleteOld && !all:
		return m.proveForDeletion(ctx, custodian, c, material, view)
	case view.Proved && !all:
		view.Warnings = append(view.Warnings, "The Vault was not asked about every key, but about as many as its threshold. --delete-old asks about all of them.")
	}
	return nil
}

// importProved imports the material and tells whether the running Vault has proved every key of it.
func (m *bankVaultsMove) importProved(ctx context.Context, a *app, custodian *cluster.Custodian, c *cluster.Cluster,
	material *bankvaults.Material, view *bankVaultsView,
) (all bool, _ error) {
	others, err := proveOthers(ctx, custodian, c, material)
	if err != nil {
		return false, fmt.Errorf("nothing was stored: %w", err)
	}
	if err := m.importInto(ctx, a, custodian, c, material, view); err != nil {
		return false, err
	}
	if view.Proved && !others { // by unsealing a node, which can be asked about the others now
		if others, err = proveOthers(ctx, custodian, c, material); err != nil {
			return false, fmt.Errorf("the keys are in custody, enough of them to unseal cluster %q, and \"nitroseal rekey %s\" makes all of them anew; this "+
				"is wrong with them: %w", c.Name, c.Name, err)
		}
	}
	return view.Proved && others, nil
}

// proveForDeletion has the running Vault prove the keys that are in custody, and every one whose object would be deleted.
func (m *bankVaultsMove) proveForDeletion(ctx context.Context, custodian *cluster.Custodian, c *cluster.Cluster, material *bankvaults.Material,
	view *bankVaultsView,
) error {
	found, err := custodian.Verify(ctx, c, cluster.VerifyOptions{By: by(), Prove: true})
	if err != nil {
		return err
	}
	if found.Proved {
		found.Proved, err = proveOthers(ctx, custodian, c, material)
	}
	if err != nil {
		return fmt.Errorf("nothing was deleted: %w", err)
	}
	if !found.Proved {
		return fmt.Errorf("%w: the keys of cluster %q are in custody, and the running Vault has not proved them, so nothing was deleted; run it again "+
			"when that is so: %s", hsm.ErrUnavailable, c.Name, strings.Join(found.Problems, " "))
	}
	view.Proved, view.Warnings = true, append(view.Warnings, found.Problems...)
	return nil
}

// withoutShares decides what an import without any share is: one that was done before where the cluster's keys are in custody,
// and none otherwise.
func (m *bankVaultsMove) withoutShares(ctx context.Context, custodian *cluster.Custodian, c *cluster.Cluster, material *bankvaults.Material,
	kept bool,
) (bool, error) {
	if len(material.Shares)+len(material.RecoveryShares) > 0 {
		return kept, nil
	}
	found, err := custodian.Verify(ctx, c, cluster.VerifyOptions{By: by()})
	switch {
	case err != nil:
		return false, err
	case found.Kind == "":
		return false, fmt.Errorf("cluster %q: %w: there is no unseal key and no recovery key among the values", c.Name, bankvaults.ErrNothing)
	case !kept:
		return false, fmt.Errorf("cluster %q: its keys are in custody and this root token is not: store it with \"nitroseal material put\", or leave it out "+
			"with --without vault-root", c.Name)
	}
	return true, nil
}

// proveOthers asks the running Vault about all shares beyond the threshold: about the first ones it is asked when they are
// imported, or verified. It tells whether it could; fewer than the threshold are what a deletion that was cut off has left.
func proveOthers(ctx context.Context, custodian *cluster.Custodian, c *cluster.Cluster, material *bankvaults.Material) (all bool, _ error) {
	kind, shares := cluster.KindUnseal, material.Shares
	if len(shares) == 0 {
		kind, shares = cluster.KindRecovery, material.RecoveryShares
	}
	threshold := 0
	for _, address := range c.Nodes {
		if st, err := custodian.Look(ctx, c, address); err == nil && st.Err == nil && st.Seal.Initialized && !st.Seal.Sealed {
			threshold = st.Seal.T
			break
		}
	}
	if threshold == 0 {
		return false, nil
	}
	for start := threshold; start < len(shares); start += threshold {
		some := shares[min(start, len(shares)-threshold):]
		err := custodian.Prove(ctx, c, kind, bankvaults.Values(some), by())
		switch {
		case errors.Is(err, node.ErrUnavailable):
			return false, nil
		case errors.Is(err, cluster.ErrWrongShares):
			return false, fmt.Errorf("one of the %d %s keys from number %d on is not the cluster's, or an earlier one; leave it out with --without: %w",
				threshold, kind, some[0].Index, err)
		case err != nil:
			return false, err
		}
	}
	return true, nil
}

// importInto imports the material. An import that had been cut off is finished first, and may be this one.
func (m *bankVaultsMove) importInto(ctx context.Context, a *app, custodian *cluster.Custodian, c *cluster.Cluster, material *bankvaults.Material,
	view *bankVaultsView,
) error {
	for {
		result, err := custodian.Import(ctx, c, cluster.ImportRequest{
			By: by(), Shares: bankvaults.Values(material.Shares), RecoveryShares: bankvaults.Values(material.RecoveryShares),
			RootToken: material.RootToken, Replace: m.replace, Unproved: m.unproved,
		})
		if err != nil {
			return err
		}
		view.Proved, view.Warnings = result.Proved, append(view.Warnings, result.Warnings...)
		kept, err := a.keeps(ctx, c, material)
		switch {
		case err != nil:
			return fmt.Errorf("reading back what was stored: %w", err)
		case kept:
			return nil
		case !result.Finished:
			return fmt.Errorf("cluster %q: what was stored reads back as something else; nothing that Bank-Vaults left was deleted", c.Name)
		}
	}
}

// keeps opens what is in custody of a cluster and tells whether all of the material is among it. More may be: a deletion that
// was cut off has left a part of what was imported.
func (a *app) keeps(ctx context.Context, c *cluster.Cluster, material *bankvaults.Material) (bool, error) {
	keeper, err := a.keeper()
	if err != nil {
		return false, err
	}
	items := map[string][][]byte{
		string(cluster.KindUnseal): bankvaults.Values(material.Shares), string(cluster.KindRecovery): bankvaults.Values(material.RecoveryShares),
	}
	if material.RootToken != nil && keepsRoot(c) {
		items["root"] = [][]byte{material.RootToken}
	}
	for kind, values := range items {
		if len(values) == 0 {
			continue
		}
		kept, err := openKept(ctx, keeper, c, kind)
		if err != nil {
			return false, err
		}
		all := !slices.ContainsFunc(values, func(value []byte) bool {
			return !slices.ContainsFunc(kept, func(k []byte) bool { return bytes.Equal(k, value) })
		})
		for _, value := range kept {
			clear(value)
		}
		if !all {
			return false, nil
		}
	}
	return true, nil
}

// openKept returns the values of all items of a kind, of each of a spread. The caller wipes them.
func openKept(ctx context.Context, keeper *custody.Keeper, c *cluster.Cluster, kind string) (values [][]byte, err error) {
	names := []string{kind}
	if c.Spread != nil && kind != "root" {
		names = nil
		for _, key := range c.Spread.Keys {
			names = append(names, kind+"."+key)
		}
	}
	for _, name := range names {
		fields, _, err := keeper.Open(ctx, c.Name, name, custody.ReadOptions{Store: c.Store, By: by()})
		if errors.Is(err, custody.ErrNotFound) {
			continue
		}
		if err != nil {
			for _, value := range values {
				clear(value)
			}
			return nil, err
		}
		for _, value := range fields {
			values = append(values, value)
		}
	}
	return values, nil
}

// nothing is the end of a run that found nothing to import: a good one where the cluster's keys are in custody, because an
// earlier run imported them.
func (m *bankVaultsMove) nothing(ctx context.Context, a *app, c *cluster.Cluster, none error) error {
	custodian, err := a.custodian()
	if err != nil {
		return err
	}
	found, err := custodian.Verify(ctx, c, cluster.VerifyOptions{By: by()})
	if err != nil {
		return errors.Join(none, err)
	}
	if found.Kind == "" {
		return fmt.Errorf("device %q: %w", m.device, none)
	}
	view := newBankVaultsView(c.Name, nil)
	view.Already = true
	view.Warnings = found.Problems
	return a.print(view, view.rows)
}
