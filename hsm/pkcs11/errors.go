package pkcs11

import (
	"errors"
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// The return values that decide something here (PKCS#11 2.40, 5.1).
const (
	ckrSlotIDInvalid            uint = 0x03
	ckrGeneralError             uint = 0x05
	ckrFunctionFailed           uint = 0x06
	ckrArgumentsBad             uint = 0x07
	ckrAttributeReadOnly        uint = 0x10
	ckrAttributeTypeInvalid     uint = 0x12
	ckrAttributeValueInvalid    uint = 0x13
	ckrActionProhibited         uint = 0x1B
	ckrDataInvalid              uint = 0x20
	ckrDataLenRange             uint = 0x21
	ckrDeviceError              uint = 0x30
	ckrDeviceMemory             uint = 0x31
	ckrDeviceRemoved            uint = 0x32
	ckrEncryptedDataInvalid     uint = 0x40
	ckrEncryptedDataLenRange    uint = 0x41
	ckrFunctionNotSupported     uint = 0x54
	ckrKeyHandleInvalid         uint = 0x60
	ckrKeySizeRange             uint = 0x62
	ckrKeyTypeInconsistent      uint = 0x63
	ckrKeyFunctionNotPermitted  uint = 0x68
	ckrMechanismInvalid         uint = 0x70
	ckrMechanismParamInvalid    uint = 0x71
	ckrObjectHandleInvalid      uint = 0x82
	ckrOperationActive          uint = 0x90
	ckrPINIncorrect             uint = 0xA0
	ckrPINInvalid               uint = 0xA1
	ckrPINLenRange              uint = 0xA2
	ckrPINExpired               uint = 0xA3
	ckrPINLocked                uint = 0xA4
	ckrSessionClosed            uint = 0xB0
	ckrSessionCount             uint = 0xB1
	ckrSessionHandleInvalid     uint = 0xB3
	ckrSessionReadOnly          uint = 0xB5
	ckrTemplateIncomplete       uint = 0xD0
	ckrTemplateInconsistent     uint = 0xD1
	ckrTokenNotPresent          uint = 0xE0
	ckrTokenNotRecognized       uint = 0xE1
	ckrTokenWriteProtected      uint = 0xE2
	ckrUserAlreadyLoggedIn      uint = 0x100
	ckrUserNotLoggedIn          uint = 0x101
	ckrUserPINNotInitialized    uint = 0x102
	ckrUserAnotherAlreadyLogged uint = 0x104
	ckrRandomNoRNG              uint = 0x121
	ckrDomainParamsInvalid      uint = 0x130
	ckrCurveNotSupported        uint = 0x140
	ckrCryptokiNotInitialized   uint = 0x190
	ckrPINTooWeak               uint = 0x1B8
	ckrPublicKeyInvalid         uint = 0x1B9
)

// failure is an error of the module or of its host, in words, with the contract's error beneath.
type failure struct {
	wire *wire.Error
	kind error
}

func (f *failure) Error() string { return fmt.Sprintf("%s (%v)", f.text(), f.kind) }

// text is the failure without its place in the contract.
func (f *failure) text() string {
	text := f.wire.Function + ": " + codeName(f.wire.Code)
	if f.wire.Detail != "" {
		text += ": " + f.wire.Detail
	}
	return text
}

func (f *failure) Unwrap() error { return f.kind }

// describe gives a wire error its words and its place in the contract.
func describe(e *wire.Error) error { return &failure{wire: e, kind: kindOf(e.Code)} }

// codeName is the name and the number of a return value.
func codeName(code uint) string {
	switch code {
	case wire.CodeNotFound:
		return "no match"
	case wire.CodeAmbiguous:
		return "more than one match"
	case wire.CodeExists:
		return "already there"
	case wire.CodeInternal:
		return "a bug in the module host"
	case wire.CodeBadRequest:
		return "the module host does not understand the request"
	case wire.CodeUnsupported:
		return "not supported"
	case wire.CodeLoad:
		return "the module cannot be loaded"
	case wire.CodeLockMemory:
		return "memory for a secret cannot be locked; raise the limit on locked memory (ulimit -l, LimitMEMLOCK)"
	}
	name := ckrNames[code]
	switch {
	case name != "":
	case code&0x80000000 != 0:
		name = "CKR_VENDOR_DEFINED"
	default:
		name = "CKR_?"
	}
	return fmt.Sprintf("%s (0x%X)", name, code)
}

// kindOf places a return value in the contract. What it does not know is ErrUnavailable: try again, or elsewhere.
func kindOf(code uint) error {
	switch code {
	case wire.CodeNotFound:
		return hsm.ErrNotFound
	case wire.CodeAmbiguous:
		return hsm.ErrAmbiguous
	case wire.CodeExists:
		return hsm.ErrExists
	case wire.CodeUnsupported, ckrFunctionNotSupported, ckrMechanismInvalid, ckrMechanismParamInvalid, ckrKeySizeRange,
		ckrKeyTypeInconsistent, ckrKeyFunctionNotPermitted, ckrCurveNotSupported, ckrDomainParamsInvalid, ckrRandomNoRNG,
		ckrTokenWriteProtected, ckrSessionReadOnly, ckrAttributeReadOnly, ckrAttributeTypeInvalid, ckrAttributeValueInvalid,
		ckrActionProhibited, ckrTemplateIncomplete, ckrTemplateInconsistent, ckrPublicKeyInvalid,
		ckrPINInvalid, ckrPINLenRange, ckrPINTooWeak:
		return hsm.ErrUnsupported
	case ckrDeviceMemory:
		return hsm.ErrFull
	case ckrDataInvalid, ckrDataLenRange, ckrEncryptedDataInvalid, ckrEncryptedDataLenRange:
		return hsm.ErrCiphertext
	case ckrPINLocked:
		return hsm.ErrLocked
	default:
		return hsm.ErrUnavailable
	}
}

// verdict says what a return value tells about the host that gave it.
type verdict int

const (
	// verdictFinal: the token works and refused. Asking again gives the same answer.
	verdictFinal verdict = iota
	// verdictStale: the token, a session, a handle or the log-in is gone, and what was asked was not done. A new host can
	// do it.
	verdictStale
	// verdictBroken: as before, but what was asked may have been done.
	verdictBroken
)

// judge trusts a host only after an answer that it knows: return values that nobody foresaw (no memory, a mutex, a vendor's
// own) were seen to stay with the process that gave them first.
func judge(code uint) verdict {
	switch code {
	case ckrSlotIDInvalid, ckrTokenNotPresent, ckrTokenNotRecognized, ckrSessionHandleInvalid, ckrSessionClosed, ckrSessionCount,
		ckrObjectHandleInvalid, ckrKeyHandleInvalid, ckrUserNotLoggedIn, ckrUserAlreadyLoggedIn, ckrUserAnotherAlreadyLogged,
		ckrCryptokiNotInitialized, ckrOperationActive:
		return verdictStale
	case ckrArgumentsBad, ckrPINTooWeak, ckrUserPINNotInitialized:
		return verdictFinal
	}
	if aboutPIN(code) || ofHost(code) || !errors.Is(kindOf(code), hsm.ErrUnavailable) {
		return verdictFinal
	}
	return verdictBroken
}

// ofHost tells the codes of the host itself from return values of the module.
func ofHost(code uint) bool { return code >= wire.CodeNotFound && code <= wire.CodeInternal }

// mechanismName is the name of a mechanism, its number where it has none.
func mechanismName(mechanism uint) string {
	if name := ckmNames[mechanism]; name != "" {
		return name
	}
	return fmt.Sprintf("CKM_0x%X", mechanism)
}

// trim removes the blanks and NULs that PKCS#11 pads its strings with.
func trim(s string) string { return strings.TrimRight(s, " \x00") }
