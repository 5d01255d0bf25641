//go:build !cgo

package modhost

import "vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"

// open cannot load anything: dlopen needs cgo.
func open(path string, _ int) (library, error) {
	return nil, &wire.Error{Function: "module host", Code: wire.CodeLoad, Detail: "this binary was built without cgo, so it cannot load " + path +
		": use a build with cgo, or name one that may be run as the module host by -module-host=PATH -module-host-sha256=HEX"}
}
