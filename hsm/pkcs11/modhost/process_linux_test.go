//go:build cgo

package modhost

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// What this test binary is started as, besides a host: os.Args[0] tells.
const (
	playParent  = "modhost-test-parent"  // starts a host on its own descriptors 3 and 4 and waits for its own end
	playBirth   = "modhost-test-birth"   // is born as a host and prints what became of it
	playLimited = "modhost-test-limited" // sets RLIMIT_MEMLOCK to os.Args[1] and becomes os.Args[2]
)

func init() {
	play = func() {
		switch os.Args[0] {
		case playParent:
			child := exec.Cmd{
				Path: "/proc/self/exe", Args: []string{wire.HostArgv0}, Env: os.Environ(),
				ExtraFiles: []*os.File{os.NewFile(3, ""), os.NewFile(4, "")},
			}
			if err := child.Start(); err != nil {
				panic(err)
			}
			_, _ = fmt.Fprintln(os.Stdout, child.Process.Pid)
			select {}
		case playLimited:
			limit, err := strconv.ParseUint(os.Args[1], 10, 64)
			if err != nil {
				panic(err)
			}
			if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: limit, Max: limit}); err != nil {
				panic(err)
			}
			panic(syscall.Exec("/proc/self/exe", os.Args[2:], os.Environ()))
		case playBirth:
			notes, secrets, err := birth()
			b := born{Notes: notes, Everything: secrets.everything}
			if err != nil {
				b.Error = err.Error()
			}
			b.Dumpable, _ = unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
			_ = json.NewEncoder(os.Stdout).Encode(b)
			os.Exit(0)
		}
	}
}

// born is what playBirth prints.
type born struct {
	Notes      []string
	Everything bool
	Error      string
	Dumpable   int
}

// beBorn runs playBirth, through playLimited where a limit is given.
func beBorn(t *testing.T, limit string, env ...string) born {
	t.Helper()
	command := exec.CommandContext(t.Context(), "/proc/self/exe")
	command.Args = []string{playBirth}
	command.Env = append(ofTests(t), env...)
	if limit != "" {
		command.Args = []string{playLimited, limit, playBirth}
		unprivileged(command)
	}
	pipe, other, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = pipe.Close(); _ = other.Close() }()
	command.ExtraFiles = []*os.File{pipe, other}
	command.Stderr = os.Stderr
	out, err := command.Output()
	if err != nil {
		t.Fatal(err)
	}
	var b born
	if err := json.Unmarshal(out, &b); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	return b
}

func TestBirth(t *testing.T) {
	privileged := mayLockAll()
	for name, c := range map[string]struct {
		limit      string
		env        []string
		everything bool
		note, err  string
	}{
		"as this process may":           {everything: privileged},
		"with little memory to lock":    {limit: "65536", note: "may not lock all of its memory"},
		"with OpenSC's debug log":       {env: []string{"OPENSC_DEBUG=9"}, everything: privileged, err: "OPENSC_DEBUG"},
		"with OpenSC's log set to none": {env: []string{"OPENSC_DEBUG="}, everything: privileged, err: "OPENSC_DEBUG"},
		"with a spy":                    {env: []string{"PKCS11SPY=/m.so"}, everything: privileged, note: "PKCS11SPY"},
	} {
		t.Run(name, func(t *testing.T) {
			b := beBorn(t, c.limit, c.env...)
			if b.Dumpable != 0 {
				t.Errorf("dumpable: %d", b.Dumpable)
			}
			if b.Everything != c.everything {
				t.Errorf("all memory locked: %t, want %t", b.Everything, c.everything)
			}
			if !strings.Contains(strings.Join(b.Notes, " "), c.note) || (c.note == "" && privileged && len(b.Notes) > 0) {
				t.Errorf("notes %q, want %q", b.Notes, c.note)
			}
			if (b.Error == "") != (c.err == "") || !strings.Contains(b.Error, c.err) {
				t.Errorf("error %q, want %q", b.Error, c.err)
			}
		})
	}
}

func TestADebugLogIsRefused(t *testing.T) {
	_, err := startHost(t, "OPENSC_DEBUG=3").hello(stub(t))
	if failure := asFailure(t, err); failure.Code != wire.CodeLoad || !strings.Contains(failure.Detail, "OPENSC_DEBUG") {
		t.Errorf("got %v", failure)
	}
}

// status reads a number of kB from /proc/PID/status.
func status(t testing.TB, pid int, field string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile(`(?m)^` + field + `:\s*(\d+) kB$`).FindSubmatch(text)
	if match == nil {
		t.Fatalf("no %s in\n%s", field, text)
	}
	kB, err := strconv.Atoi(string(match[1]))
	if err != nil {
		t.Fatal(err)
	}
	return kB
}

func TestAHostIsSmallAndKeepsItsMemory(t *testing.T) {
	k := pkcs11test.SoftHSM(t)
	h := startHost(t, environment(k)...)
	reply, err := h.hello(k.Module)
	if err != nil {
		t.Fatal(err)
	}
	pid := h.command.Process.Pid
	if reply.MemoryLocked != mayLockAll() {
		t.Errorf("memory locked: %t, and this process may: %t", reply.MemoryLocked, mayLockAll())
	}
	locked, resident := status(t, pid, "VmLck"), status(t, pid, "VmRSS")
	t.Logf("an idle host: %d kB resident, %d kB of address space locked on fault", resident, locked)
	if reply.MemoryLocked && locked == 0 {
		t.Error("nothing is locked")
	}
	if resident > 40<<10 && !raceEnabled {
		t.Errorf("an idle host takes %d kB", resident)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("core dumps are on:\n%s", limits)
	}
}

func TestSignalsOfTheTerminalDoNotEndAHost(t *testing.T) {
	h := startHost(t)
	if _, err := h.hello(stub(t)); err != nil {
		t.Fatal(err)
	}
	for _, signal := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT} {
		if err := h.command.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
	}
	_, err := h.call(wire.OpSlots, nil, nil, nil)
	wantCode(t, err, 0x54)
}

func TestTheEndOfThePipeEndsTheHost(t *testing.T) {
	for name, c := range map[string]struct {
		module string
		op     wire.Op
	}{
		"before the Hello":       {},
		"while it has no work":   {module: stub(t)},
		"while the module hangs": {module: stub(t, "SLOTS=hang"), op: wire.OpSlots},
		"while it is loaded":     {module: stub(t, "INITIALIZE=hang()"), op: wire.OpHello},
	} {
		t.Run(name, func(t *testing.T) {
			hangs := filepath.Join(t.TempDir(), "hangs")
			h := startHost(t, "STUB_HANGS="+hangs)
			hello := wire.Hello{Version: wire.Version, Module: c.module, MaxSessions: 1}
			switch {
			case c.op == wire.OpHello:
				h.send(wire.OpHello, hello, nil)
			case c.module != "":
				h.must(wire.OpHello, hello, nil, nil)
			}
			if c.op == wire.OpSlots {
				h.send(wire.OpSlots, nil, nil)
			}
			if c.op != 0 {
				eventually(t, "the module was not reached", func() bool {
					_, err := os.Stat(hangs)
					return err == nil
				})
			}
			begun := time.Now()
			_ = h.write.Close()
			h.waitExit()
			if h.exit != nil {
				t.Errorf("the host ended with %v", h.exit)
			}
			t.Logf("gone after %v", time.Since(begun))
		})
	}
}

func TestTheDeathOfTheParentEndsTheHost(t *testing.T) {
	requests, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	read, answers, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	// This side of the pipe stays open, so nothing but the signal can end the host.
	defer func() { _ = write.Close(); _ = read.Close() }()
	parent := exec.CommandContext(t.Context(), "/proc/self/exe")
	parent.Args = []string{playParent}
	parent.Env = ofTests(t)
	parent.ExtraFiles = []*os.File{requests, answers}
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	_ = requests.Close()
	_ = answers.Close()
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	hello := wire.Frame{ID: 1, Op: wire.OpHello, Meta: wire.Encode(wire.Hello{Version: wire.Version, Module: stub(t), MaxSessions: 1})}
	if err := wire.WriteFrame(write, hello); err != nil {
		t.Fatal(err)
	}
	if answer, err := wire.ReadFrame(read); err != nil || answer.Failed {
		t.Fatalf("the host does not serve: %+v, %v", answer, err)
	}
	_ = parent.Process.Kill()
	_ = parent.Wait()
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		_, _ = wire.ReadFrame(read) // its end is what is waited for
	}()
	select {
	case <-gone:
	case <-time.After(patience):
		_ = unix.Kill(pid, unix.SIGKILL)
		t.Fatal("the host outlived its parent")
	}
}

func TestAHostWhoseParentIsGoneAlreadyDoesNothing(t *testing.T) {
	requests, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = requests.Close() }()
	_ = write.Close()
	command := exec.CommandContext(t.Context(), "/proc/self/exe")
	command.Args = []string{playBirth}
	command.Env = ofTests(t)
	command.ExtraFiles = []*os.File{requests, requests}
	if out, err := command.Output(); err != nil || len(out) > 0 {
		t.Errorf("it lives on: %v, %q", err, out)
	}
}

func TestAHostStartedByHandSaysSo(t *testing.T) {
	// Whoever runs the tests may have left a descriptor open that a host would take for its own.
	if err := unix.CloseRange(requestsFD, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), "/proc/self/exe")
	command.Args = []string{wire.HostArgv0}
	command.Env = ofTests(t)
	out, err := command.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "not by hand") {
		t.Errorf("got %v: %s", err, out)
	}
}

func TestNothingOfASecretStaysInTheHost(t *testing.T) {
	module := stub(t, "WORKS")
	for name, args := range map[string][]string{
		"as this process may":        {wire.HostArgv0},
		"with little memory to lock": {playLimited, "65536", wire.HostArgv0},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.Chmod(filepath.Dir(filepath.Dir(module)), 0o711); err != nil { // for a host without privileges
				t.Fatal(err)
			}
			h := startHostAs(t, args)
			if _, err := h.hello(module); err != nil {
				t.Fatal(err)
			}
			memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", h.command.Process.Pid))
			if errors.Is(err, os.ErrPermission) {
				t.Skip("only root can look into a host, which is as it should be")
			}
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = memory.Close() }()

			pin, pins, ciphertext := randomDigits(), randomDigits()+randomDigits(), make([]byte, 256)
			rand.Read(ciphertext)
			slot := wire.SlotRequest{Slot: 0}
			h.must(wire.OpLogin, slot, []byte(pin), nil)
			h.must(wire.OpSetPIN, wire.SetPINRequest{OldLen: len(pins) / 2}, []byte(pins), nil)
			plaintext := h.must(wire.OpDecryptOAEP, wire.DecryptRequest{Hash: 0x220, Size: 256}, ciphertext, nil)

			for what, secret := range map[string][]byte{
				"the PIN": []byte(pin), "the old PIN": []byte(pins[:len(pins)/2]), "the new PIN": []byte(pins[len(pins)/2:]),
				"the plaintext": plaintext[:32],
			} {
				eventually(t, what+" is still in the memory of the host", func() bool {
					return !holds(t, h.command.Process.Pid, memory, secret)
				})
			}
			if canary := []byte(module); !holds(t, h.command.Process.Pid, memory, canary) {
				t.Error("not even the path of the module is found: this test sees nothing")
			}
		})
	}
}

// randomDigits is a PIN that is in no program.
func randomDigits() string {
	var b strings.Builder
	for range 15 {
		digit, err := rand.Int(rand.Reader, big.NewInt(10))
		if err != nil {
			panic(err)
		}
		b.WriteString(digit.String())
	}
	return b.String()
}

// holds tells whether the memory of a process holds these bytes.
func holds(t *testing.T, pid int, memory *os.File, secret []byte) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		var start, end uint64
		var access string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &start, &end, &access); err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(access, "rw") {
			continue
		}
		const step = 1 << 20
		for at := start; at < end; at += step {
			piece := make([]byte, min(step+uint64(len(secret)), end-at))
			n, _ := memory.ReadAt(piece, int64(at)) // what cannot be read is not there either
			if bytes.Contains(piece[:n], secret) {
				return true
			}
		}
	}
	return false
}

// giveToNobody lets a host without privileges use the token in this directory of a test.
func giveToNobody(t *testing.T, dir string) {
	t.Helper()
	if os.Getuid() != 0 {
		return
	}
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, nobody, nobody)
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil {
		t.Fatal(err)
	}
}

func TestSecretsAreLockedOneByOneWhereAllMemoryMayNotBe(t *testing.T) {
	for name, c := range map[string]struct {
		limit  uint64
		locked bool
	}{
		"with little memory to lock": {64 << 10, true},
		"with none":                  {0, false},
	} {
		t.Run(name, func(t *testing.T) {
			k := pkcs11test.SoftHSM(t)
			giveToNobody(t, filepath.Dir(os.Getenv("SOFTHSM2_CONF")))
			h := startHostAs(t, []string{playLimited, fmt.Sprint(c.limit), wire.HostArgv0}, environment(k)...)
			reply, err := h.hello(k.Module)
			if err != nil {
				t.Fatal(err)
			}
			if reply.MemoryLocked || len(reply.Notes) != 1 {
				t.Errorf("got %+v", reply)
			}
			slot := slotOf(h, k)
			random := wire.RandomRequest{Slot: slot, Count: 32}
			_, loginErr := h.call(wire.OpLogin, wire.SlotRequest{Slot: slot}, []byte(k.PIN), nil)
			got, randomErr := h.call(wire.OpRandom, random, nil, nil)
			if !c.locked {
				if failure := asFailure(t, loginErr); failure.Code != wire.CodeLockMemory || !strings.Contains(failure.Detail, "RLIMIT_MEMLOCK") {
					t.Errorf("got %v", failure)
				}
				wantCode(t, randomErr, wire.CodeLockMemory)
				return
			}
			if loginErr != nil || randomErr != nil || len(got) != 32 {
				t.Fatalf("log-in: %v; %d random bytes: %v", loginErr, len(got), randomErr)
			}
			for range 100 {
				h.must(wire.OpRandom, random, nil, nil)
			}
			// All that is left is the buffer for answers; the last secret goes after its answer was sent.
			eventually(t, "more is locked than the buffer for answers", func() bool {
				return status(t, h.command.Process.Pid, "VmLck") == scratchSize>>10
			})
		})
	}
}
