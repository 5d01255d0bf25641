package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

func newMaterialCommand(a *app) *cobra.Command {
	return group("material", "Look after what is sealed of clusters",
		`Material is what is kept of a cluster: its unseal keys, its recovery keys, a root token, or any secret that belongs with them.
An item has a name and one or more fields, is sealed as one envelope, and lies in a store of the configuration. Each write
makes a new generation; the one that is expected is remembered in state_dir, so that an older envelope, which somebody put back,
does not open.

The items unseal, recovery, root, former and former-recovery, and with a spread unseal.KEY and so on, belong to custody:
"nitroseal init", "rekey" and "import" write them. Opening, writing and deleting are noted in the audit log.`,
		newMaterialListCommand(a), newMaterialShowCommand(a), newMaterialOpenCommand(a), newMaterialPutCommand(a),
		newMaterialDeleteCommand(a), newMaterialAcceptCommand(a))
}

// storeFlag is where an item lies.
type storeFlag struct{ name string }

func (s *storeFlag) add(cmd *cobra.Command, a *app) {
	cmd.Flags().StringVar(&s.name, "store", "", "the store of the item (default: the one that it has, or its cluster's, or the only one)")
	_ = cmd.RegisterFlagCompletionFunc("store", a.completeStores)
}

// of is the store to ask for an item: what the flag says, else what the configuration has for its cluster. Where neither says
// anything, the keeper knows.
func (s *storeFlag) of(a *app, cluster, item string) (string, error) {
	if s.name != "" {
		return s.name, nil
	}
	c, err := a.config()
	if err != nil {
		return "", err
	}
	if found, ok := c.Cluster(cluster); ok && custodyItem(item) {
		return found.Store, nil
	}
	return "", nil
}

// custodyItem tells whether the name of an item is one that custody of clusters uses.
func custodyItem(name string) bool {
	return cluster.IsItem(name)
}

// ofCustody tells whether an item is what a cluster of the configuration is opened with.
func (a *app) ofCustody(cluster, item string) (bool, error) {
	c, err := a.config()
	if err != nil {
		return false, err
	}
	_, configured := c.Cluster(cluster)
	return configured && custodyItem(item), nil
}

// audited does something with an item that the audit log must know of before.
func (a *app) audited(ctx context.Context, verb, cluster, item string, do func() error) error {
	return a.act(ctx, audit.Act{Verb: verb, Cluster: cluster, Detail: map[string]string{"item": item}}, do)
}

// act does something that the audit log must know of before.
func (a *app) act(ctx context.Context, act audit.Act, do func() error) error {
	log, err := a.audit()
	if err != nil {
		return err
	}
	act.By = by()
	end, err := log.Begin(ctx, act)
	if err != nil {
		return err
	}
	err = do()
	end(err)
	return err
}

// itemView is an item as JSON. It holds no secret.
type itemView struct {
	Cluster       string   `json:"cluster"`
	Name          string   `json:"name"`
	State         string   `json:"state"`
	Store         string   `json:"store"`
	Key           string   `json:"key"`
	KeyVersion    int      `json:"key_version"`
	LatestVersion int      `json:"latest_key_version"` // 0 where the key is not known here
	Generation    uint64   `json:"generation"`         // of the envelope in the store; 0 where it vanished
	Expected      uint64   `json:"expected_generation"`
	HSMs          int      `json:"hsms"` // on how many it opens
	KIDs          []string `json:"kids"`
	Size          int      `json:"size"` // of the envelope, in bytes
	Fields        []string `json:"fields"`
	Created       string   `json:"created"`
	Updated       string   `json:"updated"`
	UpdatedBy     string   `json:"updated_by"`
	Warnings      []string `json:"warnings"`
}

func newItemView(m custody.Metadata) itemView {
	return itemView{
		Cluster: m.Cluster, Name: m.Name, State: string(m.State), Store: m.Store,
		Key: m.Key, KeyVersion: m.Version, LatestVersion: m.LatestVersion, Generation: m.Generation, Expected: m.Expected,
		HSMs: m.HSMs, KIDs: list(m.KIDs), Size: m.Size, Fields: list(m.Fields),
		Created: stamp(m.Created), Updated: stamp(m.Updated), UpdatedBy: m.UpdatedBy, Warnings: list(m.Warnings),
	}
}

func (v *itemView) rows(t *table) {
	t.field("item", v.Cluster+"/"+v.Name)
	t.field("state", v.State)
	t.field("store", v.Store)
	t.field("key", versionOf(v.Key, v.KeyVersion, v.LatestVersion))
	t.field("generation", generationOf(v.Generation, v.Expected))
	t.field("opens on", countHSMs(v.HSMs))
	t.field("size", fmt.Sprintf("%d bytes", v.Size))
	t.field("fields", strings.Join(v.Fields, ", "))
	t.field("created", v.Created)
	t.field("updated", v.Updated)
	t.field("updated by", v.UpdatedBy)
	for _, warning := range v.Warnings {
		t.row("warning", warning)
	}
}

// versionOf is a wrapping key with its version, and the newest one where that is another: `"prod" version 1 (2 is the newest)`.
func versionOf(key string, version, latest int) string {
	text := fmt.Sprintf("%s version %d", key, version)
	if latest > version {
		text += fmt.Sprintf(" (%d is the newest)", latest)
	}
	return text
}

func generationOf(there, expected uint64) string {
	if there == expected {
		return strconv.FormatUint(there, 10)
	}
	return fmt.Sprintf("%d (%d is expected)", there, expected)
}

// countHSMs is a number of HSMs in words: "2 HSMs".
func countHSMs(n int) string {
	if n == 1 {
		return "1 HSM"
	}
	return fmt.Sprintf("%d HSMs", n)
}

// completeItem completes CLUSTER NAME: clusters that material is recorded of, then its items.
func (a *app) completeItem(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	keeper, err := a.keeper()
	if err != nil || len(args) > 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	cluster := ""
	if len(args) == 1 {
		cluster = args[0]
	}
	items, _, _ := keeper.List(cmd.Context(), cluster)
	var known []cobra.Completion
	for _, item := range items {
		if cluster != "" {
			known = append(known, item.Name)
		} else {
			known = append(known, item.Cluster)
		}
	}
	return slices.Compact(known), cobra.ShellCompDirectiveNoFileComp
}

// completeStores completes with the names of stores.
func (a *app) completeStores(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	c, err := a.config()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var known []cobra.Completion
	for _, s := range c.Stores {
		known = append(known, cobra.CompletionWithDesc(s.Name, s.Type))
	}
	return known, cobra.ShellCompDirectiveNoFileComp
}

// casFlag is the generation that an item must be at.
type casFlag struct{ text string }

func (c *casFlag) add(cmd *cobra.Command, what string) {
	cmd.Flags().StringVar(&c.text, "cas", "", what)
}

// generation is nil where the flag is not given.
func (c *casFlag) generation() (*uint64, error) {
	if c.text == "" {
		return nil, nil //nolint:nilnil // documented
	}
	g, err := parseGeneration(c.text)
	if err != nil {
		return nil, fmt.Errorf("--cas: %w", err)
	}
	return &g, nil
}

func parseGeneration(text string) (uint64, error) {
	g, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, usage("%q is not a generation, which is a number; \"nitroseal material show CLUSTER NAME\" tells it", text)
	}
	return g, nil
}

// warnAll says what a result warns of, where it is not printed with it.
func (a *app) warnAll(warnings []string) {
	for _, warning := range warnings {
		a.say("nitroseal: warning: %s", warning)
	}
}

// explain adds what to type on the command line to errors of the keeper, whose sentences name the settings.
func explain(err error, cluster, name string) error {
	switch {
	case errors.Is(err, custody.ErrStale), errors.Is(err, custody.ErrAhead):
		return fmt.Errorf("%w (nitroseal material accept-generation %s %s GENERATION)", err, cluster, name)
	case errors.Is(err, custody.ErrUnrecorded):
		return fmt.Errorf("%w (--cas on the command line)", err)
	}
	return err
}
