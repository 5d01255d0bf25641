package daemon

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// notes decide what of a watch is worth a line in the log: every change once, and no complaint over and over.
type notes struct {
	condition string // as it was last told
	complaint string // as it was last told, "" for none since the node was well
	note      string // what it waits for
	alarm     Alarm
	told      time.Time
	once      *sync.Map // of a run that ends: the alarms of clusters that it has told of; nil for the daemon
}

// looked tells of a look.
func (n *notes) looked(logger *slog.Logger, v view) {
	condition := v.condition()
	changed := condition != n.condition
	first := n.condition == ""
	n.condition = condition
	switch {
	case !v.up:
		n.complain(logger, "the node does not answer", v, v.err, changed)
	case !changed:
	case v.well() && first:
		logger.Info("the node is unsealed", "version", v.state.Version)
	case v.well():
		logger.Info("the node is unsealed now", "version", v.state.Version)
	case !v.state.Initialized:
		logger.Info("the node is not initialised")
	default:
		logger.Info("the node is sealed")
	}
	if changed && v.well() {
		n.complaint, n.alarm = "", AlarmNone
	}
}

// tended tells of an act.
func (n *notes) tended(logger *slog.Logger, v view, r Result) {
	switch {
	case r.Unsealed:
		logger.Debug("unsealed the node") // the custodian says so, too
		n.condition, n.complaint, n.alarm = v.condition(), "", AlarmNone
	case r.Err != nil && v.alarm != AlarmNone:
		if v.alarm == n.alarm && r.Err.Error() == n.complaint {
			return
		}
		n.alarm, n.complaint, n.told = v.alarm, r.Err.Error(), time.Now()
		if n.once != nil {
			if _, before := n.once.LoadOrStore([2]string{v.cluster, string(v.alarm)}, true); !before {
				logger.Warn("only a person can mend this", "alarm", string(v.alarm), "cause", r.Err)
			}
			break
		}
		logger.Error("a person is needed: the node is not touched again before the configuration is read anew (SIGHUP), "+
			"the material changes, or a while has passed", "alarm", string(v.alarm), "wait", barTime, "cause", r.Err)
	case r.Err == nil && r.Note != "" && r.Note != n.note:
		logger.Info("the node waits", "for", r.Note)
	case r.Err != nil:
		n.complain(logger, "the node could not be tended", v, r.Err, false)
	}
	n.note = r.Note
}

// complain logs an error, once for as long as it reads the same, and not every time where it reads differently each time.
func (n *notes) complain(logger *slog.Logger, message string, v view, err error, changed bool) {
	text := err.Error()
	now := time.Now()
	if text == n.complaint || (!changed && n.complaint != "" && now.Sub(n.told) < silence) {
		return
	}
	n.complaint, n.told = text, now
	level := slog.LevelWarn
	switch {
	case v.alarm != AlarmNone, errors.Is(err, cluster.ErrEmpty), errors.Is(err, cluster.ErrHeld):
		level = slog.LevelError
	case errors.Is(err, cluster.ErrNotInitialized), errors.Is(err, cluster.ErrBusy), errors.Is(err, node.ErrInProgress):
		level = slog.LevelInfo
	}
	logger.Log(context.Background(), level, message, "cause", err)
}
