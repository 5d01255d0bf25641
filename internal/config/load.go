package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// maxFile is the size of the largest configuration, in bytes.
const maxFile = 1 << 20

// Load reads a configuration. Its errors wrap [ErrInvalid]; what is wrong inside the file is an [*Error]. It reads the
// certificates that the file names, no secret, and touches neither HSM nor network.
func Load(path string) (*Config, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("%w: the path of the configuration: %w", ErrInvalid, err)
	}
	source, err := readConfiguration(path)
	if err != nil {
		return nil, fmt.Errorf("%w: reading %s: %w", ErrInvalid, path, err)
	}
	return parse(path, source)
}

// readConfiguration reads the file, unless somebody else may have written it.
func readConfiguration(path string) ([]byte, error) {
	source, err := readTrusted(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w; name the configuration with --config, or in the environment variable NITROSEAL_CONFIG", fs.ErrNotExist)
	}
	return source, err
}

// readTrusted reads a file that says whom to trust or what to load, unless others than its owner may write it.
func readTrusted(path string, limit int64) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, pathless(err)
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return nil, pathless(err)
	case !info.Mode().IsRegular():
		return nil, errors.New("it is not a regular file")
	case info.Mode().Perm()&0o022 != 0:
		return nil, fmt.Errorf("others than its owner may write it (mode %04o), and it says whom to trust or what to load; run chmod go-w on it",
			info.Mode().Perm())
	}
	return readAll(file, limit)
}

func readAll(r io.Reader, limit int64) ([]byte, error) {
	content, err := io.ReadAll(io.LimitReader(r, limit+1))
	switch {
	case err != nil:
		return nil, pathless(err)
	case int64(len(content)) > limit:
		return nil, fmt.Errorf("it is larger than %d bytes; is it the right one?", limit)
	}
	return content, nil
}

// parse reads a configuration from its source.
func parse(path string, source []byte) (*Config, error) {
	r := &reader{path: path, dir: filepath.Dir(path)}
	// HCL calls a NUL byte by many names; a file with one is no text.
	if i := bytes.IndexByte(source, 0); i >= 0 {
		return nil, &Error{[]Complaint{{File: path, Text: "it holds a NUL byte, so it is not a text file"}}}
	}
	parsed, diagnostics := hclsyntax.ParseConfig(source, path, hcl.InitialPos)
	r.note(diagnostics)
	if parsed == nil {
		return nil, r.failure()
	}
	config := r.read(parsed.Body.(*hclsyntax.Body)) //nolint:forcetypeassert // what hclsyntax makes
	if err := r.failure(); err != nil {
		return nil, err
	}
	return config, nil
}

// reader collects complaints while a file is read.
type reader struct {
	path, dir  string
	complaints []Complaint
}

// note keeps what HCL complains about.
func (r *reader) note(diagnostics hcl.Diagnostics) {
	for _, d := range diagnostics {
		if d.Severity == hcl.DiagError {
			r.complaints = append(r.complaints, newComplaint(r.path, d))
		}
	}
}

// complain keeps a complaint of our own about a place in the file.
func (r *reader) complain(at hcl.Range, format string, args ...any) {
	r.complaints = append(r.complaints, Complaint{
		File: r.path, Line: at.Start.Line, Column: at.Start.Column, Text: fmt.Sprintf(format, args...),
	})
}

// failure returns all complaints in the order of the file, nil for none.
func (r *reader) failure() error {
	if len(r.complaints) == 0 {
		return nil
	}
	slices.SortStableFunc(r.complaints, func(a, b Complaint) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return &Error{slices.Compact(r.complaints)}
}

// pathless drops the path that os errors carry: the sentence around it names the file.
func pathless(err error) error {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}
