//go:build cgo

package modhost

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// inSession runs do in a session of its own, with these flags besides CKF_SERIAL_SESSION. A session is never used
// twice: an operation that failed may leave it with CKR_OPERATION_ACTIVE for ever, and the log-in does not live in it.
// No more than the agreed number is open on a slot at one time; the others wait.
func (m *module) inSession(id, flags uint, do func(pkcs11.SessionHandle) error) error {
	rooms := m.slot(id).rooms
	rooms <- struct{}{}
	defer func() { <-rooms }()
	session, err := m.ctx.OpenSession(id, pkcs11.CKF_SERIAL_SESSION|flags)
	if err != nil {
		return failed("C_OpenSession", err)
	}
	defer func() {
		_ = m.ctx.CloseSession(session) // what was done in it is done, and the session is not used again
	}()
	return do(session)
}

// find returns the handles of all objects that match. The search is always ended: otherwise the next one in the session
// fails with CKR_OPERATION_ACTIVE.
func (m *module) find(session pkcs11.SessionHandle, template ...*pkcs11.Attribute) (_ []uint, err error) {
	if err := m.ctx.FindObjectsInit(session, template); err != nil {
		return nil, failed("C_FindObjectsInit", err)
	}
	defer func() {
		if final := failed("C_FindObjectsFinal", m.ctx.FindObjectsFinal(session)); err == nil {
			err = final
		}
	}()
	var handles []uint
	for {
		const page = 64
		found, _, err := m.ctx.FindObjects(session, page)
		if err != nil {
			return nil, failed("C_FindObjects", err)
		}
		if len(found) == 0 { // a page that is not full does not prove that it is the last
			return handles, nil
		}
		for _, handle := range found {
			handles = append(handles, uint(handle))
		}
	}
}

// attribute reads one attribute of an object, errNoAttribute where it has none.
func (m *module) attribute(session pkcs11.SessionHandle, object, attribute uint) ([]byte, error) {
	buf := make([]byte, 4<<10) // as long as most there are: one call, and no question about the length before it
	n, err := m.calls.attribute(session, object, attribute, buf)
	if is(err, pkcs11.CKR_BUFFER_TOO_SMALL) {
		length, err := m.calls.attributeLength(session, object, attribute)
		if err != nil {
			return nil, err
		}
		if length > wire.MaxFrame {
			return nil, &wire.Error{Function: "C_GetAttributeValue", Code: wire.CodeUnsupported, Detail: fmt.Sprintf("a value of %d bytes", length)}
		}
		buf = make([]byte, length)
		n, err = m.calls.attribute(session, object, attribute, buf)
		return buf[:n:n], err
	}
	return buf[:n:n], err
}

// reader reads the attributes of a key. It keeps the first error, so that its user reads all it wants and asks once.
type reader struct {
	module  *module
	session pkcs11.SessionHandle
	object  uint
	err     error
}

func (m *module) reader(session pkcs11.SessionHandle, object uint) *reader {
	return &reader{module: m, session: session, object: object}
}

// bytes returns an attribute, nil where the object has none or the module does not know it: that spoils no other.
func (r *reader) bytes(attribute uint) []byte {
	if r.err != nil {
		return nil
	}
	value, err := r.module.attribute(r.session, r.object, attribute)
	switch {
	case err == nil:
		return value
	case errors.Is(err, errNoAttribute),
		is(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_SENSITIVE, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED):
		return nil
	default:
		r.err = err
		return nil
	}
}

func (r *reader) text(attribute uint) string { return trim(string(r.bytes(attribute))) }

// number returns a CK_ULONG, CK_UNAVAILABLE_INFORMATION where the object has none.
func (r *reader) number(attribute uint) uint {
	if value := r.bytes(attribute); len(value) == int(unsafe.Sizeof(uint(0))) {
		return uint(binary.NativeEndian.Uint64(value))
	}
	return pkcs11.CK_UNAVAILABLE_INFORMATION
}

// flag returns a CK_BBOOL, otherwise where the object has none.
func (r *reader) flag(attribute uint, otherwise bool) bool {
	if value := r.bytes(attribute); len(value) == 1 {
		return value[0] != 0
	}
	return otherwise
}
