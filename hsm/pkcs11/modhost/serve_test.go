package modhost

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// fake is a library that answers with what it was asked, and keeps the buffers that it was given, as a thief would.
type fake struct {
	mu    sync.Mutex
	kept  [][]byte
	hang  chan struct{} // slots waits for it where it is set
	enter chan struct{} // told by slots, where it is set
	err   error         // of every call
	panic bool
	value []byte // of every object
}

func (f *fake) keep(b []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.kept = append(f.kept, b)
}

func (f *fake) fill(b []byte) error {
	for i := range b {
		b[i] = 0x5e
	}
	f.keep(b)
	return f.err
}

func (f *fake) info() wire.HelloReply { return wire.HelloReply{Library: "fake"} }

func (f *fake) slots() (wire.Slots, error) {
	if f.panic {
		var nobody *fake
		nobody.keep(nil)
	}
	if f.enter != nil {
		f.enter <- struct{}{}
	}
	if f.hang != nil {
		<-f.hang
	}
	return wire.Slots{Slots: []wire.Slot{{ID: 7}}}, f.err
}

func (f *fake) mechanisms(slot uint) (wire.Mechanisms, error) {
	return wire.Mechanisms{Mechanisms: []wire.Mechanism{{Type: slot}}}, f.err
}

func (f *fake) login(_ uint, pin []byte) error { f.keep(pin); return f.err }

func (f *fake) logout(uint) error { return f.err }

func (f *fake) setPIN(_ uint, old, pin []byte) error { f.keep(old); f.keep(pin); return f.err }

func (f *fake) findKeys(r wire.FindKeysRequest) (wire.Keys, error) {
	return wire.Keys{Keys: []wire.Key{{Label: r.Label, ID: r.ID}}}, f.err
}

func (f *fake) generateKey(r wire.GenerateRequest) (wire.Key, error) {
	return wire.Key{Label: r.Label}, f.err
}

func (f *fake) destroyKey(wire.DestroyKeyRequest) error { return f.err }

func (f *fake) decryptOAEP(_ wire.DecryptRequest, _, out []byte) (int, error) {
	return len(out) / 2, f.fill(out)
}

func (f *fake) decryptRaw(_ wire.DecryptRequest, _, out []byte) error { return f.fill(out) }

func (f *fake) derive(_ wire.DeriveRequest, _, out []byte) error { return f.fill(out) }

func (f *fake) random(_ uint, out []byte) error { return f.fill(out) }

func (f *fake) objects(wire.ObjectRequest) (wire.Objects, error) {
	return wire.Objects{Labels: []string{"a"}}, f.err
}

func (f *fake) readObject(wire.ObjectRequest) ([]byte, error) { return f.value, f.err }

func (f *fake) foreignObjects(uint) (wire.Objects, error) { return wire.Objects{}, f.err }

func (f *fake) readForeign(wire.ForeignRequest) (wire.Foreign, []byte, error) {
	return wire.Foreign{Objects: []wire.ForeignObject{{Size: len(f.value)}}}, f.value, f.err
}

func (f *fake) destroyForeign(wire.ForeignRequest) error { return f.err }

func (f *fake) createObject(wire.ObjectRequest, []byte) error { return f.err }

func (f *fake) destroyObject(wire.ObjectRequest) error { return f.err }

// conversation gives the frames to a server over the library and returns its answers by id. Each but the Hello is
// handled on its own.
func conversation(t testing.TB, l library, frames ...wire.Frame) map[uint64]wire.Frame {
	t.Helper()
	var requests bytes.Buffer
	for _, frame := range frames {
		if err := wire.WriteFrame(&requests, frame); err != nil {
			t.Fatal(err)
		}
	}
	var answers bytes.Buffer
	s := greeted(&answers, l)
	if err := s.serve(&requests); err != nil {
		t.Fatal(err)
	}
	s.running.Wait()
	got := make(map[uint64]wire.Frame)
	for {
		frame, err := wire.ReadFrame(&answers)
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := got[frame.ID]; twice {
			t.Errorf("request %d was answered twice", frame.ID)
		}
		got[frame.ID] = frame
	}
}

// greeted is a server behind its Hello.
func greeted(answers io.Writer, l library) *server {
	s := newServer(answers, &secrets{everything: true}, nil)
	s.library, s.greeted = l, true
	return s
}

// failureOf returns the error that an answer is, nil where it is none.
func failureOf(t testing.TB, frame wire.Frame) *wire.Error {
	t.Helper()
	if !frame.Failed {
		return nil
	}
	var failure wire.Error
	if err := wire.Decode(frame.Meta, &failure); err != nil {
		t.Fatal(err)
	}
	return &failure
}

// wellFormed is one good request of each operation.
func wellFormed() []wire.Frame {
	point := append([]byte{4}, make([]byte, 64)...)
	frames := []wire.Frame{
		{Op: wire.OpSlots},
		{Op: wire.OpMechanisms, Meta: wire.Encode(wire.SlotRequest{Slot: 3})},
		{Op: wire.OpLogin, Meta: wire.Encode(wire.SlotRequest{Slot: 3}), Data: []byte("123456")},
		{Op: wire.OpLogout, Meta: wire.Encode(wire.SlotRequest{Slot: 3})},
		{Op: wire.OpFindKeys, Meta: wire.Encode(wire.FindKeysRequest{Slot: 3, Label: "k"})},
		{Op: wire.OpDecryptOAEP, Meta: wire.Encode(wire.DecryptRequest{Slot: 3, Handle: 1, Hash: 0x220, Size: 256}), Data: make([]byte, 256)},
		{Op: wire.OpDecryptRaw, Meta: wire.Encode(wire.DecryptRequest{Slot: 3, Handle: 1, Size: 256}), Data: make([]byte, 256)},
		{Op: wire.OpDerive, Meta: wire.Encode(wire.DeriveRequest{Slot: 3, Handle: 1, Size: 32}), Data: point},
		{Op: wire.OpGenerateKey, Meta: wire.Encode(wire.GenerateRequest{Slot: 3, Algorithm: "rsa-2048", Label: "k"})},
		{Op: wire.OpDestroyKey, Meta: wire.Encode(wire.DestroyKeyRequest{Slot: 3, Handle: 1})},
		{Op: wire.OpObjects, Meta: wire.Encode(wire.ObjectRequest{Slot: 3, Application: "a"})},
		{Op: wire.OpReadObject, Meta: wire.Encode(wire.ObjectRequest{Slot: 3, Application: "a", Label: "l"})},
		{Op: wire.OpCreateObject, Meta: wire.Encode(wire.ObjectRequest{Slot: 3, Application: "a", Label: "l"}), Data: []byte("value")},
		{Op: wire.OpDestroyObject, Meta: wire.Encode(wire.ObjectRequest{Slot: 3, Application: "a", Label: "l"})},
		{Op: wire.OpRandom, Meta: wire.Encode(wire.RandomRequest{Slot: 3, Count: 32})},
		{Op: wire.OpSetPIN, Meta: wire.Encode(wire.SetPINRequest{Slot: 3, OldLen: 6}), Data: []byte("123456654321")},
		{Op: wire.OpForeignObjects, Meta: wire.Encode(wire.SlotRequest{Slot: 3})},
		{Op: wire.OpReadForeign, Meta: wire.Encode(wire.ForeignRequest{Slot: 3, Label: "l"})},
		{Op: wire.OpDestroyForeign, Meta: wire.Encode(wire.ForeignRequest{Slot: 3, Label: "l", SHA256: make([]byte, 32)})},
	}
	for i := range frames {
		frames[i].ID = uint64(i + 1)
	}
	return frames
}

func TestEveryOperationIsAnsweredOnce(t *testing.T) {
	defer goleak.VerifyNone(t)
	frames := wellFormed()
	if len(frames) != len(handlers) {
		t.Errorf("%d operations are tested of %d", len(frames), len(handlers))
	}
	answers := conversation(t, &fake{value: []byte("value")}, frames...)
	for _, frame := range frames {
		answer, answered := answers[frame.ID]
		if failure := failureOf(t, answer); !answered || failure != nil || answer.Op != frame.Op {
			t.Errorf("operation %d: %+v, %v", frame.Op, answer, failure)
		}
	}
	if got := answers[6].Data; len(got) != 128 || got[0] != 0x5e {
		t.Errorf("the plaintext is %x", got)
	}
	if got := answers[12].Data; string(got) != "value" {
		t.Errorf("the object is %q", got)
	}
}

func TestErrorsOfTheModuleAreAnswered(t *testing.T) {
	broken := &wire.Error{Function: "C_Something", Code: 0x30, Detail: "of the test"}
	for id, answer := range conversation(t, &fake{err: broken}, wellFormed()...) {
		if diff := cmp.Diff(broken, failureOf(t, answer)); diff != "" {
			t.Errorf("answer %d (-want +got):\n%s", id, diff)
		}
		if len(answer.Data) != 0 {
			t.Errorf("answer %d: an error with %d bytes of data", id, len(answer.Data))
		}
	}
}

func TestSecretsAreWiped(t *testing.T) {
	for name, err := range map[string]error{"after success": nil, "after an error": errors.New("of the test")} {
		t.Run(name, func(t *testing.T) {
			thief := &fake{err: err}
			conversation(t, thief, wellFormed()...)
			if len(thief.kept) != 7 { // PIN, two PINs, two plaintexts, shared secret, random bytes
				t.Errorf("%d secrets passed", len(thief.kept))
			}
			for _, secret := range thief.kept {
				if len(secret) == 0 || !bytes.Equal(secret, make([]byte, len(secret))) {
					t.Errorf("this is left of a secret: %q", secret)
				}
			}
		})
	}
}

func TestBadRequests(t *testing.T) {
	request := func(op wire.Op, meta any, size int) wire.Frame {
		return wire.Frame{ID: 1, Op: op, Meta: wire.Encode(meta), Data: bytes.Repeat([]byte{4}, size)}
	}
	object := wire.ObjectRequest{Application: "a", Label: "l"}
	for name, frame := range map[string]wire.Frame{
		"operation 0":                              request(0, nil, 0),
		"an operation of the future":               request(99, nil, 0),
		"no meta where one is needed":              {ID: 1, Op: wire.OpMechanisms},
		"meta that is no JSON":                     {ID: 1, Op: wire.OpMechanisms, Meta: []byte("{")},
		"meta of a wrong type":                     request(wire.OpMechanisms, map[string]string{"Slot": "one"}, 0),
		"a negative slot":                          request(wire.OpMechanisms, map[string]int{"Slot": -1}, 0),
		"a log-in without a PIN":                   request(wire.OpLogin, wire.SlotRequest{}, 0),
		"no old PIN":                               request(wire.OpSetPIN, wire.SetPINRequest{OldLen: 0}, 6),
		"no new PIN":                               request(wire.OpSetPIN, wire.SetPINRequest{OldLen: 6}, 6),
		"an old PIN behind the end":                request(wire.OpSetPIN, wire.SetPINRequest{OldLen: 60}, 6),
		"foreign objects of no label":              request(wire.OpReadForeign, wire.ForeignRequest{}, 0),
		"foreign objects read by their value":      request(wire.OpReadForeign, wire.ForeignRequest{Label: "l", SHA256: make([]byte, 32)}, 0),
		"foreign objects destroyed by label alone": request(wire.OpDestroyForeign, wire.ForeignRequest{Label: "l"}, 0),
		"a negative old PIN":                       request(wire.OpSetPIN, wire.SetPINRequest{OldLen: -1}, 6),
		"a modulus of no bytes":                    request(wire.OpDecryptOAEP, wire.DecryptRequest{}, 0),
		"a modulus of a gigabyte":                  request(wire.OpDecryptOAEP, wire.DecryptRequest{Size: 1 << 30}, 256),
		"a negative modulus":                       request(wire.OpDecryptRaw, wire.DecryptRequest{Size: -256}, 256),
		"a ciphertext shorter than the modulus":    request(wire.OpDecryptOAEP, wire.DecryptRequest{Size: 256}, 255),
		"a raw block longer than the modulus":      request(wire.OpDecryptRaw, wire.DecryptRequest{Size: 256}, 257),
		"a field element of 66 bytes":              request(wire.OpDerive, wire.DeriveRequest{Size: 66}, 133),
		"a point that is too short":                request(wire.OpDerive, wire.DeriveRequest{Size: 32}, 33),
		"a point that is not uncompressed":         {ID: 1, Op: wire.OpDerive, Meta: wire.Encode(wire.DeriveRequest{Size: 32}), Data: make([]byte, 65)},
		"no random bytes":                          request(wire.OpRandom, wire.RandomRequest{}, 0),
		"too many random bytes":                    request(wire.OpRandom, wire.RandomRequest{Count: 1025}, 0),
		"objects without an application":           request(wire.OpObjects, wire.ObjectRequest{}, 0),
		"objects with a label":                     request(wire.OpObjects, object, 0),
		"reading an object without a label":        request(wire.OpReadObject, wire.ObjectRequest{Application: "a"}, 0),
		"creating an object without a value":       request(wire.OpCreateObject, object, 0),
		"creating an object without a label":       request(wire.OpCreateObject, wire.ObjectRequest{Application: "a"}, 3),
		"destroying an object of no application":   request(wire.OpDestroyObject, wire.ObjectRequest{Label: "l"}, 0),
		"a second Hello":                           request(wire.OpHello, wire.Hello{Version: wire.Version, Module: "/m.so", MaxSessions: 1}, 0),
		"a Hello of another version":               request(wire.OpHello, wire.Hello{Version: wire.Version + 1, MaxSessions: 1}, 0),
		"a Hello without sessions":                 request(wire.OpHello, wire.Hello{Version: wire.Version}, 0),
		"a Hello with a million sessions":          request(wire.OpHello, wire.Hello{Version: wire.Version, MaxSessions: 1e6}, 0),
		"a Hello without a module":                 request(wire.OpHello, wire.Hello{Version: wire.Version, MaxSessions: 1}, 0),
		"a Hello with a module's bare name":        request(wire.OpHello, wire.Hello{Version: wire.Version, Module: "m.so", MaxSessions: 1}, 0),
		"a Hello that is none":                     {ID: 1, Op: wire.OpHello, Meta: []byte("hello")},
		"an answer that is taken for a request":    {ID: 1, Op: wire.OpMechanisms, Failed: true, Meta: []byte(`[]`)},
		"a meta of null where a number is needed":  {ID: 1, Op: wire.OpRandom, Meta: []byte(`null`)},
	} {
		t.Run(name, func(t *testing.T) {
			answers := conversation(t, &fake{}, frame)
			failure := failureOf(t, answers[1])
			if failure == nil || failure.Code != wire.CodeBadRequest || failure.Detail == "" {
				t.Errorf("got %v, want CodeBadRequest", failure)
			}
		})
	}
}

func TestNothingIsDoneBeforeTheHello(t *testing.T) {
	var requests, answers bytes.Buffer
	for _, frame := range wellFormed() {
		if err := wire.WriteFrame(&requests, frame); err != nil {
			t.Fatal(err)
		}
	}
	s := newServer(&answers, &secrets{everything: true}, nil)
	if err := s.serve(&requests); err != nil {
		t.Fatal(err)
	}
	s.running.Wait()
	for range handlers {
		answer, err := wire.ReadFrame(&answers)
		if err != nil {
			t.Fatal(err)
		}
		if failure := failureOf(t, answer); failure == nil || failure.Code != wire.CodeBadRequest {
			t.Errorf("operation %d: %v", answer.Op, failure)
		}
	}
}

func TestHello(t *testing.T) {
	hello := wire.Frame{ID: 1, Op: wire.OpHello, Meta: wire.Encode(wire.Hello{Version: wire.Version, Module: "/m.so", MaxSessions: 8})}
	unfit := &wire.Error{Function: "module host", Code: wire.CodeLoad, Detail: "OPENSC_DEBUG"}
	for name, c := range map[string]struct {
		unfit, err error
		want       *wire.Error
		opened     bool
	}{
		"loads the module":               {opened: true},
		"tells why it cannot be loaded":  {err: unfit, want: unfit, opened: true},
		"loads nothing in a bad process": {unfit: unfit, want: unfit},
	} {
		t.Run(name, func(t *testing.T) {
			var requests, answers bytes.Buffer
			if err := wire.WriteFrame(&requests, hello); err != nil {
				t.Fatal(err)
			}
			opened := false
			s := newServer(&answers, &secrets{everything: true}, func(path string, sessions int) (library, error) {
				opened = path == "/m.so" && sessions == 8
				return &fake{}, c.err
			})
			s.notes, s.unfit = []string{"a note"}, c.unfit
			if err := s.serve(&requests); err != nil {
				t.Fatal(err)
			}
			s.running.Wait()
			answer, err := wire.ReadFrame(&answers)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.want, failureOf(t, answer)); diff != "" || opened != c.opened {
				t.Errorf("opened: %t; error (-want +got):\n%s", opened, diff)
			}
			if c.want != nil {
				return
			}
			var reply wire.HelloReply
			if err := wire.Decode(answer.Meta, &reply); err != nil {
				t.Fatal(err)
			}
			want := wire.HelloReply{Version: wire.Version, Library: "fake", MemoryLocked: true, Notes: []string{"a note"}}
			if diff := cmp.Diff(want, reply); diff != "" {
				t.Errorf("reply (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAPanicIsTheErrorOfItsRequest(t *testing.T) {
	failure := failureOf(t, conversation(t, &fake{panic: true}, wire.Frame{ID: 1, Op: wire.OpSlots})[1])
	if failure == nil || failure.Code != wire.CodeInternal || !strings.Contains(failure.Detail, "panic") {
		t.Errorf("got %v", failure)
	}
}

func TestAnAnswerThatIsTooLongIsAnError(t *testing.T) {
	frame := wire.Frame{ID: 1, Op: wire.OpReadObject, Meta: wire.Encode(wire.ObjectRequest{Application: "a", Label: "l"})}
	failure := failureOf(t, conversation(t, &fake{value: make([]byte, wire.MaxFrame)}, frame)[1])
	if failure == nil || failure.Code != wire.CodeUnsupported {
		t.Errorf("got %v", failure)
	}
}

func TestTheEndOfTheRequestsEndsServeWhileTheModuleHangs(t *testing.T) {
	defer goleak.VerifyNone(t)
	requests, write := io.Pipe()
	hanging := &fake{hang: make(chan struct{}), enter: make(chan struct{})}
	s := greeted(io.Discard, hanging)
	served := make(chan error)
	go func() { served <- s.serve(requests) }()
	if err := wire.WriteFrame(write, wire.Frame{ID: 1, Op: wire.OpSlots}); err != nil {
		t.Fatal(err)
	}
	<-hanging.enter
	_ = write.Close()
	if err := <-served; err != nil {
		t.Errorf("the end of the requests is no error: %v", err)
	}
	close(hanging.hang)
	s.running.Wait()
}

func TestRequestsThatAreNoFramesEndServe(t *testing.T) {
	s := greeted(io.Discard, &fake{})
	if err := s.serve(strings.NewReader("what a library prints when it finds the descriptor\n")); !errors.Is(err, wire.ErrMalformed) {
		t.Errorf("got %v, want ErrMalformed", err)
	}
}

func FuzzServe(f *testing.F) {
	var all bytes.Buffer
	for _, frame := range wellFormed() {
		var one bytes.Buffer
		if err := wire.WriteFrame(&one, frame); err != nil {
			f.Fatal(err)
		}
		f.Add(one.Bytes())
		_, _ = all.Write(one.Bytes())
	}
	f.Add(all.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		var answers bytes.Buffer
		s := greeted(&answers, &fake{})
		err := s.serve(bytes.NewReader(b))
		s.running.Wait()
		if err != nil && !errors.Is(err, wire.ErrMalformed) {
			t.Fatalf("an error of its own kind: %v", err)
		}
		sent := 0
		for r := bytes.NewReader(b); ; sent++ {
			if _, err := wire.ReadFrame(r); err != nil {
				break
			}
		}
		for range sent {
			answer, err := wire.ReadFrame(&answers)
			if err != nil {
				t.Fatalf("%d requests, and an answer is missing: %v", sent, err)
			}
			if failure := failureOf(t, answer); failure != nil && failure.Code == wire.CodeInternal {
				t.Fatalf("a bug: %v", failure)
			}
		}
		if answers.Len() > 0 {
			t.Errorf("%d bytes more than the answers to %d requests", answers.Len(), sent)
		}
	})
}
