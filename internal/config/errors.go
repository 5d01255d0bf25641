package config

import (
	"errors"
	"fmt"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// ErrInvalid is wrapped by every error of this package: the operator can mend it, trying again does not help.
var ErrInvalid = errors.New("the configuration is wrong")

// Error lists everything that is wrong with a configuration, in the order of the file.
type Error struct {
	Complaints []Complaint
}

// Complaint is one thing that is wrong, and how to mend it. It never quotes a value that could be a secret.
type Complaint struct {
	File string
	// Line and Column count from 1; 0 where the complaint is about the file as a whole.
	Line, Column int
	Text         string
}

// Error implements error: one line for each complaint where there are several.
func (e *Error) Error() string {
	if len(e.Complaints) == 1 {
		return fmt.Sprintf("%v: %v", ErrInvalid, e.Complaints[0])
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%v in %d places:", ErrInvalid, len(e.Complaints))
	for _, c := range e.Complaints {
		fmt.Fprintf(&text, "\n  %v", c)
	}
	return text.String()
}

// Unwrap makes the error answer to [ErrInvalid].
func (e *Error) Unwrap() error { return ErrInvalid }

// String is the form that editors jump to.
func (c Complaint) String() string {
	if c.Line == 0 {
		return fmt.Sprintf("%s: %s", c.File, c.Text)
	}
	return fmt.Sprintf("%s:%d:%d: %s", c.File, c.Line, c.Column, c.Text)
}

// newComplaint turns what HCL says into a complaint of ours.
func newComplaint(file string, d *hcl.Diagnostic) Complaint {
	text := d.Summary
	if d.Detail != "" {
		text += ": " + d.Detail
	}
	c := Complaint{File: file, Text: strings.Join(strings.Fields(text), " ")}
	if d.Subject != nil {
		c.Line, c.Column = d.Subject.Start.Line, d.Subject.Start.Column
	}
	return c
}
