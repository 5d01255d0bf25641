package pkcs11_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// TestHostsKilledWhileMuchIsGoingOn kills hosts at moments of nobody's choosing, but for those in which SoftHSM would lose
// its own files (crashes inside a write are played on the card). Whatever an operation was doing, it works or is
// ErrUnavailable, and what was said to be written or deleted is.
func TestHostsKilledWhileMuchIsGoingOn(t *testing.T) {
	token := pkcs11test.SoftHSM(t)
	s := newSetting(t, token)
	key := rsaKey(t, s.open(t, func(c *pkcs11.Config) { c.Parallel = 4 }))
	end := make(chan struct{})
	var worked, failed atomic.Int64
	note := func(what string, err error) bool {
		switch {
		case err == nil:
			worked.Add(1)
			return true
		case errors.Is(err, hsm.ErrUnavailable):
			failed.Add(1)
		case what == "writing" && strings.Contains(err.Error(), "CKR_TEMPLATE_INCONSISTENT"):
			// SoftHSM was seen to find nothing in an object that it has just made, where other threads look for objects.
			failed.Add(1)
		default:
			t.Errorf("%s: %v", what, err)
		}
		return false
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			retry := time.NewTicker(10 * time.Millisecond)
			defer retry.Stop()
			for open(end) {
				if !note("decrypting", decrypts(patient(t), key)) {
					<-retry.C // a host that fails again and again is given a pause, and whoever asks meanwhile hears it at once
				}
			}
		})
	}
	var writing sync.Mutex       // held while SoftHSM writes objects
	written := map[string]bool{} // whether it must be there; absent where nobody can say
	all.Go(func() {
		device := s.open(t)
		for i := 0; open(end); i++ {
			label := fmt.Sprintf("item-%d", i)
			ref := hsm.ObjectRef{Application: "nitroseal", Label: label}
			writing.Lock()
			if note("writing", device.WriteObject(patient(t), ref, []byte(label))) {
				written[label] = true
			}
			if _, there := written[label]; there && i%2 == 0 {
				delete(written, label)
				if note("deleting", device.DeleteObject(patient(t), ref)) {
					written[label] = false
				}
			}
			writing.Unlock()
		}
	})
	tick := time.NewTicker(150 * time.Millisecond)
	defer tick.Stop()
	for range 12 {
		<-tick.C
		writing.Lock()
		for _, pid := range hosts(t) {
			killBetweenWrites(t, pid, filepath.Dir(os.Getenv("SOFTHSM2_CONF")))
		}
		writing.Unlock()
	}
	close(end)
	all.Wait()

	pkcs11test.Until(t, "it works again when all is over", func() bool { return decrypts(patient(t), key) == nil })
	device := s.open(t)
	for label, there := range written {
		got, err := device.ReadObject(patient(t), hsm.ObjectRef{Application: "nitroseal", Label: label})
		if there && (err != nil || string(got) != label) || !there && !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("%s, which must be there: %t, gives %q, %v", label, there, got, err)
		}
	}
	t.Logf("%d operations worked and %d failed; %d objects", worked.Load(), failed.Load(), len(written))
	if worked.Load() == 0 {
		t.Error("nothing worked meanwhile")
	}
}

// killBetweenWrites kills a process that has no file of SoftHSM's open for writing. SoftHSM rewrites its token in place at
// every log-in: a kill in that moment destroys the token, which a card survives and this test is not about.
func killBetweenWrites(t *testing.T, pid int, dir string) {
	t.Helper()
	if syscall.Kill(pid, syscall.SIGSTOP) != nil {
		return // it has ended meanwhile
	}
	defer func() { _ = syscall.Kill(pid, syscall.SIGCONT) }()
	pkcs11test.Until(t, "all threads of the host have stopped", func() bool {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			t.Fatal(err)
		}
		return !slices.ContainsFunc(threads, func(thread string) bool {
			stat, err := os.ReadFile(thread)
			_, state, _ := strings.Cut(string(stat), ") ")
			return err == nil && !strings.HasPrefix(state, "T") && !strings.HasPrefix(state, "Z")
		})
	})
	descriptors, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, descriptor := range descriptors {
		if file, _ := os.Readlink(descriptor); strings.HasPrefix(file, dir) {
			return
		}
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
}

// open tells whether a channel is still open.
func open(end <-chan struct{}) bool {
	select {
	case <-end:
		return false
	default:
		return true
	}
}
