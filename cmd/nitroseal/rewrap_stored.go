package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

// rewrapTimeout is how long sealing everything anew may take: a card needs most of a second for each envelope.
const rewrapTimeout = time.Hour

// storedRewrap says what of the stores is sealed anew.
type storedRewrap struct {
	wanted   bool
	clusters []string
	key      string
}

func (s *storedRewrap) add(cmd *cobra.Command, a *app) {
	cmd.Flags().BoolVar(&s.wanted, "stored", false, "seal anew what is in custody, in the stores and on the local disk")
	cmd.Flags().StringArrayVar(&s.clusters, "cluster", nil, "with --stored: only what is kept of this cluster; may be given several times")
	cmd.Flags().StringVar(&s.key, "key", "", "with --stored: only what belongs under this wrapping key")
	_ = cmd.RegisterFlagCompletionFunc("cluster", a.completeCluster)
	_ = cmd.RegisterFlagCompletionFunc("key", func(cmd *cobra.Command, _ []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return a.completeKeys(cmd, nil, begun)
	})
	cmd.MarkFlagsMutuallyExclusive("cluster", "key")
	for _, other := range []string{"in", "out", "context"} {
		cmd.MarkFlagsMutuallyExclusive("stored", other)
	}
}

// arguments wants KEY where an envelope is given, and none with --stored.
func (s *storedRewrap) arguments(cmd *cobra.Command, args []string) error {
	switch {
	case !s.wanted && (s.clusters != nil || s.key != ""):
		return usage("--cluster and --key say what of the stores is sealed anew; give --stored as well")
	case !s.wanted:
		return arguments("KEY")(cmd, args)
	case len(args) > 0:
		return usage("%s --stored takes no KEY as an argument; --key names one", cmd.CommandPath())
	}
	return nil
}

// rewrappedView is one envelope that is as it was or was sealed anew, as JSON.
type rewrappedView struct {
	Cluster   string `json:"cluster"`
	Item      string `json:"item"`
	Key       string `json:"key"`
	Rewrapped bool   `json:"rewrapped"`
	Error     string `json:"error"`
}

// rewrapView is what sealing anew has done, as JSON.
type rewrapView struct {
	Envelopes int             `json:"envelopes"` // looked at
	Rewrapped int             `json:"rewrapped"`
	SingleHSM int             `json:"single_hsm"` // open on one HSM only
	Failed    []rewrappedView `json:"failed"`
	Warnings  []string        `json:"warnings"`

	errs []error
}

// step counts an envelope and tells a waiting person.
func (v *rewrapView) step(a *app, done, all int, ref custody.Ref, key string, rewrapped bool, err error) {
	v.Envelopes++
	outcome := "is as it should be"
	switch {
	case err != nil:
		outcome = "FAILED: " + err.Error()
		v.Failed = append(v.Failed, rewrappedView{ref.Cluster, ref.Name, key, rewrapped, err.Error()})
		v.errs = append(v.errs, err)
	case rewrapped:
		outcome = "sealed anew"
		v.Rewrapped++
	}
	a.progress("%d of %d: %s/%s %s", done, all, ref.Cluster, ref.Name, outcome)
}

// rewrapStored seals anew what is in custody: of the clusters of the configuration, whose key may have changed as well, and what
// else there is.
func (a *app) rewrapStored(ctx context.Context, s *storedRewrap) error {
	c, err := a.config()
	if err != nil {
		return err
	}
	view := &rewrapView{Failed: []rewrappedView{}, Warnings: []string{}}
	ctx, cancel := a.within(ctx, rewrapTimeout)
	defer cancel()
	if s.key != "" { // a mistyped one would find nothing to do, and say that all is well
		keys, err := a.keyring()
		if err != nil {
			return err
		}
		if _, err := keys.Get(ctx, s.key); err != nil {
			return err
		}
	}
	err = a.rewrapClusters(ctx, c, s, view)
	if err == nil && len(s.clusters) == 0 {
		err = a.rewrapOthers(ctx, c, s, view)
	}
	printing := a.print(view, view.rows)
	return errors.Join(append([]error{err, printing}, view.errs...)...)
}

// rewrapClusters seals anew what is kept of clusters of the configuration.
func (a *app) rewrapClusters(ctx context.Context, c *config.Config, s *storedRewrap, view *rewrapView) error {
	if len(c.Clusters) == 0 && len(s.clusters) == 0 {
		return nil
	}
	clusters, err := a.clusters(s.clusters)
	if err != nil {
		return err
	}
	if s.key != "" {
		clusters = slices.DeleteFunc(clusters, func(c *cluster.Cluster) bool {
			return c.Key != s.key && (c.Spread == nil || !slices.Contains(c.Spread.Keys, s.key))
		})
	}
	custodian, err := a.custodian()
	if err != nil {
		return err
	}
	result, err := custodian.Rewrap(ctx, clusters, cluster.RewrapOptions{By: by(), Progress: func(step cluster.RewrapStep) {
		view.step(a, step.Done, step.All, custody.Ref{Cluster: step.Cluster, Name: step.Item}, step.Key, step.Rewrapped, step.Err)
	}})
	view.SingleHSM += result.SingleHSM
	view.Warnings = append(view.Warnings, result.Warnings...)
	return err
}

// rewrapOthers seals anew what is kept of clusters that the configuration does not have, each item under the key that it has.
func (a *app) rewrapOthers(ctx context.Context, c *config.Config, s *storedRewrap, view *rewrapView) error {
	found, warnings, err := a.findMaterial(ctx, "")
	if err != nil {
		return err
	}
	for _, warning := range warnings {
		if !slices.Contains(view.Warnings, warning) {
			view.Warnings = append(view.Warnings, warning)
		}
	}
	found = slices.DeleteFunc(found, func(item foundItem) bool {
		_, configured := c.Cluster(item.Cluster)
		return configured
	})
	for i, item := range found {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("rewrapping: stopped after %d of %d envelopes: %w; run it again to go on", i, len(found), err)
		}
		described, err := item.keeper.Get(ctx, item.Cluster, item.Name, custody.ReadOptions{Store: item.store})
		if errors.Is(err, custody.ErrNotFound) || err == nil && s.key != "" && described.Key != s.key {
			continue
		}
		rewrapped := false
		if err == nil {
			rewrapped, err = a.rewrapItem(ctx, item, described)
		}
		if rewrapped {
			described, _ = item.keeper.Get(ctx, item.Cluster, item.Name, custody.ReadOptions{Store: item.store}) // how it is now
		}
		if described.HSMs == 1 {
			view.SingleHSM++
		}
		view.step(a, i+1, len(found), item.Ref, described.Key, rewrapped, err)
	}
	return nil
}

// rewrapItem seals an item anew where it is not sealed to exactly the recipients of the newest version of its key.
func (a *app) rewrapItem(ctx context.Context, item foundItem, described custody.Metadata) (rewrapped bool, err error) {
	keys, err := a.keyring()
	if err != nil {
		return false, err
	}
	key, err := keys.Get(ctx, described.Key)
	if err != nil {
		return false, fmt.Errorf("rewrapping material %q of cluster %q: %w", item.Name, item.Cluster, err)
	}
	var newest []string
	for _, r := range key.Versions[len(key.Versions)-1].Recipients {
		newest = append(newest, r.KID)
	}
	have := slices.Clone(described.KIDs)
	slices.Sort(newest)
	slices.Sort(have)
	if described.Version == key.LatestVersion && slices.Equal(have, newest) {
		return false, nil
	}
	err = a.audited(ctx, "rewrap", item.Cluster, item.Name, func() error {
		fields, opened, err := item.keeper.Open(ctx, item.Cluster, item.Name, custody.ReadOptions{Store: item.store, By: by()})
		if err != nil {
			return explain(err, item.Cluster, item.Name)
		}
		defer fields.Wipe()
		_, err = item.keeper.Put(ctx, item.Cluster, item.Name, fields,
			custody.PutOptions{Key: described.Key, Store: described.Store, CAS: &opened.Generation, By: by()})
		return err
	})
	return err == nil, err
}

func (v *rewrapView) rows(t *table) {
	t.row("envelopes", v.Envelopes)
	t.row("sealed anew", v.Rewrapped)
	t.row("open on one HSM only", v.SingleHSM)
	t.row("failed", len(v.Failed))
	for _, f := range v.Failed {
		t.row("  "+f.Cluster+"/"+f.Item, fmt.Sprintf("key %s: %s", f.Key, f.Error))
	}
	for _, warning := range v.Warnings {
		t.row("warning", warning)
	}
}
