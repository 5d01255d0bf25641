package audit

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

var update = flag.Bool("update", false, "write the golden file anew")

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeSink remembers its lines. Its functions, where set, decide what becomes of a write.
type fakeSink struct {
	name   string
	write  func() error
	reopen error

	mu      sync.Mutex
	lines   []map[string]any
	writes  int
	reopens int
	closed  bool
}

func (s *fakeSink) Name() string { return s.name }

func (s *fakeSink) Write(lines []Line) error {
	s.mu.Lock()
	s.writes++
	write := s.write
	s.mu.Unlock()
	if write != nil {
		if err := write(); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, line := range lines {
		var decoded map[string]any
		if err := json.Unmarshal(line.Text, &decoded); err != nil {
			return err
		}
		if decoded["id"] != line.ID || decoded["event"] != line.Event {
			return fmt.Errorf("the line %s is announced as %s %s", line.Text, line.Event, line.ID)
		}
		s.lines = append(s.lines, decoded)
	}
	return nil
}

func (s *fakeSink) Reopen() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reopens++
	return s.reopen
}

func (s *fakeSink) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

func (s *fakeSink) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}

func (s *fakeSink) fails(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.write = func() error { return err }
	if err == nil {
		s.write = nil
	}
}

// told returns one word for each line: intent, ok, failed.
func (s *fakeSink) told() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var words []string
	for _, line := range s.lines {
		if line["event"] == EventIntent {
			words = append(words, EventIntent)
		} else {
			words = append(words, line["result"].(string))
		}
	}
	return strings.Join(words, " ")
}

func open(t *testing.T, options Options, sinks ...Sink) *Log {
	t.Helper()
	options.Sinks = sinks
	if options.Program == "" {
		options.Host, options.Program = "vault-1", "nitroseal"
	}
	l, err := Open(options)
	must(t, err)
	return l
}

var unseal = Act{Verb: "unseal", Cluster: "prod", Node: "https://vault-1:8200"}

func TestAnActIsAnnouncedBeforeItHappensAndToldAfterwards(t *testing.T) {
	first, second := &fakeSink{name: "one"}, &fakeSink{name: "two"}
	l := open(t, Options{}, first, second)
	end, err := l.Begin(t.Context(), unseal)
	must(t, err)
	for _, sink := range []*fakeSink{first, second} {
		if got := sink.told(); got != "intent" {
			t.Errorf("%s before the act: %q", sink.name, got)
		}
	}
	end(errors.New("the node hung up"))
	end(nil) // told once only
	must(t, l.Close())
	for _, sink := range []*fakeSink{first, second} {
		if got := sink.told(); got != "intent failed" || !sink.closed {
			t.Errorf("%s at the end: %q, closed %v", sink.name, got, sink.closed)
		}
		if sink.lines[0]["id"] != sink.lines[1]["id"] || sink.lines[1]["error"] != "the node hung up" {
			t.Errorf("%s: %v", sink.name, sink.lines)
		}
	}
}

func TestWithoutAnySinkThatTakesTheIntentNothingHappens(t *testing.T) {
	if _, err := Open(Options{}); !errors.Is(err, ErrNoSink) {
		t.Errorf("a log without sinks: %v", err)
	}
	sinks := []*fakeSink{{name: "one"}, {name: "two"}}
	l := open(t, Options{}, sinks[0], sinks[1])
	sinks[0].fails(syscall.ENOSPC)
	sinks[1].fails(syscall.EIO)
	end, err := l.Begin(t.Context(), unseal)
	if end != nil || !errors.Is(err, ErrNoSink) || !errors.Is(err, syscall.ENOSPC) || !errors.Is(err, syscall.EIO) {
		t.Fatalf("got %v", err)
	}
	must(t, l.Close())
	if _, err := l.Begin(t.Context(), unseal); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestASinkThatFailedTellsWhatItMissesAsSoonAsItCan(t *testing.T) {
	good, bad := &fakeSink{name: "good"}, &fakeSink{name: "bad"}
	var logged strings.Builder
	l := open(t, Options{Logger: slog.New(slog.NewTextHandler(&logged, nil))}, good, bad)
	bad.fails(syscall.ENOSPC)
	for range 2 {
		end, err := l.Begin(t.Context(), unseal)
		must(t, err)
		end(nil)
	}
	if status := l.Sinks()[1]; status.Missed != 4 || !errors.Is(status.Err, syscall.ENOSPC) {
		t.Errorf("status of the bad sink: %+v", status)
	}
	bad.fails(nil)
	end, err := l.Begin(t.Context(), unseal)
	must(t, err)
	end(nil)
	if status := l.Sinks()[1]; status.Missed != 4 || status.Err != nil {
		t.Errorf("status of the sink that works again: %+v", status)
	}
	must(t, l.Close())
	if got := good.told(); got != "intent ok intent ok intent ok" {
		t.Errorf("the good sink: %s", got)
	}
	if got := bad.told(); got != "intent ok" {
		t.Errorf("the bad sink: %s", got)
	}
	missed, _ := bad.lines[0]["missed"].(map[string]any)
	if missed["lines"] != 4.0 || !strings.Contains(fmt.Sprint(missed["error"]), "no space left") || bad.lines[1]["missed"] != nil {
		t.Errorf("missed: %v, then %v", missed, bad.lines[1]["missed"])
	}
	if n := strings.Count(logged.String(), "takes no lines"); n != 1 {
		t.Errorf("the logger was told %d times:\n%s", n, &logged)
	}
	if bad.reopens < 5 {
		t.Errorf("reopened %d times", bad.reopens)
	}
}

func TestASinkThatHangsDelaysAnActOnceAndKeepsNobodyFromIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		good, stuck := &fakeSink{name: "good"}, &fakeSink{name: "stuck", write: func() error { <-release; return nil }}
		l := open(t, Options{}, good, stuck)
		begun := time.Now()
		for range 3 {
			end, err := l.Begin(t.Context(), unseal)
			must(t, err)
			end(nil)
		}
		if took := time.Since(begun); took > 2*defaultPatience {
			t.Errorf("three acts took %v", took)
		}
		if status := l.Sinks()[1]; !errors.Is(status.Err, errHangs) {
			t.Errorf("status: %v", status.Err)
		}
		if err := l.Close(); !errors.Is(err, errHangs) {
			t.Errorf("Close: %v", err)
		}
		close(release)
		synctest.Wait()
		if got := stuck.told(); got != "intent ok intent ok intent ok" {
			t.Errorf("once it went on: %s", got)
		}
	})
}

func TestAnOutcomeThatIsNotWaitedForIsWrittenAllTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		sink := &fakeSink{name: "slow"}
		l := open(t, Options{OutcomesLater: true}, sink)
		end, err := l.Begin(t.Context(), unseal)
		must(t, err)
		if got := sink.told(); got != "intent" {
			t.Errorf("before the act: %q", got)
		}
		sink.set(func() { sink.write = func() error { <-release; return nil } })
		begun := time.Now()
		end(nil)
		if took := time.Since(begun); took != 0 {
			t.Errorf("the act waited %v for its outcome", took)
		}
		synctest.Wait()
		close(release)
		must(t, l.Close())
		if got := sink.told(); got != "intent ok" || !sink.closed {
			t.Errorf("at the end: %q, closed %v", got, sink.closed)
		}
	})
}

func TestAnIntentWaitsForTheOnlySinkAndGivesUpAtLast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		slow := &fakeSink{name: "slow", write: func() error { <-release; return nil }}
		l := open(t, Options{}, slow)
		go func() { <-time.After(10 * time.Second); close(release) }()
		begun := time.Now()
		end, err := l.Begin(t.Context(), unseal)
		must(t, err)
		if took := time.Since(begun); took != 10*time.Second {
			t.Errorf("took %v", took)
		}
		end(nil)

		again := make(chan struct{})
		slow.mu.Lock()
		slow.write = func() error { <-again; return nil }
		slow.mu.Unlock()
		if _, err := l.Begin(t.Context(), unseal); !errors.Is(err, ErrNoSink) {
			t.Errorf("after the limit: %v", err)
		}
		close(again)
		must(t, l.Close())
		if got := slow.told(); got != "intent ok intent failed" {
			t.Errorf("the log says %q; an act that did not take place must be closed", got)
		}
	})
}

func TestACallerThatGoesAwayLeavesNoOpenIntent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		slow := &fakeSink{name: "slow", write: func() error { <-release; return nil }}
		l := open(t, Options{}, slow)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := l.Begin(ctx, unseal); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if _, err := l.Begin(ctx, unseal); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with a ctx that had ended: %v", err)
		}
		close(release)
		must(t, l.Close())
		if got := slow.told(); got != "intent failed" || !strings.Contains(fmt.Sprint(slow.lines[1]["error"]), "did not take place") {
			t.Errorf("the log says %q: %v", got, slow.lines)
		}
	})
}

func TestManyActsAtOneTimeCostFewWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sink := &fakeSink{name: "disk", write: func() error { <-time.After(5 * time.Millisecond); return nil }}
		l := open(t, Options{}, sink)
		var acts sync.WaitGroup
		for range 100 {
			acts.Go(func() {
				end, err := l.Begin(t.Context(), unseal)
				if err != nil {
					t.Error(err)
					return
				}
				end(nil)
			})
		}
		begun := time.Now()
		acts.Wait()
		if took := time.Since(begun); took > 50*time.Millisecond {
			t.Errorf("100 acts took %v", took)
		}
		must(t, l.Close())
		if len(sink.lines) != 200 || sink.writes > 10 {
			t.Errorf("%d lines in %d writes", len(sink.lines), sink.writes)
		}
	})
}

func TestAThousandActsAtOneTimeFindRoomInASinkThatIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const acts = 4000 // connections that a seal server has at one time
		sink := &fakeSink{name: "slow", write: func() error { <-time.After(5 * time.Millisecond); return nil }}
		l := open(t, Options{OutcomesLater: true}, sink)
		var all sync.WaitGroup
		for range acts {
			all.Go(func() {
				end, err := l.Begin(t.Context(), unseal)
				if err != nil {
					t.Error(err)
					return
				}
				end(nil)
			})
		}
		all.Wait()
		must(t, l.Close())
		if missed := l.Sinks()[0].Missed; missed > 0 || len(sink.lines) != 2*acts {
			t.Errorf("%d lines, %d missed", len(sink.lines), missed)
		}
	})
}

func TestAQueueThatIsFullMissesLinesInsteadOfWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		good, stuck := &fakeSink{name: "good"}, &fakeSink{name: "stuck", write: func() error { <-release; return nil }}
		l := open(t, Options{}, good, stuck)
		for range maxWaiting {
			end, err := l.Begin(t.Context(), unseal)
			must(t, err)
			end(nil)
		}
		if missed := l.Sinks()[1].Missed; missed == 0 {
			t.Error("nothing was missed")
		}
		close(release)
		must(t, l.Close())
		if len(good.lines) != 2*maxWaiting {
			t.Errorf("the good sink has %d lines", len(good.lines))
		}
		told := uint64(0)
		for _, line := range stuck.lines {
			if missed, ok := line["missed"].(map[string]any); ok {
				told += uint64(missed["lines"].(float64))
			}
		}
		status := l.Sinks()[1]
		if uint64(len(stuck.lines))+status.Missed != 2*maxWaiting {
			t.Errorf("%d lines and %d missed", len(stuck.lines), status.Missed)
		}
		if told > status.Missed {
			t.Errorf("told of %d missed, there are %d", told, status.Missed)
		}
	})
}

func TestACheckFindsOutBeforeAnActDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		gone := &fakeSink{name: "gone", reopen: syscall.ENOENT}
		l := open(t, Options{}, gone)
		if err := l.Check(t.Context()); !errors.Is(err, ErrNoSink) || !errors.Is(err, syscall.ENOENT) {
			t.Errorf("got %v", err)
		}
		if s := l.Sinks()[0]; !errors.Is(s.Err, syscall.ENOENT) || s.Missed != 0 {
			t.Errorf("status %+v", s)
		}
		gone.set(func() { gone.reopen = nil })
		must(t, l.Check(t.Context()))
		if s := l.Sinks()[0]; s.Err != nil || gone.told() != "" {
			t.Errorf("status %+v, lines %q", s, gone.told())
		}
		end, err := l.Begin(t.Context(), unseal)
		must(t, err)
		end(nil)
		if gone.lines[0]["missed"] != nil {
			t.Errorf("a check counts as a missed line: %v", gone.lines[0])
		}

		gone.set(func() { gone.write = func() error { <-release; return nil } })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err = l.Begin(ctx, unseal)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := l.Check(t.Context()); !errors.Is(err, errHangs) {
			t.Errorf("with a sink that hangs: %v", err)
		}
		<-time.After(time.Minute)
		if err := l.Check(t.Context()); !errors.Is(err, errHangs) {
			t.Errorf("with a sink that has hung for long: %v", err)
		}
		close(release)
		must(t, l.Close())
		if err := l.Check(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

func TestTheFormatOfLinesIsKept(t *testing.T) {
	at := time.Date(2026, 11, 22, 3, 4, 5, 678901234, time.FixedZone("", 3600))
	clock := func() time.Time { at = at.Add(1500 * time.Millisecond); return at }
	path := filepath.Join(t.TempDir(), "audit.log")
	sink, err := File(path)
	must(t, err)
	l := open(t, Options{Now: clock, Host: "vault-1", Program: "nitroseal 1.2.3"}, sink)
	end, err := l.Begin(t.Context(), unseal)
	must(t, err)
	end(nil)
	end, err = l.Begin(t.Context(), Act{
		Verb: "rekey", Cluster: "prod", By: "J\u00fcrgen \u202egro\x1b[31m as root",
		Detail: map[string]string{"generation": "7", "shares": "5 of <5> & \"more\""},
	})
	must(t, err)
	end(fmt.Errorf("storing the new keys: %w", syscall.ENOSPC))
	must(t, l.Close())

	written, err := os.ReadFile(path)
	must(t, err)
	got := string(written)
	for i, id := range ids(t, got) {
		got = strings.ReplaceAll(got, id, fmt.Sprintf("%016x", i+1))
	}
	got = strings.ReplaceAll(got, fmt.Sprintf(`"pid":%d`, os.Getpid()), `"pid":4711`)
	golden := filepath.Join("testdata", "audit.golden")
	if *update {
		must(t, os.WriteFile(golden, []byte(got), 0o644))
	}
	want, err := os.ReadFile(golden)
	must(t, err)
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("the format changed (-want +got):\n%s", diff)
	}
}

// ids returns the different ids in a log, in their order.
func ids(t *testing.T, log string) []string {
	t.Helper()
	var found []string
	for line := range strings.Lines(log) {
		var r record
		must(t, json.Unmarshal([]byte(line), &r))
		if len(found) == 0 || found[len(found)-1] != r.ID {
			found = append(found, r.ID)
		}
	}
	return found
}

func FuzzLinesArePrintableAndBounded(f *testing.F) {
	f.Add("unseal", "prod", "https://a:8200", "root on vault-1", "reason", "\x1b[2J", "cut off", uint64(3))
	f.Add(strings.Repeat("\x00", 9000), strings.Repeat("\U0001f511", 900), "\xff\xfe", strings.Repeat("<", 900),
		strings.Repeat("k", 100), strings.Repeat("\u202e", 300), strings.Repeat("\"", 9000), uint64(0))
	f.Fuzz(func(t *testing.T, verb, cluster, node, by, key, value, failure string, lost uint64) {
		detail := map[string]string{}
		for i := range 40 {
			detail[fmt.Sprint(i, key)] = value
		}
		r := record{
			Time: time.Unix(1, 0), ID: newID(), Event: EventOutcome, Verb: verb, Cluster: cluster, Node: node, By: by, Host: by, Program: verb,
			Detail: detail, Result: ResultFailed, Seconds: 1, Error: failure,
		}
		if lost > 0 {
			r.Missed = &missed{Lines: lost, Since: time.Unix(2, 0), Error: failure}
		}
		line, err := r.encode()
		must(t, err)
		if len(line) > MaxLine {
			t.Errorf("a line of %d bytes", len(line))
		}
		for i, b := range line {
			if last := i == len(line)-1; (b < ' ' || b > '~') && (!last || b != '\n') {
				t.Fatalf("byte %d is %q", i, b)
			}
		}
		var decoded record
		must(t, json.Unmarshal(line, &decoded))
		if len(verb) < maxText/6 && decoded.Verb != strings.ToValidUTF8(verb, "\ufffd") && !strings.Contains(verb, "\ufffd") {
			if []rune(decoded.Verb)[0] != []rune(verb)[0] {
				t.Errorf("the verb %q reads %q", verb, decoded.Verb)
			}
		}
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// elsewhere is a sink of which nobody can say whether it took a line.
type elsewhere struct{ *fakeSink }

func (elsewhere) Uncertain() bool { return true }

func TestACheckIsNotPleasedByACopy(t *testing.T) {
	gone, far := &fakeSink{name: "gone", reopen: syscall.ENOENT}, elsewhere{&fakeSink{name: "far"}}
	l := open(t, Options{}, gone, far)
	if err := l.Check(t.Context()); !errors.Is(err, ErrNoSink) {
		t.Errorf("only a copy would be taken: %v", err)
	}
	must(t, l.Close())
}

func TestACheckForgetsNotWhatWasMissed(t *testing.T) {
	full, other := &fakeSink{name: "full"}, &fakeSink{name: "other"}
	full.fails(syscall.ENOSPC)
	l := open(t, Options{}, full, other)
	end, err := l.Begin(t.Context(), unseal)
	must(t, err)
	end(nil)
	full.fails(nil)
	must(t, l.Check(t.Context()))
	end, err = l.Begin(t.Context(), unseal)
	must(t, err)
	end(nil)
	must(t, l.Close())
	if told, ok := full.lines[0]["missed"].(map[string]any); !ok || told["lines"] != 2.0 {
		t.Errorf("the next line tells %v", full.lines[0]["missed"])
	}
}
