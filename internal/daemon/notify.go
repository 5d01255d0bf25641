package daemon

import (
	"context"
	"fmt"
	"time"

	systemd "github.com/coreos/go-systemd/v22/daemon"
)

// notifier tells systemd how the daemon fares (sd_notify(3)). Where systemd did not start it, nothing happens, and an error
// is nobody's business: the unit's own time limits find out.
type notifier struct {
	send     func(state string)
	interval time.Duration // of the watchdog, 0 for none
}

func newNotifier() *notifier {
	interval, err := systemd.SdWatchdogEnabled(false)
	if err != nil {
		interval = 0
	}
	return &notifier{interval: interval, send: func(state string) { _, _ = systemd.SdNotify(false, state) }}
}

func (n *notifier) ready(status string) { n.send(systemd.SdNotifyReady + "\nSTATUS=" + status) }

// reloading is what Type=notify-reload waits for after its SIGHUP.
func (n *notifier) reloading() {
	n.send(systemd.SdNotifyReloading + "\n" + systemd.SdNotifyMonotonicUsec())
}

func (n *notifier) stopping() { n.send(systemd.SdNotifyStopping) }

// extend asks for more time to stop.
func (n *notifier) extend() {
	n.send(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (30 * time.Second).Microseconds()))
}

// watchdog tells systemd twice in its interval that the loops turn, for as long as they do.
func (n *notifier) watchdog(ctx context.Context, healthy func() error) {
	if n.interval == 0 {
		return
	}
	for sleep(ctx, n.interval/2) {
		if err := healthy(); err != nil {
			n.send("STATUS=" + err.Error())
			continue
		}
		n.send(systemd.SdNotifyWatchdog)
	}
}
