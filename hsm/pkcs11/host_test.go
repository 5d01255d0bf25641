package pkcs11

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// waits runs f in a goroutine and returns how to get its error, so that several operations are on their way at once.
func waits(t *testing.T, f func() error) func() error {
	t.Helper()
	result := make(chan error, 1)
	var done sync.WaitGroup
	done.Go(func() { result <- f() })
	t.Cleanup(done.Wait)
	return func() error { return <-result }
}

func TestAFrozenTokenCostsACallerItsDeadlineAndNobodyElseAnything(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	k := key(t, d)
	thaw := make(chan struct{})
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		return r.Op == wire.OpDecryptOAEP && !h.hang(thaw)
	})
	before := f.count(wire.OpDecryptOAEP)

	impatient, leave := context.WithCancel(patient(t))
	inside := waits(t, func() error { return f.decrypts(impatient, k) })
	eventually(t, "the first operation is inside", func() bool { return f.count(wire.OpDecryptOAEP) == before+1 })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	begun := time.Now()
	queued := f.decrypts(ctx, k)
	if !errors.Is(queued, context.DeadlineExceeded) || time.Since(begun) > 5*time.Second {
		t.Errorf("the queued caller gets %v after %v, want its own deadline", queued, time.Since(begun))
	}
	leave()
	if err := inside(); !errors.Is(err, context.Canceled) {
		t.Errorf("the caller inside gets %v, want its own end", err)
	}
	close(thaw)
	if err := f.decrypts(patient(t), k); err != nil {
		t.Errorf("after the thaw: %v", err)
	}
	if got := f.count(wire.OpDecryptOAEP) - before; got != 2 {
		t.Errorf("%d decryptions reached the module, want 2: the queued one was given up", got)
	}
	if got := f.born(); got != 1 {
		t.Errorf("%d hosts were born, want 1: nobody's impatience is a reason to kill one", got)
	}
}

func TestAHangingHostIsKilledAndOnlyTheOldestOperationFails(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module, func(c *Config) { c.Parallel = 2 })
	k := key(t, d)
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		return h.number == 1 && r.Op == wire.OpDecryptOAEP && !h.hang(nil)
	})
	oldest := waits(t, func() error { return f.decrypts(patient(t), k) })
	eventually(t, "the first is inside", func() bool { return f.count(wire.OpDecryptOAEP) == 1 })
	younger := waits(t, func() error { return f.decrypts(patient(t), k) })
	eventually(t, "the second is inside", func() bool { return f.count(wire.OpDecryptOAEP) == 2 })
	lapse(t, d, defaultDecryptLimit)
	if err := oldest(); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the oldest gets %v, want ErrUnavailable", err)
	}
	if err := younger(); err != nil {
		t.Errorf("the younger gets %v, want a second run on a new host", err)
	}
	if f.born() != 2 || f.count(wire.OpDecryptOAEP) != 3 {
		t.Errorf("%d hosts and %d decryptions, want 2 and 3", f.born(), f.count(wire.OpDecryptOAEP))
	}
}

func TestAShortLimitOfOneMountKillsNobodysHost(t *testing.T) {
	const short = 100 * time.Millisecond
	hasty := func(c *Config) { c.Owner, c.DecryptLimit, c.GenerateLimit = "hasty", short, short }
	generates := func(d *Device) error {
		_, err := d.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "02"})
		return err
	}
	for name, test := range map[string]struct {
		op wire.Op
		do func(f *fake, d *Device, k *rsaKey) error
	}{
		"decrypting":   {wire.OpDecryptOAEP, func(f *fake, _ *Device, k *rsaKey) error { return f.decrypts(patient(t), k) }},
		"generating":   {wire.OpGenerateKey, func(_ *fake, d *Device, _ *rsaKey) error { return generates(d) }},
		"logging in":   {wire.OpLogin, func(_ *fake, d *Device, _ *rsaKey) error { return list(t, d) }},
		"being listed": {wire.OpSlots, func(_ *fake, d *Device, _ *rsaKey) error { return list(t, d) }},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			good, bad := f.open(t, m, module), f.open(t, m, module, hasty)
			if _, err := good.Info(patient(t)); err != nil { // from here on its limits count
				t.Fatal(err)
			}
			k := key(t, bad)
			if h, err := bad.module.host(patient(t)); err != nil {
				t.Fatal(err)
			} else if test.op == wire.OpLogin || test.op == wire.OpSlots {
				bad.module.discard(h) // the next one logs in anew
			}
			before := f.born()
			f.follow(func(h *fakeHost, r wire.Frame) bool {
				if r.Op == test.op {
					<-time.After(4 * short)
				}
				return false
			})
			if err := test.do(f, bad, k); err != nil {
				t.Error(err)
			}
			if n := f.born() - before; n > 1 || n == 1 && test.op != wire.OpLogin && test.op != wire.OpSlots {
				t.Errorf("%d hosts were born: one was killed", n)
			}
			// Alone on the token, the device's own limit counts.
			if err := good.Close(); err != nil {
				t.Fatal(err)
			}
			if test.op == wire.OpDecryptOAEP {
				f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == test.op && !h.hang(nil) })
				if err := test.do(f, bad, k); !errors.Is(err, hsm.ErrUnavailable) {
					t.Errorf("alone it gives %v, want ErrUnavailable", err)
				}
			}
		})
	}
}

func TestReturnsKeepAHostAliveAndAGenerationHoldsTheWatchdogBack(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module, func(c *Config) { c.Parallel, c.GenerateLimit = 2, time.Hour })
	k := key(t, d)
	release := make(chan struct{})
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		return (r.Op == wire.OpGenerateKey || r.Op == wire.OpDecryptOAEP) && !h.hang(release)
	})
	generated := waits(t, func() error {
		_, err := d.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "02"})
		return err
	})
	eventually(t, "the generation is inside", func() bool { return f.count(wire.OpGenerateKey) == 1 })
	decrypted := waits(t, func() error { return f.decrypts(patient(t), k) })
	eventually(t, "the decryption is inside", func() bool { return f.count(wire.OpDecryptOAEP) == 1 })
	lapse(t, d, 2*defaultDecryptLimit) // longer than a decryption alone would be left inside
	close(release)
	if err := errors.Join(generated(), decrypted()); err != nil {
		t.Error(err)
	}
	if f.born() != 1 {
		t.Errorf("%d hosts were born: a decryption behind a generation is not stuck", f.born())
	}
}

func TestACrashFailsTheOperationThatItHappenedIn(t *testing.T) {
	f, m, module := newFake(t)
	k := key(t, f.open(t, m, module))
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if r.Op != wire.OpDecryptOAEP || h.number > 1 {
			return false
		}
		h.die()
		return true
	})
	if err := f.decrypts(patient(t), k); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the operation gets %v, want ErrUnavailable", err)
	}
	if f.count(wire.OpDecryptOAEP) != 1 {
		t.Errorf("it was sent %d times, want once: it may be what crashes the module", f.count(wire.OpDecryptOAEP))
	}
	if err := f.decrypts(patient(t), k); err != nil {
		t.Errorf("the next operation: %v", err)
	}
}

func TestAGenerationIsNeverRepeated(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module, func(c *Config) { c.Parallel = 2 })
	k := key(t, d)
	var both sync.WaitGroup
	both.Add(2)
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		switch {
		case h.number > 1:
			return false
		case r.Op == wire.OpDecryptOAEP:
			both.Done()
			both.Wait() // until the generation is inside as well
			h.die()
			return true
		case r.Op == wire.OpGenerateKey:
			both.Done()
			return !h.hang(nil)
		}
		return false
	})
	decrypted := waits(t, func() error { return f.decrypts(patient(t), k) })
	eventually(t, "the decryption is inside", func() bool { return f.count(wire.OpDecryptOAEP) == 1 })
	_, err := d.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "02"})
	if !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the generation gets %v, want ErrUnavailable", err)
	}
	if f.count(wire.OpGenerateKey) != 1 {
		t.Errorf("it was sent %d times", f.count(wire.OpGenerateKey))
	}
	if err := decrypted(); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the oldest gets %v, want ErrUnavailable", err)
	}
}

func TestAQueuedGenerationOutlivesTheHost(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	k := key(t, d)
	release := make(chan struct{})
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if h.number > 1 || r.Op != wire.OpDecryptOAEP {
			return false
		}
		h.hang(release)
		h.die()
		return true
	})
	inside := waits(t, func() error { return f.decrypts(patient(t), k) })
	eventually(t, "the decryption is inside", func() bool { return f.count(wire.OpDecryptOAEP) == 1 })
	queued := waits(t, func() error {
		_, err := d.GenerateKey(patient(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "02"})
		return err
	})
	token := d.known()
	eventually(t, "the generation waits", func() bool {
		token.queue.mu.Lock()
		defer token.queue.mu.Unlock()
		return token.queue.waiting == 1
	})
	close(release)
	if err := inside(); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the decryption gets %v, want ErrUnavailable", err)
	}
	if err := queued(); err != nil || f.count(wire.OpGenerateKey) != 1 {
		t.Errorf("the generation, which never reached the dead host, gets %v and was sent %d times", err, f.count(wire.OpGenerateKey))
	}
}

func TestAWriteThatItsCallerLeftKeepsOthersOutUntilItHasLeftTheModule(t *testing.T) {
	spec := hsm.KeySpec{Algorithm: hsm.RSA2048, Label: "l", ID: "aabb"}
	ref := hsm.ObjectRef{Application: "a", Label: "l"}
	for name, test := range map[string]struct {
		op    wire.Op
		write func(ctx context.Context, d *Device) error
	}{
		"a generation": {wire.OpGenerateKey, func(ctx context.Context, d *Device) error {
			_, err := d.GenerateKey(ctx, spec)
			return err
		}},
		"an object": {wire.OpCreateObject, func(ctx context.Context, d *Device) error {
			return d.WriteObject(ctx, ref, []byte("v"))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			d := f.open(t, m, module, func(c *Config) { c.Parallel = 8 })
			release := make(chan struct{})
			f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == test.op && !h.hang(release) })
			ctx, leave := context.WithCancel(patient(t))
			first := waits(t, func() error { return test.write(ctx, d) })
			eventually(t, "the write is inside", func() bool { return f.count(test.op) == 1 })
			leave()
			if err := first(); !errors.Is(err, context.Canceled) {
				t.Errorf("the write gives %v, want its caller's end", err)
			}
			short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := test.write(short, d); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a second write gives %v, want its deadline", err)
			}
			if n := f.count(test.op); n != 1 {
				t.Errorf("%d writes of one name are inside the module at one time", n)
			}
			close(release)
			if err := test.write(patient(t), d); err != nil && !errors.Is(err, hsm.ErrExists) {
				t.Errorf("once it has left: %v", err)
			}
		})
	}
}

func TestALargeWriteToAStoppedHostKeepsItsDeadline(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	if err := func() error { _, err := d.Objects(patient(t), "a"); return err }(); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	// The reader of a stopped host takes nothing: here the lock that it needs is held.
	f.mu.Lock()
	go func() { <-stopped; f.mu.Unlock() }()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	begun := time.Now()
	err := d.WriteObject(ctx, hsm.ObjectRef{Application: "a", Label: "l"}, bytes.Repeat([]byte{1}, 512<<10))
	close(stopped)
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) > 5*time.Second {
		t.Errorf("the write gets %v after %v, want its deadline", err, time.Since(begun))
	}
}

func TestABadAnswerIsTheEndOfTheHost(t *testing.T) {
	for name, garble := range map[string]func(h *fakeHost){
		"bytes that are no frame":    func(h *fakeHost) { _, _ = h.answers.Write(bytes.Repeat([]byte{0xff}, 64)) },
		"an answer to no question":   func(h *fakeHost) { h.answer(wire.Frame{ID: 1 << 40, Op: wire.OpRandom}, nil, []byte("x")) },
		"a frame that is cut short":  func(h *fakeHost) { _, _ = h.answers.Write([]byte{0, 0, 0, 40, 1}); h.die() },
		"the end of the pipe alone":  func(h *fakeHost) { _ = h.answers.Close() },
		"an answer's Meta that lies": func(h *fakeHost) { h.send(wire.Frame{ID: 1, Failed: true, Meta: []byte("{")}) },
	} {
		t.Run(name, func(t *testing.T) {
			f, m, module := newFake(t)
			k := key(t, f.open(t, m, module))
			f.follow(func(h *fakeHost, r wire.Frame) bool {
				if h.number > 1 || r.Op != wire.OpDecryptOAEP {
					return false
				}
				garble(h)
				return true
			})
			if err := f.decrypts(patient(t), k); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("the operation gets %v, want ErrUnavailable", err)
			}
			if err := f.decrypts(patient(t), k); err != nil {
				t.Errorf("the next operation: %v", err)
			}
		})
	}
}

func TestClosingEndsAHangingHost(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	k := key(t, d)
	f.follow(func(h *fakeHost, r wire.Frame) bool { return r.Op == wire.OpDecryptOAEP && !h.hang(nil) })
	inside := waits(t, func() error { return f.decrypts(patient(t), k) })
	eventually(t, "the operation is inside", func() bool { return f.count(wire.OpDecryptOAEP) == 1 })
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := inside(); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the operation inside gets %v, want ErrUnavailable", err)
	}
	if _, err := d.FindKeys(patient(t), hsm.KeyQuery{}); !errors.Is(err, ErrClosed) {
		t.Errorf("a closed device answers %v", err)
	}
}

func TestClosingDoesNotWaitForWhatNeverEnds(t *testing.T) {
	closes := func(t *testing.T, d *Device) {
		t.Helper()
		begun := time.Now()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("closing took %v", took)
		}
	}
	t.Run("a process that no kill ends", func(t *testing.T) {
		f, m, module := newFake(t)
		m.closePatience = 100 * time.Millisecond
		stuck := make(chan struct{})
		m.spawn = func() (*process, error) {
			p, err := f.spawn()
			if err != nil {
				return nil, err
			}
			undead := *p
			undead.ended = stuck
			return &undead, nil
		}
		d := f.open(t, m, module)
		if err := list(t, d); err != nil {
			t.Fatal(err)
		}
		closes(t, d)
		close(stuck)
		d.module.waiting.Wait()
	})
	t.Run("another process that keeps the ledger's lock", func(t *testing.T) {
		f, m, module := newFake(t)
		m.closePatience = 100 * time.Millisecond
		d := f.open(t, m, module)
		if _, err := d.Info(patient(t)); err != nil {
			t.Fatal(err)
		}
		other, err := openLedger(m.options.StateDir).attempt(t.Context(), fakeSerial, []byte("111111"), shows(allTries))
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if err := d.Unbar(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Unbar gives %v, want its deadline", err)
		}
		closes(t, d)
		if err := other.unresolved(); err != nil {
			t.Error(err)
		}
		d.module.waiting.Wait()
	})
}

func TestAChildOfTheModuleThatHoldsThePipeKeepsNobodyWaiting(t *testing.T) {
	f, m, module := newFake(t)
	k := key(t, f.open(t, m, module))
	held := make(chan struct{})
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if h.number > 1 || r.Op != wire.OpDecryptOAEP {
			return false
		}
		// As birth's supervisor sees it: the process has ended, and its end of the pipe stays open.
		h.kill.Do(func() {
			close(h.killed)
			close(h.process.ended)
			time.AfterFunc(farewell/10, func() { _ = h.process.answers.Close() })
			h.running.Go(func() { <-held; _, _ = h.requests.Close(), h.answers.Close() })
		})
		return true
	})
	err := f.decrypts(patient(t), k)
	close(held)
	if !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("the operation inside gets %v, want ErrUnavailable", err)
	}
	if err := f.decrypts(patient(t), k); err != nil {
		t.Errorf("the next operation: %v", err)
	}
}
