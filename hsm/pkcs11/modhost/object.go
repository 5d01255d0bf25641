//go:build cgo

package modhost

import (
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// Data objects are created and destroyed and never changed: C_SetAttributeValue of CKA_VALUE has changed the module's
// own copy only, and brought the process down later.

// named is the template of the objects of an application, and of one label where that is set.
func named(r wire.ObjectRequest) []*pkcs11.Attribute {
	template := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, uint(pkcs11.CKO_DATA)),
		pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, r.Application),
	}
	if r.Label != "" {
		template = append(template, pkcs11.NewAttribute(pkcs11.CKA_LABEL, r.Label))
	}
	return template
}

// findObject returns the one object of that name.
func (m *module) findObject(session pkcs11.SessionHandle, r wire.ObjectRequest) (uint, error) {
	handles, err := m.find(session, named(r)...)
	if err != nil {
		return 0, err
	}
	switch len(handles) {
	case 1:
		return handles[0], nil
	case 0:
		detail := fmt.Sprintf("no data object %q of application %q", r.Label, r.Application)
		return 0, &wire.Error{Function: "C_FindObjects", Code: wire.CodeNotFound, Detail: detail}
	default:
		detail := fmt.Sprintf("%d data objects %q of application %q", len(handles), r.Label, r.Application)
		return 0, &wire.Error{Function: "C_FindObjects", Code: wire.CodeAmbiguous, Detail: detail}
	}
}

func (m *module) objects(r wire.ObjectRequest) (answer wire.Objects, _ error) {
	err := m.inSession(r.Slot, 0, func(session pkcs11.SessionHandle) error {
		handles, err := m.find(session, named(r)...)
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

func (m *module) readObject(r wire.ObjectRequest) (value []byte, _ error) {
	err := m.inSession(r.Slot, 0, func(session pkcs11.SessionHandle) error {
		object, err := m.findObject(session, r)
		if err != nil {
			return err
		}
		value, err = m.attribute(session, object, pkcs11.CKA_VALUE)
		if errors.Is(err, errNoAttribute) {
			return &wire.Error{Function: "C_GetAttributeValue", Code: wire.CodeUnsupported, Detail: "the object has no value that can be read"}
		}
		return err
	})
	return value, err
}

func (m *module) createObject(r wire.ObjectRequest, value []byte) error {
	return m.inSession(r.Slot, pkcs11.CKF_RW_SESSION, func(session pkcs11.SessionHandle) error {
		// TOKEN and PRIVATE have defaults that differ between modules and their versions.
		_, err := m.ctx.CreateObject(session, append(named(r),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
			pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
			pkcs11.NewAttribute(pkcs11.CKA_VALUE, value),
		))
		return failed("C_CreateObject", err)
	})
}

func (m *module) destroyObject(r wire.ObjectRequest) error {
	return m.inSession(r.Slot, pkcs11.CKF_RW_SESSION, func(session pkcs11.SessionHandle) error {
		object, err := m.findObject(session, r)
		if err != nil {
			return err
		}
		return failed("C_DestroyObject", m.ctx.DestroyObject(session, pkcs11.ObjectHandle(object)))
	})
}
