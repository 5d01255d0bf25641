package pkcs11

import (
	"context"
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func TestAWrongNewPINLeavesTheLogInThatIsInUse(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	if err := list(t, d); err != nil {
		t.Fatal(err)
	}
	for i, wantBarred := range []bool{false, true, true} { // it is sent once, and then no more
		if pin := pinError(t, d.AdoptPIN(patient(t), []byte("999999"), false)); pin.Barred != wantBarred {
			t.Errorf("attempt %d: %+v", i, pin)
		}
		if err := list(t, d); err != nil {
			t.Errorf("the log-in that was in use: %v", err)
		}
	}
	if n := f.count(wire.OpLogin); n != 2 {
		t.Errorf("%d PINs were sent, want 2: the stored one, and the new one once", n)
	}
}

func TestARightNewPINReplacesTheOldOne(t *testing.T) {
	f, m, module := newFake(t)
	d, other := f.open(t, m, module), f.open(t, m, module, func(c *Config) { c.Owner = "other" })
	if err := errors.Join(list(t, d), list(t, other)); err != nil {
		t.Fatal(err)
	}
	f.do(func() { f.pin = "777777" }) // by another program
	if err := d.AdoptPIN(patient(t), []byte("777777"), false); err != nil {
		t.Fatal(err)
	}
	if err := list(t, d); err != nil {
		t.Errorf("with the new PIN: %v", err)
	}
	if pin := pinError(t, list(t, other)); !pin.Barred {
		t.Errorf("another mount with the old PIN gets %+v, want Barred", pin)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	m.mu.Lock()
	mod := m.modules[d.module.path]
	m.mu.Unlock()
	if h, err := mod.host(patient(t)); err == nil {
		mod.replace(h, errors.New("the test wants a new host"))
	}
	if pin := pinError(t, list(t, other)); !pin.Barred {
		t.Errorf("on a new host the old PIN gets %+v, want Barred", pin)
	}
	if n := f.count(wire.OpLogin); n != 2 {
		t.Errorf("%d PINs were sent, want 2", n)
	}
}

func TestAPersonsWordForOnePINSpendsATryButTheLastOneOnlyWhenAsked(t *testing.T) {
	for name, test := range map[string]struct {
		flags uint
		last  bool
		sent  bool
	}{
		"all tries are left":                    {0, false, true},
		"a try is missing":                      {ckfUserPINCountLow, false, true},
		"the last try is left":                  {ckfUserPINCountLow | ckfUserPINFinalTry, false, false},
		"the last try, and it may be spent":     {ckfUserPINCountLow | ckfUserPINFinalTry, true, true},
		"it is locked, whatever a person wants": {ckfUserPINLocked, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module, func(c *Config) { c.PIN = []byte("000000") })
			f.do(func() { f.flags |= test.flags })
			err := d.AdoptPIN(patient(t), []byte(fakePIN), test.last)
			if test.sent != (err == nil) {
				t.Fatalf("AdoptPIN = %v", err)
			}
			want := 0
			if test.sent {
				want = 1
				f.do(func() { f.flags &^= ckfUserPINCountLow | ckfUserPINFinalTry })
				if err := list(t, d); err != nil {
					t.Errorf("with the new PIN: %v", err)
				}
			} else if pin := pinError(t, err); !pin.Barred {
				t.Errorf("%+v, want Barred", pin)
			}
			if n := f.count(wire.OpLogin); n != want {
				t.Errorf("%d PINs were sent, want %d", n, want)
			}
		})
	}
}

// The word is for one log-in: what it let through leaves no pass for another.
func TestAPersonsWordEndsWithItsLogIn(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	f.do(func() { f.flags |= ckfUserPINCountLow })
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		return r.Op == wire.OpLogin && h.fail(r, ckrUserPINNotInitialized)
	})
	if err := d.AdoptPIN(patient(t), []byte("111111"), false); err == nil {
		t.Fatal("a log-in that failed is a success")
	}
	f.follow(nil)
	if pin := pinError(t, list(t, d)); !pin.Barred {
		t.Errorf("the next log-in gets %+v, want Barred", pin)
	}
	if n := f.count(wire.OpLogin); n != 1 {
		t.Errorf("%d PINs were sent, want 1", n)
	}
}

func TestANewPINOnADeviceThatCannotAnswer(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	f.do(func() { f.present = false })
	if err := d.AdoptPIN(patient(t), []byte("777777"), false); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("an absent token gives %v", err)
	}
	f.do(func() { f.present = true })
	if err := d.AdoptPIN(patient(t), nil, false); err == nil {
		t.Error("an empty PIN was taken")
	}
	ctx, cancel := context.WithCancel(patient(t))
	cancel()
	if err := d.AdoptPIN(ctx, []byte("777777"), false); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended request gives %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.AdoptPIN(patient(t), []byte("777777"), false); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed device gives %v", err)
	}
	if n := f.count(wire.OpLogin); n != 0 {
		t.Errorf("%d PINs were sent, want none", n)
	}
}

func TestOneMountsWordSpendsNoTryOfATokenThatAnotherMountUses(t *testing.T) {
	f, m, module := newFake(t)
	if err := list(t, f.open(t, m, module)); err != nil {
		t.Fatal(err)
	}
	stranger := f.open(t, m, module, otherPIN)
	for _, pin := range []string{"222222", "333333"} {
		if refused := pinError(t, stranger.AdoptPIN(patient(t), []byte(pin), true)); !refused.Barred {
			t.Errorf("%s gives %+v, want Barred", pin, refused)
		}
	}
	if err := stranger.AdoptPIN(patient(t), []byte(fakePIN), false); err != nil {
		t.Errorf("the PIN that is right: %v", err)
	}
	if n := f.count(wire.OpLogin); n != 2 {
		t.Errorf("%d PINs were sent, want the right one twice", n)
	}
}

func TestFollowingTheSentencesAtTheLastTrySpendsNoneOnARejectedPIN(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module, func(c *Config) { c.PIN = []byte("000000") })
	if pin := pinError(t, list(t, d)); pin.Barred {
		t.Fatalf("the first time gives %+v, want one that was sent", pin)
	}
	f.do(func() { f.flags |= ckfUserPINCountLow | ckfUserPINFinalTry })
	says := func(err error, want string) {
		t.Helper()
		pin := pinError(t, err)
		if !pin.Barred || !strings.Contains(pin.Detail, want) {
			t.Errorf("got %+v, want Barred and %q", pin, want)
		}
		if want != "the bar stays" && strings.Contains(pin.Detail, "unbar") {
			t.Errorf("%q sends people to unbar, which lets another PIN through", pin.Detail)
		}
	}
	says(d.AdoptPIN(patient(t), []byte(fakePIN), false), "only force=true spends the last try on it")
	for _, last := range []bool{false, true} {
		says(d.AdoptPIN(patient(t), []byte("000000"), last), "force=true does not send this one either")
	}
	says(d.Unbar(patient(t)), "the bar stays")
	if pin := pinError(t, list(t, d)); !pin.Barred {
		t.Errorf("the next use gives %+v, want Barred", pin)
	}
	if n := f.count(wire.OpLogin); n != 1 {
		t.Errorf("%d PINs were sent, want the rejected one once", n)
	}
	if err := d.AdoptPIN(patient(t), []byte(fakePIN), true); err != nil {
		t.Errorf("the right PIN, as the sentence says: %v", err)
	}
}
