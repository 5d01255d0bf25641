package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

// rekeyTimeout is how long new keys may take: a few operations of an HSM, and a few dozen calls of Vault.
const rekeyTimeout = 5 * time.Minute

func newRekeyCommand(a *app) *cobra.Command {
	var options cluster.RekeyOptions
	messages := messageFolder{}
	cmd := &cobra.Command{
		Use:   "rekey CLUSTER",
		Short: "Give a cluster new unseal keys, or recovery keys, under the HSM",
		Long: `Have Vault make new unseal keys (recovery keys where the cluster unseals itself), store them sealed beside the old ones, have Vault verify
that they are kept, and drop the old ones. Vault takes the new keys only after that, so nothing is lost wherever it is cut off: the next
run finishes or undoes what was begun, and says which.

The shares are dealt as the configuration says today: to its wrapping key or spread, and to its persons, whose shares come out as OpenPGP
messages. The HSM has to hold at least as many shares as the threshold, before and after. Where Vault has a rekey under way that was not begun
here, it is reported and left as it is; --cancel ends it, and makes no new keys.`,
		Example: `  nitroseal rekey prod
  nitroseal rekey prod --shares 7 --threshold 4 --shares-dir ./shares`,
		Args: arguments("CLUSTER"), ValidArgsFunction: a.completeCluster,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.cluster(args[0])
			if err != nil {
				return err
			}
			if options.Cancel && (options.Shares > 0 || options.Threshold > 0) {
				return usage("--cancel makes no new keys; leave --shares and --threshold out")
			}
			if err := messages.check(c); err != nil {
				return err
			}
			custodian, err := a.custodian()
			if err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), rekeyTimeout)
			defer cancel()
			options.By = by()
			result, err := custodian.Rekey(ctx, c, options)
			if err != nil {
				return err
			}
			return a.showRekey(c, &result, &messages)
		},
	}
	cmd.Flags().IntVar(&options.Shares, "shares", 0, "how many shares the new keys have (default: as many as before)")
	cmd.Flags().IntVar(&options.Threshold, "threshold", 0, "how many of them are needed (default: as many as before)")
	cmd.Flags().BoolVar(&options.Cancel, "cancel", false, "end a rekey that is under way, whoever began it, and make no new keys")
	cmd.Flags().StringVar(&messages.dir, "shares-dir", "", "folder for the messages to persons, a file for each (default: they are printed)")
	_ = cmd.MarkFlagDirname("shares-dir")
	return cmd
}

// rekeyView is a rekey as JSON.
type rekeyView struct {
	Cluster   string       `json:"cluster"`
	Kind      string       `json:"kind"`    // unseal or recovery
	Outcome   string       `json:"outcome"` // renewed, finished, cancelled, undone, unchanged
	Node      string       `json:"node"`
	Shares    int          `json:"shares"` // as they are now
	Threshold int          `json:"threshold"`
	Items     []string     `json:"items"`
	Redealt   bool         `json:"redealt"` // the wrapping keys are other ones than before
	People    []personView `json:"people"`
	Warnings  []string     `json:"warnings"`
}

// rekeySentences say what came of a rekey.
var rekeySentences = map[string]string{
	"renewed":   "has new keys, and Vault takes them",
	"finished":  "has new keys: a rekey that was cut off is finished",
	"cancelled": "has its keys as before: the rekey that was under way is ended",
	"undone":    "has its keys as before: a rekey that was cut off is undone",
	"unchanged": "has its keys as before: no rekey was under way",
}

func rekeyOutcome(result *cluster.RekeyResult, cancelled bool) string {
	switch {
	case result.Finished:
		return "finished"
	case !cancelled:
		return "renewed"
	case result.Cancelled:
		return "cancelled"
	case result.Dropped:
		return "undone"
	}
	return "unchanged"
}

func (a *app) showRekey(c *cluster.Cluster, result *cluster.RekeyResult, messages *messageFolder) error {
	view := rekeyView{
		Cluster: c.Name, Kind: string(result.Kind), Outcome: rekeyOutcome(result, result.Made == 0), Node: result.Node, Shares: result.Shares,
		Threshold: result.Threshold, Items: list(result.Items), Redealt: result.Redealt, People: []personView{}, Warnings: list(result.Warnings),
	}
	var failures []error
	for _, p := range result.People {
		shown := personView{Name: p.Name, Share: p.Index + 1, Fingerprint: p.Fingerprint}
		if result.Made > 0 || result.Finished { // else they have it already
			path, err := messages.put(c, p.Name, p.Message)
			if shown.File = path; path == "" { // also where the file could not be written: it must not be lost
				shown.Message = string(p.Message)
			}
			failures = append(failures, err)
		}
		view.People = append(view.People, shown)
	}
	failures = append(failures, a.print(view, view.rows))
	return errors.Join(failures...)
}

func (v *rekeyView) rows(t *table) {
	t.row("cluster "+v.Cluster, rekeySentences[v.Outcome])
	t.row("  "+v.Kind+" keys", fmt.Sprintf("%s, of which %d are needed", count(v.Shares, "share"), v.Threshold))
	for _, item := range v.Items {
		t.row("  sealed in", item)
	}
	if v.Redealt {
		t.row("  wrapping keys", "other ones than before, as the configuration says")
	}
	for _, p := range v.People {
		where := "as before"
		switch {
		case p.File != "":
			where = "message in " + p.File
		case p.Message != "":
			where = "message below"
		}
		t.row("  person "+p.Name, fmt.Sprintf("share %d, key %s, %s", p.Share, p.Fingerprint, where))
	}
	for _, warning := range v.Warnings {
		t.row("  warning", warning)
	}
	for _, p := range v.People {
		showMessage(t, "The share of "+p.Name, p.Message)
	}
}
