package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"text/tabwriter"
	"time"
)

// format is the value of --output.
type format string

const (
	formatTable = "table"
	formatJSON  = "json"
)

func (f *format) String() string { return string(*f) }

// Type implements pflag.Value.
func (f *format) Type() string { return "format" }

// Set implements pflag.Value.
func (f *format) Set(value string) error {
	if value != formatTable && value != formatJSON {
		return fmt.Errorf("it is %s or %s", formatTable, formatJSON)
	}
	*f = format(value)
	return nil
}

// print writes a result to stdout: as JSON, indented and ending with a line break, or as rows that people read. A result
// that cannot be written is a failure: a full disk behind a redirection must not look like success. Without rows only JSON
// is written.
func (a *app) print(result any, rows func(*table)) error {
	if a.format == formatJSON {
		encoder := json.NewEncoder(a.stdout)
		encoder.SetEscapeHTML(false)
		encoder.SetIndent("", "  ")
		return written(encoder.Encode(result))
	}
	if rows == nil {
		return nil
	}
	aligned := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	t := &table{w: aligned}
	rows(t)
	return written(errors.Join(t.err, aligned.Flush()))
}

// table is aligned columns, for people: its form may change from release to release.
type table struct {
	w   io.Writer
	err error
}

// row writes one line of cells. Control characters in a cell, as an HSM's label may hold, do not reach the terminal.
func (t *table) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, cell := range cells {
		texts[i] = printable(fmt.Sprint(cell))
	}
	if _, err := fmt.Fprintln(t.w, strings.Join(texts, "\t")); t.err == nil {
		t.err = err
	}
}

// field writes a name and its value, unless that is empty.
func (t *table) field(name string, value any) {
	if text := fmt.Sprint(value); text != "" {
		t.row(name, text)
	}
}

func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, text)
}

// stamp is how points in time are printed: RFC 3339, UTC; empty for none.
func stamp(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return at.UTC().Format(time.RFC3339)
}

// milliseconds is how durations are printed in JSON.
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// list is shown as [], not as null, where it is empty.
func list[T any](items []T) []T {
	if items == nil {
		return []T{}
	}
	return items
}

// names says in a sentence what there is: `the devices "one" and "two"`.
func names(what string, all []string) string {
	switch len(all) {
	case 0:
		return "no " + what
	case 1:
		return fmt.Sprintf("the %s %q", what, all[0])
	}
	quoted := make([]string, len(all))
	for i, name := range all {
		quoted[i] = fmt.Sprintf("%q", name)
	}
	last := len(quoted) - 1
	return fmt.Sprintf("the %ss %s and %s", what, strings.Join(quoted[:last], ", "), quoted[last])
}

// written says what it was that failed.
func written(err error) error {
	if err != nil {
		return fmt.Errorf("writing the result to stdout: %w", pathless(err))
	}
	return nil
}

// pathless drops the path that os errors carry: the sentence around it names the file.
func pathless(err error) error {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}
