//go:build cgo

package modhost

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// Foreign objects are what other programs left. Nobody knows which attributes they have, so they are searched for by
// class and label only: a template with CKA_APPLICATION does not match an object that has none.

// maxForeign is the largest value of a foreign object that is read, in bytes.
const maxForeign = 64 << 10

func labelled(label string) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, uint(pkcs11.CKO_DATA)),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	}
}

func (m *module) foreignObjects(slot uint) (answer wire.Objects, _ error) {
	err := m.inSession(slot, 0, func(session pkcs11.SessionHandle) error {
		handles, err := m.find(session, pkcs11.NewAttribute(pkcs11.CKA_CLASS, uint(pkcs11.CKO_DATA)))
		if err != nil {
			return err
		}
		for _, handle := range handles {
			object := m.reader(session, handle)
			label := object.text(pkcs11.CKA_LABEL)
			if is(object.err, pkcs11.CKR_OBJECT_HANDLE_INVALID) {
				continue // deleted by somebody else just now
			}
			if object.err != nil {
				return object.err
			}
			answer.Labels = append(answer.Labels, label)
		}
		return nil
	})
	slices.Sort(answer.Labels)
	return answer, err
}

// foreign is a data object as it was found.
type foreign struct {
	handle      uint
	application string
	value       []byte
}

func (m *module) foreign(session pkcs11.SessionHandle, label string) ([]foreign, error) {
	handles, err := m.find(session, labelled(label)...)
	if err != nil {
		return nil, err
	}
	var all []foreign
	for _, handle := range handles {
		object := m.reader(session, handle)
		application := object.text(pkcs11.CKA_APPLICATION)
		err := object.err
		var value []byte
		if err == nil {
			value, err = m.attribute(session, handle, pkcs11.CKA_VALUE)
		}
		switch {
		case is(err, pkcs11.CKR_OBJECT_HANDLE_INVALID):
			continue
		case errors.Is(err, errNoAttribute):
			value = nil // an object without a value is one all the same
		case err != nil:
			return nil, err
		case len(value) > maxForeign:
			return nil, &wire.Error{Function: "C_GetAttributeValue", Code: wire.CodeUnsupported, Detail: fmt.Sprintf("a value of %d bytes", len(value))}
		}
		all = append(all, foreign{handle: handle, application: application, value: value})
	}
	slices.SortFunc(all, func(a, b foreign) int {
		return cmp.Or(bytes.Compare(a.value, b.value), cmp.Compare(a.application, b.application))
	})
	return all, nil
}

func (m *module) readForeign(r wire.ForeignRequest) (answer wire.Foreign, values []byte, _ error) {
	err := m.inSession(r.Slot, 0, func(session pkcs11.SessionHandle) error {
		all, err := m.foreign(session, r.Label)
		if err != nil {
			return err
		}
		if len(all) == 0 {
			return noForeign(r.Label)
		}
		for _, object := range all {
			answer.Objects = append(answer.Objects, wire.ForeignObject{Application: object.application, Size: len(object.value)})
			values = append(values, object.value...)
		}
		return nil
	})
	return answer, values, err
}

func (m *module) destroyForeign(r wire.ForeignRequest) error {
	return m.inSession(r.Slot, pkcs11.CKF_RW_SESSION, func(session pkcs11.SessionHandle) error {
		all, err := m.foreign(session, r.Label)
		if err != nil {
			return err
		}
		destroyed := 0
		for _, object := range all {
			if sum := sha256.Sum256(object.value); !bytes.Equal(sum[:], r.SHA256) {
				continue
			}
			if err := m.ctx.DestroyObject(session, pkcs11.ObjectHandle(object.handle)); err != nil {
				return failed("C_DestroyObject", err)
			}
			destroyed++
		}
		if destroyed == 0 {
			return noForeign(r.Label)
		}
		return nil
	})
}

func noForeign(label string) error {
	return &wire.Error{Function: "C_FindObjects", Code: wire.CodeNotFound, Detail: fmt.Sprintf("no such data object %q", label)}
}
