package modhost

import (
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// birth makes this process a safe place for a PIN. The error says why it must not load a module; the notes are for the
// operator. A process that has lost its parent meanwhile ends here.
func birth() (notes []string, _ *secrets, _ error) {
	// The terminal sends Ctrl-C to the whole process group, systemd SIGTERM to the whole service: the host must outlive
	// the work that its parent still finishes. It ends with its pipe.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)

	// A module may start processes: none of them may hold our pipes open.
	unix.CloseOnExec(requestsFD)
	unix.CloseOnExec(answersFD)

	secrets := &secrets{}
	if err := guard(); err != nil {
		return nil, secrets, unfit(err.Error())
	}
	if hungUp(requestsFD) {
		os.Exit(0) // died before guard asked for its death to be told
	}

	// What the initialisation of the plugin's packages left behind would be locked for good, and a heap of 1 MB is enough.
	debug.SetGCPercent(25)
	debug.FreeOSMemory()
	_ = forgetStart()
	secrets.everything = lockMemory() == nil
	if !secrets.everything {
		notes = append(notes, "The module host may not lock all of its memory, so it locks PINs and plaintexts one by one; "+
			"the module's own copies may be swapped out. Give CAP_IPC_LOCK or an unlimited RLIMIT_MEMLOCK, or do without swap.")
	}
	environment, err := checkEnvironment()
	return append(notes, environment...), secrets, err
}

// guard keeps others from reading the memory of this process, and ends it with its parent.
func guard() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("turning core dumps off: %w", err)
	}
	// No ptrace and no /proc/PID/mem for other processes of the same user.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process undumpable: %w", err)
	}
	// The end of the pipe ends this process too, unless another process of the parent's holds the other side.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("asking for the parent-death signal: %w", err)
	}
	return nil
}

// hungUp is true where the other side of a pipe is closed and nothing is left to be read.
func hungUp(fd int32) bool {
	poll := []unix.PollFd{{Fd: fd, Events: unix.POLLIN}}
	_, err := unix.Poll(poll, 0)
	return err == nil && poll[0].Revents&unix.POLLHUP != 0 && poll[0].Revents&unix.POLLIN == 0
}

// lockMemory keeps all memory, present and future, out of the swap. MCL_ONFAULT locks a page when it is first touched:
// without it the address space that the runtime merely reserves would become 250 MB of memory.
func lockMemory() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return err
	}
	if limit.Cur < limit.Max {
		limit.Cur = limit.Max
		_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit)
	}
	// Under a limit the call may succeed now, and a later mmap fail: the runtime would die of that.
	if limit.Cur != unix.RLIM_INFINITY && !mayLockAll() {
		return syscall.EPERM
	}
	return unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
}

// mayLockAll is true where this process has CAP_IPC_LOCK, to which RLIMIT_MEMLOCK does not apply.
func mayLockAll() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	return unix.Capget(&header, &sets[0]) == nil && sets[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}

// checkEnvironment refuses what makes a well-known module write secrets to a log, and notes what does so on purpose.
func checkEnvironment() (notes []string, _ error) {
	if _, set := os.LookupEnv("OPENSC_DEBUG"); set {
		return nil, unfit("OPENSC_DEBUG is set, and OpenSC's debug log contains decrypted plaintext: take it out of the plugin's -module-env")
	}
	if _, set := os.LookupEnv("PKCS11SPY"); set {
		notes = append(notes, "PKCS11SPY is set: its log holds the PIN and every plaintext. Use it with throw-away tokens only.")
	}
	return notes, nil
}

// unfit says why this process must not load a module.
func unfit(why string) error {
	return &wire.Error{Function: "module host", Code: wire.CodeLoad, Detail: why}
}
