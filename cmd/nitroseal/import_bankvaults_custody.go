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
)

// takeOver takes the material into custody unless it is there already, opens what is stored, and compares. Where old objects
// are to be deleted afterwards, the running Vault must have proved the keys.
func (m *bankVaultsMove) takeOver(ctx context.Context, a *app, c *cluster.Cluster, material *bankvaults.Material, view *bankVaultsView) error {
	custodian, err := a.custodian()
	if err != nil {
		return err
	}
	kept, err := a.keeps(ctx, c, material)
	if err != nil && (!m.replace || ctx.Err() != nil) { // what is replaced need not open any more
		return err
	}
	view.Already = kept
	if !kept {
		if err := m.importInto(ctx, a, custodian, c, material, view); err != nil {
			return err
		}
	}
	if !m.deleteOld || view.Proved {
		return nil
	}
	found, err := custodian.Verify(ctx, c, cluster.VerifyOptions{By: by(), Prove: true})
	if err != nil {
		return err
	}
	if !found.Proved {
		return fmt.Errorf("%w: the keys of cluster %q are in custody, and the running Vault has not proved them, so nothing was deleted; run it again "+
			"when that is so: %s", hsm.ErrUnavailable, c.Name, strings.Join(found.Problems, " "))
	}
	view.Proved, view.Warnings = true, append(view.Warnings, found.Problems...)
	return nil
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

// keeps opens what is in custody of a cluster and tells whether all of the material is among it.
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
