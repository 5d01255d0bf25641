package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

// initTimeout is how long an initialisation may take: sys/init has five minutes of its own, and the nodes have to join.
const initTimeout = 10 * time.Minute

func newInitCommand(a *app) *cobra.Command {
	var sharesDir string
	cmd := &cobra.Command{
		Use:   "init CLUSTER",
		Short: "Initialise a Vault or OpenBao cluster, with its unseal keys under the HSM",
		Long: `Initialise a cluster of the configuration and take custody of its keys: Vault makes the unseal keys (recovery keys where it unseals
itself), they are sealed to the HSM, written to the disk of this machine and to the store, and the nodes are joined and unsealed.
Nobody ever sees them, but for the shares of the persons that the configuration names: those come out as OpenPGP messages.

Before anything is created, a value is written to the store, read back, opened by the HSM and deleted: a cluster is initialised only
where its keys can be kept. Once Vault was asked, Ctrl-C waits until the answer is safe. What is cut short all the same is finished by
the next run; where an answer was lost, it says so and how to start again. It may run on all machines of a cluster at once: one
initialises, the others wait and unseal. A cluster that is initialised already is left as it is.

What becomes of the root token says root_token in the configuration: it is revoked (the default; "nitroseal root" makes another one), kept
sealed, or given out as an OpenPGP message.`,
		Example: `  nitroseal init prod
  nitroseal init prod --shares-dir ./shares`,
		Args: arguments("CLUSTER"), ValidArgsFunction: a.completeCluster,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.cluster(args[0])
			if err != nil {
				return err
			}
			messages := messageFolder{dir: sharesDir}
			if err := messages.check(c); err != nil {
				return err
			}
			custodian, err := a.custodian()
			if err != nil {
				return err
			}
			a.steps = isTerminal(a.stderr)
			a.progress("cluster %q: first a value goes to the store and back through the HSM, so that it is known to work", c.Name)
			ctx, cancel := a.within(cmd.Context(), initTimeout)
			defer cancel()
			result, err := custodian.Init(ctx, c, cluster.InitOptions{By: by()})
			result.Initialized = result.Initialized || result.People != nil || result.RootPGP != nil
			if err != nil && !result.Initialized {
				return err
			}
			// Also beside an error: what people get must not be lost.
			status, looking := custodian.Status(context.WithoutCancel(ctx), c)
			if looking != nil {
				a.say("nitroseal: warning: cluster %q is initialised, and how its keys are kept could not be looked up: %v", c.Name, looking)
			}
			return errors.Join(err, a.showInit(c, &result, &status, &messages))
		},
	}
	cmd.Flags().StringVar(&sharesDir, "shares-dir", "", "folder for the messages to persons, a file for each (default: they are printed)")
	_ = cmd.MarkFlagDirname("shares-dir")
	return cmd
}

// messageFolder is where messages to people go: OpenPGP, so that they may lie anywhere.
type messageFolder struct{ dir string } // "" for standard output

// path is the file of a message.
func (m *messageFolder) path(c *cluster.Cluster, whom string) string {
	return filepath.Join(m.dir, c.Name+"-"+whom+".asc")
}

// check wants to be able to write messages before there are any, over nothing that is there.
func (m *messageFolder) check(c *cluster.Cluster) error {
	if m.dir == "" {
		return nil
	}
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return usage("--shares-dir: making %s: %w", m.dir, pathless(err))
	}
	probe, err := os.CreateTemp(m.dir, ".nitroseal-")
	if err != nil {
		return usage("--shares-dir: writing in %s: %w", m.dir, pathless(err))
	}
	if err := errors.Join(probe.Close(), os.Remove(probe.Name())); err != nil {
		return usage("--shares-dir: writing in %s: %w", m.dir, pathless(err))
	}
	whom := []string{rootMessage}
	for _, p := range c.People {
		whom = append(whom, p.Name)
	}
	for _, name := range whom {
		if _, err := os.Lstat(m.path(c, name)); !errors.Is(err, fs.ErrNotExist) {
			return usage("--shares-dir: %s is there already; move it away, or name another folder", m.path(c, name))
		}
	}
	return nil
}

// rootMessage names the file with the root token.
const rootMessage = "root-token"

// put writes a message where it belongs, over nothing, and returns the file; "" where it is to be printed.
func (m *messageFolder) put(c *cluster.Cluster, whom string, message []byte) (path string, err error) {
	if m.dir == "" {
		return "", nil
	}
	path = m.path(c, whom)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("writing the message to %s: %s is there already; the message is printed in place of that", whom, path)
	}
	if err := writeFile(path, message); err != nil {
		return "", fmt.Errorf("writing the message to %s into %s: %w; it is printed in place of that", whom, path, pathless(err))
	}
	return path, nil
}

// initView is an initialisation as JSON.
type initView struct {
	Cluster     string           `json:"cluster"`
	Initialized bool             `json:"initialized"` // now; false where it had been before
	Kind        string           `json:"kind"`        // unseal or recovery
	Shares      int              `json:"shares"`
	Threshold   int              `json:"threshold"`
	Material    []materialOfView `json:"material"`
	Spread      string           `json:"spread"`
	People      []personView     `json:"people"`
	RootToken   rootTokenView    `json:"root_token"`
	Nodes       []tendedView     `json:"nodes"`
	Warnings    []string         `json:"warnings"`
}

// personView is somebody's share. The message, OpenPGP, is left out where it went to a file.
type personView struct {
	Name        string `json:"name"`
	Share       int    `json:"share"` // counted from 1
	Fingerprint string `json:"fingerprint"`
	File        string `json:"file,omitempty"`
	Message     string `json:"message,omitempty"`
}

// rootTokenView is what became of the root token.
type rootTokenView struct {
	Outcome string `json:"outcome"` // revoked, pending, kept, pgp; empty where this run made none
	File    string `json:"file,omitempty"`
	Message string `json:"message,omitempty"`
}

func (a *app) showInit(c *cluster.Cluster, result *cluster.InitResult, status *cluster.Status, messages *messageFolder) error {
	view := initView{
		Cluster: c.Name, Initialized: result.Initialized, Kind: string(result.Kind), Shares: result.Shares, Threshold: result.Threshold,
		Material: materialOf(status), Spread: status.Spread, People: []personView{}, Nodes: tended(result.Nodes), Warnings: list(result.Warnings),
	}
	var failures []error
	for _, p := range result.People {
		path, err := messages.put(c, p.Name, p.Message)
		shown := personView{Name: p.Name, Share: p.Index + 1, Fingerprint: p.Fingerprint, File: path}
		if path == "" { // also where the file could not be written: it must not be lost
			shown.Message = string(p.Message)
		}
		view.People, failures = append(view.People, shown), append(failures, err)
	}
	view.RootToken.Outcome = rootOutcome(c, result)
	if result.RootPGP != nil {
		path, err := messages.put(c, rootMessage, result.RootPGP)
		view.RootToken.File, failures = path, append(failures, err)
		if path == "" {
			view.RootToken.Message = string(result.RootPGP)
		}
	}
	failures = append(failures, a.print(view, view.rows))
	return errors.Join(failures...)
}

func rootOutcome(c *cluster.Cluster, result *cluster.InitResult) string {
	switch {
	case result.RootRevoked:
		return "revoked"
	case result.RootPGP != nil:
		return "pgp"
	case !result.Initialized:
		return ""
	case c.RootToken == cluster.RootKeep:
		return "kept"
	case c.RootToken == cluster.RootPGP:
		return "pgp"
	}
	return "pending"
}

// rootSentences say what became of the root token.
var rootSentences = map[string]string{
	"revoked": "revoked; \"nitroseal root\" makes another one when it is needed",
	"pending": "sealed until a node is active, and revoked then: run \"nitroseal unseal\" to finish that",
	"kept":    "sealed like the keys, in the item \"root\"",
	"pgp":     "given out as a message that only its receiver can open",
}

func (v *initView) rows(t *table) {
	if v.Initialized {
		t.row("cluster "+v.Cluster, "initialised now")
	} else {
		t.row("cluster "+v.Cluster, "is initialised, nothing to do")
	}
	if v.Shares > 0 {
		t.row("  "+v.Kind+" keys", fmt.Sprintf("%s, of which %d are needed", count(v.Shares, "share"), v.Threshold))
	}
	for i := range v.Material {
		t.row("  sealed in "+v.Material[i].Item, v.Material[i].sentence())
	}
	t.field("  HSMs that must take part", v.Spread)
	for _, p := range v.People {
		where := "message below"
		if p.File != "" {
			where = "message in " + p.File
		}
		t.row("  person "+p.Name, fmt.Sprintf("share %d, key %s, %s", p.Share, p.Fingerprint, where))
	}
	if sentence := rootSentences[v.RootToken.Outcome]; sentence != "" {
		if v.RootToken.File != "" {
			sentence += ": " + v.RootToken.File
		}
		t.row("  root token", sentence)
	}
	for i := range v.Nodes {
		t.row("  node "+v.Nodes[i].Node, v.Nodes[i].sentence())
	}
	for _, warning := range v.Warnings {
		t.row("  warning", warning)
	}
	for _, p := range v.People {
		showMessage(t, "The share of "+p.Name, p.Message)
	}
	showMessage(t, "The root token", v.RootToken.Message)
}

// showMessage prints a message for people to copy.
func showMessage(t *table, what, message string) {
	if message == "" {
		return
	}
	t.row("")
	t.row(what + ":")
	for line := range strings.Lines(message) {
		t.row(strings.TrimRight(line, "\r\n"))
	}
}
