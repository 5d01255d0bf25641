package wire

import "fmt"

// The operations. The comment names the Meta and Data of the request → those of the answer.
const (
	// OpHello: Hello → HelloReply. The first frame in each direction.
	OpHello Op = iota + 1
	// OpSlots: nothing → Slots. C_GetSlotList, then C_GetSlotInfo and C_GetTokenInfo of each; one slot that answers
	// with an error is listed with that error and spoils no other.
	OpSlots
	// OpMechanisms: SlotRequest → Mechanisms.
	OpMechanisms
	// OpLogin: SlotRequest, PIN → nothing. Opens the keeper session and calls C_Login once. Where the process is already
	// logged in to that slot the host answers CKR_USER_ALREADY_LOGGED_IN without calling the module: never proof of a PIN.
	OpLogin
	// OpLogout: SlotRequest → nothing. Closes the keeper session and with it the log-in.
	OpLogout
	// OpFindKeys: FindKeysRequest → Keys.
	OpFindKeys
	// OpDecryptOAEP: DecryptRequest, ciphertext → plaintext. One C_Decrypt in a session of its own.
	OpDecryptOAEP
	// OpDecryptRaw: DecryptRequest, ciphertext → the block as the modulus has it, left-padded to its size (CKM_RSA_X_509).
	OpDecryptRaw
	// OpDerive: DeriveRequest, the peer's uncompressed point → the x coordinate (CKM_ECDH1_DERIVE with CKD_NULL).
	OpDerive
	// OpGenerateKey: GenerateRequest → Key. CodeExists where a key with that id is there; an empty ID gets 16 random bytes.
	OpGenerateKey
	// OpDestroyKey: DestroyKeyRequest → nothing. Refused unless the handles are a private key and its public half.
	OpDestroyKey
	// OpObjects: ObjectRequest (Label empty) → Objects.
	OpObjects
	// OpReadObject: ObjectRequest → value. Exactly one must match.
	OpReadObject
	// OpCreateObject: ObjectRequest, value → nothing. An OK here proves nothing (OpenSC loses writes in silence).
	OpCreateObject
	// OpDestroyObject: ObjectRequest → nothing. Exactly one must match.
	OpDestroyObject
	// OpRandom: RandomRequest → bytes, 1024 at most.
	OpRandom
	// OpSetPIN: SetPINRequest, old PIN followed by new PIN → nothing.
	OpSetPIN
	// OpForeignObjects: SlotRequest → Objects: those of all data objects, whatever their application.
	OpForeignObjects
	// OpReadForeign: ForeignRequest (SHA256 empty) → Foreign, all values one after the other.
	OpReadForeign
	// OpDestroyForeign: ForeignRequest → nothing. All that match both; one at least.
	OpDestroyForeign
)

// Hello opens the conversation.
type Hello struct {
	Version int
	// Module is the absolute path of the module, already checked against the allow-list.
	Module string
	// MaxSessions bounds the sessions open at one time on a slot, besides the keeper.
	MaxSessions int
}

// HelloReply answers once the module is loaded and C_Initialize has returned.
type HelloReply struct {
	Version int
	// Manufacturer, Library and CryptokiVersion are from C_GetInfo, trimmed.
	Manufacturer    string
	Library         string
	CryptokiVersion string
	// MemoryLocked is true where mlockall(MCL_CURRENT|MCL_FUTURE|MCL_ONFAULT) worked; otherwise secrets are locked one
	// by one.
	MemoryLocked bool
	// Notes are sentences for the operator.
	Notes []string
}

// Slots answers OpSlots.
type Slots struct{ Slots []Slot }

// Slot is a slot, and the token in it.
type Slot struct {
	ID      uint
	Present bool
	// Failure is the error of this slot's C_GetSlotInfo or C_GetTokenInfo, nil where both worked.
	Failure *Error
	Token   Token
}

// Token is CK_TOKEN_INFO with blanks and NULs trimmed. Flags are CKF_… bits as the module gave them.
type Token struct {
	Label, Manufacturer, Model, Serial, Firmware string
	Flags                                        uint
}

// SlotRequest names a slot.
type SlotRequest struct{ Slot uint }

// Mechanisms answers OpMechanisms.
type Mechanisms struct{ Mechanisms []Mechanism }

// Mechanism is CK_MECHANISM_INFO.
type Mechanism struct {
	Type             uint
	MinSize, MaxSize uint
	Flags            uint
}

// FindKeysRequest selects private keys by label and id; empty fields match all. ID is hexadecimal.
type FindKeysRequest struct {
	Slot      uint
	Label, ID string
}

// Keys answers OpFindKeys.
type Keys struct{ Keys []Key }

// Key is a private key object and what its public half is. A private key whose public half cannot be found or read,
// or of a kind that we do not use, is listed with Unusable set to the reason.
type Key struct {
	Handle uint
	// PublicHandle is 0 where the token has no public key object and the public half came from the private one.
	PublicHandle uint
	Label, ID    string
	Unusable     string
	// Modulus and Exponent are set for RSA, Curve ("P-256", "P-384") and Point (uncompressed) for EC.
	Modulus, Exponent []byte
	Curve             string
	Point             []byte
	// Sensitive and Extractable are what the token says; where it does not say, the worse: false and true.
	Sensitive   bool
	Extractable bool
	// Uses are the CKA_ usage attributes that are true on the private key, in lower case: decrypt, sign, derive, …
	Uses []string
}

// DecryptRequest names a key and, for OAEP, the hash by its CKM_ number.
type DecryptRequest struct {
	Slot, Handle uint
	// Hash is CKM_SHA_1 or CKM_SHA256; 0 for OpDecryptRaw.
	Hash uint
	// Size is the modulus size in bytes: the length of the buffer given to the one C_Decrypt.
	Size int
}

// DeriveRequest names a key and the size of a field element in bytes.
type DeriveRequest struct {
	Slot, Handle uint
	Size         int
}

// GenerateRequest is a hsm.KeySpec.
type GenerateRequest struct {
	Slot      uint
	Algorithm string
	Label, ID string
}

// DestroyKeyRequest names both halves; PublicHandle may be 0.
type DestroyKeyRequest struct {
	Slot, Handle, PublicHandle uint
}

// ObjectRequest names a data object.
type ObjectRequest struct {
	Slot               uint
	Application, Label string
}

// Objects answers OpObjects with labels, one for each object, sorted; two objects of one label are two entries.
type Objects struct{ Labels []string }

// ForeignRequest names data objects by their label alone, whatever their application, and those to be destroyed by the
// SHA-256 of their value as well.
type ForeignRequest struct {
	Slot   uint
	Label  string
	SHA256 []byte
}

// Foreign answers OpReadForeign, one entry for each object. Data holds their values in this order.
type Foreign struct{ Objects []ForeignObject }

// ForeignObject is one of them. Size is the length of its value in bytes.
type ForeignObject struct {
	Application string
	Size        int
}

// RandomRequest asks for bytes.
type RandomRequest struct {
	Slot  uint
	Count int
}

// SetPINRequest says where in Data the old PIN ends.
type SetPINRequest struct {
	Slot   uint
	OldLen int
}

// Error is what went wrong in the host. Code is the CKR_ number of the module, or one of the codes below, which lie
// outside what PKCS#11 defines.
type Error struct {
	// Function is the PKCS#11 function, "C_Decrypt", or what the host was doing.
	Function string
	Code     uint
	// Detail adds what the code does not say. It never holds a secret or an object's content.
	Detail string
}

// Codes of the host itself, above CKR_VENDOR_DEFINED.
const (
	CodeNotFound    uint = 0xFFFF0001 + iota // no object matches
	CodeAmbiguous                            // more than one object matches
	CodeBadRequest                           // the request breaks the protocol
	CodeUnsupported                          // the module or key cannot do that
	CodeLoad                                 // the module cannot be loaded
	CodeLockMemory                           // memory for a secret cannot be locked
	CodeExists                               // an object of that name or id is already there
	CodeInternal                             // a bug in the host
)

func (e *Error) Error() string {
	if e.Detail == "" {
		return fmt.Sprintf("%s: 0x%x", e.Function, e.Code)
	}
	return fmt.Sprintf("%s: 0x%x: %s", e.Function, e.Code, e.Detail)
}
