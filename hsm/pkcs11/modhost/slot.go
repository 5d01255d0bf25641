//go:build cgo

package modhost

import (
	"sync"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// slot is what this process holds of one slot.
type slot struct {
	id    uint
	rooms chan struct{} // one for each session that is open, besides the keeper

	// login guards the keeper. It is held during C_Login, so that of two log-ins at the same time one is sent.
	login    sync.Mutex
	keeper   pkcs11.SessionHandle // stays open, and with it the log-in of the whole process to this token
	loggedIn bool
}

func (m *module) slot(id uint) *slot {
	m.mu.Lock()
	defer m.mu.Unlock()
	s, known := m.slotsByID[id]
	if !known {
		s = &slot{id: id, rooms: make(chan struct{}, m.sessions)}
		m.slotsByID[id] = s
	}
	return s
}

func (m *module) slots() (wire.Slots, error) {
	ids, err := m.ctx.GetSlotList(false)
	if err != nil {
		return wire.Slots{}, failed("C_GetSlotList", err)
	}
	answer := wire.Slots{Slots: make([]wire.Slot, len(ids))}
	for i, id := range ids {
		answer.Slots[i] = m.slotInfo(id)
	}
	return answer, nil
}

// slotInfo describes a slot; what goes wrong with it is part of the description.
func (m *module) slotInfo(id uint) wire.Slot {
	answer := wire.Slot{ID: id}
	info, err := m.ctx.GetSlotInfo(id)
	if err != nil {
		answer.Failure = asWireError(failed("C_GetSlotInfo", err))
		return answer
	}
	if answer.Present = info.Flags&pkcs11.CKF_TOKEN_PRESENT != 0; !answer.Present {
		return answer
	}
	token, err := m.ctx.GetTokenInfo(id)
	if err != nil {
		answer.Failure = asWireError(failed("C_GetTokenInfo", err))
		return answer
	}
	answer.Token = wire.Token{
		Label:        trim(token.Label),
		Manufacturer: trim(token.ManufacturerID),
		Model:        trim(token.Model),
		Serial:       trim(token.SerialNumber),
		Firmware:     version(token.FirmwareVersion),
		Flags:        token.Flags,
	}
	return answer
}

func (m *module) mechanisms(slot uint) (wire.Mechanisms, error) {
	list, err := m.ctx.GetMechanismList(slot)
	if err != nil {
		return wire.Mechanisms{}, failed("C_GetMechanismList", err)
	}
	var answer wire.Mechanisms
	for _, mechanism := range list {
		info, err := m.ctx.GetMechanismInfo(slot, []*pkcs11.Mechanism{mechanism})
		if err := failed("C_GetMechanismInfo", err); is(err, pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_FUNCTION_NOT_SUPPORTED) {
			continue // listed, but not there
		} else if err != nil {
			return wire.Mechanisms{}, err
		}
		answer.Mechanisms = append(answer.Mechanisms, wire.Mechanism{
			Type: mechanism.Mechanism, MinSize: info.MinKeySize, MaxSize: info.MaxKeySize, Flags: info.Flags,
		})
	}
	return answer, nil
}

// login opens the keeper session and sends the PIN once.
func (m *module) login(id uint, pin []byte) error {
	s := m.slot(id)
	s.login.Lock()
	defer s.login.Unlock()
	if s.loggedIn {
		// Not asked of the module, whose answer would be the same for every PIN.
		return &wire.Error{Function: "C_Login", Code: pkcs11.CKR_USER_ALREADY_LOGGED_IN}
	}
	session, err := m.ctx.OpenSession(id, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return failed("C_OpenSession", err)
	}
	if err := m.calls.login(session, pin); err != nil {
		_ = m.ctx.CloseSession(session) // the log-in failed: that is what is told
		return err
	}
	s.keeper, s.loggedIn = session, true
	return nil
}

// logout ends the log-in. Whatever the module answers, the keeper is gone: after the removal of a token only a new
// log-in helps.
func (m *module) logout(id uint) error {
	s := m.slot(id)
	s.login.Lock()
	defer s.login.Unlock()
	if !s.loggedIn {
		return &wire.Error{Function: "C_Logout", Code: pkcs11.CKR_USER_NOT_LOGGED_IN}
	}
	s.loggedIn = false
	// Closing the keeper ends the log-in only where no other session is open.
	err := failed("C_Logout", m.ctx.Logout(s.keeper))
	if closing := failed("C_CloseSession", m.ctx.CloseSession(s.keeper)); err == nil {
		err = closing
	}
	return err
}

func (m *module) setPIN(id uint, old, pin []byte) error {
	return m.inSession(id, pkcs11.CKF_RW_SESSION, func(s pkcs11.SessionHandle) error {
		return m.calls.setPIN(s, old, pin)
	})
}

func (m *module) random(id uint, out []byte) error {
	return m.inSession(id, 0, func(s pkcs11.SessionHandle) error {
		return m.calls.random(s, out)
	})
}
