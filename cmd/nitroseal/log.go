package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// personLog is a log for people: "nitroseal: warning: the message (device one, …)" on stderr. What the rooms below log at
// other levels is for servers, but for the steps of a long verb ([app.steps]). What was told of one cause is not told again. Warnings wait a moment for the end of the command: where it fails, those that its error
// repeats would only be in the way of it, and where it goes on a person wants to know what is waited for.
type personLog struct {
	app   *app
	waits *waitingWarnings
	attrs []slog.Attr
}

// waitingWarnings are warnings until the end of the command, or until the first has waited for warningWait.
type waitingWarnings struct {
	mu   sync.Mutex
	all  []warning
	late *time.Timer // nil where nothing waits
	told map[warning]bool
}

// again tells whether a message was told before in this run: of the same cause, or in the same words where it names none.
func (w *waitingWarnings) again(message, line, cause string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	told := warning{line, ""}
	if cause != "" {
		told = warning{message, cause}
	}
	if w.told == nil {
		w.told = map[warning]bool{}
	}
	before := w.told[told]
	w.told[told] = true
	return before
}

const warningWait = 3 * time.Second

// warning is a line, and the text of the error that it tells of; empty for none.
type warning struct{ line, cause string }

// flush prints what waits, but for what the command's own error says.
func (w *waitingWarnings) flush(a *app, failure error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.late != nil {
		w.late.Stop()
		w.late = nil
	}
	for _, waiting := range w.all {
		if waiting.cause == "" || !strings.Contains(text(failure), waiting.cause) {
			a.say("%s", waiting.line)
		}
	}
	w.all = nil
}

// Enabled implements [slog.Handler].
func (l personLog) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn || level >= slog.LevelInfo && l.app.steps
}

// Handle implements [slog.Handler].
func (l personLog) Handle(_ context.Context, record slog.Record) error {
	attrs := l.attrs
	record.Attrs(func(attr slog.Attr) bool {
		attrs = append(attrs[:len(attrs):len(attrs)], attr)
		return true
	})
	var details []string
	cause := ""
	for _, attr := range attrs {
		details = append(details, fmt.Sprintf("%s %v", attr.Key, attr.Value))
		if attr.Key == "error" || attr.Key == "cause" {
			cause = attr.Value.String()
		}
	}
	line := record.Message
	if details != nil {
		line += " (" + strings.Join(details, ", ") + ")"
	}
	switch {
	case record.Level < slog.LevelWarn:
		l.app.say("%s", line)
		return nil
	case l.waits.again(record.Message, line, cause):
		return nil
	case record.Level >= slog.LevelError:
		l.app.say("nitroseal: error: %s", line)
		return nil
	}
	l.waits.mu.Lock()
	defer l.waits.mu.Unlock()
	l.waits.all = append(l.waits.all, warning{"nitroseal: warning: " + line, cause})
	if l.waits.late == nil {
		l.waits.late = time.AfterFunc(warningWait, func() { l.waits.flush(l.app, nil) })
	}
	return nil
}

// WithAttrs implements [slog.Handler].
func (l personLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	l.attrs = append(l.attrs[:len(l.attrs):len(l.attrs)], attrs...)
	return l
}

// WithGroup implements [slog.Handler]. Groups say nothing to people.
func (l personLog) WithGroup(string) slog.Handler { return l }
