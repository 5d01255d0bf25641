package nethsm_test

import (
	"errors"
	"net/http"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// A node can read and hangs over every write (a NetHSM was seen to). A carrier is made in a moment, so nobody waits for it as
// long as for an RSA key.
func TestNodeThatHangsOverWritesHoldsNobodyForMinutes(t *testing.T) {
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete} {
		h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
		config := deviceOn(h)
		config.Timeout = 2 * time.Second
		device := openDevice(t, config)
		nethsm.ShortenGrace(device, shortGrace)
		if method == http.MethodDelete {
			if err := device.WriteObject(shortly(t), unsealObject, []byte("value")); err != nil {
				t.Fatal(err)
			}
		}
		h.Node(0).Inject(nethsmtest.Fault{Method: method, Path: "/keys/", Hang: true})
		began := time.Now()
		var err error
		if method == http.MethodDelete {
			err = device.DeleteObject(shortly(t), unsealObject)
		} else {
			err = device.WriteObject(shortly(t), unsealObject, []byte("value"))
		}
		if !errors.Is(err, hsm.ErrUnavailable) || !errors.Is(err, hsm.ErrMayHaveHappened) {
			t.Errorf("with a node that hangs over %s: %v, want ErrUnavailable and ErrMayHaveHappened", method, err)
		}
		if took := time.Since(began); took > 20*time.Second {
			t.Errorf("a node that hangs over %s holds a writer for %v", method, took)
		}
	}
}

// Whoever asks a node that still has the empty carrier in its cache would find nothing where the older value is deleted next.
func TestWriteIsDoneWhenEveryNodeThatAnswersShowsIt(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 4, Provisioned: true})
	device := openDevice(t, deviceOn(h))
	path := "/keys/" + unsealCarrier + "/cert"
	h.Node(2).Inject(nethsmtest.Fault{Method: http.MethodGet, Path: path, Status: http.StatusNotFound, Times: 4})
	h.Node(3).Stop()
	if err := device.WriteObject(shortly(t), unsealObject, []byte("value")); err != nil {
		t.Fatal(err)
	}
	if n := asked(h, http.MethodGet, path); n != 1+1+5 {
		t.Errorf("the value was read %d times, want once where it was written, once at the next node, and five times where it came late", n)
	}
}
