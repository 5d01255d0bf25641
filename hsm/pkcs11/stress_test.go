package pkcs11_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// TestHostsKilledWhileMuchIsGoingOn kills hosts at moments of nobody's choosing. Whatever an operation was doing, it
// works or is ErrUnavailable, and what was said to be written or deleted is.
func TestHostsKilledWhileMuchIsGoingOn(t *testing.T) {
	s := newSetting(t, pkcs11test.SoftHSM(t))
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
	written := map[string]bool{} // whether it must be there; absent where nobody can say
	all.Go(func() {
		device := s.open(t)
		for i := 0; open(end); i++ {
			label := fmt.Sprintf("item-%d", i)
			ref := hsm.ObjectRef{Application: "nitroseal", Label: label}
			if !note("writing", device.WriteObject(patient(t), ref, []byte(label))) {
				continue
			}
			written[label] = true
			if i%2 == 0 {
				delete(written, label)
				if note("deleting", device.DeleteObject(patient(t), ref)) {
					written[label] = false
				}
			}
		}
	})
	tick := time.NewTicker(150 * time.Millisecond)
	defer tick.Stop()
	for range 12 {
		<-tick.C
		for _, pid := range hosts(t) {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended meanwhile
		}
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

// open tells whether a channel is still open.
func open(end <-chan struct{}) bool {
	select {
	case <-end:
		return false
	default:
		return true
	}
}
