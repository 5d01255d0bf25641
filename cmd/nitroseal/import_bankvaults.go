package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/bankvaults"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

func newImportBankVaultsCommand(a *app) *cobra.Command {
	var m bankVaultsMove
	cmd := &cobra.Command{
		Use:   "bank-vaults CLUSTER --device DEVICE",
		Short: "Take over what Bank-Vaults keeps under an HSM",
		Long: `Take over the unseal keys, recovery keys and root token that Bank-Vaults encrypted with an RSA key on a token: from the data objects
that it left on that token, or with --secret from what "kubectl get secret -o yaml" prints. They are decrypted in the HSM, proved
against the running Vault, sealed under the cluster's own wrapping key, stored, read back and compared.

Before its version 1.33 Bank-Vaults encrypted with PKCS#1 v1.5, which this command tries only with --accept-pkcs1-v15. Whatever
is wrong with whichever value, the error is the same, and nothing is imported. Whoever can have this command run on values of
their own again and again could still learn something from it: do not build it into a service.

A key that answers PKCS#1 v1.5 is no good guard for anything else, so a wrapping key that lies on the very key of Bank-Vaults is
refused unless --accept-legacy-key says otherwise. "nitroseal key generate" makes another one.

Running it again does no harm: what is in custody already is compared, and not imported again. With --delete-old the data objects
that were imported are deleted from the token in the end; Secrets are yours to delete.`,
		Example: `  nitroseal import bank-vaults prod --device stick --dry-run
  nitroseal import bank-vaults prod --device stick
  kubectl get secret vault-unseal-keys -o yaml | nitroseal import bank-vaults prod --device stick --secret -
  nitroseal import bank-vaults prod --device stick --accept-pkcs1-v15 --use vault-unseal-0=1f2e3d4c --delete-old`,
		Args: arguments("CLUSTER"), ValidArgsFunction: a.completeCluster,
		RunE: func(cmd *cobra.Command, args []string) error { return m.run(cmd.Context(), a, args[0]) },
	}
	m.add(cmd, a)
	return cmd
}

// bankVaultsTimeout is how long an import may take where --timeout does not say: a card takes half a second for each value,
// and as long again for some.
const bankVaultsTimeout = 5 * time.Minute

// bankVaultsMove is one run of import bank-vaults, as its flags describe it.
type bankVaultsMove struct {
	device, secret             string
	keyLabel, keyFingerprint   string
	acceptV15, acceptLegacyKey bool
	use, without               []string
	dryRun, replace, unproved  bool
	deleteOld                  bool
}

func (m *bankVaultsMove) add(cmd *cobra.Command, a *app) {
	flags := cmd.Flags()
	flags.StringVar(&m.device, "device", "", "device of the configuration that has Bank-Vaults' key")
	flags.StringVar(&m.secret, "secret", "", `file with the Secret, YAML or JSON ("-": standard input), in place of the token's data objects`)
	flags.StringVar(&m.keyLabel, "key-label", bankvaults.DefaultKeyLabel, "label of Bank-Vaults' key")
	flags.StringVar(&m.keyFingerprint, "key-fingerprint", "", `fingerprint of Bank-Vaults' key, where several have its label; "nitroseal device keys" shows it`)
	flags.BoolVar(&m.acceptV15, "accept-pkcs1-v15", false, "decrypt what Bank-Vaults encrypted before its version 1.33, too")
	flags.BoolVar(&m.acceptLegacyKey, "accept-legacy-key", false, "go on although the wrapping key is the very key that Bank-Vaults used")
	flags.StringArrayVar(&m.use, "use", nil, "which copy counts where those of a name differ, vault-unseal-0=1f2e3d4c as --dry-run lists them; again for each name")
	flags.StringArrayVar(&m.without, "without", nil, "name that is left alone, vault-test for example; again for each name")
	flags.BoolVar(&m.dryRun, "dry-run", false, "list what is there, and decrypt nothing")
	flags.BoolVar(&m.replace, "replace", false, "put it in place of other keys of the cluster that are in custody")
	flags.BoolVar(&m.unproved, "unproved", false, "store the keys although no node answers that could prove them")
	flags.BoolVar(&m.deleteOld, "delete-old", false, "delete the data objects that were imported from the token, after everything else")
	_ = cmd.RegisterFlagCompletionFunc("device", a.completeDevices)
	_ = cmd.MarkFlagFilename("secret", "yaml", "yml", "json")
}

func (m *bankVaultsMove) check() (choice bankvaults.Choice, _ error) {
	switch {
	case m.device == "":
		return choice, usage("--device is missing; name the device that has Bank-Vaults' key")
	case m.deleteOld && m.secret != "":
		return choice, usage("--delete-old is for data objects on the token; delete the Secret with kubectl when you need it no more")
	case m.deleteOld && m.dryRun:
		return choice, usage("--dry-run deletes nothing; leave --delete-old away")
	}
	choice.Use = map[bankvaults.Name]string{}
	for _, text := range m.use {
		name, sum, err := bankvaults.ParseUse(text)
		if err != nil {
			return choice, usage("--use: %w", err)
		}
		if _, twice := choice.Use[name]; twice {
			return choice, usage("--use: %s is there twice", name)
		}
		choice.Use[name] = sum
	}
	for _, text := range m.without {
		name, known := bankvaults.ParseName(text)
		if !known {
			return choice, usage("--without: %q is no name of Bank-Vaults; they are vault-unseal-0 and so on, vault-recovery-0 and so on, vault-root and "+
				"vault-test", text)
		}
		choice.Without = append(choice.Without, name)
	}
	return choice, nil
}

func (m *bankVaultsMove) run(ctx context.Context, a *app, name string) error {
	choice, err := m.check()
	if err != nil {
		return err
	}
	c, err := a.cluster(name)
	if err != nil {
		return err
	}
	var document []byte
	if m.secret != "" {
		if document, err = a.input(ctx, m.secret, bankvaults.MaxSecret, "the Secret"); err != nil {
			return err
		}
	}
	ctx, cancel := a.within(ctx, bankVaultsTimeout)
	defer cancel()
	device, err := a.device(ctx, m.device)
	if err != nil {
		return err
	}
	objects, ok := device.(hsm.ForeignObjects)
	if m.secret == "" && !ok {
		return usage("device %q keeps no data objects of other programs; Bank-Vaults' values lie in a Kubernetes Secret then: give it with --secret", m.device)
	}
	copies, err := m.read(ctx, document, objects)
	if errors.Is(err, bankvaults.ErrNothing) && !m.dryRun {
		return m.nothing(ctx, a, c, err)
	}
	if err != nil {
		return fmt.Errorf("device %q: %w", m.device, err)
	}
	view := newBankVaultsView(name, copies)
	chosen, left, err := choice.Apply(copies)
	if err != nil {
		return usage("%w; --dry-run lists what is there", err)
	}
	if m.dryRun {
		return a.print(view, view.rows)
	}
	key, err := m.findKey(ctx, device)
	if err != nil {
		return err
	}
	if err := m.checkWrappingKeys(ctx, a, c, key.Ref()); err != nil {
		return err
	}
	act := audit.Act{Verb: "import bank-vaults", Cluster: name, Detail: map[string]string{
		"device": m.device, "key": key.Ref().Fingerprint, "values": strconv.Itoa(len(chosen)), "delete_old": strconv.FormatBool(m.deleteOld),
	}}
	err = a.act(ctx, act, func() error {
		return m.move(ctx, a, c, key, objects, chosen, left, view)
	})
	if err != nil && !view.opened {
		return err
	}
	return errors.Join(a.print(view, view.rows), err)
}

// move decrypts what was chosen and takes it into custody; then, where that is wanted, it deletes what was imported.
func (m *bankVaultsMove) move(ctx context.Context, a *app, c *cluster.Cluster, key hsm.Key, objects hsm.ForeignObjects,
	chosen, left []bankvaults.Copy, view *bankVaultsView,
) error {
	material, err := bankvaults.Decrypt(ctx, key, chosen, m.acceptV15)
	if err != nil {
		return m.explain(err)
	}
	defer material.Wipe()
	if err := m.takeOver(ctx, a, c, material, view); err != nil {
		return err
	}
	view.tell(material, keepsRoot(c))
	view.leave(left)
	if !m.deleteOld {
		return nil
	}
	return bankvaults.Delete(ctx, objects, m.imported(c, chosen, view), view.gone)
}

// imported are the copies that may be deleted: not a root token that was not taken.
func (m *bankVaultsMove) imported(c *cluster.Cluster, chosen []bankvaults.Copy, view *bankVaultsView) (done []bankvaults.Copy) {
	for _, found := range chosen {
		if found.Name.Kind == bankvaults.Root && !keepsRoot(c) {
			view.leave([]bankvaults.Copy{found})
			view.Warnings = append(view.Warnings, "The root token was left: it is not in custody. Revoke it, and delete "+found.Name.String()+" with pkcs11-tool.")
			continue
		}
		done = append(done, found)
	}
	return done
}

// keepsRoot tells whether the root token of a cluster is kept.
func keepsRoot(c *cluster.Cluster) bool { return c.RootToken == cluster.RootKeep }

func (m *bankVaultsMove) read(ctx context.Context, document []byte, objects hsm.ForeignObjects) ([]bankvaults.Copy, error) {
	if m.secret != "" {
		return bankvaults.Secret(document)
	}
	return bankvaults.Token(ctx, objects)
}

// findKey finds the key that Bank-Vaults used, by its label as it did.
func (m *bankVaultsMove) findKey(ctx context.Context, device hsm.Device) (hsm.Key, error) {
	key, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Label: m.keyLabel, Fingerprint: m.keyFingerprint})
	switch {
	case errors.Is(err, hsm.ErrAmbiguous):
		// It made another key pair whenever it could not find its own, and went on with that. None of them has an id.
		return nil, fmt.Errorf("device %q: %w: Bank-Vaults made more than one key pair. \"nitroseal device keys %s\" lists them; name one with "+
			"--key-fingerprint, and try the next where the values do not decrypt", m.device, hsm.ErrAmbiguous, m.device)
	case err != nil:
		return nil, fmt.Errorf("device %q: %w; name Bank-Vaults' key with --key-label", m.device, err)
	}
	return key, nil
}

// explain adds what to do.
func (m *bankVaultsMove) explain(err error) error {
	switch {
	case errors.Is(err, bankvaults.ErrDecrypt) && !m.acceptV15:
		return fmt.Errorf("%w; nothing was imported. Values of before Bank-Vaults 1.33 want --accept-pkcs1-v15; a key of another name is given with "+
			"--key-label, and what is not Bank-Vaults' left out with --without", err)
	case errors.Is(err, bankvaults.ErrDecrypt):
		return fmt.Errorf("%w; nothing was imported. A key of another name is given with --key-label, and what is not Bank-Vaults' left out with --without", err)
	case errors.Is(err, bankvaults.ErrDiffer):
		return fmt.Errorf("%w. Nothing was imported; choose with --use NAME=COPY, for example by trying which one the running Vault takes", err)
	}
	return err
}

// errLegacyKey: the wrapping key is the key that Bank-Vaults used.
var errLegacyKey = errors.New("the wrapping key is the very key that Bank-Vaults used")

// checkWrappingKeys refuses to seal to the key that Bank-Vaults used.
func (m *bankVaultsMove) checkWrappingKeys(ctx context.Context, a *app, c *cluster.Cluster, legacy hsm.KeyRef) error {
	keys, err := a.keyring()
	if err != nil {
		return err
	}
	names := []string{c.Key}
	if c.Spread != nil {
		names = c.Spread.Keys
	}
	for _, name := range names {
		key, err := keys.Get(ctx, name)
		if err != nil {
			return fmt.Errorf("cluster %q: %w", c.Name, err)
		}
		var fingerprints []string
		for _, version := range key.Versions {
			if version.Number != key.LatestVersion {
				continue // nothing is sealed to it any more
			}
			for _, recipient := range version.Recipients {
				fingerprints = append(fingerprints, recipient.KID)
			}
		}
		if bankvaults.SameKey(legacy, fingerprints) && !m.acceptLegacyKey {
			return fmt.Errorf("cluster %q: wrapping key %q: %w: whoever can have it decrypt PKCS#1 v1.5 can have it decrypt what is sealed to it as well; "+
				"make another one (nitroseal key generate), or say --accept-legacy-key", c.Name, name, errLegacyKey)
		}
	}
	return nil
}
