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

// A cluster that fell apart: what one node wrote never reaches the other one.
func TestWriteThatOtherNodesNeverShowIsNotConfirmed(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
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
	remove := h.Node(1).Inject(nethsmtest.Fault{Method: http.MethodGet, Path: "/keys/", Status: http.StatusNotFound})
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}
	began := time.Now()
	err = device.WriteObject(t.Context(), ref, []byte("value"))
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
