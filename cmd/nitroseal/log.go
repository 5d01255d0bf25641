package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
)

// personLog is a log for people: warnings and errors on stderr, "nitroseal: warning: the message (device one, …)". What the
// rooms below log at other levels is for servers.
type personLog struct {
	app   *app
	attrs []slog.Attr
}

// Enabled implements [slog.Handler].
func (l personLog) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }

// Handle implements [slog.Handler].
func (l personLog) Handle(_ context.Context, record slog.Record) error {
	attrs := l.attrs
	record.Attrs(func(attr slog.Attr) bool {
		attrs = append(attrs[:len(attrs):len(attrs)], attr)
		return true
	})
	var details []string
	for _, attr := range attrs {
		details = append(details, fmt.Sprintf("%s %v", attr.Key, attr.Value))
	}
	kind, text := "warning", record.Message
	if record.Level >= slog.LevelError {
		kind = "error"
	}
	if details != nil {
		text += " (" + strings.Join(details, ", ") + ")"
	}
	l.app.say("nitroseal: %s: %s", kind, text)
	return nil
}

// WithAttrs implements [slog.Handler].
func (l personLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	l.attrs = append(l.attrs[:len(l.attrs):len(l.attrs)], attrs...)
	return l
}

// WithGroup implements [slog.Handler]. Groups say nothing to people.
func (l personLog) WithGroup(string) slog.Handler { return l }
