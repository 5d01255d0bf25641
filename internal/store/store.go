// Package store is where envelopes and records lie: small values under slash-separated names, each with a revision.
//
// A [Store] makes one promise that everything above it builds on: of two writers that expect the same revision,
// exactly one wins and the other gets [ErrConflict]. Whom the promise covers differs: etcd covers every machine, a
// file one machine, the mount's storage the active node, data objects the processes that share a lock file. Each
// store says so in its own package comment; package storetest checks all of them alike.
//
// Values are sealed before they get here. A store may see, keep and lose them; it cannot read them.
package store

import (
	"context"
	"errors"
)

// MaxValueSize is the largest value that a store is given, in bytes: an envelope of the largest payload with the most
// recipients fits. Data objects take less, as their package says.
const MaxValueSize = 128 << 10

// Revision identifies one written state of a name. It is opaque but for [NoRevision]: compare it, keep it, give it back.
type Revision string

// NoRevision is the revision of a name that does not exist: a Put that expects it creates.
const NoRevision Revision = ""

// Entry is a value and the revision that wrote it.
type Entry struct {
	Value    []byte
	Revision Revision
}

// Store keeps values under names. Names are made of non-empty parts joined by "/", each of the characters that
// [CheckName] allows. Methods are safe for concurrent use and return when ctx ends.
type Store interface {
	// Get returns the value under name, or ErrNotFound.
	Get(ctx context.Context, name string) (Entry, error)
	// Put writes value where name is at the expected revision, and returns the new one. Any other state of name is
	// ErrConflict and changes nothing. After any other error the write may or may not have happened: read to know.
	Put(ctx context.Context, name string, value []byte, expected Revision) (Revision, error)
	// List returns the names that begin with prefix, whole and sorted. The prefix is "" or ends in "/".
	List(ctx context.Context, prefix string) ([]string, error)
	// Delete removes name where it is at the expected revision; ErrNotFound where it does not exist, ErrConflict where
	// it is at another.
	Delete(ctx context.Context, name string, expected Revision) error
	// Close gives back connections. The store is of no use afterwards.
	Close() error
}

// The errors of every store. They are wrapped: ask with errors.Is.
var (
	// ErrNotFound: there is no such name.
	ErrNotFound = errors.New("not found in the store")
	// ErrConflict: the name is at another revision than the expected one.
	ErrConflict = errors.New("changed by somebody else in the store")
	// ErrUnavailable: the store did not answer. Try again.
	ErrUnavailable = errors.New("the store is unavailable")
	// ErrDenied: the store answered and refused us: credentials, certificate or permissions.
	ErrDenied = errors.New("the store refused access")
	// ErrFull: the store has no room.
	ErrFull = errors.New("no room in the store")
	// ErrAmbiguous: two writers that do not share a lock wrote the same name; both values are kept.
	ErrAmbiguous = errors.New("written twice in the store")
	// ErrCorrupt: what lies under the name is not what a store wrote there: cut short, changed or foreign.
	ErrCorrupt = errors.New("damaged in the store")
	// ErrInvalidName: the name breaks the rules of CheckName.
	ErrInvalidName = errors.New("invalid name")
	// ErrTooLarge: the value is larger than the store takes, or the list longer than it gives.
	ErrTooLarge = errors.New("too large for the store")
)
