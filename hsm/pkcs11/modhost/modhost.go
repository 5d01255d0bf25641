// Package modhost is the process that loads a vendor's PKCS#11 module.
//
// The plugin starts its own binary again under the name [wire.HostArgv0] and speaks [wire] to it over two pipes. A
// module that hangs or crashes harms this process and nobody else; the client in hsm/pkcs11 kills it and starts another.
//
//   - serve.go reads requests and answers each in a goroutine of its own. The reader calls nothing that can block, so
//     that the end of the pipe ends the process at once, even while the module hangs.
//   - birth_linux.go makes the process a safe place for a PIN; memory_linux.go keeps secrets out of the swap.
//   - library.go loads the module; slot.go, session.go, key.go, object.go and foreign.go are the operations. Where a secret passes,
//     or where every call counts, call.go goes to the module directly instead of through miekg/pkcs11, which copies PINs
//     and plaintexts to memory that nobody wipes, and which asks for the length of a plaintext with an operation that a
//     card performs in full.
//   - startup_linux.go gives back what the start of so large a program took.
//   - modhost_nocgo.go answers in a binary built without cgo, and says why it can do no more.
//
// The host keeps no policy: which module may be loaded, which PIN may be sent, how long a call may take and what is
// done after an error is decided by the client.
package modhost

import (
	"errors"
	"fmt"
	"io"
	"os"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// The descriptors on which a host is spoken to.
const (
	requestsFD = 3
	answersFD  = 4
)

// RunIfStarted serves as a module host and does not return, if this process was started as one: under the name
// [wire.HostArgv0]. Otherwise it returns at once. It is the first line of every main, and of the TestMain of every test
// that opens a PKCS#11 device.
//
// The process that starts a host must do so from a thread that lives as long as the host (runtime.LockOSThread):
// Linux sends the parent-death signal when the parent's thread ends.
func RunIfStarted() {
	if len(os.Args) == 0 || os.Args[0] != wire.HostArgv0 {
		return
	}
	requests, answers := os.NewFile(requestsFD, "requests"), os.NewFile(answersFD, "answers")
	notes, secrets, err := birth()
	s := newServer(answers, secrets, open)
	s.notes, s.unfit = notes, err
	if err := s.serve(requests); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\nThis process is started by nitroseal and the Vault plugin, not by hand.\n", wire.HostArgv0, err)
		os.Exit(1)
	}
	// Not by returning from main: this is exit_group(2) without atexit handlers and without C_Finalize, either of which
	// may wait for a module that hangs.
	os.Exit(0)
}

// library is a loaded and initialised module: one method for each operation of the wire. All methods are safe for
// concurrent use. They return a *wire.Error, or an error that the module gave as a number.
type library interface {
	info() wire.HelloReply
	slots() (wire.Slots, error)
	mechanisms(slot uint) (wire.Mechanisms, error)
	// login and setPIN neither keep nor copy a PIN.
	login(slot uint, pin []byte) error
	logout(slot uint) error
	setPIN(slot uint, old, pin []byte) error
	findKeys(wire.FindKeysRequest) (wire.Keys, error)
	generateKey(wire.GenerateRequest) (wire.Key, error)
	destroyKey(wire.DestroyKeyRequest) error
	// decrypt and derive fill the first n bytes of out, decryptRaw, derive and random all of it.
	decryptOAEP(r wire.DecryptRequest, ciphertext, out []byte) (n int, err error)
	decryptRaw(r wire.DecryptRequest, ciphertext, out []byte) error
	derive(r wire.DeriveRequest, point, out []byte) error
	random(slot uint, out []byte) error
	objects(wire.ObjectRequest) (wire.Objects, error)
	readObject(wire.ObjectRequest) ([]byte, error)
	createObject(r wire.ObjectRequest, value []byte) error
	destroyObject(wire.ObjectRequest) error
	foreignObjects(slot uint) (wire.Objects, error)
	readForeign(wire.ForeignRequest) (wire.Foreign, []byte, error)
	destroyForeign(wire.ForeignRequest) error
}

// badRequest says that the client broke the protocol.
func badRequest(format string, args ...any) error {
	return &wire.Error{Function: "request", Code: wire.CodeBadRequest, Detail: fmt.Sprintf(format, args...)}
}

// asWireError is err as it goes over the wire.
func asWireError(err error) *wire.Error {
	var known *wire.Error
	if errors.As(err, &known) {
		return known
	}
	if errors.Is(err, wire.ErrMalformed) {
		return &wire.Error{Function: "request", Code: wire.CodeBadRequest, Detail: err.Error()}
	}
	return &wire.Error{Function: "module host", Code: wire.CodeInternal, Detail: err.Error()}
}

// ended tells the ordinary end of the requests from a broken one.
func ended(err error) bool { return errors.Is(err, io.EOF) && !errors.Is(err, wire.ErrMalformed) }
