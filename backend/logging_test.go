package backend

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
)

func TestLogLinesReachHclogWithTheirAttributes(t *testing.T) {
	var out bytes.Buffer
	logger := NewLogger(hclog.New(&hclog.LoggerOptions{Output: &out, Level: hclog.Info, JSONFormat: true, DisableTime: true}))

	logger.Debug("below the level")
	if out.Len() != 0 {
		t.Fatalf("a debug line was written at level info: %s", out.String())
	}
	logger.With("device", "card").WithGroup("token").LogAttrs(t.Context(), slog.LevelWarn, "reading the token",
		slog.String("serial", "DENK01"), slog.Group("pin", slog.Int("tries", 3)), slog.Duration("took", time.Second),
		slog.Any("error", errors.New("gone")), slog.Attr{})

	var got map[string]any
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("the line is no JSON: %v: %s", err, out.String())
	}
	delete(got, "@timestamp")
	want := map[string]any{
		"@level": "warn", "@message": "reading the token", "device": "card",
		"token.serial": "DENK01", "token.pin.tries": float64(3), "token.error": "gone", "token.took": "1s",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("line (-want +got):\n%s", diff)
	}
}

func TestLogLevelsAreThoseOfHclog(t *testing.T) {
	for level, want := range map[slog.Level]hclog.Level{
		slog.LevelDebug - 4: hclog.Trace,
		slog.LevelDebug:     hclog.Debug,
		slog.LevelInfo:      hclog.Info,
		slog.LevelWarn:      hclog.Warn,
		slog.LevelError:     hclog.Error,
		slog.LevelError + 4: hclog.Error,
	} {
		logger := hclog.New(&hclog.LoggerOptions{Level: want, Output: &bytes.Buffer{}})
		if got := logLevel(level); got != want {
			t.Errorf("logLevel(%v) = %v, want %v", level, got, want)
		}
		if !NewLogger(logger).Enabled(context.Background(), level) {
			t.Errorf("a logger of level %v does not write %v", want, level)
		}
	}
}
