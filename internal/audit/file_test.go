package audit

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func line(text string) []Line { return []Line{{Text: []byte(text + "\n")}} }

func content(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	must(t, err)
	return string(text)
}

func TestAFileThatOthersDecideIsRefused(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name string, mode fs.FileMode) string {
		must(t, os.WriteFile(path(name), []byte("{}\n"), 0o600))
		must(t, os.Chmod(path(name), mode))
		return path(name)
	}
	must(t, os.Symlink(write("target", 0o600), path("link")))
	must(t, os.Symlink(path("nowhere"), path("dangling")))
	must(t, unix.Mkfifo(path("fifo"), 0o600))
	must(t, os.Mkdir(path("folder"), 0o700))
	must(t, os.Link(write("one", 0o600), path("other")))
	must(t, os.Mkdir(path("open"), 0o700))
	must(t, os.Chmod(path("open"), 0o777))

	tests := map[string]struct {
		path string
		want string // part of the complaint, "" where the file is taken
	}{
		"a file of ours is taken":                      {write("ours", 0o600), ""},
		"a file that a group may read is taken":        {write("read", 0o640), ""},
		"a file that is not there is made":             {path("new"), ""},
		"a symlink is refused":                         {path("link"), "symbolic link"},
		"a symlink to nowhere is refused":              {path("dangling"), "symbolic link"},
		"a FIFO is refused":                            {path("fifo"), "not a regular file"},
		"a file that the group may write is refused":   {write("group", 0o660), "chmod go-w"},
		"a file with a second name is refused":         {path("one"), "hard link"},
		"a folder that everybody may write is refused": {path("open/audit.log"), "chmod o-w"},
		"a relative path is refused":                   {"audit.log", "does not begin"},
	}
	if _, err := File(path("missing/audit.log")); err != nil {
		t.Errorf("a folder that is missing may be there tomorrow: %v", err)
	}
	if os.Geteuid() == 0 {
		must(t, os.Chown(write("foreign", 0o600), 65534, -1))
		tests["a file of another user is refused"] = struct{ path, want string }{path("foreign"), "another user"}
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			sink, err := File(test.path)
			if err == nil {
				err = errors.Join(sink.Reopen(), sink.Close())
			}
			if test.want == "" {
				must(t, err)
				return
			}
			if !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want %q", err, test.want)
			}
		})
	}
	info, err := os.Stat(path("new"))
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("made with mode %v", info.Mode())
	}
}

func TestALineThatACrashCutShortIsClosedOff(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	must(t, os.WriteFile(path, []byte("{\"a\":1}\n{\"b\":"), 0o600))
	sink, err := File(path)
	must(t, err)
	must(t, sink.Write(line(`{"c":3}`)))
	must(t, sink.Write(line(`{"d":4}`)))
	must(t, sink.Close())
	if got, want := content(t, path), "{\"a\":1}\n{\"b\":\n{\"c\":3}\n{\"d\":4}\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestARotatedFileIsMadeAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	sink, err := File(path)
	must(t, err)
	must(t, sink.Write(line("1")))
	must(t, os.Rename(path, path+".1"))
	must(t, sink.Write(line("2"))) // without a word from anybody
	must(t, os.Remove(path))
	must(t, sink.Write(line("3")))
	must(t, os.Truncate(path, 0)) // copytruncate
	must(t, sink.Write(line("4")))
	must(t, sink.Reopen())
	must(t, sink.Write(line("5")))
	must(t, os.Rename(path, path+".2"))
	must(t, os.Symlink("/dev/null", path))
	if err := sink.Write(line("6")); !errors.Is(err, ErrUnsafe) {
		t.Errorf("a symlink in its place: %v", err)
	}
	must(t, os.Remove(path))
	must(t, sink.Write(line("7")))
	must(t, sink.Close())
	for name, want := range map[string]string{path + ".1": "1\n", path + ".2": "4\n5\n", path: "7\n"} {
		if got := content(t, name); got != want {
			t.Errorf("%s: %q, want %q", filepath.Base(name), got, want)
		}
	}
}

func TestProcessesThatShareAFileTearNoLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	var writers sync.WaitGroup
	for range 4 {
		sink, err := File(path)
		must(t, err)
		l := open(t, Options{}, sink)
		writers.Go(func() {
			for range 10 {
				end, err := l.Begin(t.Context(), unseal)
				if err != nil {
					t.Error(err)
					return
				}
				end(nil)
			}
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	writers.Wait()
	events := map[string]string{}
	for text := range strings.Lines(content(t, path)) {
		var r record
		must(t, json.Unmarshal([]byte(text), &r))
		events[r.ID] += r.Event + " "
	}
	if len(events) != 40 {
		t.Errorf("%d acts", len(events))
	}
	for id, got := range events {
		if got != "intent outcome " {
			t.Errorf("act %s: %s", id, got)
		}
	}
}

// A disk that is full is a real one where the test may mount a small tmpfs.
func TestOneFullDiskStopsNoActAndAllOfThemDo(t *testing.T) {
	full := t.TempDir()
	if err := unix.Mount("tmpfs", full, "tmpfs", 0, "size=16k,mode=0700"); err != nil {
		t.Skipf("mounting a small tmpfs: %v", err)
	}
	t.Cleanup(func() { must(t, unix.Unmount(full, unix.MNT_DETACH)) })
	fill := func() {
		for err := error(nil); err == nil; {
			var f *os.File
			f, err = os.OpenFile(filepath.Join(full, "ballast"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
			must(t, err)
			_, err = f.Write(make([]byte, 512))
			must(t, f.Close())
		}
	}
	elsewhere := filepath.Join(t.TempDir(), "audit.log")
	onFull, err := File(filepath.Join(full, "audit.log"))
	must(t, err)
	good, err := File(elsewhere)
	must(t, err)
	l := open(t, Options{}, onFull, good)
	act := func() error {
		end, err := l.Begin(t.Context(), unseal)
		if err == nil {
			end(nil)
		}
		return err
	}
	must(t, act())
	fill()
	for range 20 { // until the file's own block is full as well
		must(t, act())
	}
	if status := l.Sinks()[0]; !errors.Is(status.Err, syscall.ENOSPC) {
		t.Fatalf("the full disk: %+v", status)
	}

	must(t, l.Check(t.Context()))
	if status := l.Sinks()[0]; !errors.Is(status.Err, syscall.ENOSPC) {
		t.Errorf("a check of the full disk: %+v", status)
	}
	must(t, os.Remove(filepath.Join(full, "ballast")))
	must(t, act())
	if status := l.Sinks()[0]; status.Err != nil {
		t.Errorf("with room again: %v", status.Err)
	}
	told, whole := 0, 0
	for text := range strings.Lines(content(t, filepath.Join(full, "audit.log"))) {
		var r record
		if json.Unmarshal([]byte(text), &r) != nil {
			continue // cut short where the disk was full, and closed off
		}
		whole++
		if r.Missed != nil {
			told += int(r.Missed.Lines)
		}
	}
	if missed := l.Sinks()[0].Missed; told == 0 || told != int(missed) || whole < 4 {
		t.Errorf("the file tells of %d missed lines of %d, and has %d whole ones", told, missed, whole)
	}
	if got := strings.Count(content(t, elsewhere), "\n"); got != 44 {
		t.Errorf("the other file has %d lines", got)
	}
	must(t, l.Close())

	fill()
	alone, err := File(filepath.Join(full, "audit.log"))
	must(t, err)
	l = open(t, Options{}, alone)
	err = nil
	for range 20 {
		if err = act(); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrNoSink) || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("with all disks full: %v", err)
	}
	must(t, l.Close())
}

// TestWhoMayReadAFileCannotStopTheLog: a lock needs no right to write, and may be held for ever.
func TestWhoMayReadAFileCannotStopTheLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.log")
	sink, err := File(path)
	must(t, err)
	must(t, sink.Reopen())
	reader, err := os.Open(path)
	must(t, err)
	defer reader.Close()
	must(t, unix.Flock(int(reader.Fd()), unix.LOCK_EX))
	written := make(chan error, 1)
	go func() { written <- sink.Write(line("1")) }()
	select {
	case err := <-written:
		must(t, err)
	case <-time.After(10 * time.Second):
		t.Error("the log waits for somebody who only reads it")
		must(t, reader.Close())
		must(t, <-written)
	}
	must(t, sink.Close())
	if got := content(t, path); got != "1\n" {
		t.Errorf("%q", got)
	}
}

// TestAFileThatIsNotSafeIsASinkThatFails: a mode that somebody changed keeps no Vault sealed after the next start where another
// sink takes lines, and none for longer than it takes to mend it.
func TestAFileThatIsNotSafeIsASinkThatFails(t *testing.T) {
	dir := t.TempDir()
	path, good := filepath.Join(dir, "audit.log"), filepath.Join(dir, "good.log")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Chmod(path, 0o622))
	file := func(path string) Sink {
		sink, err := File(path)
		must(t, err)
		return sink
	}
	act := func(l *Log) error {
		end, err := l.Begin(t.Context(), unseal)
		if err == nil {
			end(nil)
		}
		return err
	}

	l := open(t, Options{}, file(path), file(good))
	must(t, l.Check(t.Context()))
	if status := l.Sinks()[0]; !errors.Is(status.Err, ErrUnsafe) {
		t.Errorf("beside a sink that works, at the start: %+v", status)
	}
	must(t, act(l))
	if status := l.Sinks()[0]; !errors.Is(status.Err, ErrUnsafe) || status.Missed != 2 {
		t.Errorf("after an act: %+v", status)
	}
	must(t, os.Chmod(path, 0o600))
	must(t, act(l))
	if status := l.Sinks()[0]; status.Err != nil {
		t.Errorf("once it is mended: %+v", status)
	}
	must(t, os.Chmod(path, 0o622))
	l.Reopen()
	must(t, act(l))
	if status := l.Sinks()[0]; !errors.Is(status.Err, ErrUnsafe) {
		t.Errorf("opened anew: %+v", status)
	}
	must(t, l.Close())

	alone := open(t, Options{}, file(path))
	if err := alone.Check(t.Context()); !errors.Is(err, ErrNoSink) || !errors.Is(err, ErrUnsafe) {
		t.Errorf("a check of the only one: %v", err)
	}
	if err := act(alone); !errors.Is(err, ErrNoSink) || !errors.Is(err, ErrUnsafe) || !strings.Contains(err.Error(), "chmod go-w "+path) {
		t.Errorf("with the only one: %v", err)
	}
	must(t, os.Chmod(path, 0o600))
	must(t, alone.Check(t.Context()))
	must(t, act(alone))
	must(t, alone.Close())
	if lines := strings.Count(content(t, path), "\n"); lines != 4 {
		t.Errorf("the file has %d lines", lines)
	}
}
