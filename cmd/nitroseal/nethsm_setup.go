package main

import (
	"context"
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/nethsm"
)

// setupVerb is "nitroseal nethsm setup" and its flags.
type setupVerb struct {
	app    *app
	target nethsmTarget
	admin  nethsmAdministrator

	name      string // of the device in what is printed at the end
	namespace string

	namespaceAdmin, operator, backup                    string
	namespacePassword, operatorPassword, backupPassword secretFlag
	backupPassphrase                                    secretFlag
	key                                                 nethsm.WantedKey
	tag                                                 string
	unattended                                          string
	generate                                            generateFlag
	dryRun                                              bool

	proved bool
}

func newNetHSMSetupCommand(a *app) *cobra.Command {
	v := &setupVerb{
		app: a, target: nethsmTarget{app: a},
		namespacePassword: secretFlag{name: "namespace-admin-password", prompt: "Password of the namespace's administrator"},
		operatorPassword:  secretFlag{name: "operator-password", prompt: "Password of the operator, new or as it is"},
		backupPassword:    secretFlag{name: "backup-password", prompt: "Password of the backup user, new or as it is"},
		backupPassphrase:  secretFlag{name: "backup-passphrase", prompt: "Backup passphrase of the NetHSM, new or as it is"},
	}
	cmd := &cobra.Command{
		Use:   "setup",
		Short: "Make a provisioned NetHSM ready for wrapping keys",
		Long: `Make a provisioned NetHSM ready for wrapping keys: a user with the role Operator, an RSA key that can do
RSA_Decryption_OAEP_SHA256 and nothing else, and a tag that lets this operator alone use it. On request also a
namespace of its own, unattended boot on or off, and a user and a passphrase for backups.

With --device the user name, its namespace, its password and the tag are those of the configuration where no
flag says otherwise.

It can be run again at any time: what is there is left alone, what is missing is made, and what is there but
differs is reported and never changed. --dry-run only says what it would do, and exits with 1 where the run would
stop because something differs, with 0 where it would go ahead. At the end it prints the device for nitroseal.hcl
and for Vault.

Unattended boot lets a NetHSM start without its unlock passphrase: then whoever has the NetHSM (of a container:
its database and its device key) has the keys. Without --unattended-boot it stays as it is.`,
		Example: `  nitroseal nethsm setup --url https://10.0.0.5 --generate --dry-run \
    --operator-password-file /etc/nitroseal/secrets/operator
  nitroseal nethsm setup --url https://10.0.0.5 --generate --operator-password-file /etc/nitroseal/secrets/operator \
    --unattended-boot off \
    --backup-user backup --backup-password-file /etc/nitroseal/backup-user --backup-passphrase-file /etc/nitroseal/backup-passphrase
  nitroseal nethsm setup --device hsm --namespace vault --namespace-admin admin --operator-password-env OPERATOR_PASSWORD`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return v.run(cmd) },
	}
	v.target.add(cmd, false)
	v.admin.add(cmd)
	flags := cmd.Flags()
	flags.StringVar(&v.name, "name", "", `name of the device in what is printed (default: --device, else "nethsm")`)
	flags.StringVar(&v.namespace, "namespace", "", "namespace for operator and key; made where there is none (default: "+
		"the root namespace)")
	flags.StringVar(&v.namespaceAdmin, "namespace-admin", "admin", "administrator of the namespace, without the namespace's name")
	flags.StringVar(&v.operator, "operator", "nitroseal", "name of the operator, without the namespace's name")
	flags.StringVar(&v.key.ID, "key-id", "nitroseal", "id of the key")
	flags.IntVar(&v.key.Length, "key-length", 3072, "length of the key in bits: 2048, 3072 or 4096")
	flags.StringVar(&v.key.Label, "key-label", "", "label of the key; needs a NetHSM of version 5")
	flags.StringVar(&v.tag, "tag", "nitroseal", "tag of operator and key")
	flags.StringVar(&v.unattended, "unattended-boot", "", "on or off; without it, left as it is")
	flags.StringVar(&v.backup, "backup-user", "", "user that makes backups")
	flags.BoolVar(&v.dryRun, "dry-run", false, "say what would be done, and change nothing")
	v.namespacePassword.add(cmd, "the password of the namespace's administrator")
	v.operatorPassword.add(cmd, "the operator's password")
	v.backupPassword.add(cmd, "the backup user's password")
	v.backupPassphrase.add(cmd, "the passphrase that backups are encrypted with")
	v.generate.add(cmd)
	onOff := cobra.FixedCompletions([]cobra.Completion{"on", "off"}, cobra.ShellCompDirectiveNoFileComp)
	_ = cmd.RegisterFlagCompletionFunc("unattended-boot", onOff)
	return cmd
}

func (v *setupVerb) run(cmd *cobra.Command) error {
	ctx := cmd.Context()
	client, err := v.target.open(ctx)
	if err != nil {
		return err
	}
	v.fromConfiguration(cmd.Flags().Changed)
	setup, err := v.setup(ctx)
	if err != nil {
		return err
	}
	working, cancel := v.app.within(ctx, setupTimeout)
	defer cancel()
	if _, err := v.app.logIn(working, client, setup.Administrator); err != nil && !errors.Is(err, nethsm.ErrState) {
		return err // in another state than Operational the setup itself says what to do
	}
	if v.dryRun {
		steps, err := setup.Plan(working, client)
		if err != nil {
			return err
		}
		return errors.Join(v.print(steps, nil), nethsm.Differing(steps))
	}
	steps, err := setup.Apply(working, client, func(step nethsm.Step) {
		if step.Changed {
			v.app.progress("  done: %s", step.What)
		}
	})
	if err == nil {
		v.proved, err = v.prove(working, setup, client)
	}
	if steps == nil {
		return err
	}
	return errors.Join(v.print(steps, err), err)
}

// fromConfiguration takes what no flag says from the device of the configuration: so it is set up as it will be used.
func (v *setupVerb) fromConfiguration(given func(flag string) bool) {
	c := v.target.configured
	if c.Name == "" {
		return
	}
	namespace, operator := splitUser(c.Username)
	if !given("namespace") && !given("operator") {
		v.namespace, v.operator = namespace, operator
	}
	if !v.operatorPassword.given() && v.namespace == namespace && v.operator == operator {
		v.operatorPassword.file, v.operatorPassword.env = c.PasswordFile, c.PasswordEnv
	}
	if namespace, admin := splitUser(c.AdminUsername); namespace != "" && namespace == v.namespace && !given("namespace-admin") {
		v.namespaceAdmin = admin
		if !v.namespacePassword.given() {
			v.namespacePassword.file, v.namespacePassword.env = c.AdminPasswordFile, c.AdminPasswordEnv
		}
	}
	if !given("tag") && len(c.KeyTags) > 0 {
		v.tag = c.KeyTags[0]
	}
}

// splitUser parts "namespace~user".
func splitUser(name string) (namespace, user string) {
	if namespace, user, is := strings.Cut(name, "~"); is {
		return namespace, user
	}
	return "", name
}

// prove lets the operator open what was sealed to the key; where the password is not known, nobody can.
func (v *setupVerb) prove(ctx context.Context, setup *nethsm.Setup, client *nethsm.Client) (bool, error) {
	if len(setup.Operator.Passphrase) == 0 {
		return false, nil
	}
	err := setup.Prove(ctx, client)
	return err == nil, err
}

// setup gathers what is wanted. Passwords that are not needed are not asked for.
func (v *setupVerb) setup(ctx context.Context) (*nethsm.Setup, error) {
	setup := &nethsm.Setup{Namespace: v.namespace, Key: v.key, Tag: v.tag}
	switch v.unattended {
	case "":
	case "on", "off":
		on := v.unattended == "on"
		setup.UnattendedBoot = &on
	default:
		return nil, usage("--unattended-boot is on or off")
	}
	if v.backup == "" && (v.backupPassword.given() || v.backupPassphrase.given()) {
		return nil, usage("a password or a passphrase for backups is given, and no user who makes them; name one with " +
			"--backup-user")
	}
	var err error
	if setup.Administrator, err = v.admin.credentials(ctx, &v.target); err != nil {
		return nil, err
	}
	if v.namespace != "" && !strings.Contains(setup.Administrator.Username, "~") {
		if setup.NamespaceAdministrator, err = v.account(ctx, v.namespaceAdmin, &v.namespacePassword); err != nil {
			return nil, err
		}
	}
	if setup.Operator, err = v.account(ctx, v.operator, &v.operatorPassword); err != nil {
		return nil, err
	}
	if v.backup == "" {
		return setup, nil
	}
	if setup.Backup, err = v.account(ctx, v.backup, &v.backupPassword); err != nil {
		return nil, err
	}
	if v.dryRun && (!v.backupPassphrase.given() || v.generate.missing(&v.backupPassphrase)) {
		return setup, nil
	}
	setup.BackupPassphrase, err = v.app.newSecret(ctx, &v.backupPassphrase, v.generate)
	return setup, err
}

func (v *setupVerb) account(ctx context.Context, username string, s *secretFlag) (nethsm.Account, error) {
	return v.app.account(ctx, username, s, v.generate, v.dryRun)
}

// setupResult is the result in JSON.
type setupResult struct {
	DryRun bool        `json:"dry_run"`
	Steps  []setupStep `json:"steps"`
	// Proved is true where the operator opened with the key what was sealed to it.
	Proved bool         `json:"proved"`
	Device *setupDevice `json:"device,omitempty"`
}

type setupStep struct {
	What    string `json:"what"`
	State   string `json:"state"`
	Found   string `json:"found,omitempty"`
	Changed bool   `json:"changed"`
}

// print prints the steps, and after a success how the NetHSM is used.
func (v *setupVerb) print(steps []nethsm.Step, failure error) error {
	result := setupResult{DryRun: v.dryRun, Steps: []setupStep{}, Proved: v.proved}
	toDo, differs := 0, 0
	for _, step := range steps {
		result.Steps = append(result.Steps, setupStep{step.What, string(step.State), step.Found, step.Changed})
		switch step.State {
		case nethsm.StepDone:
		case nethsm.StepDiffers:
			differs++
		default:
			toDo++
		}
	}
	if failure == nil && !v.dryRun {
		result.Device = v.device()
	}
	a := v.app
	return a.print(result, func(t *table) {
		t.row("STATE", "WHAT", "")
		changed := 0
		for _, step := range result.Steps {
			state := step.State
			if step.Changed {
				state, changed = "made", changed+1
			}
			t.row(state, step.What, step.Found)
		}
		switch {
		case v.dryRun && differs > 0:
			t.row("")
			t.row("Nothing was changed, and without --dry-run nothing would be: what differs is for a person to decide.")
		case v.dryRun && toDo > 0:
			t.row("")
			t.row("Nothing was changed; without --dry-run the steps that are to do are done.")
		case failure == nil && changed == 0:
			t.row("")
			t.row("There was nothing to do.")
		}
		if v.proved {
			t.row("The key was tried: the operator opened what was sealed to it.")
		}
		if result.Device != nil {
			result.Device.rows(t)
		}
	})
}
