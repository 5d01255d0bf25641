//go:build !linux

package modhost

import "vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"

// birth refuses: none of what keeps a PIN safe here is known for this operating system.
func birth() ([]string, *secrets, error) {
	return nil, &secrets{}, &wire.Error{Function: "module host", Code: wire.CodeLoad, Detail: "PKCS#11 modules are loaded on Linux only"}
}

// secrets is ordinary memory: no secret ever comes here.
type secrets struct{ everything bool }

func (*secrets) alloc(n int) ([]byte, error) { return make([]byte, n), nil }

func (*secrets) free(b []byte) { clear(b) }
