package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// ledger makes sure that one PIN is wrong at most once on a machine: tokens lock after three wrong ones, and programs
// start again and again.
//
// Before a PIN is sent, the intent to send it is made durable; the token's answer resolves it. What a program that died
// in between leaves is an unresolved intent, and whether that bars its PIN is asked of the token: where it still shows
// all its tries, the PIN was right or never arrived. A PIN that was rejected stays barred until another one is
// configured or a person unbars the token. Where a token shows fewer than all its tries, only the PIN that worked there
// last is sent without a person's word. Where the disk is full, that PIN needs no intent (docs/decisions/0005).
//
// PINs are told apart by fingerprints that are made to be poor (see [ledgerFiles.fingerprint]). All processes of a
// machine share the ledger's directory; one log-in to a token runs at a time, under a lock that dies with its process.
type ledger struct {
	files ledgerFiles
	now   func() time.Time
	// advice is what errors tell people to do.
	advice Advice

	mu sync.Mutex
	// unwritten are bars, by serial, for which the disk had no room yet. At least this process keeps to them.
	unwritten map[string]bar
}

// openLedger returns the ledger in a directory. It does no I/O: what is wrong with the directory, attempt tells.
func openLedger(dir string) *ledger {
	return &ledger{files: ledgerFiles{dir: dir, sync: syncFile}, now: time.Now, advice: Advice{}.complete(), unwritten: make(map[string]bar)}
}

// attempt is a log-in under way. Exactly one of succeeded, succeededInPlaceOf, wrong, changed, unresolved and withdrawn must
// be called; until then other log-ins to the same token wait, in every process.
type attempt struct {
	ledger *ledger
	serial string
	known  record // what is known without this attempt
	intent intent
	// unrecorded is why the intent could not be written, nil where it was, see [ledger.attemptOnFullDisk].
	unrecorded error
	unlock     func()
}

// attempt records the intent to log in to the token with that serial number, and returns once it is durable. shows asks
// the token about its PIN; it is called when no other log-in runs any more, whose result it has to show. The errors are
// *hsm.PINError where the PIN must not be sent, the error of ctx where it ended while another log-in ran, that of shows,
// and hsm.ErrUnavailable where the intent cannot be written.
func (l *ledger) attempt(
	ctx context.Context, serial string, pin []byte, shows func(context.Context) (hsm.PINState, error),
) (*attempt, error) {
	return l.start(ctx, terms{}, serial, pin, shows)
}

// attemptOnFullDisk is attempt for log-ins that a Vault needs to be unsealed. Where there is no room for the intent (the disk
// is full, or read-only after an error), the PIN that worked last goes ahead without one, as long as the token shows all its
// tries. A wrong one then costs one try, and with that try missing and no intent it is not sent again.
func (l *ledger) attemptOnFullDisk(
	ctx context.Context, serial string, pin []byte, shows func(context.Context) (hsm.PINState, error),
) (*attempt, error) {
	return l.start(ctx, terms{evenUnrecorded: true}, serial, pin, shows)
}

// word is what a person said about one log-in.
type word int

const (
	noWord  word = iota // nothing
	oneTry              // this PIN may cost a try where another one is left after it
	lastTry             // it may cost the last one
)

// passes tells whether the word lets a PIN through that is not known to be right.
func (w word) passes(flags hsm.PINState) bool { return w == lastTry || w == oneTry && !flags.FinalTry }

// attemptAtWord is attempt where a person said something about this log-in. Unlike the pass that unbar leaves, that lifts no
// bar and ends with the attempt.
func (l *ledger) attemptAtWord(
	ctx context.Context, said word, serial string, pin []byte, shows func(context.Context) (hsm.PINState, error),
) (*attempt, error) {
	return l.start(ctx, terms{said: said}, serial, pin, shows)
}

// terms are what an attempt may do beyond the rule.
type terms struct {
	said           word
	evenUnrecorded bool
}

// start begins an attempt under the token's lock.
func (l *ledger) start(
	ctx context.Context, on terms, serial string, pin []byte, shows func(context.Context) (hsm.PINState, error),
) (*attempt, error) {
	if err := l.files.checkDir(); err != nil {
		return nil, l.noIntent(serial, err)
	}
	unlock, err := l.files.lock(ctx, serial)
	if err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("waiting for another log-in to the token %q: %w", serial, err)
		}
		return nil, l.noIntent(serial, err)
	}
	flags, err := shows(ctx)
	var a *attempt
	if err == nil {
		a, err = l.begin(on, serial, pin, flags)
	}
	if err != nil {
		unlock()
		return nil, err
	}
	a.unlock = unlock
	return a, nil
}

// begin decides and writes the intent. The caller holds the token's lock.
func (l *ledger) begin(on terms, serial string, pin []byte, flags hsm.PINState) (*attempt, error) {
	var damaged *damagedError
	mark, key, err := l.files.fingerprint(serial, pin)
	if errors.As(err, &damaged) {
		return nil, barredByDamage(serial, err, flags)
	}
	if err != nil {
		return nil, l.noIntent(serial, err)
	}
	written, err := l.files.read(serial)
	if errors.As(err, &damaged) {
		return nil, barredByDamage(serial, err, flags)
	}
	if err != nil {
		return nil, l.noIntent(serial, err)
	}
	before := l.withUnwritten(serial, written)
	known, again, refusal := before.admit(mark, key, flags, on.said)
	if refusal != nil {
		if len(known.Barred) > len(written.Barred) && l.files.write(serial, known) == nil {
			l.remember(serial, nil) // else a suspicion is not kept: the intent stays, and is suspected again
		}
		return nil, refusal.error(serial, flags, on.said, l.advice)
	}
	a := &attempt{ledger: l, serial: serial, known: known}
	a.intent = intent{Mark: mark, At: l.now().UTC().Truncate(time.Second), Again: again}
	err = l.files.write(serial, known.resolved(mark, &a.intent))
	if err != nil && on.evenUnrecorded && noRoom(err) && known.surely(mark, flags) {
		a.unrecorded, err = err, nil
	}
	if err != nil {
		return nil, l.noIntent(serial, err)
	}
	if a.unrecorded == nil {
		l.remember(serial, nil)
	}
	return a, nil
}

// remember keeps a bar that could not be written, or with nil forgets it, because it is written or lifted now.
func (l *ledger) remember(serial string, b *bar) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b == nil {
		delete(l.unwritten, serial)
	} else {
		l.unwritten[serial] = *b
	}
}

// withUnwritten adds what is remembered to what was read.
func (l *ledger) withUnwritten(serial string, r record) record {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b, remembered := l.unwritten[serial]; remembered {
		return r.bar(b)
	}
	return r
}

// noIntent is the error where the ledger's directory is of no use.
func (l *ledger) noIntent(serial string, err error) error {
	return fmt.Errorf("not logging in to the token %q, because the attempt cannot be recorded in the state directory %q, "+
		"which keeps a wrong PIN from being sent twice; that directory must exist, belong to the user that this program "+
		"runs as, be writable by nobody else and have room (-state-dir): %w: %w", serial, l.files.dir, hsm.ErrUnavailable, err)
}

// succeeded records that the PIN is good. After an error the log-in is as good as before; the intent stays until the
// next one, which the token's full count of tries will then resolve.
func (a *attempt) succeeded() error {
	defer a.unlock()
	if a.unrecorded != nil {
		return nil // which the record says already
	}
	after := a.known.resolved(a.intent.Mark, nil)
	after.Good, after.PassFor = &a.intent.Mark, nil // the token shows all its tries again, so nobody needs a pass
	if err := a.ledger.files.write(a.serial, after); err != nil {
		return fmt.Errorf("recording that the log-in to the token %q worked, in %q: %w", a.serial, a.ledger.files.dir, err)
	}
	return nil
}

// succeededInPlaceOf is succeeded where the program had another PIN for the token until now. A token has one, so that is
// wrong, and other programs that still have it must not send it.
func (a *attempt) succeededInPlaceOf(old []byte) error {
	mark, _, err := a.ledger.files.fingerprint(a.serial, old)
	if err == nil && mark != a.intent.Mark {
		a.known = a.known.bar(bar{Mark: mark, At: a.intent.At, Why: replaced})
	}
	return errors.Join(a.succeeded(), err)
}

// wrong records that the token rejected the PIN, which is not sent again. The error says that recording it failed; then the
// intent stays, which bars the PIN as long as the token shows fewer than all its tries.
func (a *attempt) wrong() error {
	defer a.unlock()
	barred := bar{Mark: a.intent.Mark, At: a.intent.At, Why: rejected}
	if err := a.write(a.known.resolved(a.intent.Mark, nil).bar(barred)); err != nil {
		a.ledger.remember(a.serial, &barred)
		return fmt.Errorf("recording that the token %q rejected the PIN, in %q; end all programs that use the token until that "+
			"is mended: %w", a.serial, a.ledger.files.dir, err)
	}
	return nil
}

// changed records that the token took another PIN in place of this one: that is good now, and this one, which other programs
// may still have, is barred.
func (a *attempt) changed(pin []byte) error {
	defer a.unlock()
	mark, _, err := a.ledger.files.fingerprint(a.serial, pin)
	if err == nil {
		after := a.known.resolved(a.intent.Mark, nil).bar(bar{Mark: a.intent.Mark, At: a.intent.At, Why: replaced})
		after.Good = &mark
		after.Barred = slices.DeleteFunc(after.Barred, func(b bar) bool { return b.Mark == mark })
		err = a.ledger.files.write(a.serial, after)
	}
	if err != nil {
		return fmt.Errorf("recording that the PIN of the token %q was changed, in %q: %w", a.serial, a.ledger.files.dir, err)
	}
	return nil
}

// unresolved leaves the intent as it is, because nobody knows what the token did with the PIN: the module hung or died.
func (a *attempt) unresolved() error {
	defer a.unlock()
	if a.unrecorded == nil {
		return nil
	}
	if err := a.write(a.known.resolved(a.intent.Mark, &a.intent)); err != nil {
		return fmt.Errorf("recording that a PIN was sent to the token %q, in %q: %w", a.serial, a.ledger.files.dir, err)
	}
	return nil
}

// write records what came of an attempt. Where there was no room for the intent there is hardly any for that; the old record
// has room.
func (a *attempt) write(r record) error {
	err := a.ledger.files.write(a.serial, r)
	if err != nil && a.unrecorded != nil {
		err = a.ledger.files.overwrite(a.serial, r)
	}
	return err
}

// withdrawn takes the intent back, because the PIN surely did not reach the token or did not count.
func (a *attempt) withdrawn() error {
	defer a.unlock()
	if a.unrecorded != nil {
		return nil
	}
	if err := a.ledger.files.write(a.serial, a.known); err != nil {
		return fmt.Errorf("recording that no PIN was sent to the token %q, in %q: %w", a.serial, a.ledger.files.dir, err)
	}
	return nil
}

// unbarPatience is how long unbar waits for a log-in that runs: longer than a hanging one is left alone.
const unbarPatience = 30 * time.Second

// unbar lifts the bar of one PIN of a token and lets its next log-in through whatever the token shows, once. The bars of
// other PINs stay: what a person knows about this one says nothing about those of other mounts. A damaged file of the
// ledger is set aside. A PIN that the token rejected is asked about: shows tells what the token shows, and on its last try
// the PIN stays barred, which is a *hsm.PINError.
func (l *ledger) unbar(serial string, pin []byte, shows func(context.Context) (hsm.PINState, error)) error {
	if err := l.files.checkDir(); err != nil {
		return fmt.Errorf("unbarring the token %q in the state directory %q: %w", serial, l.files.dir, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), unbarPatience)
	defer cancel()
	unlock, err := l.files.lock(ctx, serial)
	if err != nil {
		return fmt.Errorf("unbarring the token %q, waiting for a log-in that runs: %w", serial, err)
	}
	defer unlock()
	if err := l.unbarLocked(ctx, serial, pin, shows); err != nil {
		return fmt.Errorf("unbarring the token %q in the state directory %q: %w", serial, l.files.dir, err)
	}
	l.remember(serial, nil)
	return nil
}

func (l *ledger) unbarLocked(
	ctx context.Context, serial string, pin []byte, shows func(context.Context) (hsm.PINState, error),
) error {
	var damaged *damagedError
	mark, key, err := l.files.fingerprint(serial, pin)
	if errors.As(err, &damaged) {
		if err := damaged.setAside(); err != nil {
			return err
		}
		mark, key, err = l.files.fingerprint(serial, pin)
	}
	if err != nil {
		return err
	}
	before, err := l.files.read(serial)
	before = l.withUnwritten(serial, before)
	if errors.As(err, &damaged) {
		if err := damaged.setAside(); err != nil {
			return err
		}
		before, err = record{}, nil
	}
	if err != nil {
		return err
	}
	if before.rejected(mark) {
		flags, err := shows(ctx)
		if err != nil {
			return fmt.Errorf("asking the token how many tries it leaves, since it rejected this PIN; the bar stays: %w", err)
		}
		if flags.FinalTry {
			return &hsm.PINError{TriesLeft: 1, Barred: true, Detail: fmt.Sprintf("the token %q rejected this PIN and shows its last "+
				"try, so the bar stays: sent again, this PIN would lock it; %s, or log in once with another program "+
				"(pkcs11-tool --login), which restores the tries", serial, l.advice.LastTry)}
		}
	}
	return l.files.write(serial, before.unbarred(mark, key))
}

// record is what the ledger knows about one token.
type record struct {
	// Key names the local key that the fingerprints were made with.
	Key string `json:"key"`
	// Good is the PIN that worked last.
	Good *fingerprint `json:"good,omitempty"`
	// Barred are the PINs that are not sent.
	Barred []bar `json:"barred,omitempty"`
	// Intent is a log-in that was begun.
	Intent *intent `json:"intent,omitempty"`
	// PassFor is a PIN that is let through once, whatever the token shows: a person said so.
	PassFor *fingerprint `json:"pass_for,omitempty"`
	// Pass lets the next log-in through with any PIN that is not barred. Files written before there was PassFor have it.
	Pass bool `json:"pass,omitempty"`
}

// bar is a PIN that is not sent.
type bar struct {
	Mark fingerprint `json:"pin"`
	// At is when it was sent.
	At  time.Time `json:"at"`
	Why barCause  `json:"why"`
}

// barCause is why a PIN is barred.
type barCause string

const (
	rejected   barCause = "rejected"   // by the token
	unanswered barCause = "unanswered" // the log-in ended without an answer, and the token showed a wrong PIN afterwards
	replaced   barCause = "replaced"   // by another PIN that the token has now
)

// intent is a PIN that may have been sent.
type intent struct {
	Mark fingerprint `json:"pin"`
	At   time.Time   `json:"at"`
	// Again is true where the intent before this one had the same PIN and stayed unresolved as well.
	Again bool `json:"again,omitempty"`
}

// admit decides whether a PIN may be sent. It returns what is known now, which may be more than before even where the PIN
// is refused, and whether the intent to come follows an unresolved one of the same PIN.
func (r record) admit(mark fingerprint, key string, flags hsm.PINState, said word) (known record, again bool, refused *refusal) {
	if flags.Locked {
		return r, false, &refusal{why: becauseLocked}
	}
	if r.Key != key {
		if r.Intent != nil || len(r.Barred) > 0 {
			return r, false, &refusal{why: becauseOtherKey}
		}
		r.Key, r.Good, r.PassFor = key, nil, nil
	}
	allTries := !flags.CountLow && !flags.FinalTry
	if i := r.Intent; i != nil && !allTries {
		switch {
		case !r.isGood(i.Mark) || i.Again:
			// Barred from now on, even when somebody's right PIN restores the count later. A PIN that was good is believed
			// to be so still, but not twice: somebody may have changed it on the token.
			r = r.bar(bar{Mark: i.Mark, At: i.At, Why: unanswered})
		case i.Mark == mark:
			again = true
		}
	}
	if i := slices.IndexFunc(r.Barred, func(b bar) bool { return b.Mark == mark }); i >= 0 {
		return r, false, &refusal{why: becauseBarred, bar: r.Barred[i]}
	}
	if !allTries && !r.isGood(mark) && !r.passes(mark) && !said.passes(flags) {
		return r, false, &refusal{why: becauseFewTries}
	}
	return r, again, nil
}

// resolved returns the record with another intent, or none, in place of the one before it, where the PIN mark was sent. That
// uses up its pass.
func (r record) resolved(mark fingerprint, next *intent) record {
	r.Intent, r.Pass = next, false
	if r.passes(mark) {
		r.PassFor = nil
	}
	return r
}

func (r record) passes(mark fingerprint) bool {
	return r.Pass || r.PassFor != nil && *r.PassFor == mark
}

// unbarred returns the record after a person's word for one PIN. What was recorded with another key tells nothing any more.
func (r record) unbarred(mark fingerprint, key string) record {
	if r.Key != key {
		return record{Key: key, PassFor: &mark}
	}
	r.Barred = slices.DeleteFunc(slices.Clone(r.Barred), func(b bar) bool { return b.Mark == mark })
	if r.Intent != nil && r.Intent.Mark == mark {
		r.Intent = nil
	}
	r.PassFor, r.Pass = &mark, false
	return r
}

// surely tells whether a PIN is right as far as anybody knows: it worked last, nothing is missing on the token, and no log-in
// is open but one with this very PIN.
func (r record) surely(mark fingerprint, flags hsm.PINState) bool {
	return r.isGood(mark) && !flags.CountLow && !flags.FinalTry && (r.Intent == nil || r.Intent.Mark == mark)
}

// rejected tells whether a PIN is barred because the token said that it is wrong.
func (r record) rejected(mark fingerprint) bool {
	return slices.ContainsFunc(r.Barred, func(b bar) bool { return b.Mark == mark && b.Why == rejected })
}

func (r record) isGood(mark fingerprint) bool { return r.Good != nil && *r.Good == mark }

// bar returns the record with a PIN barred, good no more, and without the intent.
func (r record) bar(b bar) record {
	r.Intent = nil
	if r.isGood(b.Mark) {
		r.Good = nil
	}
	r.Barred = append(slices.DeleteFunc(slices.Clone(r.Barred), func(o bar) bool { return o.Mark == b.Mark }), b)
	return r
}

// refusal says why a PIN is not sent.
type refusal struct {
	why refusalCause
	bar bar
}

type refusalCause int

const (
	becauseLocked refusalCause = iota + 1
	becauseOtherKey
	becauseBarred
	becauseFewTries
)

const lockedAdvice = "it is locked now, and no PIN works until the SO-PIN has unblocked it " +
	"(pkcs11-tool --login --login-type so --init-pin)"

// error is the refusal for people. A PIN that came with a person's word is not the one that the device has, which is what
// unbar lets through: there the sentences do not name it.
func (f *refusal) error(serial string, flags hsm.PINState, said word, advice Advice) *hsm.PINError {
	e := &hsm.PINError{TriesLeft: triesLeft(flags), Barred: true}
	switch f.why {
	case becauseLocked:
		e.Detail = fmt.Sprintf("the token %q took too many wrong PINs: %s", serial, lockedAdvice)
	case becauseOtherKey:
		e.Detail = fmt.Sprintf("the PINs that the token %q rejected were recorded with another pin.key than the state directory "+
			"now holds, so nobody can tell whether this one was among them; nothing was sent; put the old file back, or make "+
			"sure of the PIN and unbar the device", serial)
	case becauseBarred:
		happened := fmt.Sprintf("the token %q rejected this PIN", serial)
		switch f.bar.Why {
		case unanswered:
			happened = fmt.Sprintf("a log-in to the token %q with this PIN ended without an answer, and the token showed a wrong "+
				"PIN afterwards", serial)
		case replaced:
			happened = fmt.Sprintf("this PIN of the token %q was changed to another one", serial)
		case rejected:
		}
		next := advice.Give + ", or " + advice.Unbar + " if this one is right after all"
		if said != noWord {
			next = "make sure of the PIN and give another one; " + advice.Force + " does not send this one either"
		}
		e.Detail = fmt.Sprintf("%s (%s), so it is not sent again from this machine; %s", happened, f.bar.At.Format(time.RFC3339), next)
	case becauseFewTries:
		shows := "a wrong PIN was sent to it"
		if flags.FinalTry {
			shows = "the next wrong PIN locks it"
		}
		next := advice.next() + ", or " + advice.Unbar + " for one try, or log in once with " +
			"another program (pkcs11-tool --login), which restores the tries"
		if said != noWord {
			next = "make sure of the PIN; only " + advice.Force + " spends the last try on it"
		}
		e.Detail = fmt.Sprintf("the token %q shows that %s, and this PIN is not known to be right, so nothing was sent; %s", serial, shows, next)
	}
	return e
}

// barredByDamage is the bar where the ledger cannot be read.
func barredByDamage(serial string, err error, flags hsm.PINState) *hsm.PINError {
	return &hsm.PINError{TriesLeft: triesLeft(flags), Barred: true, Detail: fmt.Sprintf("nobody can tell whether the token %q "+
		"rejected this PIN before, so nothing was sent: %v; make sure of the PIN and unbar the device, which sets the file "+
		"aside", serial, err)}
}

// triesLeft is what the flags tell about the number of tries.
func triesLeft(flags hsm.PINState) int {
	switch {
	case flags.Locked:
		return 0
	case flags.FinalTry:
		return 1
	default:
		return -1
	}
}
