package pkcs11

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func otherPIN(c *Config) { c.PIN, c.Owner = []byte("111111"), "other" }

// pinError fails the test unless err is a PINError.
func pinError(t *testing.T, err error) *hsm.PINError {
	t.Helper()
	pin, ok := errors.AsType[*hsm.PINError](err)
	if !ok {
		t.Fatalf("got %v, want a *hsm.PINError", err)
	}
	return pin
}

func list(t *testing.T, d *Device) error {
	t.Helper()
	_, err := d.FindKeys(patient(t), hsm.KeyQuery{})
	return err
}

func TestALogInIsSharedOnlyByWhoHasThePIN(t *testing.T) {
	f, m, module := newFake(t)
	first, second, stranger := f.open(t, m, module), f.open(t, m, module), f.open(t, m, module, otherPIN)
	if err := errors.Join(list(t, first), list(t, second)); err != nil {
		t.Fatal(err)
	}
	if pin := pinError(t, list(t, stranger)); !pin.Barred {
		t.Errorf("another PIN gives %+v, want Barred", pin)
	}
	if n := f.count(wire.OpLogin); n != 1 {
		t.Errorf("%d log-ins, want 1: nothing is sent for another PIN", n)
	}
}

func TestAWrongPINIsSentOnceAndBarsItsMountAlone(t *testing.T) {
	f, m, module := newFake(t)
	stranger, d := f.open(t, m, module, otherPIN), f.open(t, m, module)
	if err := list(t, d); err != nil { // so that this PIN is known to be good
		t.Fatal(err)
	}
	f.follow(func(h *fakeHost, r wire.Frame) bool { // a loss, so that on the second host the stranger comes first
		return h.number == 1 && r.Op == wire.OpMechanisms && h.fail(r, ckrSessionHandleInvalid)
	})
	if _, err := stranger.Info(patient(t)); err != nil {
		t.Fatal(err)
	}
	if pin := pinError(t, list(t, stranger)); !pin.Barred || f.count(wire.OpLogin) != 1 {
		t.Errorf("while the mount with the good PIN is open another PIN gives %+v after %d log-ins", pin, f.count(wire.OpLogin))
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if pin := pinError(t, list(t, stranger)); pin.Barred || pin.TriesLeft != -1 {
		t.Errorf("a wrong PIN gives %+v, want one that was sent", pin)
	}
	for range 3 {
		if pin := pinError(t, list(t, stranger)); !pin.Barred {
			t.Errorf("the same PIN again gives %+v, want Barred", pin)
		}
	}
	if n := f.count(wire.OpLogin); n != 2 {
		t.Errorf("%d PINs were sent, want the right one and the wrong one once", n)
	}
	if err := list(t, f.open(t, m, module)); err != nil {
		t.Errorf("the other mount's good PIN: %v", err)
	}
}

func TestReturnValuesOfALogIn(t *testing.T) {
	for name, test := range map[string]struct {
		code  uint
		flags uint // that the token shows afterwards
		tries int
	}{
		"a first wrong PIN":    {code: ckrPINIncorrect, flags: ckfUserPINCountLow, tries: -1},
		"a second":             {code: ckrPINIncorrect, flags: ckfUserPINCountLow | ckfUserPINFinalTry, tries: 1},
		"the last":             {code: ckrPINLocked, flags: ckfUserPINLocked, tries: 0},
		"a length not allowed": {code: ckrPINLenRange, tries: -1},
		"an expired PIN":       {code: ckrPINExpired, tries: -1},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module)
			f.follow(func(h *fakeHost, r wire.Frame) bool {
				if r.Op != wire.OpLogin {
					return false
				}
				h.do(func() { h.flags |= test.flags })
				return h.fail(r, test.code)
			})
			err := list(t, d)
			pin := pinError(t, err)
			if pin.TriesLeft != test.tries || pin.Barred {
				t.Errorf("got %+v, want %d tries", pin, test.tries)
			}
			if errors.Is(err, hsm.ErrLocked) != (test.tries == 0) {
				t.Errorf("ErrLocked is wrong for %v", err)
			}
			if again := pinError(t, list(t, d)); !again.Barred || f.count(wire.OpLogin) != 1 {
				t.Errorf("the same PIN again gives %+v after %d log-ins", again, f.count(wire.OpLogin))
			}
		})
	}
}

func TestALogInThatItsCallerLeftIsNotLost(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	release := make(chan struct{})
	f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpLogin && !h.hang(release) })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.FindKeys(ctx, hsm.KeyQuery{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the caller gets %v, want its deadline", err)
	}
	close(release)
	if err := list(t, d); err != nil {
		t.Errorf("the next caller gets %v", err)
	}
	if n := f.count(wire.OpLogin); n != 1 {
		t.Errorf("%d log-ins, want 1", n)
	}
}

func TestALogInThatKillsTheHostIsNotSentAgainByItself(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if r.Op != wire.OpLogin {
			return false
		}
		if h.number == 1 {
			h.do(func() { h.flags |= ckfUserPINCountLow }) // the PIN arrived, and was wrong
		}
		h.die()
		return true
	})
	if err := list(t, d); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the log-in gives %v, want ErrUnavailable", err)
	}
	if n := f.count(wire.OpLogin); n != 1 {
		t.Errorf("%d PINs were sent, want 1", n)
	}
	if pin := pinError(t, list(t, d)); !pin.Barred {
		t.Errorf("with fewer tries shown the next log-in gives %+v, want Barred", pin)
	}
	if n := f.count(wire.OpLogin); n != 1 {
		t.Errorf("%d PINs were sent, want 1", n)
	}
	f.follow(nil)
	if err := d.Unbar(patient(t)); err != nil {
		t.Fatalf("Unbar: %v", err)
	}
	if err := list(t, d); err != nil {
		t.Errorf("after Unbar: %v", err)
	}
}

func TestNoPINIsNeverSentAsAnEmptyOne(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module, func(c *Config) { c.PIN = nil })
	if pin := pinError(t, list(t, d)); !pin.Barred || f.count(wire.OpLogin) != 0 {
		t.Errorf("no PIN gives %+v after %d log-ins", pin, f.count(wire.OpLogin))
	}
}

func TestChangingThePIN(t *testing.T) {
	f, m, module := newFake(t)
	d, old := f.open(t, m, module), f.open(t, m, module)
	if err := d.ChangePIN(patient(t), []byte("777777")); err != nil {
		t.Fatal(err)
	}
	if f.pin != "777777" {
		t.Errorf("the token's PIN is %q", f.pin)
	}
	if err := list(t, d); err != nil {
		t.Errorf("with the new PIN: %v", err)
	}
	if f.born() != 2 {
		t.Errorf("%d hosts, want 2: a module that remembers the old PIN would send it", f.born())
	}
	if pin := pinError(t, list(t, old)); !pin.Barred {
		t.Errorf("a mount with the old PIN gets %+v, want Barred", pin)
	}
	if n := f.count(wire.OpLogin); n != 2 {
		t.Errorf("%d log-ins, want 2", n)
	}

	f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpSetPIN && h.fail(r, ckrPINLenRange) })
	if err := d.ChangePIN(patient(t), []byte("1")); err == nil {
		t.Error("a PIN of one digit was taken")
	}
	if err := list(t, d); err != nil {
		t.Errorf("after a change that was refused: %v", err)
	}
}

func TestUnbarDoesNotSendAnotherMountsWrongPINAgain(t *testing.T) {
	f, m, module := newFake(t)
	stranger := f.open(t, m, module, otherPIN)
	if pin := pinError(t, list(t, stranger)); pin.Barred {
		t.Fatalf("the first time gives %+v, want one that was sent", pin)
	}
	mine := f.open(t, m, module)
	if pin := pinError(t, list(t, mine)); !pin.Barred {
		t.Fatalf("while the token shows a wrong PIN mine gives %+v, want Barred", pin)
	}
	if err := mine.Unbar(patient(t)); err != nil {
		t.Fatal(err)
	}
	if pin := pinError(t, list(t, stranger)); !pin.Barred {
		t.Errorf("after the unbarring of mine the stranger's PIN gives %+v, want Barred", pin)
	}
	if err := list(t, mine); err != nil {
		t.Errorf("mine: %v", err)
	}
	if n := f.count(wire.OpLogin); n != 2 {
		t.Errorf("%d PINs were sent, want the wrong one once and mine", n)
	}
}

func TestUnbarSendsNothingPastAMountWhosePINIsRight(t *testing.T) {
	f, m, module := newFake(t)
	first, second := f.open(t, m, module), f.open(t, m, module)
	if err := errors.Join(list(t, first), list(t, second)); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil { // the second one has the same PIN and holds on
		t.Fatal(err)
	}
	lost := 0
	f.follow(func(h *fakeHost, r wire.Frame) bool { // the host is replaced now and then, as after any loss
		return h.number == lost+1 && r.Op == wire.OpMechanisms && h.fail(r, ckrSessionHandleInvalid)
	})
	for _, pin := range []string{"111111", "222222", "333333"} {
		b := f.open(t, m, module, func(c *Config) { c.PIN, c.Owner = []byte(pin), "other" })
		if refused := pinError(t, b.Unbar(patient(t))); !refused.Barred || !strings.Contains(refused.Detail, "another mount") {
			t.Errorf("Unbar gives %+v", refused)
		}
		f.do(func() { lost = f.hosts - 1 })
		eventually(t, "there is another host", func() bool { _, err := b.Info(patient(t)); return err == nil })
		if refused := pinError(t, list(t, b)); !refused.Barred {
			t.Errorf("its PIN gives %+v, want Barred", refused)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if n := f.count(wire.OpLogin); n != 1 {
		t.Errorf("%d wrong PINs were sent while a mount with the right one is open", n-1)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	b := f.open(t, m, module, otherPIN)
	if err := b.Unbar(patient(t)); err != nil {
		t.Errorf("with the other mount closed: %v", err)
	}
}

func TestADeviceThatWasClosedDuringItsLogInHoldsNothing(t *testing.T) {
	f, m, module := newFake(t)
	keep := f.open(t, m, module, otherPIN) // another mount keeps the host alive
	if _, err := keep.Info(patient(t)); err != nil {
		t.Fatal(err)
	}
	d := f.open(t, m, module)
	release := make(chan struct{})
	f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpLogin && !h.hang(release) })
	listed := waits(t, func() error { return list(t, d) })
	eventually(t, "the log-in is inside", func() bool { return f.count(wire.OpLogin) == 1 })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	close(release)
	_ = listed() // whatever it gets: its device is closed
	if !keep.known().mayTry(keep) {
		t.Error("a closed device holds the token for ever")
	}
}

func TestAPINChangeWithAnUnknownReturnValueMayHaveHappened(t *testing.T) {
	for name, code := range map[string]uint{
		"CKR_HOST_MEMORY": 0x02, "a vendor's own": 0x80000201, "a bug in the host": wire.CodeInternal,
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module)
			f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpSetPIN && h.fail(r, code) })
			err := d.ChangePIN(patient(t), []byte("777777"))
			if !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "may or may not") {
				t.Errorf("it gives %v, want an unknown outcome", err)
			}
			r, err := m.ledger.files.read(fakeSerial)
			if err != nil || r.Intent == nil {
				t.Errorf("the ledger holds %+v, %v; want the intent that nobody resolved", r, err)
			}
		})
	}
}

func TestAFullDiskKeepsNoVaultSealed(t *testing.T) {
	f, m, module := newFake(t)
	if err := list(t, f.open(t, m, module)); err != nil {
		t.Fatal(err)
	}
	start := func(spoil func(*ledger)) *Device { // the plugin again, after a restart
		other := New(m.options)
		other.spawn = f.spawn
		spoil(other.ledger)
		t.Cleanup(func() {
			if err := other.Close(); err != nil {
				t.Error(err)
			}
		})
		return f.open(t, other, module)
	}
	noRoom := func(l *ledger) { l.files.sync = full(unix.ENOSPC, false) }
	if err := list(t, start(noRoom)); err != nil {
		t.Errorf("with a full disk: %v", err)
	}
	if err := start(noRoom).ChangePIN(patient(t), []byte("777777")); !errors.Is(err, hsm.ErrUnavailable) || f.count(wire.OpSetPIN) != 0 {
		t.Errorf("a change of the PIN, which has to be recorded, gives %v", err)
	}
	f.do(func() { f.pin = "777777" }) // by another program
	before := f.count(wire.OpLogin)
	for range 3 {
		if err := list(t, start(noRoom)); err == nil {
			t.Fatal("a wrong PIN works")
		}
	}
	if n := f.count(wire.OpLogin) - before; n != 1 {
		t.Errorf("a PIN that is wrong now was sent %d times, want once", n)
	}
}

func TestAPINChangeThatTheTokenRefusedSurelyDidNotHappen(t *testing.T) {
	for name, test := range map[string]struct {
		code uint
		kind error
	}{
		"a length not allowed": {ckrPINLenRange, hsm.ErrUnsupported},
		"characters not taken": {ckrPINInvalid, hsm.ErrUnsupported},
		"too weak":             {ckrPINTooWeak, hsm.ErrUnsupported},
		"the session is gone":  {ckrSessionHandleInvalid, hsm.ErrUnavailable},
		"nobody is logged in":  {ckrUserNotLoggedIn, hsm.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module)
			f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpSetPIN && h.fail(r, test.code) })
			err := d.ChangePIN(patient(t), []byte("777777"))
			if !errors.Is(err, test.kind) || errors.Is(err, hsm.ErrMayHaveHappened) {
				t.Errorf("it gives %v, want %v that surely did not happen", err, test.kind)
			}
			if errors.Is(err, hsm.ErrUnavailable) != errors.Is(test.kind, hsm.ErrUnavailable) {
				t.Errorf("whether to try again is wrong for %v", err)
			}
			f.follow(nil)
			if err := list(t, d); err != nil {
				t.Errorf("with the old PIN: %v", err)
			}
		})
	}
}

func TestAPINChangeOfATokenThatIsAwaySurelyDidNotHappen(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	f.do(func() { f.present = false })
	if err := d.ChangePIN(patient(t), []byte("777777")); !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrMayHaveHappened) {
		t.Errorf("it gives %v, want ErrUnavailable that surely did not happen", err)
	}
}

func TestAPINChangeOrTrialWhoseCallerWentMayHaveHappened(t *testing.T) {
	for name, test := range map[string]struct {
		op  wire.Op
		ask func(context.Context, *Device) error
	}{
		"a change": {wire.OpSetPIN, func(ctx context.Context, d *Device) error { return d.ChangePIN(ctx, []byte("777777")) }},
		"a trial":  {wire.OpLogin, func(ctx context.Context, d *Device) error { return d.AdoptPIN(ctx, []byte(fakePIN), false) }},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module)
			if err := list(t, d); err != nil {
				t.Fatal(err)
			}
			before, release := f.count(test.op), make(chan struct{})
			f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == test.op && !h.hang(release) })
			ctx, cancel := context.WithCancel(patient(t))
			asked := waits(t, func() error { return test.ask(ctx, d) })
			eventually(t, "the token is asked", func() bool { return f.count(test.op) > before })
			cancel()
			if err := asked(); !errors.Is(err, hsm.ErrMayHaveHappened) || !errors.Is(err, context.Canceled) {
				t.Errorf("it gives %v, want an unknown outcome", err)
			}
			close(release)
		})
	}
}

func TestADeviceThatWasClosedDuringAPINChangeKeepsNoPIN(t *testing.T) {
	f, m, module := newFake(t)
	keep := f.open(t, m, module) // keeps the host alive
	d := f.open(t, m, module, func(c *Config) { c.Owner = "other" })
	if err := errors.Join(list(t, keep), list(t, d)); err != nil {
		t.Fatal(err)
	}
	release := make(chan struct{})
	f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpSetPIN && !h.hang(release) })
	changed := waits(t, func() error { return d.ChangePIN(patient(t), []byte("777777")) })
	eventually(t, "the change is inside", func() bool { return f.count(wire.OpSetPIN) == 1 })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := changed(); err != nil {
		t.Fatalf("the change: %v", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if strings.Contains(string(d.pin), "777777") {
		t.Error("a closed device has a PIN again, which nobody wipes")
	}
}

func TestANewHostsLogInForgetsNoMountThatHasTheSamePIN(t *testing.T) {
	f, m, module := newFake(t)
	first, second := f.open(t, m, module), f.open(t, m, module, func(c *Config) { c.Owner = "second" })
	stranger := f.open(t, m, module, otherPIN)
	if err := errors.Join(list(t, first), list(t, second)); err != nil {
		t.Fatal(err)
	}
	newHost := func() {
		h, err := first.module.host(patient(t))
		if err != nil {
			t.Fatal(err)
		}
		first.module.replace(h, errors.New("the test wants a new host"))
	}
	newHost()
	if err := errors.Join(list(t, first), first.Close()); err != nil { // the second one has not used the new host
		t.Fatal(err)
	}
	newHost()
	if pin := pinError(t, list(t, stranger)); !pin.Barred {
		t.Errorf("another PIN gives %+v, want Barred while a mount with the right one is open", pin)
	}
}
