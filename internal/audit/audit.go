// Package audit keeps nitroseal's own account of what it did to clusters: JSON lines, one before an act and one after.
//
// An act is announced before it happens. [Log.Begin] returns only when at least one sink has taken the intent durably;
// where none did, it is [ErrNoSink] and the act must not happen. Its end is written to every sink that works. Several
// sinks (file, journal, syslog) are there so that one full disk does not keep a Vault sealed: an act goes on while one
// sink takes it, and a sink that failed is tried again at the next act and tells, in the next line that it can write, how many
// lines it misses and why.
//
// Each sink has a goroutine of its own, which gathers the lines that wait and writes them together, so that a hundred
// unseals at one time cost a file a few fsyncs, and a disk that hangs delays nobody but itself. What "taken" means differs:
// a file was synced; the journal and syslog have the datagram in another process, which outlives ours but may lose the
// last minutes in a power cut (journald syncs every five minutes, SyncIntervalSec=). Whoever wants more configures a file.
//
// A line holds no secret, is printable ASCII whatever was put in, and no longer than [MaxLine].
package audit

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// The errors of this package, wrapped: ask with errors.Is.
var (
	// ErrNoSink: no sink took the intent. The act must not happen.
	ErrNoSink = errors.New("no audit sink took the intent")
	// ErrUnsafe: a file cannot be the audit log because somebody else could change it, or have it say something else. Such a
	// file is a sink that fails until it is mended.
	ErrUnsafe = errors.New("not safe as an audit log")
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("the audit log was closed")
)

// Act is something about to be done to a cluster. It holds no secret.
type Act struct {
	Verb    string // init, unseal, rekey, …
	Cluster string
	Node    string // its address, "" where the act concerns the cluster
	By      string // who asked for it; "" for the daemon itself
	Detail  map[string]string
}

// Sink takes lines. A sink is used by one goroutine at a time.
type Sink interface {
	// Name tells the sink from others, for people and metrics: "file /var/log/…", "journal".
	Name() string
	// Write takes lines, each ending in a newline, and returns nil only when all of them are as durable as the sink can
	// make them. After an error it is called again with the next lines.
	Write(lines []Line) error
	// Reopen makes the sink begin anew where it writes to: a rotated file, a restarted server.
	Reopen() error
	Close() error
}

// counts tells whether a line that the sink took allows an act.
func counts(sink Sink) bool {
	uncertain, ok := sink.(interface{ Uncertain() bool })
	return !ok || !uncertain.Uncertain()
}

// Line is one line of the log, with what a sink may want to tell about it besides its text.
type Line struct {
	// Text is the JSON with its newline.
	Text []byte
	// ID joins the lines of one act; Event is [EventIntent] or [EventOutcome]; Failed is true for an outcome with an error.
	ID, Event string
	Failed    bool
}

// Options are what a [Log] is made of.
type Options struct {
	Sinks         []Sink           // at least one; the log closes them
	Host, Program string           // for every line; the host's own name where Host is empty
	Now           func() time.Time // nil for time.Now
	Logger        *slog.Logger     // nil for none
	// Patience is how long an act waits for a sink that is slow while another one has taken the line; 0 for 3 seconds.
	// Limit is how long an intent waits for the first sink; 0 for 30 seconds.
	Patience, Limit time.Duration
	// OutcomesLater lets an act end without waiting for the line that tells so, which is written all the same, at the latest by
	// Close: for a server whose acts are many and short. What ends the process in between leaves an act without its outcome, as
	// it does while the act lasts.
	OutcomesLater bool
}

const (
	defaultPatience = 3 * time.Second
	defaultLimit    = 30 * time.Second
)

// Log is an audit log. Its methods are safe for concurrent use.
type Log struct {
	writers         []*writer
	host, program   string
	now             func() time.Time
	logger          *slog.Logger
	patience, limit time.Duration
	outcomesLater   bool

	mu     sync.Mutex
	closed bool
}

// Open returns a log that writes to all of the sinks. A sink that cannot be opened now is tried again at every act; the
// logger is told.
func Open(options Options) (*Log, error) {
	if len(options.Sinks) == 0 {
		return nil, fmt.Errorf("opening the audit log: %w: none is configured", ErrNoSink)
	}
	l := &Log{
		host: options.Host, program: options.Program, now: options.Now, logger: options.Logger,
		patience: options.Patience, limit: options.Limit, outcomesLater: options.OutcomesLater,
	}
	if l.host == "" {
		l.host, _ = os.Hostname() // a line without a host is better than no line
	}
	if l.now == nil {
		l.now = time.Now
	}
	if l.logger == nil {
		l.logger = slog.New(slog.DiscardHandler)
	}
	if l.patience == 0 {
		l.patience = defaultPatience
	}
	if l.limit == 0 {
		l.limit = defaultLimit
	}
	if !slices.ContainsFunc(options.Sinks, counts) {
		return nil, fmt.Errorf("opening the audit log: %w: nobody knows whether a syslog server elsewhere took a line; add a file or the journal", ErrNoSink)
	}
	for _, sink := range options.Sinks {
		l.writers = append(l.writers, newWriter(sink, l.logger, l.now, l.patience))
	}
	return l, nil
}

// Begin announces an act and returns a function that tells its end: call it exactly once, with the act's error. Where Begin
// fails the act must not happen: no sink took the intent ([ErrNoSink]), or ctx ended first.
func (l *Log) Begin(ctx context.Context, act Act) (end func(error), err error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("writing the audit log: %w", err)
	}
	begun := l.now()
	intent := l.record(act, newID(), begun)
	intent.Event = EventIntent
	if maybe, err := l.write(ctx, intent, true); err != nil {
		if maybe { // nobody shall think that it happened
			l.outcome(intent, begun, fmt.Errorf("the act did not take place: %w", err))
		}
		return nil, err
	}
	var once sync.Once
	return func(failure error) { once.Do(func() { l.outcome(intent, begun, failure) }) }, nil
}

// outcome writes how an act ended.
func (l *Log) outcome(intent record, begun time.Time, failure error) {
	r := intent
	r.Event, r.Time = EventOutcome, l.now()
	r.Seconds = r.Time.Sub(begun).Seconds()
	r.Result = ResultOK
	if failure != nil {
		r.Result, r.Error = ResultFailed, failure.Error()
	}

	if _, err := l.write(context.Background(), r, false); err != nil {
		l.logger.Error("the outcome of an act is in no audit log", "verb", r.Verb, "cluster", r.Cluster, "node", r.Node, "id", r.ID, "cause", err)
	}
}

// write gives a record to all sinks and waits for those that work, with must for the first one in any case. Where it fails,
// maybe tells whether a sink may hold the line, or write it yet.
func (l *Log) write(ctx context.Context, r record, must bool) (maybe bool, err error) {
	answers := make(chan answer, len(l.writers)) // room for all: a sink that answers late is not kept waiting
	var failed []error
	prompt, slow := 0, 0 // sinks that have not answered; those of the second kind hang and are only hoped for
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return false, fmt.Errorf("writing the audit log: %w", ErrClosed)
	}
	for _, w := range l.writers {
		switch hangs, err := w.enqueue(r, answers); {
		case err != nil:
			failed = append(failed, err)
		case hangs:
			slow++
		default:
			prompt++
		}
	}
	l.mu.Unlock()
	if !must && l.outcomesLater && prompt+slow > 0 {
		return true, nil // a sink that does not take it tells the logger
	}

	patience, limit := time.NewTimer(l.patience), time.NewTimer(l.limit)
	defer patience.Stop()
	defer limit.Stop()
	taken, late := false, false
	for prompt+slow > 0 {
		if enough := taken || !must; enough && (late || prompt == 0) {
			break
		}
		select {
		case a := <-answers:
			if a.hung {
				slow--
			} else {
				prompt--
			}
			taken = taken || a.err == nil && a.counts
			if a.err != nil {
				failed = append(failed, a.err)
			}
		case <-patience.C:
			late = true
		case <-limit.C:
			return true, l.noSink(append(failed, fmt.Errorf("no answer from %d sinks within %v", prompt+slow, l.limit)))
		case <-ctx.Done():
			return true, fmt.Errorf("writing the audit log: %w", ctx.Err())
		}
	}
	if taken || !must && len(failed) < len(l.writers) {
		return true, nil
	}
	return len(failed) < len(l.writers), l.noSink(failed)
}

// noSink says why no sink took a line.
func (l *Log) noSink(why []error) error {
	return fmt.Errorf("writing the audit log: %w: %w", ErrNoSink, failures(why))
}

// failures are the errors of several sinks in one line.
type failures []error

func (f failures) Error() string {
	texts := make([]string, len(f))
	for i, err := range f {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (f failures) Unwrap() []error { return f }

// SinkStatus is how a sink fares.
type SinkStatus struct {
	Name string
	// Err is why the last line was not taken; nil where it was, or none was written yet.
	Err error
	// Missed counts the lines that the sink did not take since the log was opened.
	Missed uint64
}

// Sinks tells how each sink fares, in the order of the configuration.
func (l *Log) Sinks() []SinkStatus {
	all := make([]SinkStatus, len(l.writers))
	for i, w := range l.writers {
		all[i] = w.status()
	}
	return all
}

// Check finds out which sinks would take a line now, without writing one, so that nobody learns only at the next act that none
// does: [ErrNoSink] then. [Log.Sinks] tells more. A sink that hangs is not waited for longer than the patience.
func (l *Log) Check(ctx context.Context) error {
	answers := make(chan answer, len(l.writers))
	var failed []error
	waiting := 0
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return fmt.Errorf("checking the audit log: %w", ErrClosed)
	}
	for _, w := range l.writers {
		if w.check(answers) {
			waiting++
		} else {
			failed = append(failed, w.hanging())
		}
	}
	l.mu.Unlock()
	patience := time.NewTimer(l.patience)
	defer patience.Stop()
	would := false
	for ; waiting > 0; waiting-- {
		select {
		case a := <-answers:
			would = would || a.err == nil && a.counts
			if a.err != nil {
				failed = append(failed, a.err)
			}
		case <-patience.C:
			waiting = 1
			failed = append(failed, errHangs)
		case <-ctx.Done():
			return fmt.Errorf("checking the audit log: %w", ctx.Err())
		}
	}
	if would {
		return nil
	}
	return fmt.Errorf("checking the audit log: %w: %w", ErrNoSink, failures(failed))
}

// Reopen makes every sink begin anew where it writes to, before its next line.
func (l *Log) Reopen() {
	for _, w := range l.writers {
		w.reopenSoon()
	}
}

// Close writes what waits and closes the sinks. A sink that hangs is left behind after the patience.
func (l *Log) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	for _, w := range l.writers {
		close(w.queue)
	}
	patience := time.NewTimer(l.patience)
	defer patience.Stop()
	var errs []error
	for _, w := range l.writers {
		select {
		case <-w.ended:
			errs = append(errs, w.closeErr)
		case <-patience.C:
			patience.Reset(0) // for the others, which had the same time
			errs = append(errs, w.hanging())
		}
	}
	return errors.Join(errs...)
}

// record returns what every line of an act holds.
func (l *Log) record(act Act, id string, at time.Time) record {
	return record{
		Time: at, ID: id, Verb: act.Verb, Cluster: act.Cluster, Node: act.Node, By: act.By, Detail: maps.Clone(act.Detail),
		Host: l.host, Program: l.program, PID: os.Getpid(),
	}
}

// newID returns a name for one act: 64 random bits.
func newID() string {
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails: crypto/rand
	return hex.EncodeToString(id[:])
}
