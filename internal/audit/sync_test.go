package audit

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// An act begins when its intent is on the disk, not when a line of it is in some buffer: a power cut in the middle of the act
// must leave it.
func TestAnIntentIsOnTheDiskBeforeTheActBegins(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	sink, err := File(path)
	must(t, err)
	toDisk, synced, broken := sink.(*file).sync, "", error(nil)
	sink.(*file).sync = func(opened *os.File) error {
		if broken != nil {
			return broken
		}
		synced = content(t, path)
		return toDisk(opened)
	}
	l := open(t, Options{}, sink)
	end, err := l.Begin(t.Context(), unseal)
	must(t, err)
	if !strings.Contains(synced, `"event":"intent"`) {
		t.Errorf("when the act begins, what was synced is %q", synced)
	}
	end(nil)

	broken = syscall.EIO
	if _, err := l.Begin(t.Context(), unseal); !errors.Is(err, ErrNoSink) || !errors.Is(err, syscall.EIO) {
		t.Errorf("with a disk that takes the line and does not keep it: %v", err)
	}
	broken = nil
	must(t, l.Close())

	closed, err := os.Open(path)
	must(t, err)
	must(t, closed.Close())
	if err := toDisk(closed); !errors.Is(err, os.ErrClosed) {
		t.Errorf("it syncs nothing: %v", err)
	}
}
