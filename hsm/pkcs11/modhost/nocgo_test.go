//go:build !cgo

package modhost

import (
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func TestWithoutCgoTheHostSaysWhatToDo(t *testing.T) {
	h := startHost(t)
	_, err := h.hello("/usr/lib/module.so")
	failure := asFailure(t, err)
	if failure.Code != wire.CodeLoad {
		t.Errorf("got %v", failure)
	}
	for _, want := range []string{"built without cgo", "/usr/lib/module.so", "-module-host=PATH -module-host-sha256=HEX"} {
		if !strings.Contains(failure.Detail, want) {
			t.Errorf("%q does not say %q", failure.Detail, want)
		}
	}
	_, err = h.call(wire.OpSlots, nil, nil, nil)
	wantCode(t, err, wire.CodeBadRequest)
}
