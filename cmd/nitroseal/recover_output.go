package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// recoveryOutput is where what was recovered goes.
type recoveryOutput struct {
	file, dir, field string
	show             bool
}

func (o *recoveryOutput) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&o.file, "out", "", `file for the value, made with mode 0600 (default "-": standard output)`)
	flags.StringVar(&o.dir, "out-dir", "", "folder for the fields of an item of material, made with mode 0700; a file each, with mode 0600")
	flags.StringVar(&o.field, "field", "", "write this field of an item of material only, as it is")
	flags.BoolVar(&o.show, "show", false, "show the value on a terminal")
	cmd.MarkFlagsMutuallyExclusive("out", "out-dir")
	cmd.MarkFlagsMutuallyExclusive("field", "out-dir")
	_ = cmd.MarkFlagDirname("out-dir")
}

// toFile tells whether nothing secret goes to standard output.
func (o *recoveryOutput) toFile() bool { return o.dir != "" || o.file != "" && o.file != "-" }

// check refuses to show a secret on a screen before the HSM is asked for it.
func (o *recoveryOutput) check(a *app) error {
	if !o.toFile() && !o.show && isTerminal(a.stdout) {
		return usage("the value would be shown on this terminal; redirect it, name a file with --out or a folder with --out-dir, or say --show")
	}
	return nil
}

// makeDir makes the folder, before the HSM is asked for what goes there. One that is there already must be of this user alone:
// in a folder of others a link or a pipe may lie in place of a file.
func (o *recoveryOutput) makeDir() error {
	if o.dir == "" {
		return nil
	}
	err := os.Mkdir(o.dir, 0o700)
	if err == nil {
		return nil
	}
	if info, statErr := os.Stat(o.dir); statErr != nil || !info.IsDir() {
		return usage("the folder %s cannot be made: %w", o.dir, pathless(err))
	}
	if err := usableStateDir(o.dir); err != nil {
		return usage("the folder %s %w, or name one that is not there yet", o.dir, err)
	}
	return nil
}

// recoveredView is what came out, as JSON. The secret parts are base64, and left out where they went to files.
type recoveredView struct {
	Use           string            `json:"use"`
	Key           string            `json:"key"`
	KeyVersion    int               `json:"key_version"`
	Cluster       string            `json:"cluster,omitempty"`
	Name          string            `json:"name,omitempty"`
	Generation    uint64            `json:"generation,omitempty"`
	Authenticated bool              `json:"authenticated"`
	Value         []byte            `json:"value,omitempty"`
	Fields        map[string][]byte `json:"fields,omitempty"`
	Files         []string          `json:"files,omitempty"`
}

func (o *recoveryOutput) write(a *app, made envelope.Context, payload []byte, authenticated bool) error {
	view := recoveredView{
		Use: string(made.Use), Key: made.Key, KeyVersion: made.Version, Cluster: made.Cluster, Name: made.Name, Generation: made.Generation,
		Authenticated: authenticated,
	}
	fields, noFields := recoveredFields(made, payload)
	defer fields.Wipe()
	if noFields != nil && (o.field != "" || o.dir != "") {
		return noFields
	}
	switch {
	case o.field != "":
		value, there := fields[o.field]
		if !there {
			return usage("it has no field %q; it has %s", o.field, strings.Join(fields.Names(), ", "))
		}
		payload, fields = value, custody.Fields{o.field: value} // a part of what is wiped
	case o.dir != "":
		return o.writeFields(a, &view, fields)
	}
	switch {
	case o.toFile():
		if err := a.output(o.file, payload); err != nil {
			return err
		}
		view.Files = []string{o.file}
		return a.print(view, func(t *table) { t.row("written", o.file) })
	case a.format == formatJSON:
		if view.Fields = fields; fields == nil {
			view.Value = payload
		}
		return a.print(view, nil)
	}
	return a.output("", payload)
}

// writeFields writes each field to a file of its name.
func (o *recoveryOutput) writeFields(a *app, view *recoveredView, fields custody.Fields) error {
	for _, name := range fields.Names() {
		path := filepath.Join(o.dir, name)
		if err := writeFile(path, fields[name]); err != nil {
			return fmt.Errorf("writing %s: %w", path, pathless(err))
		}
		view.Files = append(view.Files, path)
	}
	return a.print(view, func(t *table) {
		for _, path := range view.Files {
			t.row("written", path)
		}
	})
}

// fieldName is what a field may be called: no path.
var fieldName = regexp.MustCompile(`^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$`)

// recoveredFields reads the fields of an item of material. They may be unauthenticated: nothing of it is quoted, and no name
// leads out of a folder. The caller wipes them.
func recoveredFields(made envelope.Context, payload []byte) (custody.Fields, error) {
	if made.Use != envelope.UseMaterial {
		return nil, usage("it is one value and has no fields; leave --field and --out-dir away, and name a file with --out")
	}
	fields, err := custody.DecodeFields(payload)
	if err != nil {
		return nil, errNoFields
	}
	for name := range fields {
		if !fieldName.MatchString(name) {
			fields.Wipe()
			return nil, errNoFields
		}
	}
	return fields, nil
}

var errNoFields = errors.New("it is no item of material as this release writes it; leave --field and --out-dir away to get it as it is")
