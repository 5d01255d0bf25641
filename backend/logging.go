package backend

import (
	"context"
	"log/slog"
	"time"

	"github.com/hashicorp/go-hclog"
)

// NewLogger returns a slog.Logger that writes through hclog, the only way in which a plugin's log reaches Vault's. The
// rooms below know slog only.
func NewLogger(to hclog.Logger) *slog.Logger { return slog.New(&hclogHandler{to: to}) }

// hclogHandler is a slog.Handler. Groups become a prefix of the attribute's name: "device.serial".
type hclogHandler struct {
	to     hclog.Logger
	prefix string
}

func (h *hclogHandler) Enabled(_ context.Context, level slog.Level) bool {
	switch logLevel(level) {
	case hclog.Trace:
		return h.to.IsTrace()
	case hclog.Debug:
		return h.to.IsDebug()
	case hclog.Info:
		return h.to.IsInfo()
	case hclog.Warn:
		return h.to.IsWarn()
	default:
		return h.to.IsError()
	}
}

func (h *hclogHandler) Handle(_ context.Context, record slog.Record) error {
	args := make([]any, 0, 2*record.NumAttrs())
	record.Attrs(func(attr slog.Attr) bool {
		args = appendAttr(args, h.prefix, attr)
		return true
	})
	h.to.Log(logLevel(record.Level), record.Message, args...)
	return nil
}

func (h *hclogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var args []any
	for _, attr := range attrs {
		args = appendAttr(args, h.prefix, attr)
	}
	return &hclogHandler{to: h.to.With(args...), prefix: h.prefix}
}

func (h *hclogHandler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return &hclogHandler{to: h.to, prefix: h.prefix + name + "."}
}

func appendAttr(args []any, prefix string, attr slog.Attr) []any {
	value := attr.Value.Resolve()
	switch {
	case attr.Equal(slog.Attr{}):
		return args
	case value.Kind() == slog.KindGroup:
		if attr.Key != "" {
			prefix += attr.Key + "."
		}
		for _, member := range value.Group() {
			args = appendAttr(args, prefix, member)
		}
		return args
	}
	held := value.Any()
	switch typed := held.(type) { // hclog writes JSON, and that knows neither
	case error:
		held = typed.Error()
	case time.Duration:
		held = typed.String()
	}
	return append(args, prefix+attr.Key, held)
}

func logLevel(level slog.Level) hclog.Level {
	switch {
	case level < slog.LevelDebug:
		return hclog.Trace
	case level < slog.LevelInfo:
		return hclog.Debug
	case level < slog.LevelWarn:
		return hclog.Info
	case level < slog.LevelError:
		return hclog.Warn
	default:
		return hclog.Error
	}
}
