//go:build cgo

package modhost

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include "cryptoki.h"

enum { LOAD_OK, LOAD_DLOPEN, LOAD_NO_SYMBOL, LOAD_REFUSED, LOAD_NO_LIST, LOAD_VERSION, LOAD_HOLE };

// check says whether a list of functions can be called: miekg/pkcs11 does so without looking.
static int check(CK_FUNCTION_LIST *list, CK_ULONG *number) {
	if (list == NULL)
		return LOAD_NO_LIST;
	if (list->version.major != 2 && list->version.major != 3) {
		*number = list->version.major;
		return LOAD_VERSION;
	}
	void **f = &list->C_Initialize, **end = (void **)(list + 1);
	for (; f < end; f++)
		if (*f == NULL)
			return LOAD_HOLE;
	return LOAD_OK;
}

// load opens a module and gets its list of functions. At LOAD_DLOPEN and LOAD_NO_SYMBOL, text is the reason; it lives
// until the next call of the dl family on this thread. At LOAD_REFUSED and LOAD_VERSION, number is the code or version.
static int load(const char *path, CK_FUNCTION_LIST **list, const char **text, CK_ULONG *number) {
	// RTLD_NOW: a symbol that the library lacks is an error here, and not the end of the process in the middle of a call.
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (handle == NULL) {
		*text = dlerror();
		return LOAD_DLOPEN;
	}
	CK_RV (*get)(CK_FUNCTION_LIST **) = (CK_RV (*)(CK_FUNCTION_LIST **))dlsym(handle, "C_GetFunctionList");
	if (get == NULL) {
		*text = dlerror();
		return LOAD_NO_SYMBOL;
	}
	*list = NULL;
	*number = get(list);
	if (*number != 0)
		return LOAD_REFUSED;
	return check(*list, number);
}

static CK_RV login(CK_FUNCTION_LIST *f, CK_ULONG session, CK_BYTE *pin, CK_ULONG len) {
	return f->C_Login(session, 1, pin, len); // CKU_USER
}

static CK_RV set_pin(CK_FUNCTION_LIST *f, CK_ULONG session, CK_BYTE *old, CK_ULONG oldLen, CK_BYTE *pin, CK_ULONG pinLen) {
	return f->C_SetPIN(session, old, oldLen, pin, pinLen);
}

// decrypt_oaep calls C_Decrypt once, with a buffer. hash is the CKM_ number and mgf the CKG_ number of the same hash.
static CK_RV decrypt_oaep(CK_FUNCTION_LIST *f, CK_ULONG session, CK_ULONG key, CK_ULONG hash, CK_ULONG mgf,
		CK_BYTE *in, CK_ULONG inLen, CK_BYTE *out, CK_ULONG *outLen, int *begun) {
	CK_RSA_PKCS_OAEP_PARAMS oaep = {hash, mgf, 1, NULL, 0}; // CKZ_DATA_SPECIFIED, an empty label
	CK_MECHANISM mechanism = {0x9, &oaep, sizeof(oaep)};     // CKM_RSA_PKCS_OAEP
	CK_RV rv = f->C_DecryptInit(session, &mechanism, key);
	*begun = rv == 0;
	return rv != 0 ? rv : f->C_Decrypt(session, in, inLen, out, outLen);
}

static CK_RV decrypt_raw(CK_FUNCTION_LIST *f, CK_ULONG session, CK_ULONG key,
		CK_BYTE *in, CK_ULONG inLen, CK_BYTE *out, CK_ULONG *outLen, int *begun) {
	CK_MECHANISM mechanism = {0x3, NULL, 0}; // CKM_RSA_X_509
	CK_RV rv = f->C_DecryptInit(session, &mechanism, key);
	*begun = rv == 0;
	return rv != 0 ? rv : f->C_Decrypt(session, in, inLen, out, outLen);
}

// derive makes a session object of the shared x coordinate, whose handle is *secret.
static CK_RV derive(CK_FUNCTION_LIST *f, CK_ULONG session, CK_ULONG key, CK_BYTE *point, CK_ULONG pointLen, CK_ULONG size, CK_ULONG *secret) {
	CK_ECDH1_DERIVE_PARAMS ecdh = {1, 0, NULL, pointLen, point}; // CKD_NULL
	CK_MECHANISM mechanism = {0x1050, &ecdh, sizeof(ecdh)};      // CKM_ECDH1_DERIVE
	CK_ULONG class = 4, type = 0x10;                             // CKO_SECRET_KEY, CKK_GENERIC_SECRET
	CK_BYTE yes = 1, no = 0;
	CK_ATTRIBUTE attributes[] = {
		{0x000, &class, sizeof(class)}, // CKA_CLASS
		{0x100, &type, sizeof(type)},   // CKA_KEY_TYPE
		{0x001, &no, 1},                // CKA_TOKEN: gone with its session
		{0x103, &no, 1},                // CKA_SENSITIVE
		{0x162, &yes, 1},               // CKA_EXTRACTABLE
		{0x161, &size, sizeof(size)},   // CKA_VALUE_LEN
	};
	return f->C_DeriveKey(session, &mechanism, key, attributes, sizeof(attributes) / sizeof(*attributes), secret);
}

// get_attribute reads one attribute into out. *outLen becomes its length, or the needed one with CKR_BUFFER_TOO_SMALL
// where the module tells it.
static CK_RV get_attribute(CK_FUNCTION_LIST *f, CK_ULONG session, CK_ULONG object, CK_ULONG type, CK_BYTE *out, CK_ULONG *outLen) {
	CK_ATTRIBUTE attribute = {type, out, *outLen};
	CK_RV rv = f->C_GetAttributeValue(session, object, &attribute, 1);
	*outLen = attribute.ulValueLen;
	return rv;
}

static CK_RV generate_random(CK_FUNCTION_LIST *f, CK_ULONG session, CK_BYTE *out, CK_ULONG len) {
	return f->C_GenerateRandom(session, out, len);
}
*/
import "C"

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// functions calls a module directly. Secrets go from and to the caller's memory and nowhere else on this side.
type functions struct{ list *C.CK_FUNCTION_LIST }

// load opens the library and gets its list of functions. Nothing that a file can be makes it crash, except code that
// the library runs when it is opened.
func load(path string) (functions, error) {
	name := C.CString(path)
	defer C.free(unsafe.Pointer(name))
	var f functions
	var text *C.char
	var number C.CK_ULONG
	runtime.LockOSThread() // what dlerror returns belongs to the thread
	defer runtime.UnlockOSThread()
	result := C.load(name, &f.list, &text, &number)
	switch result {
	case C.LOAD_DLOPEN:
		return f, fmt.Errorf("loading the module: %s", C.GoString(text))
	case C.LOAD_NO_SYMBOL:
		return f, fmt.Errorf("this is a library, but no PKCS#11 module: %s", C.GoString(text))
	case C.LOAD_REFUSED:
		return f, fmt.Errorf("C_GetFunctionList of %s failed: %w", path, pkcs11.Error(number))
	default:
		return f, checked(path, result, number)
	}
}

// checked is the error of a list of functions that cannot be called.
func checked(path string, result C.int, number C.CK_ULONG) error {
	switch result {
	case C.LOAD_OK:
		return nil
	case C.LOAD_NO_LIST:
		return fmt.Errorf("C_GetFunctionList of %s gave no list", path)
	case C.LOAD_VERSION:
		return fmt.Errorf("%s speaks PKCS#11 version %d: 2 and 3 are known", path, number)
	default:
		return fmt.Errorf("the function list of %s has holes where functions must be", path)
	}
}

// sharedWith returns the functions that ctx itself calls, so that sessions and handles of one are valid in the other. Most
// modules have one list of functions and give it to everybody; p11-kit's client makes a new instance, with sessions and
// a log-in of its own, for each call of C_GetFunctionList. The package keeps its list to itself: this reads the first
// field of its Ctx, a pointer to struct ctx {void *handle; CK_FUNCTION_LIST_PTR sym;}.
func sharedWith(ctx *pkcs11.Ctx, path string) (functions, error) {
	type inner struct{ handle, list unsafe.Pointer }
	f := functions{list: (*C.CK_FUNCTION_LIST)((*(**inner)(unsafe.Pointer(ctx))).list)}
	var number C.CK_ULONG
	return f, checked(path, C.check(f.list, &number), number) // its C_GetFunctionList may have failed the second time
}

// A Ctx with another field is another layout: then this does not compile.
var _ [unsafe.Sizeof(uintptr(0)) - unsafe.Sizeof(pkcs11.Ctx{})]byte

// code is the error of a PKCS#11 function, nil for CKR_OK.
func code(function string, rv C.CK_RV) error {
	if rv == pkcs11.CKR_OK {
		return nil
	}
	return &wire.Error{Function: function, Code: uint(rv)}
}

func bytePointer(b []byte) *C.CK_BYTE { return (*C.CK_BYTE)(unsafe.Pointer(unsafe.SliceData(b))) }

func ulong[T ~uint | ~int](n T) C.CK_ULONG { return C.CK_ULONG(n) }

// login is C_Login of the user.
func (f functions) login(session pkcs11.SessionHandle, pin []byte) error {
	return code("C_Login", C.login(f.list, ulong(session), bytePointer(pin), ulong(len(pin))))
}

func (f functions) setPIN(session pkcs11.SessionHandle, old, pin []byte) error {
	return code("C_SetPIN", C.set_pin(f.list, ulong(session), bytePointer(old), ulong(len(old)), bytePointer(pin), ulong(len(pin))))
}

// decryptOAEP decrypts with one C_Decrypt and returns how much of out is plaintext.
func (f functions) decryptOAEP(session pkcs11.SessionHandle, key, hash, mgf uint, in, out []byte) (int, error) {
	n, begun := ulong(len(out)), C.int(0)
	rv := C.decrypt_oaep(f.list, ulong(session), ulong(key), ulong(hash), ulong(mgf), bytePointer(in), ulong(len(in)),
		bytePointer(out), &n, &begun)
	return decrypted(rv, n, begun, out)
}

// decryptRaw does the bare RSA operation with one C_Decrypt and returns how much of out it filled.
func (f functions) decryptRaw(session pkcs11.SessionHandle, key uint, in, out []byte) (int, error) {
	n, begun := ulong(len(out)), C.int(0)
	rv := C.decrypt_raw(f.list, ulong(session), ulong(key), bytePointer(in), ulong(len(in)), bytePointer(out), &n, &begun)
	return decrypted(rv, n, begun, out)
}

func decrypted(rv C.CK_RV, n C.CK_ULONG, begun C.int, out []byte) (int, error) {
	function := "C_DecryptInit"
	if begun != 0 {
		function = "C_Decrypt"
	}
	if err := code(function, rv); err != nil {
		return 0, err
	}
	if n > ulong(len(out)) {
		return 0, &wire.Error{Function: function, Code: pkcs11.CKR_GENERAL_ERROR, Detail: "the module tells of more plaintext than there was room for"}
	}
	return int(n), nil
}

// derive agrees with the peer's point and returns the handle of the shared secret, an object of the session.
func (f functions) derive(session pkcs11.SessionHandle, key uint, point []byte, size int) (uint, error) {
	var secret C.CK_ULONG
	rv := C.derive(f.list, ulong(session), ulong(key), bytePointer(point), ulong(len(point)), ulong(size), &secret)
	return uint(secret), code("C_DeriveKey", rv)
}

// attribute reads one attribute into out and returns its length.
func (f functions) attribute(session pkcs11.SessionHandle, object, attribute uint, out []byte) (int, error) {
	n := ulong(len(out))
	rv := C.get_attribute(f.list, ulong(session), ulong(object), ulong(attribute), bytePointer(out), &n)
	if err := code("C_GetAttributeValue", rv); err != nil {
		return 0, err
	}
	if n > ulong(len(out)) { // CK_UNAVAILABLE_INFORMATION is the largest number there is
		return 0, errNoAttribute
	}
	return int(n), nil
}

// attributeLength asks how long an attribute is.
func (f functions) attributeLength(session pkcs11.SessionHandle, object, attribute uint) (uint, error) {
	var n C.CK_ULONG
	rv := C.get_attribute(f.list, ulong(session), ulong(object), ulong(attribute), nil, &n)
	return uint(n), code("C_GetAttributeValue", rv)
}

func (f functions) random(session pkcs11.SessionHandle, out []byte) error {
	return code("C_GenerateRandom", C.generate_random(f.list, ulong(session), bytePointer(out), ulong(len(out))))
}

// errNoAttribute: the object has no such attribute, or the module will not tell.
var errNoAttribute = errors.New("no such attribute")
