package nethsm

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// impatient opens a device that waits for other nodes for a moment only.
func impatient(t *testing.T, h *nethsmtest.HSM) *Device {
	t.Helper()
	manager := NewManager(nil)
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	device, err := manager.Open(DeviceConfig{
		Options:       Options{URLs: h.URLs(), TLS: TLS{CA: h.CA()}},
		Operator:      Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)},
		Administrator: &Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)},
		Objects:       true,
	})
	if err != nil {
		t.Fatal(err)
	}
	device.lag = 300 * time.Millisecond
	return device
}

// Two nodes took a write to one name at the same moment, which a cluster cannot prevent. What its caches show passes; in the end
// all show the one that came last.
func TestWriteThatAnotherOneReplacedIsNotConfirmed(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	device := impatient(t, h)
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}
	path := "/keys/" + carrierID(ref) + "/cert"
	other := nethsmtest.Fault{
		Method: http.MethodGet, Path: path, Status: http.StatusOK, Body: append(header(ref), "of another writer"...),
		Header: http.Header{"Content-Type": {"application/octet-stream"}},
	}
	remove := h.Node(1).Inject(other)
	if err := device.WriteObject(t.Context(), ref, []byte("value")); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("WriteObject = %v, want ErrExists", err)
	}
	remove()
	if err := device.DeleteObject(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	other.Times = 3 // from the cache
	h.Node(1).Inject(other)
	device.lag = cacheLag
	if err := device.WriteObject(t.Context(), ref, []byte("value")); err != nil {
		t.Errorf("WriteObject over an old cache = %v", err)
	}
}

// A cluster that fell apart: what one node wrote never reaches the other one.
func TestWriteThatOtherNodesNeverShowIsNotConfirmed(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
	device := impatient(t, h)
	remove := h.Node(1).Inject(nethsmtest.Fault{Method: http.MethodGet, Path: "/keys/", Status: http.StatusNotFound})
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}
	began := time.Now()
	err := device.WriteObject(t.Context(), ref, []byte("value"))
	if !errors.Is(err, hsm.ErrUnavailable) || !errors.Is(err, hsm.ErrMayHaveHappened) || !strings.Contains(err.Error(), h.Node(1).URL()) {
		t.Errorf("WriteObject = %v, want ErrUnavailable and ErrMayHaveHappened with the node's URL", err)
	}
	if took := time.Since(began); took < device.lag || took > 10*time.Second {
		t.Errorf("the other node was waited for %v", took)
	}
	remove()
	if err := device.WriteObject(t.Context(), ref, []byte("other")); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("a second WriteObject = %v, want ErrExists", err)
	}
}
