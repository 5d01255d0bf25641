package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// wantedLock is how much memory a module host wants to lock, in bytes, with room to spare.
const wantedLock = 64 << 20

// wantedDisk is what a state directory should have free, in bytes: PIN ledger and key records are small, and a full disk
// stops log-ins.
const wantedDisk = 16 << 20

func (d *doctor) machine(context.Context) {
	f := d.about("machine")
	d.stateDir(f)
	lockedMemory(f)
}

// stateDir looks at the folder without which nobody logs in to a token.
func (d *doctor) stateDir(f chart) {
	const check = "state directory"
	dir := d.Config.StateDir
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		f.problem(check, "make it, or mount it: install -d -m 700 "+dir, "%s is not there", dir)
		return
	case err != nil:
		f.problem(check, "let this user read it, or name another state_dir", "%s cannot be looked at: %v", dir, err)
		return
	case !info.IsDir():
		f.problem(check, "name a folder as state_dir", "%s is no folder", dir)
		return
	case info.Mode().Perm()&0o022 != 0:
		f.problem(check, "chmod 0700 "+dir, "%s may be written by others: they could lift PIN bars and replace key records", dir)
		return
	}
	probe, err := os.CreateTemp(dir, ".doctor-*")
	if err == nil {
		err = errors.Join(probe.Close(), os.Remove(probe.Name()))
	}
	if err != nil {
		f.problem(check, "run as the user that owns it, or name another state_dir; no log-in happens where it cannot be written",
			"%s cannot be written: %v", dir, err)
		return
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(dir, &disk); err == nil {
		if free := disk.Bavail * uint64(max(disk.Bsize, 0)); free < wantedDisk {
			f.warning(check, "make room: on a full disk only the PIN that worked last is used", "%s has only %d kB free", dir, free>>10)
			return
		}
	}
	f.ok(check, "%s can be written", dir)
}

// lockedMemory looks at how much memory this user may lock. A module host that may not lock all of its memory locks its
// buffers one by one.
func lockedMemory(f chart) {
	const check = "mlock"
	page := make([]byte, os.Getpagesize())
	if err := unix.Mlock(page); err != nil {
		f.warning(check, lockRemedy(), "this user may lock no memory (%v): PINs and plaintext could be swapped to disk", err)
		return
	}
	_ = unix.Munlock(page) // ends with the process anyway
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		f.skipped(check, "how much memory this user may lock is not known: %v", err)
		return
	}
	switch {
	case mayLockAll():
		f.ok(check, "this user may lock all memory (CAP_IPC_LOCK)")
	case limit.Cur >= wantedLock:
		f.ok(check, "this user may lock %d MB", limit.Cur>>20)
	default:
		f.warning(check, lockRemedy(), "this user may lock %d kB only: a module host locks its PIN and its buffers, not all of its memory", limit.Cur>>10)
	}
}

func lockRemedy() string {
	return fmt.Sprintf("set LimitMEMLOCK=%d in the systemd unit, or \"ulimit -l\" for a shell; or turn swap off", wantedLock)
}

// mayLockAll tells whether the process has CAP_IPC_LOCK.
func mayLockAll() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	return unix.Capget(&header, &data[0]) == nil && data[0].Effective&(1<<unix.CAP_IPC_LOCK) != 0
}
