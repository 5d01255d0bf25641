package monitor

import (
	"context"
	"fmt"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
)

// Notifier tells systemd how the process fares (sd_notify(3)). Where systemd did not start it, nothing happens, and an error
// is nobody's business: the unit's own time limits find out.
type Notifier struct {
	Send     func(state string)
	Interval time.Duration // of the watchdog, 0 for none
}

// NewNotifier returns the notifier of this process.
func NewNotifier() *Notifier {
	interval, err := systemd.SdWatchdogEnabled(false)
	if err != nil {
		interval = 0
	}
	return &Notifier{Interval: interval, Send: func(state string) { _, _ = systemd.SdNotify(false, state) }}
}

// Ready says that the work has begun, with one line for "systemctl status".
func (n *Notifier) Ready(status string) { n.Send(systemd.SdNotifyReady + "\nSTATUS=" + status) }

// Reloading is what Type=notify-reload waits for after its SIGHUP.
func (n *Notifier) Reloading() {
	n.Send(systemd.SdNotifyReloading + "\n" + systemd.SdNotifyMonotonicUsec())
}

// Stopping says that the process ends.
func (n *Notifier) Stopping() { n.Send(systemd.SdNotifyStopping) }

// Extend asks for more time to stop.
func (n *Notifier) Extend() {
	n.Send(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (30 * time.Second).Microseconds()))
}

// Watchdog tells systemd twice in its interval that the loops turn, for as long as they do.
func (n *Notifier) Watchdog(ctx context.Context, healthy func() error) {
	if n.Interval == 0 {
		return
	}
	for Sleep(ctx, n.Interval/2) {
		if err := healthy(); err != nil {
			n.Send("STATUS=" + err.Error())
			continue
		}
		n.Send(systemd.SdNotifyWatchdog)
	}
}
