package audit

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// maxWaiting is how many lines wait for one sink; more are missed. A thousand Vaults that come back at one time announce
	// a thousand openings, and as many ends of them follow: a sink that is well misses none of that.
	maxWaiting = 8192
	maxBatch   = 256 // lines that are written together
)

// writer is a sink with the goroutine that writes to it.
type writer struct {
	sink     Sink
	logger   *slog.Logger
	now      func() time.Time
	patience time.Duration // after which the sink counts as one that hangs

	queue    chan *entry   // pointers: the room for them is there from the start
	ended    chan struct{} // closed when the goroutine has ended
	closeErr error         // of the sink, once ended

	mu      sync.Mutex // guards what follows
	reopen  bool
	busy    time.Time // since when the sink writes; zero while it does not
	err     error     // of the last line
	total   uint64    // lines missed since the beginning
	pending missed    // lines missed since the last one that was taken
}

// entry is a record that waits for a sink.
type entry struct {
	record  record
	answers chan<- answer
	hung    bool
	check   bool // there is no record: only whether the sink would take one is asked
}

// answer is what came of an entry. Hung is true where the sink already hung when it was given the record, counts where taking
// it allows an act.
type answer struct {
	hung, counts bool
	err          error
}

func newWriter(sink Sink, logger *slog.Logger, now func() time.Time, patience time.Duration) *writer {
	w := &writer{
		sink: sink, logger: logger, now: now, patience: patience,
		queue: make(chan *entry, maxWaiting), ended: make(chan struct{}), reopen: true,
	}
	go w.run() // ends when the queue is closed; Log.Close waits for it
	return w
}

// enqueue gives a record to the sink, which sends one answer unless enqueue fails. It never waits. Hangs tells that the sink
// has been at its last lines for longer than the patience.
func (w *writer) enqueue(r record, answers chan<- answer) (hangs bool, err error) {
	hangs = w.hangs()
	select {
	case w.queue <- &entry{record: r, answers: answers, hung: hangs}:
		return hangs, nil
	default:
		err := fmt.Errorf("%s: %d lines wait for it already", w.sink.Name(), maxWaiting)
		w.miss(r, 1, err)
		return false, err
	}
}

// check asks whether the sink would take a line. It sends one answer, unless it returns false because the sink hangs.
func (w *writer) check(answers chan<- answer) bool {
	if w.hangs() {
		return false
	}
	select {
	case w.queue <- &entry{answers: answers, check: true}:
		return true
	default:
		return false
	}
}

// run writes what is queued until the queue is closed.
func (w *writer) run() {
	defer close(w.ended)
	for first := range w.queue {
		var checks []*entry
		batch := []*entry{first}
	gather:
		for !first.check && len(batch) < maxBatch {
			select {
			case next, ok := <-w.queue:
				switch {
				case !ok:
					break gather // what was gathered is written; range ends then
				case next.check: // what is written answers it
					checks = append(checks, next)
				default:
					batch = append(batch, next)
				}
			default:
				break gather
			}
		}
		err := w.write(batch)
		batch = append(batch, checks...)
		for _, e := range batch {
			e.answers <- answer{e.hung, counts(w.sink), err}
		}
	}
	w.closeErr = w.sink.Close()
}

// write writes a batch and keeps account of it.
func (w *writer) write(batch []*entry) error {
	w.mu.Lock()
	w.busy = time.Now()
	reopen, before := w.reopen, w.pending
	w.reopen = false
	w.mu.Unlock()

	var err error
	if batch[0].check {
		before.Lines = 0
		if reopen || counts(w.sink) { // a connection that only carries copies is not made anew for that
			err = w.sink.Reopen()
		}
		if err == nil {
			err = room(w.sink)
		}
	} else {
		err = w.give(batch, reopen, before)
	}

	w.mu.Lock()
	w.busy = time.Time{}
	if err == nil {
		if w.err != nil {
			w.logger.Info("an audit sink works again", "sink", w.sink.Name(), "missed_lines", w.pending.Lines)
		}
		w.err = nil
		w.pending.Lines -= before.Lines // a line may have been missed meanwhile
		if w.pending.Lines == 0 {
			w.pending = missed{}
		}
		w.mu.Unlock()
		return nil
	}
	w.reopen = true
	w.mu.Unlock()
	err = fmt.Errorf("%s: %w", w.sink.Name(), err)
	missed := len(batch)
	if batch[0].check {
		missed = 0
	}
	w.miss(batch[0].record, missed, err)
	return err
}

// give encodes a batch and hands it to the sink. The first line tells what was missed before it.
func (w *writer) give(batch []*entry, reopen bool, before missed) error {
	if reopen {
		if err := w.sink.Reopen(); err != nil {
			return err
		}
	}
	lines := make([]Line, 0, len(batch))
	for i, e := range batch {
		if i == 0 && before.Lines > 0 {
			e.record.Missed = &before
		}
		text, err := e.record.encode()
		if err != nil {
			return err
		}
		lines = append(lines, Line{Text: text, ID: e.record.ID, Event: e.record.Event, Failed: e.record.Result == ResultFailed})
	}
	return w.sink.Write(lines)
}

// miss counts lines that the sink did not take, and tells the logger of the first.
func (w *writer) miss(r record, lines int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.logger.Warn("an audit sink takes no lines; it is tried again at every act", "sink", w.sink.Name(), "cause", err)
	}
	if w.pending.Lines == 0 && lines > 0 {
		w.pending.Since = r.Time
	}
	w.pending.Lines += uint64(lines) //nolint:gosec // a count
	w.pending.Error = err.Error()
	w.total += uint64(lines) //nolint:gosec // a count
	w.err = err
}

// room asks a sink that knows whether there is room for a line.
func room(sink Sink) error {
	if limited, ok := sink.(interface{ Room() error }); ok {
		return limited.Room()
	}
	return nil
}

func (w *writer) status() SinkStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	status := SinkStatus{Name: w.sink.Name(), Err: w.err, Missed: w.total}
	if status.Err == nil && w.hangsLocked() {
		status.Err = w.hanging()
	}
	return status
}

func (w *writer) hangs() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.hangsLocked()
}

// hangsLocked is hangs for those who hold mu.
func (w *writer) hangsLocked() bool { return !w.busy.IsZero() && time.Since(w.busy) > w.patience }

func (w *writer) reopenSoon() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reopen = true
}

// errHangs: a sink has not come back from writing.
var errHangs = errors.New("it hangs")

func (w *writer) hanging() error { return fmt.Errorf("%s: %w", w.sink.Name(), errHangs) }
