package pkcs11

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"vault-plugin-secrets-nitrokey/hsm"
)

const serial = "DENK0104245"

var (
	allTries = hsm.PINState{}
	countLow = hsm.PINState{CountLow: true}
	finalTry = hsm.PINState{CountLow: true, FinalTry: true}
	locked   = hsm.PINState{Locked: true}
)

// shows is a token that tells this about its PIN.
func shows(flags hsm.PINState) func(context.Context) (hsm.PINState, error) {
	return func(context.Context) (hsm.PINState, error) { return flags, nil }
}

// testLedger returns a ledger in a directory of its own that does not wait for the disk. Its key is known, because with a
// random one two PINs have one fingerprint once in 1,024.
func testLedger(t testing.TB) *ledger {
	t.Helper()
	l := openLedger(t.TempDir())
	l.files.sync = func(*os.File) error { return nil }
	key := make([]byte, keySize)
	for i := range key {
		key[i] = byte(i)
	}
	must(t, os.WriteFile(filepath.Join(l.files.dir, "pin.key"), key, 0o600))
	return l
}

// again opens the same directory as another process does.
func (l *ledger) again() *ledger {
	other := openLedger(l.files.dir)
	other.files.sync = l.files.sync
	return other
}

// begins is an attempt that must be let through.
func begins(t testing.TB, l *ledger, pin string, flags hsm.PINState) *attempt {
	t.Helper()
	a, err := l.attempt(t.Context(), serial, []byte(pin), shows(flags))
	if err != nil {
		t.Fatalf("attempt with %q while the token shows %+v: %v", pin, flags, err)
	}
	return a
}

// refuses fails the test unless the attempt is barred.
func refuses(t testing.TB, l *ledger, pin string, flags hsm.PINState) {
	t.Helper()
	_ = reason(t, l, pin, flags)
}

// reason fails the test unless the attempt is barred, and says why it is.
func reason(t testing.TB, l *ledger, pin string, flags hsm.PINState) *hsm.PINError {
	t.Helper()
	a, err := l.attempt(t.Context(), serial, []byte(pin), shows(flags))
	if err == nil {
		_ = a.unresolved()
		t.Fatalf("attempt with %q while the token shows %+v is let through", pin, flags)
	}
	refused, ok := errors.AsType[*hsm.PINError](err)
	if !ok || !refused.Barred {
		t.Fatalf("attempt with %q while the token shows %+v gives %v, want a bar", pin, flags, err)
	}
	if strings.Contains(refused.Detail, pin) || !strings.Contains(refused.Detail, serial) {
		t.Errorf("the reason names the PIN or not the token: %s", refused.Detail)
	}
	return refused
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// good makes a PIN the one that worked last.
func good(t testing.TB, l *ledger, pin string) {
	t.Helper()
	must(t, begins(t, l, pin, allTries).succeeded())
}

func TestARejectedPINIsNotSentAgain(t *testing.T) {
	l := testLedger(t)
	must(t, begins(t, l, "111111", allTries).wrong())
	for name, flags := range map[string]hsm.PINState{"fewer tries": countLow, "the last try": finalTry, "all tries": allTries} {
		if refused := reason(t, l.again(), "111111", flags); !strings.Contains(refused.Detail, "rejected") {
			t.Errorf("while the token shows %s: %s", name, refused.Detail)
		}
	}
	must(t, l.unbar(serial, []byte("111111"), shows(allTries)))
	must(t, begins(t, l, "111111", countLow).wrong())
	refuses(t, l, "111111", allTries)
}

func TestAnotherPINAfterARejectedOne(t *testing.T) {
	l := testLedger(t)
	must(t, begins(t, l, "111111", allTries).wrong())
	refuses(t, l, "648219", countLow)
	must(t, begins(t, l, "648219", allTries).succeeded())
	refuses(t, l, "111111", allTries)
	must(t, begins(t, l, "648219", countLow).succeeded())
}

func TestTheGoodPINIsSentWhateverTheTokenShowsButLocked(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	must(t, begins(t, l, "648219", countLow).succeeded())
	must(t, begins(t, l, "648219", finalTry).succeeded())
	refused := reason(t, l, "648219", locked)
	if refused.TriesLeft != 0 || !errors.Is(refused, hsm.ErrLocked) || !strings.Contains(refused.Detail, "SO-PIN") {
		t.Errorf("a locked token gives %+v", refused)
	}
}

func TestAGoodPINThatIsRejectedIsGoodNoMore(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	must(t, begins(t, l, "648219", allTries).wrong())
	refuses(t, l, "648219", allTries)
	refuses(t, l, "648219", countLow)
	r, err := l.files.read(serial)
	if err != nil || r.Good != nil {
		t.Errorf("the record is %+v, %v", r, err)
	}
}

func TestTheLatestGoodPINIsTheOnlyOne(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	good(t, l, "975310")
	refuses(t, l, "648219", countLow)
	must(t, begins(t, l, "975310", countLow).succeeded())
}

func TestAnUnresolvedIntentIsABarUnlessTheTokenShowsAllTries(t *testing.T) {
	for name, c := range map[string]struct {
		flags   hsm.PINState
		refused bool
		tries   int
	}{
		"all tries: the PIN was right or never arrived": {flags: allTries},
		"fewer tries":  {countLow, true, -1},
		"the last try": {finalTry, true, 1},
		"locked":       {locked, true, 0},
	} {
		t.Run(name, func(t *testing.T) {
			l := testLedger(t)
			must(t, begins(t, l, "111111", allTries).unresolved())
			if !c.refused {
				must(t, begins(t, l.again(), "111111", c.flags).succeeded())
				return
			}
			if refused := reason(t, l.again(), "111111", c.flags); refused.TriesLeft != c.tries {
				t.Errorf("%d tries are left, want %d", refused.TriesLeft, c.tries)
			}
		})
	}
}

func TestASuspicionOutlivesSomebodysRightPIN(t *testing.T) {
	l := testLedger(t)
	must(t, begins(t, l, "111111", allTries).unresolved())
	refuses(t, l, "111111", countLow)
	refused := reason(t, l.again(), "111111", allTries)
	if !strings.Contains(refused.Detail, "without an answer") {
		t.Errorf("the reason is %s", refused.Detail)
	}
	// The suspicion is kept by whoever looks first, also with another PIN.
	l = testLedger(t)
	must(t, begins(t, l, "111111", allTries).unresolved())
	refuses(t, l, "648219", countLow)
	must(t, begins(t, l, "648219", allTries).succeeded())
	refuses(t, l, "111111", allTries)
}

func TestAPowerCutWithTheGoodPINDoesNotBarIt(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	must(t, begins(t, l, "648219", countLow).unresolved())
	must(t, begins(t, l.again(), "648219", countLow).succeeded())
	must(t, begins(t, l.again(), "648219", finalTry).succeeded())
}

func TestTheGoodPINIsNotSentForEverWithoutAnAnswer(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	must(t, begins(t, l, "648219", allTries).unresolved())
	must(t, begins(t, l, "648219", countLow).unresolved()) // somebody may have changed it on the token
	refuses(t, l, "648219", finalTry)
	refuses(t, l, "648219", allTries)
}

func TestUnbarLetsOneLogInThrough(t *testing.T) {
	l := testLedger(t)
	must(t, begins(t, l, "111111", allTries).wrong())
	refuses(t, l, "648219", countLow)
	must(t, l.unbar(serial, []byte("648219"), shows(allTries)))
	must(t, begins(t, l, "648219", countLow).wrong())
	refuses(t, l, "648219", countLow)
	refuses(t, l, "975310", countLow)
	must(t, l.unbar(serial, []byte("975310"), shows(allTries)))
	must(t, begins(t, l, "975310", finalTry).succeeded())
	refuses(t, l, "648219", countLow)

	// What never arrived does not use up a person's word.
	l = testLedger(t)
	must(t, l.unbar(serial, []byte("648219"), shows(allTries)))
	must(t, begins(t, l, "648219", countLow).withdrawn())
	must(t, begins(t, l, "648219", countLow).unresolved())
	refuses(t, l, "648219", countLow)

	// Unbarring keeps what is known to be good.
	l = testLedger(t)
	good(t, l, "648219")
	must(t, l.unbar(serial, []byte("111111"), shows(allTries)))
	must(t, begins(t, l, "111111", countLow).wrong())
	must(t, begins(t, l, "648219", countLow).succeeded())
}

func TestUnbarIsAWordForOnePINOnly(t *testing.T) {
	l := testLedger(t)
	must(t, begins(t, l, "111111", allTries).wrong())
	must(t, begins(t, l, "222222", allTries).unresolved())
	must(t, l.unbar(serial, []byte("648219"), shows(allTries)))
	refuses(t, l, "111111", allTries) // what was rejected stays barred
	refuses(t, l, "222222", countLow) // what may have been rejected is suspected as before
	refuses(t, l, "975310", countLow) // what nobody spoke for does not use the word
	must(t, begins(t, l, "648219", countLow).succeeded())

	// Once the token shows all its tries again the word is spent, whoever restored them.
	l = testLedger(t)
	good(t, l, "648219")
	must(t, l.unbar(serial, []byte("111111"), shows(allTries)))
	must(t, begins(t, l, "648219", countLow).succeeded())
	refuses(t, l, "111111", countLow)
}

func TestAWordGivenToAnEarlierVersionIsKept(t *testing.T) {
	golden, err := os.ReadFile(filepath.Join("testdata", "ledger", "unbarred.json"))
	must(t, err)
	l := testLedger(t)
	must(t, os.WriteFile(l.files.path(serial, ".json"), golden, 0o600))
	must(t, begins(t, l, "111111", countLow).wrong())
	refuses(t, l, "975310", countLow)
}

func TestAWithdrawnIntentLeavesEverythingAsItWas(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	must(t, begins(t, l, "648219", allTries).unresolved())
	before, err := l.files.read(serial)
	must(t, err)
	must(t, begins(t, l, "975310", allTries).withdrawn())
	after, err := l.files.read(serial)
	must(t, err)
	if diff := gocmp.Diff(before, after); diff != "" {
		t.Errorf("the record changed (-before +after):\n%s", diff)
	}
}

func TestTokensDoNotBarEachOther(t *testing.T) {
	l := testLedger(t)
	must(t, begins(t, l, "111111", allTries).wrong())
	for _, other := range []string{"DENK0104246", "", "../../etc/passwd", "DENK0104245 ", strings.Repeat("long", 100), "\x00\xff"} {
		a, err := l.attempt(t.Context(), other, []byte("111111"), shows(allTries))
		if err != nil {
			t.Errorf("the token %q: %v", other, err)
			continue
		}
		must(t, a.succeeded())
	}
	refuses(t, l, "111111", allTries)
	entries, err := os.ReadDir(l.files.dir)
	must(t, err)
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), "pin") {
			t.Errorf("a stray file %q", entry.Name())
		}
	}
}

func TestOnlyOneLogInRunsAtATime(t *testing.T) {
	l := testLedger(t)
	first := begins(t, l, "111111", allTries)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := l.again().attempt(ctx, serial, []byte("111111"), shows(allTries))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a second log-in gives %v, want the deadline", err)
	}
	second := make(chan error, 1)
	go func() {
		a, err := l.again().attempt(t.Context(), serial, []byte("111111"), shows(countLow))
		if err == nil {
			err = errors.Join(errors.New("it was let through"), a.unresolved())
		}
		second <- err
	}()
	must(t, first.wrong())
	if refused, ok := errors.AsType[*hsm.PINError](<-second); !ok || !refused.Barred {
		t.Errorf("the one that waited gives %v, want a bar", err)
	}
}

func TestWhoeverWaitedAsksTheTokenAfterwards(t *testing.T) {
	l := testLedger(t)
	first := begins(t, l, "111111", allTries)
	var mu sync.Mutex
	flags := allTries
	asked := 0
	second := make(chan error, 1)
	go func() {
		a, err := l.again().attempt(t.Context(), serial, []byte("111111"), func(context.Context) (hsm.PINState, error) {
			mu.Lock()
			defer mu.Unlock()
			asked++
			return flags, nil
		})
		if err == nil {
			err = errors.Join(errors.New("it was let through"), a.unresolved())
		}
		second <- err
	}()
	mu.Lock()
	flags = countLow // the PIN was wrong, and its program dies before it can say so
	if asked != 0 {
		t.Error("the token was asked while another log-in ran")
	}
	mu.Unlock()
	must(t, first.unresolved())
	err := <-second
	if refused, ok := errors.AsType[*hsm.PINError](err); !ok || !refused.Barred {
		t.Errorf("the one that waited gives %v, want a bar", err)
	}
}

func TestATokenThatDoesNotTellGetsNoPIN(t *testing.T) {
	l := testLedger(t)
	away := errors.New("the token is away")
	_, err := l.attempt(t.Context(), serial, []byte("648219"), func(context.Context) (hsm.PINState, error) {
		return hsm.PINState{}, away
	})
	if !errors.Is(err, away) {
		t.Errorf("it gives %v, want the token's error", err)
	}
	good(t, l, "648219") // and the lock is free
}

func TestAChangedPINIsGoodAndTheOldOneBarred(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	must(t, begins(t, l, "975310", allTries).wrong())
	must(t, begins(t, l, "648219", allTries).changed([]byte("975310"))) // to one that was wrong before
	must(t, begins(t, l, "975310", countLow).succeeded())
	if refused := reason(t, l, "648219", allTries); !strings.Contains(refused.Detail, "changed") {
		t.Errorf("the reason is %s", refused.Detail)
	}
	must(t, begins(t, l, "975310", allTries).changed([]byte("648219"))) // and back
	must(t, begins(t, l, "648219", countLow).succeeded())
}

func TestWithoutAnIntentThereIsNoLogIn(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, l *ledger){
		"no directory was given":    func(_ *testing.T, l *ledger) { l.files.dir = "" },
		"the directory is missing":  func(t *testing.T, l *ledger) { t.Helper(); must(t, os.RemoveAll(l.files.dir)) },
		"others may write to it":    func(t *testing.T, l *ledger) { t.Helper(); must(t, os.Chmod(l.files.dir, 0o777)) },
		"its group may write to it": func(t *testing.T, l *ledger) { t.Helper(); must(t, os.Chmod(l.files.dir, 0o770)) },
		"it is a file": func(t *testing.T, l *ledger) {
			t.Helper()
			l.files.dir = filepath.Join(l.files.dir, "file")
			must(t, os.WriteFile(l.files.dir, nil, 0o600))
		},
		"it is a symbolic link": func(t *testing.T, l *ledger) {
			t.Helper()
			link := filepath.Join(t.TempDir(), "link")
			must(t, os.Symlink(l.files.dir, link))
			l.files.dir = link
		},
		"the record cannot be replaced": func(t *testing.T, l *ledger) {
			t.Helper()
			must(t, os.MkdirAll(filepath.Join(l.files.path(serial, ".json")+".new", "in the way"), 0o700))
		},
		"the lock cannot be opened": func(t *testing.T, l *ledger) {
			t.Helper()
			must(t, os.Mkdir(l.files.path(serial, ".lock"), 0o700))
		},
		"the disk does not confirm": func(_ *testing.T, l *ledger) {
			l.files.sync = func(*os.File) error { return errors.New("input/output error") }
		},
		"the disk does not confirm the directory": func(_ *testing.T, l *ledger) {
			l.files.sync = func(f *os.File) error {
				if info, err := f.Stat(); err != nil || info.IsDir() {
					return errors.New("input/output error")
				}
				return nil
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := testLedger(t)
			spoil(t, l)
			_, err := l.attempt(t.Context(), serial, []byte("648219"), shows(allTries))
			if err == nil {
				t.Fatal("the attempt is let through")
			}
			if _, pin := errors.AsType[*hsm.PINError](err); pin || !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("the error is %v; want ErrUnavailable: the PIN has no part in it", err)
			}
			for _, word := range []string{fmt.Sprintf("%q", l.files.dir), "-state-dir", serial} {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q does not say %s", err, word)
				}
			}
			if strings.Contains(err.Error(), "648219") {
				t.Errorf("%q holds the PIN", err)
			}
		})
	}
}

// full is a disk that takes no new file; what is there can be written over where inPlace says so.
func full(errno unix.Errno, inPlace bool) func(*os.File) error {
	return func(f *os.File) error {
		if inPlace && strings.HasSuffix(f.Name(), ".json") {
			return nil
		}
		return &fs.PathError{Op: "write", Path: f.Name(), Err: errno}
	}
}

func hasRoom(*os.File) error { return nil }

func TestAFullDiskKeepsTheGoodPINFromNoToken(t *testing.T) {
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EROFS} {
		t.Run(errno.Error(), func(t *testing.T) {
			l := testLedger(t)
			good(t, l, "648219")
			l.files.sync = full(errno, false)
			for range 3 { // a Vault that starts again and again
				a, err := l.again().attemptOnFullDisk(t.Context(), serial, []byte("648219"), shows(allTries))
				must(t, err)
				if !errors.Is(a.unrecorded, errno) {
					t.Errorf("the attempt says %v of its intent", a.unrecorded)
				}
				must(t, a.succeeded())
			}
			l.files.sync = hasRoom
			must(t, begins(t, l, "648219", countLow).succeeded())
		})
	}
}

func TestAFullDiskLetsNothingElseThrough(t *testing.T) {
	for name, c := range map[string]struct {
		pin    string
		flags  hsm.PINState
		errno  unix.Errno
		before func(t *testing.T, l *ledger)
	}{
		"another PIN":                     {pin: "111111"},
		"a missing try":                   {flags: countLow},
		"the last try":                    {flags: finalTry},
		"a disk that is broken, not full": {errno: unix.EIO},
		"an open log-in with another PIN": {before: func(t *testing.T, l *ledger) {
			t.Helper()
			must(t, begins(t, l, "111111", allTries).unresolved())
		}},
	} {
		t.Run(name, func(t *testing.T) {
			l := testLedger(t)
			good(t, l, "648219")
			if c.before != nil {
				c.before(t, l)
			}
			l.files.sync = full(cmp.Or(c.errno, unix.ENOSPC), true)
			_, err := l.attemptOnFullDisk(t.Context(), serial, []byte(cmp.Or(c.pin, "648219")), shows(c.flags))
			if _, barred := errors.AsType[*hsm.PINError](err); barred || !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("it gives %v, want ErrUnavailable", err)
			}
		})
	}
	// A change of the PIN, and a new PIN, have a person there who can make room.
	l := testLedger(t)
	good(t, l, "648219")
	l.files.sync = full(unix.ENOSPC, true)
	if _, err := l.attempt(t.Context(), serial, []byte("648219"), shows(allTries)); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("an attempt that must be recorded gives %v", err)
	}
}

func TestALogInOnAFullDiskMayFollowItsOwnOpenOne(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	must(t, begins(t, l, "648219", allTries).unresolved()) // the disk was full before the log-in could be recorded
	l.files.sync = full(unix.ENOSPC, false)
	a, err := l.attemptOnFullDisk(t.Context(), serial, []byte("648219"), shows(allTries))
	must(t, err)
	must(t, a.succeeded())
}

func TestAPINThatWasWrongOnAFullDiskIsBarred(t *testing.T) {
	for name, inPlace := range map[string]bool{"where the old record has room": true, "where nothing can be written": false} {
		t.Run(name, func(t *testing.T) {
			l := testLedger(t)
			good(t, l, "648219")
			l.files.sync = full(unix.ENOSPC, inPlace)
			a, err := l.attemptOnFullDisk(t.Context(), serial, []byte("648219"), shows(allTries))
			must(t, err)
			if err := a.wrong(); (err == nil) != inPlace {
				t.Errorf("recording it gives %v", err)
			}
			if _, err := l.attemptOnFullDisk(t.Context(), serial, []byte("648219"), shows(countLow)); err == nil {
				t.Error("it is sent again while the disk is full")
			}
			l.files.sync = hasRoom
			refuses(t, l, "648219", countLow)
			refuses(t, l, "648219", allTries)
			refuses(t, l.again(), "648219", allTries) // it is written by now
			must(t, l.unbar(serial, []byte("648219"), shows(allTries)))
			must(t, begins(t, l, "648219", countLow).succeeded())
		})
	}
}

func TestALogInWithoutAnAnswerOnAFullDiskIsRemembered(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219")
	l.files.sync = full(unix.ENOSPC, true)
	a, err := l.attemptOnFullDisk(t.Context(), serial, []byte("648219"), shows(allTries))
	must(t, err)
	must(t, a.unresolved())
	l.files.sync = hasRoom
	must(t, begins(t, l, "648219", countLow).unresolved()) // good until now, so once more
	refuses(t, l, "648219", finalTry)

	l = testLedger(t)
	good(t, l, "648219")
	l.files.sync = full(unix.ENOSPC, true)
	before, err := l.files.read(serial)
	must(t, err)
	a, err = l.attemptOnFullDisk(t.Context(), serial, []byte("648219"), shows(allTries))
	must(t, err)
	must(t, a.withdrawn())
	after, err := l.files.read(serial)
	must(t, err)
	if diff := gocmp.Diff(before, after); diff != "" {
		t.Errorf("a withdrawn one leaves (-before +after):\n%s", diff)
	}
}

func TestARecordWrittenOverALongerOneReads(t *testing.T) {
	l := testLedger(t)
	everything(t, l)
	short := record{Key: "c7a9f643"}
	must(t, l.files.overwrite(serial, short))
	if got, err := l.files.read(serial); err != nil || gocmp.Diff(short, got) != "" {
		t.Errorf("it reads as %+v, %v", got, err)
	}
}

func TestAnIntentIsDurableBeforeTheAttemptBegins(t *testing.T) {
	l := testLedger(t)
	good(t, l, "648219") // the key of fingerprints exists from here on
	path := l.files.path(serial, ".json")
	var events []string
	l.files.sync = func(f *os.File) error {
		info, err := f.Stat()
		must(t, err)
		r, err := l.files.read(serial)
		must(t, err)
		switch {
		case !info.IsDir() && f.Name() == path+".new" && r.Intent == nil:
			events = append(events, "content, not yet in place")
		case info.IsDir() && f.Name() == l.files.dir && r.Intent != nil:
			events = append(events, "directory, with the intent in place")
		default:
			events = append(events, "unexpected: "+f.Name())
		}
		return nil
	}
	a := begins(t, l, "111111", allTries)
	if diff := gocmp.Diff([]string{"content, not yet in place", "directory, with the intent in place"}, events); diff != "" {
		t.Errorf("what reached the disk when attempt returned (-want +got):\n%s", diff)
	}
	must(t, a.unresolved())
}

func TestAResultThatCannotBeRecordedKeepsTheIntent(t *testing.T) {
	for name, resolve := range map[string]func(*attempt) error{
		"success": (*attempt).succeeded, "rejection": (*attempt).wrong, "withdrawal": (*attempt).withdrawn,
		"change": func(a *attempt) error { return a.changed([]byte("975310")) },
	} {
		t.Run(name, func(t *testing.T) {
			l := testLedger(t)
			a := begins(t, l, "111111", allTries)
			a.ledger.files.sync = func(*os.File) error { return errors.New("no space left on device") }
			err := resolve(a)
			if err == nil || !strings.Contains(err.Error(), l.files.dir) || !strings.Contains(err.Error(), "no space left") {
				t.Errorf("the error is %v; it must name the directory and the cause", err)
			}
			a.ledger.files.sync = func(*os.File) error { return nil }
			refuses(t, l, "111111", countLow) // and the lock is free
		})
	}
}

func TestADamagedLedgerIsABarThatUnbarLifts(t *testing.T) {
	keyPath := func(l *ledger) string { return filepath.Join(l.files.dir, "pin.key") }
	recordPath := func(l *ledger) string { return l.files.path(serial, ".json") }
	write := func(path func(*ledger) string, content string) func(*testing.T, *ledger) string {
		return func(t *testing.T, l *ledger) string {
			t.Helper()
			must(t, os.WriteFile(path(l), []byte(content), 0o600))
			return path(l)
		}
	}
	for name, damage := range map[string]func(t *testing.T, l *ledger) string{
		"an empty record":       write(recordPath, ""),
		"half a record":         write(recordPath, `{"version": 1, "token": "DENK01`),
		"a record of zeros":     write(recordPath, strings.Repeat("\x00", 512)),
		"a later version":       write(recordPath, `{"version": 2, "token": "DENK0104245", "key": "00000000"}`),
		"another token's":       write(recordPath, `{"version": 1, "token": "DENK0104246", "key": "00000000"}`),
		"an unknown field":      write(recordPath, `{"version": 1, "token": "DENK0104245", "key": "00000000", "more": 1}`),
		"a fingerprint of more": write(recordPath, `{"version": 1, "token": "DENK0104245", "key": "00000000", "good": 1024}`),
		"an unknown reason":     write(recordPath, `{"version": 1, "token": "DENK0104245", "key": "00000000", "barred": [{"pin": 1, "at": "2026-03-01T02:00:00Z", "why": "?"}]}`),
		"a short key":           write(keyPath, "short"),
		"a long key":            write(keyPath, strings.Repeat("x", 33)),
		"a record that others may read": func(t *testing.T, l *ledger) string {
			t.Helper()
			must(t, os.Chmod(recordPath(l), 0o644))
			return recordPath(l)
		},
		"a key that others may read": func(t *testing.T, l *ledger) string {
			t.Helper()
			must(t, os.Chmod(keyPath(l), 0o640))
			return keyPath(l)
		},
		"a record that is a link": func(t *testing.T, l *ledger) string {
			t.Helper()
			must(t, os.Remove(recordPath(l)))
			must(t, os.Symlink("/dev/null", recordPath(l)))
			return recordPath(l)
		},
		"a record that is a directory": func(t *testing.T, l *ledger) string {
			t.Helper()
			must(t, os.Remove(recordPath(l)))
			must(t, os.Mkdir(recordPath(l), 0o700))
			return recordPath(l)
		},
	} {
		t.Run(name, func(t *testing.T) {
			l := testLedger(t)
			good(t, l, "648219")
			path := damage(t, l)
			for _, flags := range []hsm.PINState{allTries, countLow} {
				if refused := reason(t, l, "648219", flags); !strings.Contains(refused.Detail, path) {
					t.Errorf("the reason does not name %s: %s", path, refused.Detail)
				}
			}
			must(t, l.unbar(serial, []byte("648219"), shows(allTries)))
			if _, err := os.Lstat(path + ".damaged"); err != nil {
				t.Errorf("the damaged file was not set aside: %v", err)
			}
			must(t, begins(t, l, "648219", countLow).succeeded())
			must(t, begins(t, l, "648219", countLow).succeeded())
		})
	}
}

func TestALostKeyLiftsNoBar(t *testing.T) {
	for name, resolve := range map[string]func(*attempt) error{"rejected": (*attempt).wrong, "unresolved": (*attempt).unresolved} {
		l := testLedger(t)
		must(t, resolve(begins(t, l, "111111", allTries)))
		must(t, os.Remove(filepath.Join(l.files.dir, "pin.key")))
		if refused := reason(t, l, "111111", allTries); !strings.Contains(refused.Detail, "pin.key") {
			t.Errorf("%s: the reason is %s", name, refused.Detail)
		}
		must(t, l.unbar(serial, []byte("648219"), shows(allTries)))
		must(t, begins(t, l, "648219", allTries).succeeded())
	}
	// Nothing barred: the log-in goes on, and what was good is to be proved again.
	l := testLedger(t)
	good(t, l, "648219")
	must(t, os.Remove(filepath.Join(l.files.dir, "pin.key")))
	refuses(t, l, "648219", countLow)
	must(t, begins(t, l, "648219", allTries).succeeded())
	must(t, begins(t, l, "648219", countLow).succeeded())
}

func TestUnbarTellsWhereItCannot(t *testing.T) {
	l := openLedger(filepath.Join(t.TempDir(), "missing"))
	if err := l.unbar(serial, []byte("648219"), shows(allTries)); err == nil || !strings.Contains(err.Error(), l.files.dir) {
		t.Errorf("unbar gives %v", err)
	}
}

func TestFingerprintsArePoorAndSteady(t *testing.T) {
	l := testLedger(t)
	seen := map[fingerprint]bool{}
	for i := range 4096 {
		mark, key, err := l.files.fingerprint(serial, fmt.Appendf(nil, "%06d", i))
		must(t, err)
		if mark >= 1024 || len(key) != 8 {
			t.Fatalf("fingerprint %d, key %q", mark, key)
		}
		seen[mark] = true
	}
	if len(seen) < 900 { // 4096 balls into 1024 urns leave about 19 empty
		t.Errorf("4096 PINs have only %d fingerprints", len(seen))
	}
	one, _, err := l.files.fingerprint(serial, []byte("648219"))
	must(t, err)
	two, _, err := l.again().files.fingerprint(serial, []byte("648219"))
	must(t, err)
	if one != two {
		t.Errorf("one PIN has the fingerprints %d and %d", one, two)
	}
}

// simulatedToken takes three wrong PINs.
type simulatedToken struct {
	right string
	tries int
	sent  map[string]int // wrong PINs only
}

func (s *simulatedToken) flags() hsm.PINState {
	return hsm.PINState{CountLow: s.tries == 2, FinalTry: s.tries == 1, Locked: s.tries == 0}
}

func (s *simulatedToken) logIn(pin string) bool {
	if s.tries == 0 {
		return false
	}
	if pin != s.right {
		s.tries--
		s.sent[pin]++
		return false
	}
	s.tries = 3
	return true
}

// TestNoHistoryOfCrashesSendsAWrongPINTwice plays programs that log in with several PINs and die at any moment.
func TestNoHistoryOfCrashesSendsAWrongPINTwice(t *testing.T) {
	dir := t.TempDir()
	run := 0
	rapid.Check(t, func(r *rapid.T) {
		run++
		token := &simulatedToken{right: "648219", tries: 3, sent: map[string]int{}}
		l := openLedger(filepath.Join(dir, fmt.Sprint(run)))
		l.files.sync = func(*os.File) error { return nil }
		must(t, os.Mkdir(l.files.dir, 0o700))
		allowed := map[string]int{} // sendings of a wrong PIN: one, and one for each word of a person
		pins := distinct(t, l, token.right, "111111", "222222", "333333")
		for range rapid.IntRange(1, 30).Draw(r, "log-ins") {
			pin := rapid.SampledFrom(pins).Draw(r, "pin")
			if token.tries == 3 && rapid.IntRange(0, 9).Draw(r, "a person's word") == 0 {
				must(t, l.again().unbar(serial, []byte(pin), shows(allTries)))
				allowed[pin]++
			}
			shown := token.flags()
			a, err := l.again().attempt(t.Context(), serial, []byte(pin), shows(shown))
			if err != nil {
				if pin == token.right && shown == allTries {
					r.Fatalf("the right PIN is refused while the token shows all its tries: %v", err)
				}
				continue
			}
			switch rapid.SampledFrom([]string{"answered", "answered", "died before sending", "died after sending"}).Draw(r, "end") {
			case "answered":
				if token.logIn(pin) {
					must(t, a.succeeded())
				} else {
					must(t, a.wrong())
				}
			case "died before sending":
				must(t, a.unresolved())
			case "died after sending":
				token.logIn(pin)
				must(t, a.unresolved())
			}
		}
		for pin, n := range token.sent {
			if n > 1+allowed[pin] {
				r.Fatalf("the wrong PIN %s was sent %d times after %d words for it", pin, n, allowed[pin])
			}
		}
		if token.tries == 0 {
			r.Fatal("the token is locked")
		}
	})
}

// distinct drops PINs that happen to have the fingerprint of one before them.
func distinct(t testing.TB, l *ledger, pins ...string) []string {
	t.Helper()
	var kept []string
	var marks []fingerprint
	for _, pin := range pins {
		mark, _, err := l.files.fingerprint(serial, []byte(pin))
		must(t, err)
		if !slices.Contains(marks, mark) {
			kept, marks = append(kept, pin), append(marks, mark)
		}
	}
	return kept
}
