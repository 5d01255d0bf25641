package file_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// Other processes are played by this test binary, told by the environment what to do.
const roleVariable = "NITROSEAL_FILE_STORE_TEST_ROLE"

func TestMain(m *testing.M) {
	role, dir, _ := strings.Cut(os.Getenv(roleVariable), ":")
	switch role {
	case "":
		os.Exit(m.Run())
	case "lock":
		playLockHolder(dir)
	case "count":
		playCounter(dir)
	case "full":
		playFullDisk(dir)
	case "write":
		playEndlessWriter(dir)
	}
}

func child(t *testing.T, role, dir string) *exec.Cmd {
	t.Helper()
	command := exec.CommandContext(t.Context(), os.Args[0])
	command.Env = append(os.Environ(), roleVariable+"="+role+":"+dir)
	command.Stderr = os.Stderr
	return command
}

// tell says something to the test that started this process.
func tell(line string) {
	if _, err := os.Stdout.WriteString(line + "\n"); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// holdLock starts a process that holds the store's lock until the test ends.
func holdLock(t *testing.T, dir string) {
	t.Helper()
	command := child(t, "lock", dir)
	stdin, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); _ = command.Wait() }) // killed with the test's context, or ended by its stdin
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "locked\n" {
		t.Fatalf("the lock holder said %q, %v", line, err)
	}
}

func playLockHolder(dir string) {
	lock, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		fail(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		fail(err)
	}
	tell("locked")
	_, _ = os.Stdin.Read(make([]byte, 1)) // until the parent closes it
}

const (
	countEach = 25
	countName = "n"
)

func playCounter(dir string) {
	s, err := file.Open(dir)
	if err != nil {
		fail(err)
	}
	ctx := context.Background()
	for done := 0; done < countEach; {
		entry, err := s.Get(ctx, countName)
		if err != nil {
			fail(err)
		}
		_, err = s.Put(ctx, countName, append(entry.Value, '|'), entry.Revision)
		if err != nil && !errors.Is(err, store.ErrConflict) {
			fail(err)
		}
		if err == nil {
			done++
		}
	}
}

func TestProcessesCountWithoutLosingOne(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	if _, err := s.Put(t.Context(), countName, nil, store.NoRevision); err != nil {
		t.Fatal(err)
	}
	children := []*exec.Cmd{child(t, "count", dir), child(t, "count", dir), child(t, "count", dir)}
	for _, c := range children {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range children {
		if err := c.Wait(); err != nil {
			t.Errorf("a counter: %v", err)
		}
	}
	entry, err := s.Get(t.Context(), countName)
	if err != nil || len(entry.Value) != countEach*len(children) {
		t.Errorf("counted %d, %v, want %d", len(entry.Value), err, countEach*len(children))
	}
}

// A limit on the size of files makes write(2) fail in the middle of a file, as a full disk does.
func playFullDisk(dir string) {
	signal.Ignore(unix.SIGXFSZ)
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 4096, Max: 4096}); err != nil {
		fail(err)
	}
	s, err := file.Open(dir)
	if err != nil {
		fail(err)
	}
	entry, err := s.Get(context.Background(), "a")
	if err != nil {
		fail(err)
	}
	_, err = s.Put(context.Background(), "a", make([]byte, 8192), entry.Revision)
	if !errors.Is(err, store.ErrFull) {
		fail(fmt.Errorf("writing to a full disk, which wants ErrFull: %w", err))
	}
}

func TestFullDiskLeavesTheOldValue(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	revision, err := s.Put(t.Context(), "a", []byte("old"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	if err := child(t, "full", dir).Run(); err != nil {
		t.Fatalf("the writer: %v", err)
	}
	entry, err := s.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "old" || entry.Revision != revision {
		t.Errorf("Get = %q at %s, %v, want the old value", entry.Value, entry.Revision, err)
	}
	wantNoLeftovers(t, dir)
}

func playEndlessWriter(dir string) {
	s, err := file.Open(dir)
	if err != nil {
		fail(err)
	}
	for i := 0; ; i++ {
		entry, err := s.Get(context.Background(), "a")
		if err != nil {
			fail(err)
		}
		value := bytes.Repeat([]byte{byte(i)}, 20000)
		if _, err := s.Put(context.Background(), "a", value, entry.Revision); err != nil {
			fail(err)
		}
		if i == 3 {
			tell("writing")
		}
	}
}

func TestWriterKilledInMidWriteLeavesAWholeValue(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s := open(t, dir)
	if _, err := s.Put(t.Context(), "a", nil, store.NoRevision); err != nil {
		t.Fatal(err)
	}
	for round := range 10 {
		writer := child(t, "write", dir)
		stdout, err := writer.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := writer.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
			t.Fatalf("the writer did not begin: %v", err)
		}
		<-time.After(time.Duration(round) * 300 * time.Microsecond) // another moment each round
		if err := writer.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = writer.Wait() // killed: the error says so
		entry, err := s.Get(t.Context(), "a")
		if err != nil {
			t.Fatalf("round %d: Get = %v", round, err)
		}
		if !bytes.Equal(entry.Value, bytes.Repeat(entry.Value[:1], 20000)) {
			t.Fatalf("round %d: a mixed value of %d bytes", round, len(entry.Value))
		}
		if _, err := s.Put(t.Context(), "a", entry.Value, entry.Revision); err != nil {
			t.Fatalf("round %d: Put after the crash = %v", round, err)
		}
		wantNoLeftovers(t, dir)
	}
}

func wantNoLeftovers(t *testing.T, dir string) {
	t.Helper()
	files, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Name() != ".lock" && f.Name() != "a" {
			t.Errorf("%s was left behind", f.Name())
		}
	}
}
