//go:build cgo

package modhost

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// module is a loaded PKCS#11 module.
type module struct {
	ctx      *pkcs11.Ctx
	calls    functions // of the same instance, for what ctx does not do well
	hello    wire.HelloReply
	sessions int // bound for each slot, besides the keeper

	mu        sync.Mutex
	slotsByID map[uint]*slot
}

// open loads the module and initialises it. The process is not used for another after an error.
func open(path string, sessions int) (library, error) {
	unloadable := func(err error) error {
		return &wire.Error{Function: "dlopen", Code: wire.CodeLoad, Detail: err.Error()}
	}
	if _, err := load(path); err != nil { // says why, where New crashes or says nothing
		return nil, unloadable(err)
	}
	m := &module{sessions: sessions, slotsByID: make(map[uint]*slot)}
	if m.ctx = pkcs11.New(path); m.ctx == nil {
		return nil, unloadable(fmt.Errorf("loading %s a second time", path))
	}
	var err error
	if m.calls, err = sharedWith(m.ctx, path); err != nil {
		return nil, unloadable(err)
	}
	if err := m.ctx.Initialize(); err != nil { // with CKF_OS_LOCKING_OK
		return nil, failed("C_Initialize", err)
	}
	info, err := m.ctx.GetInfo()
	if err != nil {
		return nil, failed("C_GetInfo", err)
	}
	m.hello = wire.HelloReply{
		Manufacturer:    trim(info.ManufacturerID),
		Library:         trim(info.LibraryDescription),
		CryptokiVersion: version(info.CryptokiVersion),
	}
	return m, nil
}

func (m *module) info() wire.HelloReply { return m.hello }

// trim takes the padding off a fixed-size field: blanks by the standard, NULs by some vendors.
func trim(s string) string {
	return strings.ToValidUTF8(strings.TrimRight(s, " \x00"), "\uFFFD")
}

func version(v pkcs11.Version) string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

// failed is the error of a PKCS#11 function, nil where err is.
func failed(function string, err error) error {
	if err == nil {
		return nil
	}
	var code pkcs11.Error
	if errors.As(err, &code) {
		return &wire.Error{Function: function, Code: uint(code)}
	}
	return &wire.Error{Function: function, Code: wire.CodeInternal, Detail: err.Error()}
}

// is tells whether err is one of these CKR_ codes of the module.
func is(err error, codes ...uint) bool {
	var known *wire.Error
	if !errors.As(err, &known) {
		return false
	}
	for _, code := range codes {
		if known.Code == code {
			return true
		}
	}
	return false
}
