package test

import (
	"os"
	"syscall"
	"testing"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// A token that is sent a wrong PIN three times is locked for good. A daemon that finds a sealed node again and again, is
// reloaded and started anew, and commands beside it, send it once.
func TestAWrongPINIsSentOnceWhileAVaultStaysSealed(t *testing.T) {
	w := newWatched(t)
	w.daemon.Stop(t)
	right, err := os.ReadFile(w.File("pin"))
	must(t, err)
	w.Put(t, "pin", []byte("000000"))
	w.vault.Restarted(t)
	d := w.Host.Daemon(t)
	d.Says(t, 0, "PIN")
	w.stays(t, 3)
	d.Signal(t, syscall.SIGHUP) // it tries again then
	w.stays(t, 3)
	d.Stop(t)
	d = w.Host.Daemon(t)
	w.stays(t, 3)
	for range 2 {
		w.Refused(t, vaulttest.ExitRefused, []string{"PIN"}, "unseal", "-once", "eu", "--timeout", "30s")
	}
	if sent := w.card.WrongPINs(t); sent != 1 {
		t.Fatalf("the wrong PIN was sent %d times", sent)
	}

	// As the guide says.
	w.Put(t, "pin", right)
	w.Must(t, "device", "pin", "try", "hsm")
	d.Signal(t, syscall.SIGHUP)
	w.vault.WaitUnsealed(t, unsealLimit)
	if tries := w.card.Tries(t); tries != 3 || w.card.WrongPINs(t) != 1 {
		t.Errorf("the card has %d tries left and was sent %d wrong PINs", tries, w.card.WrongPINs(t))
	}
	d.Stop(t)
}
