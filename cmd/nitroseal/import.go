package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

func newImportCommand(a *app) *cobra.Command {
	var from shareSource
	var request cluster.ImportRequest
	cmd := &cobra.Command{
		Use:   "import CLUSTER",
		Short: "Take the keys of a running cluster into custody",
		Long: `Take unseal keys or recovery keys that people have into custody: typed in one by one, or from a file: what "vault operator init" wrote, as
text or with -format=json, or one share a line in base64 or hexadecimal. They are sealed and stored only after a node of the cluster said
that it takes them: by a rekey that is begun with them and cancelled, or, where the cluster is sealed, by unsealing it.

At least as many shares as the threshold are needed. A root token that the file holds is taken where the configuration says
root_token = "keep", and left alone else. Afterwards delete the file, or rekey: who has seen the shares has the cluster.

An import that was cut off is finished by the next one, without shares.`,
		Example: `  nitroseal import prod
  nitroseal import prod --file init.json
  gpg --decrypt shares.asc | nitroseal import prod --file -
  nitroseal import prod --file new.txt --replace`,
		Args: arguments("CLUSTER"), ValidArgsFunction: a.completeCluster,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.cluster(args[0])
			if err != nil {
				return err
			}
			custodian, err := a.custodian()
			if err != nil {
				return err
			}
			left, err := custodian.ImportLeft(cmd.Context(), c)
			if err != nil {
				return err
			}
			given := new(cluster.GivenShares)
			if left {
				a.say("nitroseal: an import of cluster %q was cut off, and is finished now; no shares are needed", c.Name)
			} else if given, err = a.givenShares(cmd.Context(), &from); err != nil {
				return err
			}
			defer given.Wipe()
			request.By, request.Shares, request.RecoveryShares, request.RootToken = by(), given.Shares, given.RecoveryShares, given.RootToken
			ctx, cancel := a.within(cmd.Context(), openTimeout)
			defer cancel()
			result, err := custodian.Import(ctx, c, request)
			if err != nil {
				return err
			}
			return a.showImport(&result)
		},
	}
	from.add(cmd)
	cmd.Flags().BoolVar(&request.Replace, "replace", false, "put them in place of the keys of the cluster that are in custody")
	cmd.Flags().BoolVar(&request.Unproved, "unproved", false, "store them although no node answers that could prove them")
	cmd.AddCommand(newImportBankVaultsCommand(a))
	return cmd
}

// shareSource is where shares come from.
type shareSource struct {
	file     string
	recovery bool
}

func (s *shareSource) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&s.file, "file", "", `file with the shares ("-": standard input; default: they are typed in)`)
	cmd.Flags().BoolVar(&s.recovery, "recovery", false, "shares that do not say what they are of are of recovery keys")
	_ = cmd.MarkFlagFilename("file")
}

// givenShares reads the shares. The caller wipes them.
func (a *app) givenShares(ctx context.Context, from *shareSource) (given *cluster.GivenShares, err error) {
	if from.file == "" {
		given, err = a.typedShares(ctx)
	} else {
		var raw []byte
		if raw, err = a.input(ctx, from.file, cluster.MaxSharesFile, "the shares"); err != nil {
			return nil, err
		}
		defer clear(raw)
		if given, err = cluster.ParseShares(raw); err != nil {
			name := from.file
			if name == "-" {
				name = "standard input"
			}
			err = usage("%s: %w", name, err)
		}
	}
	if err != nil {
		return nil, err
	}
	if from.recovery && len(given.RecoveryShares) == 0 {
		given.Shares, given.RecoveryShares = nil, given.Shares
		given.N, given.T, given.RecoveryN, given.RecoveryT = 0, 0, given.N, given.T
	}
	return given, nil
}

// typedShares asks the person at the terminal for one share after the other, without echo. An empty line ends them.
func (a *app) typedShares(ctx context.Context) (*cluster.GivenShares, error) {
	if !isTerminal(a.stdin) || a.stdinTaken {
		return nil, usage("the shares are needed, and there is no terminal to ask at; name a file with --file, or --file - for standard input")
	}
	given := new(cluster.GivenShares)
	for {
		line, err := a.readHiddenLine(ctx, fmt.Sprintf("Share %d (empty to end)", len(given.Shares)+1))
		if err != nil {
			given.Wipe()
			return nil, err
		}
		if len(bytes.TrimSpace(line)) == 0 {
			break
		}
		share, err := cluster.ParseShare(line)
		clear(line)
		switch {
		case err != nil: // a person may mistype
			a.say("nitroseal: %v; type it again", err)
		case slices.ContainsFunc(given.Shares, func(other []byte) bool { return bytes.Equal(other, share) }):
			clear(share)
			a.say("nitroseal: that share was typed already; type another one")
		default:
			given.Shares = append(given.Shares, share)
		}
	}
	if len(given.Shares) == 0 {
		return nil, usage("no share was typed; nothing was done")
	}
	return given, nil
}

// readHiddenLine reads a line without echo, which may be empty.
func (a *app) readHiddenLine(ctx context.Context, prompt string) ([]byte, error) {
	fd := int(a.stdin.Fd())
	before, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("preparing the terminal: %w", err)
	}
	_, _ = fmt.Fprintf(a.stderr, "%s: ", prompt)
	line, err := interruptible(ctx, func() ([]byte, error) { return term.ReadPassword(fd) })
	a.say("")
	switch {
	case ctx.Err() != nil:
		return nil, errors.Join(ctx.Err(), term.Restore(fd, before))
	case err != nil:
		return nil, fmt.Errorf("reading from the terminal: %w", err)
	}
	return line, nil
}

// importView is an import as JSON.
type importView struct {
	Cluster   string   `json:"cluster"`
	Kind      string   `json:"kind"`
	Given     int      `json:"given"` // shares in custody
	Shares    int      `json:"shares"`
	Threshold int      `json:"threshold"`
	Items     []string `json:"items"`
	Proved    bool     `json:"proved"`
	Unsealed  bool     `json:"unsealed"` // the node was sealed, and the shares opened it
	Node      string   `json:"node"`
	RootToken bool     `json:"root_token"` // it is kept
	Finished  bool     `json:"finished"`   // an import that was cut off
	Warnings  []string `json:"warnings"`
}

func (a *app) showImport(result *cluster.ImportResult) error {
	view := importView{
		Cluster: result.Cluster, Kind: string(result.Kind), Given: result.Given, Shares: result.Shares, Threshold: result.Threshold, Items: list(result.Items),
		Proved: result.Proved, Unsealed: result.Unsealed, Node: result.Node, RootToken: result.RootToken, Finished: result.Finished,
		Warnings: list(result.Warnings),
	}
	return a.print(view, func(t *table) {
		outcome := "its keys are in custody"
		if view.Finished {
			outcome += ": an import that was cut off is finished"
		}
		t.row("cluster "+view.Cluster, outcome)
		t.row("  "+view.Kind+" keys", fmt.Sprintf("%d of %s, of which %d are needed", view.Given, count(view.Shares, "share"), view.Threshold))
		for _, item := range view.Items {
			t.row("  sealed in", item)
		}
		switch {
		case view.Unsealed:
			t.row("  proved", "node "+view.Node+" was sealed, and they unsealed it")
		case view.Proved:
			t.row("  proved", "node "+view.Node+" takes them")
		}
		if view.RootToken {
			t.row("  root token", "kept, in the item \"root\"")
		}
		for _, warning := range view.Warnings {
			t.row("  warning", warning)
		}
	})
}
