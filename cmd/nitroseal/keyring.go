package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// keyringDir is the folder of the state directory that holds the records of wrapping keys. They hold no secret: the
// authentication keys lie in envelopes, which an HSM opens when they are needed.
const keyringDir = "keyring"

// keyring opens the wrapping keys of this machine. Several commands may run at a time: what they change takes turns, by
// compare-and-swap and by a lock for each key.
func (a *app) keyring() (*keyring.Keyring, error) {
	if a.keys != nil {
		return a.keys, nil
	}
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	set, err := a.devices()
	if err != nil {
		return nil, err
	}
	if err := a.checkStateDir(); err != nil {
		return nil, err
	}
	records, err := file.Open(filepath.Join(c.StateDir, keyringDir))
	if err != nil {
		return nil, fmt.Errorf("opening the wrapping keys: %w", err)
	}
	a.onClose(records.Close)
	a.keys = keyring.New(keyring.Config{
		Records: records, Devices: set, Logger: a.logger(), SealAuthKeys: true,
		Words: &words, CacheRecords: a.serving,
		Lock: func(ctx context.Context, name string) (func(), error) { return records.Lock(ctx, name) },
	})
	a.onClose(a.keys.Close)
	return a.keys, nil
}

// checkStateDir refuses a state directory that is not there: made here, it might lie where a volume should be mounted, and
// its keys would seem lost. It refuses one of another user as well, who could not use afterwards what this one leaves, and
// one that others may write: they could lift PIN bars, and put records in place that seal to keys of theirs.
func (a *app) checkStateDir() error {
	c, err := a.config()
	if err != nil {
		return err
	}
	if err := usableStateDir(c.StateDir); err != nil {
		return fmt.Errorf("%w: the state directory %s %w", config.ErrInvalid, c.StateDir, err)
	}
	return nil
}

func usableStateDir(dir string) error {
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("does not exist; make it with: install -d -m 700 %s", dir)
	}
	if err != nil {
		return fmt.Errorf("cannot be used: %w", pathless(err))
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() {
		name := fmt.Sprintf("#%d", owner.Uid)
		if known, err := user.LookupId(strconv.FormatUint(uint64(owner.Uid), 10)); err == nil {
			name = known.Username
		}
		return fmt.Errorf("belongs to another user; run the command as that one: sudo -u '%s' nitroseal …", name)
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf("may be written by others than its owner (mode %04o), who could put keys of theirs in place; run: chmod go-w %s", mode, dir)
	}
	return nil
}

// words are how the keyring's sentences name what an operator types.
var words = keyring.Words{
	Home: "this state directory",
	Read: func(key string) string { return "print it with \"nitroseal key backup " + key + "\"" },
	Set: func(key, setting string) string {
		return "run \"nitroseal key configure " + key + " --" + strings.ReplaceAll(setting, "_", "-") + "\""
	},
	Ask: func(what string) string { return "--" + strings.ReplaceAll(what, "_", "-") },
}

// by says who runs the command, for the records: the user, and who became that user by sudo.
func by() string {
	name := fmt.Sprintf("user %d", os.Getuid())
	if current, err := user.Current(); err == nil {
		name = current.Username
	}
	if before := os.Getenv("SUDO_USER"); before != "" && before != name {
		name = before + " as " + name
	}
	if host, err := os.Hostname(); err == nil {
		name += " on " + host
	}
	return name
}

// completeKeys completes the first argument with the names of wrapping keys.
func (a *app) completeKeys(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	keys, err := a.keyring()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	known, _ := keys.List(cmd.Context())
	return known, cobra.ShellCompDirectiveNoFileComp
}

// completeDevices completes arguments with the names of devices.
func (a *app) completeDevices(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
	c, err := a.config()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var known []cobra.Completion
	for _, d := range c.Devices {
		known = append(known, cobra.CompletionWithDesc(d.Name, d.Type))
	}
	return known, cobra.ShellCompDirectiveNoFileComp
}

// completeDevice completes the first argument only.
func (a *app) completeDevice(cmd *cobra.Command, args []string, begun string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.completeDevices(cmd, args, begun)
}
