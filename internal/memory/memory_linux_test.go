package memory

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// flagsOf returns the kernel's flags of the pages that hold a byte: "lo" locked, "dd" not dumped, "wf" empty after a fork.
func flagsOf(t *testing.T, b []byte) string {
	t.Helper()
	file, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	at := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b))))
	inside := false
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var begin, end uint64
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x ", &begin, &end); n == 2 {
			inside = begin <= at && at < end
		}
		if flags, ok := strings.CutPrefix(lines.Text(), "VmFlags:"); ok && inside {
			return flags + " "
		}
	}
	t.Fatal("the buffer is nowhere")
	return ""
}

func TestABufferIsLockedAndNeitherDumpedNorInherited(t *testing.T) {
	b, err := New(100)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	flags := flagsOf(t, b.Bytes())
	if b.Locked() != strings.Contains(flags, " lo ") {
		t.Errorf("it says locked %v, the kernel says%s", b.Locked(), flags)
	}
	for _, flag := range []string{" dd ", " wf "} {
		if !strings.Contains(flags, flag) {
			t.Errorf("the kernel does not say%sof it:%s", flag, flags)
		}
	}
}

// The rest happens in processes of their own: limits cannot be taken back.
const asChild = "NITROSEAL_MEMORY_TEST"

func child(t *testing.T, what string) {
	t.Helper()
	command := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run", "^"+t.Name()+"$", "-test.v")
	command.Env = append(os.Environ(), asChild+"="+what)
	if out, err := command.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestWhereLockingIsNotPermittedABufferWorksAndSaysSo(t *testing.T) {
	if os.Getenv(asChild) == "" {
		child(t, "no lock")
		return
	}
	forbidLocking(t)
	b, err := New(100)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Wipe()
	if b.Locked() || strings.Contains(flagsOf(t, b.Bytes()), " lo ") {
		t.Error("it says that it is locked")
	}
	a, err := NewAES(make([]byte, 32))
	if err != nil || a.Locked() {
		t.Errorf("a key is locked %v: %v", a.Locked(), err)
	}
	a.Wipe()
	if err := LockAll(); !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.ENOMEM) {
		t.Errorf("locking all memory: %v", err)
	}
}

// forbidLocking takes away the limit and the capability to go beyond it.
func forbidLocking(t *testing.T) {
	t.Helper()
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{}); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 {
		return
	}
	runtime.LockOSThread() // capabilities are a thread's own; this one ends with the test
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	data[unix.CAP_IPC_LOCK/32].Effective &^= 1 << (unix.CAP_IPC_LOCK % 32)
	if err := unix.Capset(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
}

func TestLockingAllLocksWhatComesLater(t *testing.T) {
	if os.Getenv(asChild) == "" {
		child(t, "lock all")
		return
	}
	if err := LockAll(); errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOMEM) {
		t.Skipf("not permitted here: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	later := make([]byte, 8<<20)
	if !strings.Contains(flagsOf(t, later), " lo ") {
		t.Error("memory that was taken later is not locked")
	}
}
