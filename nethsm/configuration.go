package nethsm

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"
)

// All of the configuration is for an Administrator of the root namespace. But for the backup passphrase and the cluster's CA
// it is of one node.

// UnattendedBoot tells whether a node starts without its unlock passphrase.
func (c *Client) UnattendedBoot(ctx context.Context) (bool, error) {
	var got struct {
		Status string `json:"status"`
	}
	err := c.doAlone(ctx, call{
		op: "asking for unattended boot", method: http.MethodGet, path: "/config/unattended-boot",
		into: wanting(&got, func() error {
			if got.Status != "on" && got.Status != "off" {
				return errors.New("the member status is neither on nor off")
			}
			return nil
		}),
	})
	return got.Status == "on", err
}

// SetUnattendedBoot lets a node start without its unlock passphrase, or not. With it, whoever has the node and its device
// key has the keys.
func (c *Client) SetUnattendedBoot(ctx context.Context, on bool) error {
	status := "off"
	if on {
		status = "on"
	}
	return c.doAlone(ctx, call{
		op: "turning unattended boot " + status, method: http.MethodPut, path: "/config/unattended-boot", creates: true,
		body: struct {
			Status string `json:"status"`
		}{status},
	})
}

// SetUnlockPassphrase changes the unlock passphrase of a node. A wrong current one is an [*hsm.PINError].
func (c *Client) SetUnlockPassphrase(ctx context.Context, current, changed []byte) error {
	one, err := c.alone("changing the unlock passphrase")
	if err != nil {
		return err
	}
	return one.changePassphrase(ctx, "unlock passphrase", "/config/unlock-passphrase", current, changed)
}

// SetBackupPassphrase changes the passphrase that backups are encrypted with, for all nodes. The first time, current is
// empty. A wrong current one is an [*hsm.PINError].
func (c *Client) SetBackupPassphrase(ctx context.Context, current, changed []byte) error {
	return c.changePassphrase(ctx, "backup passphrase", "/config/backup-passphrase", current, changed)
}

func (c *Client) changePassphrase(ctx context.Context, what, path string, current, changed []byte) error {
	op := "changing the " + what
	if err := checkPassphrase(op, "the new "+what, changed); err != nil {
		return err
	}
	if err := checkCurrent(op, "the current "+what, current); err != nil {
		return err
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPut, path: path, timeout: slowly, creates: true,
		body: struct {
			New     secret `json:"newPassphrase"`
			Current secret `json:"currentPassphrase"`
		}{secret(changed), secret(current)},
	})
	return wrongPassphrase(err, "current "+what, false)
}

// Time reads a node's clock.
func (c *Client) Time(ctx context.Context) (time.Time, error) {
	var got struct {
		Time time.Time `json:"time"`
	}
	err := c.doAlone(ctx, call{
		op: "reading the clock", method: http.MethodGet, path: "/config/time",
		into: wanting(&got, func() error {
			if got.Time.IsZero() {
				return errors.New("the member time is missing")
			}
			return nil
		}),
	})
	return got.Time, err
}

// SetTime sets a node's clock, to the second.
func (c *Client) SetTime(ctx context.Context, now time.Time) error {
	return c.doAlone(ctx, call{
		op: "setting the clock", method: http.MethodPut, path: "/config/time", creates: true,
		body: struct {
			Time string `json:"time"`
		}{timestamp(now)},
	})
}

// LogLevel is how much a node logs.
type LogLevel string

// The log levels.
const (
	LogDebug   LogLevel = "debug"
	LogInfo    LogLevel = "info"
	LogWarning LogLevel = "warning"
	LogError   LogLevel = "error"
)

// Logging is where a node sends its log, by syslog. The address 0.0.0.0 means nowhere.
type Logging struct {
	Address netip.Addr `json:"ipAddress"`
	Port    uint16     `json:"port"`
	Level   LogLevel   `json:"logLevel"`
}

// Logging reads where a node sends its log.
func (c *Client) Logging(ctx context.Context) (Logging, error) {
	var got Logging
	err := c.doAlone(ctx, call{
		op: "reading the logging configuration", method: http.MethodGet, path: "/config/logging",
		into: wanting(&got, func() error { return present("logLevel", got.Level) }),
	})
	return got, err
}

// SetLogging sets where a node sends its log.
func (c *Client) SetLogging(ctx context.Context, logging Logging) error {
	const op = "setting the logging configuration"
	if err := checkIPv4(op, logging.Address); err != nil {
		return err
	}
	return c.doAlone(ctx, call{
		op: op, method: http.MethodPut, path: "/config/logging", creates: true, body: logging,
	})
}

// Network is how an appliance is reached.
type Network struct {
	Address netip.Addr `json:"ipAddress"` // IPv4
	Netmask netip.Addr `json:"netmask"`
	Gateway netip.Addr `json:"gateway"` // 0.0.0.0: none
	IPv6    *IPv6      `json:"ipv6,omitempty"`
}

// IPv6 is the IPv6 part of [Network].
type IPv6 struct {
	Prefix  netip.Prefix `json:"cidr"`    // the address with the length of its network
	Gateway *netip.Addr  `json:"gateway"` // nil: none
}

// Network reads how an appliance is reached. A container gives [ErrContainer].
func (c *Client) Network(ctx context.Context) (Network, error) {
	var got Network
	err := c.doAppliance(ctx, call{
		op: "reading the network configuration", method: http.MethodGet, path: "/config/network",
		into: wanting(&got, func() error {
			if !got.Address.IsValid() {
				return errors.New("the member ipAddress is missing")
			}
			return nil
		}),
	})
	return got, err
}

// SetNetwork sets how an appliance is reached. Its answer may be lost with the old address: [hsm.ErrMayHaveHappened]. A
// container gives [ErrContainer].
func (c *Client) SetNetwork(ctx context.Context, network Network) error {
	const op = "setting the network configuration"
	if err := checkIPv4(op, network.Address, network.Netmask, network.Gateway); err != nil {
		return err
	}
	if network.IPv6 != nil && !network.IPv6.Prefix.Addr().Is6() {
		return fmt.Errorf("%s: %w: the IPv6 address is none", op, ErrRequest)
	}
	return c.doAppliance(ctx, call{op: op, method: http.MethodPut, path: "/config/network", body: network, creates: true})
}

func checkIPv4(op string, addresses ...netip.Addr) error {
	for _, address := range addresses {
		if !address.Is4() {
			return fmt.Errorf("%s: %w: %v is not an IPv4 address", op, ErrRequest, address)
		}
	}
	return nil
}
