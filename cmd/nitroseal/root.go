package main

import (
	"cmp"
	"errors"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"vault-plugin-secrets-nitrokey/internal/config"
)

const rootHelp = `nitroseal keeps the unseal material of Vault and OpenBao under a hardware key: a Nitrokey HSM 2, or a NetHSM.

Devices and stores are named in a configuration file, nitroseal.hcl; "nitroseal config check" reads it and says what is
wrong. Secrets never come as an argument: they are read from files, environment variables or a prompt.

Results go to stdout, as a table or, with --output json, as JSON. What went wrong goes to stderr, a sentence in either case, and
into the exit code; status and doctor print what they found as well.

` + exitCodesHelp

// newRootCommand is the whole command tree.
func newRootCommand(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:           "nitroseal",
		Short:         "Keep unseal keys under a hardware key",
		Long:          rootHelp,
		Args:          noArguments,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		SilenceErrors: true, // printed once, by app.report
		SilenceUsage:  true,
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	root.SetFlagErrorFunc(flagError)
	root.SetIn(a.stdin)
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)

	global := root.PersistentFlags()
	global.StringVarP(&a.configPath, "config", "c", cmp.Or(os.Getenv("NITROSEAL_CONFIG"), config.DefaultPath),
		"the configuration file; the environment variable NITROSEAL_CONFIG names another default")
	global.VarP(&a.format, "output", "o", "how results are printed: table or json")
	global.Var((*patience)(&a.timeout), "timeout", "how long the command may take at most (default 1m, 15m where an HSM makes a key)")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]cobra.Completion{formatTable, formatJSON}, cobra.ShellCompDirectiveNoFileComp))
	_ = root.MarkPersistentFlagFilename("config", "hcl")

	for _, add := range nouns {
		root.AddCommand(add(a))
	}
	a.noteBegin(root)
	return root
}

// noteBegin makes every verb note that it began: what cobra finds wrong before that, with flags that exclude each other for
// example, is a mistake on the command line.
func (a *app) noteBegin(cmd *cobra.Command) {
	if work := cmd.RunE; work != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			a.begun = true
			return work(cmd, args)
		}
	}
	for _, sub := range cmd.Commands() {
		a.noteBegin(sub)
	}
}

// nouns make the commands below the root, in the order of the help.
var nouns = []func(*app) *cobra.Command{
	newInitCommand,
	newUnsealCommand,
	newRunCommand,
	newServeCommand,
	newStatusCommand,
	newVerifyCommand,
	newDrillCommand,
	newRekeyCommand,
	newRootTokenCommand,
	newImportCommand,
	newExportCommand,
	newMaterialCommand,
	newWrapCommand,
	newUnwrapCommand,
	newRewrapCommand,
	newKeyCommand,
	newDeviceCommand,
	newNetHSMCommand,
	newRecoverCommand,
	newConfigCommand,
	newDoctorCommand,
	newVersionCommand,
}

// group is a command that only holds others.
func group(use, short, long string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_ = cmd.Help()
			return usage("%s needs a verb", cmd.CommandPath())
		},
	}
	cmd.AddCommand(verbs...)
	return cmd
}

// noArguments refuses what follows the flags. cobra's own check would call it an unknown command.
func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if cmd.HasAvailableSubCommands() {
		suggestion := ""
		cmd.SuggestionsMinimumDistance = 2
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			suggestion = `; did you mean "` + near[0] + `"?`
		}
		return usage(`%q is not a verb of %q%s`, args[0], cmd.CommandPath(), suggestion)
	}
	return usage("%s takes no argument, and %d came", cmd.CommandPath(), len(args))
}

// arguments wants exactly these, and names those that are missing. It never repeats what was given: a secret that was
// typed in the wrong place must not come out again.
func arguments(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usage(`%s: %s is missing; "%s --help" shows an example`, cmd.CommandPath(), strings.Join(names[len(args):], " "), cmd.CommandPath())
		case len(args) > len(names):
			return usage("%s takes %d arguments (%s), and %d came", cmd.CommandPath(), len(names), strings.Join(names, " "), len(args))
		}
		return nil
	}
}

// flagError says what is wrong with a flag. The value of one that is not known is left out: somebody may have meant to give
// a secret.
func flagError(cmd *cobra.Command, err error) error {
	if unknown := (*pflag.NotExistError)(nil); errors.As(err, &unknown) {
		name, _, _ := strings.Cut(unknown.GetSpecifiedName(), "=")
		if group := unknown.GetSpecifiedShortnames(); group != "" {
			name, _, _ = strings.Cut(group, "=")
		}
		return usage(`the flag "-%s" is not known; "%s --help" lists the flags`, name, cmd.CommandPath())
	}
	return usage(`%w; "%s --help" lists the flags`, err, cmd.CommandPath())
}

// longFlags lets "-output" stand for "--output", as in Vault's own command. Only names of flags that there are get their
// second dash, so bundled short flags keep their meaning; the value of the flag before, as in "--context -label", stays what
// it is.
func longFlags(root *cobra.Command, args []string) []string {
	known := map[string]bool{"help": false} // whether a value may follow it as an argument of its own
	var collect func(*cobra.Command)
	collect = func(cmd *cobra.Command) {
		note := func(f *pflag.Flag) {
			known[f.Name] = f.NoOptDefVal == ""
			if f.Shorthand != "" {
				known[f.Shorthand] = f.NoOptDefVal == ""
			}
		}
		cmd.Flags().VisitAll(note)
		cmd.PersistentFlags().VisitAll(note)
		for _, sub := range cmd.Commands() {
			collect(sub)
		}
	}
	collect(root)
	long := slices.Clone(args)
	value := false // this argument is the value of the one before
	for i, arg := range args {
		if arg == "--" && !value {
			break
		}
		name, _, given := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		takesValue, isFlag := known[name]
		isFlag = isFlag && !value && strings.HasPrefix(arg, "-")
		if isFlag && !strings.HasPrefix(arg, "--") && len(name) > 1 {
			long[i] = "-" + arg
		}
		value = isFlag && takesValue && !given
	}
	return long
}
