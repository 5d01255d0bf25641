package modhost

import (
	"crypto/sha256"
	"fmt"
	"io"
	"path/filepath"
	"sync"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// What a request may ask for. The limits are wider than any caller's; they keep a broken one from doing damage.
const (
	maxSessions = 1024
	maxModulus  = 2048 // bytes: RSA-16384
	maxRandom   = 1024 // bytes
	scratchSize = 8 << 10
)

// server answers the requests of one client.
type server struct {
	secrets *secrets
	open    func(path string, sessions int) (library, error)
	notes   []string // for the operator, from the birth of the process
	unfit   error    // why this process must not load a module, or nil

	mu      sync.Mutex // guards what follows
	library library    // nil until a Hello succeeded
	greeted bool

	running sync.WaitGroup // handlers; a test waits for them, the process does not

	writing sync.Mutex // guards what follows
	answers io.Writer
	scratch []byte // for frames: locked memory
}

func newServer(answers io.Writer, secrets *secrets, open func(string, int) (library, error)) *server {
	s := &server{answers: answers, secrets: secrets, open: open}
	s.scratch, _ = secrets.alloc(scratchSize) // without it no answer with a secret can be made either, and that is said then
	return s
}

// serve answers requests until they end, and returns nil, or until they are no frames. It waits for no handler.
func (s *server) serve(requests io.Reader) error {
	for {
		var buffer []byte
		var unlocked error
		frame, err := wire.ReadFrameIn(requests, func(op wire.Op, size int) []byte {
			if op == wire.OpLogin || op == wire.OpSetPIN {
				buffer, unlocked = s.secrets.alloc(size)
			}
			if buffer == nil {
				buffer = make([]byte, size) // a PIN is read all the same, refused and wiped: the stream goes on behind it
			}
			return buffer
		})
		switch {
		case err == nil:
		case ended(err):
			return nil
		default:
			s.secrets.free(buffer)
			return fmt.Errorf("reading a request: %w", err)
		}
		s.running.Go(func() { s.answer(frame, buffer, unlocked) })
	}
}

// answer handles one request, whatever happens in the handler, and wipes the buffer that it was read into.
func (s *server) answer(request wire.Frame, buffer []byte, unlocked error) {
	reply := response{secrets: s.secrets}
	err := unlocked
	if err == nil {
		err = s.handle(request, &reply)
	}
	s.secrets.free(buffer)
	frame := wire.Frame{ID: request.ID, Op: request.Op}
	if err != nil {
		frame.Failed, frame.Meta = true, wire.Encode(asWireError(err))
	} else {
		frame.Data = reply.data
		if reply.meta != nil {
			frame.Meta = wire.Encode(reply.meta)
		}
	}
	s.write(frame)
	s.secrets.free(reply.buffer)
}

// write sends one answer. A client that is gone is no error here: the reader sees the end of its pipe.
func (s *server) write(frame wire.Frame) {
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := wire.WriteFrameIn(s.answers, frame, s.scratch); err != nil && !frame.Failed {
		// Too long: the only error of a frame that leaves the stream intact. Behind a broken pipe nobody reads this.
		tooLong := &wire.Error{Function: "answer", Code: wire.CodeUnsupported, Detail: err.Error()}
		_ = wire.WriteFrameIn(s.answers, wire.Frame{ID: frame.ID, Op: frame.Op, Failed: true, Meta: wire.Encode(tooLong)}, s.scratch)
	}
}

// response is what a handler answers.
type response struct {
	meta any
	data []byte

	secrets *secrets
	buffer  []byte // of data, where it came from the secrets
}

// secret makes room for a secret answer of n bytes. It is wiped once the answer is on its way.
func (r *response) secret(n int) ([]byte, error) {
	buffer, err := r.secrets.alloc(n)
	r.buffer = buffer
	return buffer, err
}

// handle answers one request. A panic in it is a bug in this host, and the error of this one request.
func (s *server) handle(request wire.Frame, reply *response) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = &wire.Error{Function: "module host", Code: wire.CodeInternal, Detail: fmt.Sprintf("panic in operation %d: %v", request.Op, p)}
		}
	}()
	if request.Op == wire.OpHello {
		return s.hello(request, reply)
	}
	handler, known := handlers[request.Op]
	if !known {
		return badRequest("operation %d is not known to protocol version %d", request.Op, wire.Version)
	}
	s.mu.Lock()
	library := s.library
	s.mu.Unlock()
	if library == nil {
		return badRequest("operation %d before a module was loaded", request.Op)
	}
	return handler(library, request, reply)
}

// hello loads the module. There is one Hello in the life of a host.
func (s *server) hello(request wire.Frame, reply *response) error {
	var hello wire.Hello
	if err := wire.Decode(request.Meta, &hello); err != nil {
		return err
	}
	if hello.Version != wire.Version {
		return badRequest("protocol version %d is asked for and this host speaks %d: its binary was replaced; reload the plugin",
			hello.Version, wire.Version)
	}
	if hello.MaxSessions < 1 || hello.MaxSessions > maxSessions {
		return badRequest("%d sessions: 1 to %d can be had", hello.MaxSessions, maxSessions)
	}
	if !filepath.IsAbs(hello.Module) {
		// dlopen takes a bare name for a library in the system's path, and no name for this program itself.
		return badRequest("the module %q is no absolute path", hello.Module)
	}
	s.mu.Lock()
	again := s.greeted
	s.greeted = true
	s.mu.Unlock()
	if again {
		return badRequest("a second Hello: a host loads one module in its life")
	}
	if s.unfit != nil {
		return s.unfit
	}
	library, err := s.open(hello.Module, hello.MaxSessions)
	if err != nil {
		return err
	}
	info := library.info()
	info.Version = wire.Version
	info.MemoryLocked = s.secrets.everything
	info.Notes = append(info.Notes, s.notes...)
	reply.meta = info
	s.mu.Lock()
	s.library = library
	s.mu.Unlock()
	return nil
}

// handlers are the operations after the Hello.
var handlers = map[wire.Op]func(library, wire.Frame, *response) error{
	wire.OpSlots: func(l library, _ wire.Frame, reply *response) (err error) {
		reply.meta, err = l.slots()
		return err
	},
	wire.OpMechanisms: with(func(l library, r wire.SlotRequest, _ []byte, reply *response) (err error) {
		reply.meta, err = l.mechanisms(r.Slot)
		return err
	}),
	wire.OpLogin: with(func(l library, r wire.SlotRequest, pin []byte, _ *response) error {
		if len(pin) == 0 {
			return badRequest("no PIN: an empty one is never sent to a token")
		}
		return l.login(r.Slot, pin)
	}),
	wire.OpLogout: with(func(l library, r wire.SlotRequest, _ []byte, _ *response) error {
		return l.logout(r.Slot)
	}),
	wire.OpFindKeys: with(func(l library, r wire.FindKeysRequest, _ []byte, reply *response) (err error) {
		reply.meta, err = l.findKeys(r)
		return err
	}),
	wire.OpDecryptOAEP: with(func(l library, r wire.DecryptRequest, ciphertext []byte, reply *response) error {
		out, err := decryptBuffer(r, ciphertext, reply)
		if err != nil {
			return err
		}
		n, err := l.decryptOAEP(r, ciphertext, out)
		if err != nil {
			return err
		}
		reply.data = out[:n]
		return nil
	}),
	wire.OpDecryptRaw: with(func(l library, r wire.DecryptRequest, ciphertext []byte, reply *response) (err error) {
		if reply.data, err = decryptBuffer(r, ciphertext, reply); err != nil {
			return err
		}
		return l.decryptRaw(r, ciphertext, reply.data)
	}),
	wire.OpDerive: with(func(l library, r wire.DeriveRequest, point []byte, reply *response) (err error) {
		if r.Size != 32 && r.Size != 48 {
			return badRequest("a field element of %d bytes: 32 (P-256) and 48 (P-384) are known", r.Size)
		}
		if len(point) != 1+2*r.Size || point[0] != 4 {
			return badRequest("the peer's key is no uncompressed point of %d bytes", 1+2*r.Size)
		}
		if reply.data, err = reply.secret(r.Size); err != nil {
			return err
		}
		return l.derive(r, point, reply.data)
	}),
	wire.OpGenerateKey: with(func(l library, r wire.GenerateRequest, _ []byte, reply *response) (err error) {
		reply.meta, err = l.generateKey(r)
		return err
	}),
	wire.OpDestroyKey: with(func(l library, r wire.DestroyKeyRequest, _ []byte, _ *response) error {
		return l.destroyKey(r)
	}),
	wire.OpObjects: with(func(l library, r wire.ObjectRequest, _ []byte, reply *response) (err error) {
		if r.Application == "" || r.Label != "" {
			return badRequest("objects are listed by their application alone")
		}
		reply.meta, err = l.objects(r)
		return err
	}),
	wire.OpReadObject: with(func(l library, r wire.ObjectRequest, _ []byte, reply *response) (err error) {
		if err := checkObject(r); err != nil {
			return err
		}
		reply.data, err = l.readObject(r)
		return err
	}),
	wire.OpCreateObject: with(func(l library, r wire.ObjectRequest, value []byte, _ *response) error {
		if err := checkObject(r); err != nil {
			return err
		}
		if len(value) == 0 {
			return badRequest("an object without a value: tokens refuse it")
		}
		return l.createObject(r, value)
	}),
	wire.OpDestroyObject: with(func(l library, r wire.ObjectRequest, _ []byte, _ *response) error {
		if err := checkObject(r); err != nil {
			return err
		}
		return l.destroyObject(r)
	}),
	wire.OpRandom: with(func(l library, r wire.RandomRequest, _ []byte, reply *response) (err error) {
		if r.Count < 1 || r.Count > maxRandom {
			return badRequest("%d random bytes: 1 to %d can be had", r.Count, maxRandom)
		}
		if reply.data, err = reply.secret(r.Count); err != nil {
			return err
		}
		return l.random(r.Slot, reply.data)
	}),
	wire.OpSetPIN: with(func(l library, r wire.SetPINRequest, pins []byte, _ *response) error {
		if r.OldLen < 1 || r.OldLen >= len(pins) {
			return badRequest("an old and a new PIN are needed, neither of them empty")
		}
		return l.setPIN(r.Slot, pins[:r.OldLen:r.OldLen], pins[r.OldLen:])
	}),
	wire.OpForeignObjects: with(func(l library, r wire.SlotRequest, _ []byte, reply *response) (err error) {
		reply.meta, err = l.foreignObjects(r.Slot)
		return err
	}),
	wire.OpReadForeign: with(func(l library, r wire.ForeignRequest, _ []byte, reply *response) (err error) {
		if r.Label == "" || len(r.SHA256) != 0 {
			return badRequest("foreign objects are read by their label alone")
		}
		reply.meta, reply.data, err = l.readForeign(r)
		return err
	}),
	wire.OpDestroyForeign: with(func(l library, r wire.ForeignRequest, _ []byte, _ *response) error {
		if r.Label == "" || len(r.SHA256) != sha256.Size {
			return badRequest("foreign objects are destroyed by their label and the SHA-256 of their value")
		}
		return l.destroyForeign(r)
	}),
}

// with makes a handler of one that takes its request decoded.
func with[R any](f func(l library, r R, data []byte, reply *response) error) func(library, wire.Frame, *response) error {
	return func(l library, request wire.Frame, reply *response) error {
		var r R
		if err := wire.Decode(request.Meta, &r); err != nil {
			return err
		}
		return f(l, r, request.Data, reply)
	}
}

// decryptBuffer checks a request to decrypt and makes room for the plaintext: as large as the modulus, which is what
// lets the module answer with one operation.
func decryptBuffer(r wire.DecryptRequest, ciphertext []byte, reply *response) ([]byte, error) {
	if r.Size < 1 || r.Size > maxModulus {
		return nil, badRequest("a modulus of %d bytes: 1 to %d are taken", r.Size, maxModulus)
	}
	if len(ciphertext) != r.Size {
		return nil, badRequest("a ciphertext of %d bytes for a modulus of %d", len(ciphertext), r.Size)
	}
	return reply.secret(r.Size)
}

func checkObject(r wire.ObjectRequest) error {
	if r.Application == "" || r.Label == "" {
		return badRequest("an object is named by an application and a label")
	}
	return nil
}
