package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
)

func newDeviceStatusCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "status [NAME …]",
		Short: "Ask devices how they fare",
		Long: `Ask the named devices, or all, how they fare. Each is asked for what it tells of itself, its keys are listed, and one
private-key operation is tried, because nothing else proves that it works. That means a log-in with the PIN; one that is
known to be wrong is not sent.

The exit code is that of the first device that cannot be used.`,
		Example:           "  nitroseal device status\n  nitroseal device status stick --output json",
		ValidArgsFunction: a.completeDevices,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.config()
			if err != nil {
				return err
			}
			if len(args) == 0 {
				for _, d := range c.Devices {
					args = append(args, d.Name)
				}
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			all, err := a.statuses(ctx, args)
			if err != nil {
				return err
			}
			view := deviceStatusView{Devices: []statusView{}}
			var troubles []error
			for i, status := range all {
				d, _ := c.Device(args[i])
				view.Devices = append(view.Devices, showStatus(d.Name, d.Type, status))
				if status.Err != nil {
					troubles = append(troubles, fmt.Errorf("device %q: %w", d.Name, status.Err))
				}
			}
			printing := a.print(view, func(t *table) {
				for i, d := range view.Devices {
					if i > 0 {
						t.row()
					}
					d.rows(t)
				}
			})
			return errors.Join(append([]error{printing}, troubles...)...)
		},
	}
}

// statuses asks devices, all at a time.
func (a *app) statuses(ctx context.Context, names []string) ([]device.Status, error) {
	set, err := a.devices()
	if err != nil {
		return nil, err
	}
	all := make([]device.Status, len(names))
	var asked sync.WaitGroup
	for i, name := range names {
		if _, err := a.deviceConfig(name); err != nil {
			return nil, err
		}
		handle, err := set.handle(name)
		if err != nil {
			all[i] = device.Status{Err: err, Checked: time.Now()}
			continue
		}
		asked.Go(func() { all[i] = handle.Status(ctx) })
	}
	asked.Wait()
	return all, nil
}

type deviceStatusView struct {
	Devices []statusView `json:"devices"`
}

// statusView is how a device fares. Its members are those of the plugin's devices/:name/status.
type statusView struct {
	Name        string     `json:"name"`
	Type        string     `json:"type"`
	Usable      bool       `json:"usable"`
	Error       string     `json:"error"`
	State       string     `json:"state"`
	Vendor      string     `json:"vendor"`
	Model       string     `json:"model"`
	Serial      string     `json:"serial"`
	Label       string     `json:"label"`
	Firmware    string     `json:"firmware"`
	PINCountLow bool       `json:"pin_count_low"`
	PINFinalTry bool       `json:"pin_final_try"`
	PINLocked   bool       `json:"pin_locked"`
	Keys        int        `json:"keys"`
	RoundTripMS float64    `json:"round_trip_ms"`
	Mechanisms  []string   `json:"mechanisms"`
	Notes       []string   `json:"notes"`
	Nodes       []nodeView `json:"nodes"`
	Checked     string     `json:"checked"`
}

// nodeView is a node of a NetHSM.
type nodeView struct {
	URL             string  `json:"url"`
	State           string  `json:"state"`
	Serial          string  `json:"serial"`
	Firmware        string  `json:"firmware"`
	RoundTripMS     float64 `json:"round_trip_ms"`
	CertificateEnds string  `json:"certificate_ends"`
	Resting         bool    `json:"resting"`
	Error           string  `json:"error"`
}

func showStatus(name, kind string, status device.Status) statusView {
	info := status.Info
	view := statusView{
		Name: name, Type: kind, Usable: status.Err == nil, Error: text(status.Err), State: string(info.State),
		Vendor: info.Vendor, Model: info.Model, Serial: info.Serial, Label: info.Label, Firmware: info.Firmware,
		PINCountLow: info.PIN.CountLow, PINFinalTry: info.PIN.FinalTry, PINLocked: info.PIN.Locked,
		Keys: len(status.Keys), RoundTripMS: milliseconds(status.RoundTrip),
		Mechanisms: list(info.Mechanisms), Notes: list(info.Notes), Nodes: showNodes(status.Nodes), Checked: stamp(status.Checked),
	}
	return view
}

func showNodes(nodes []hsm.Node) []nodeView {
	shown := []nodeView{}
	for _, n := range nodes {
		shown = append(shown, nodeView{
			URL: n.URL, State: string(n.State), Serial: n.Serial, Firmware: n.Firmware, RoundTripMS: milliseconds(n.RoundTrip),
			CertificateEnds: stamp(n.CertificateEnds), Resting: n.Resting, Error: text(n.Err),
		})
	}
	return shown
}

func (v statusView) rows(t *table) {
	usable := "usable"
	if !v.Usable {
		usable = "NOT USABLE"
	}
	t.row(v.Name, usable)
	t.field("  state", v.State)
	t.field("  hsm", strings.Join(strings.Fields(v.Vendor+" "+v.Model), " "))
	t.field("  serial", v.Serial)
	t.field("  label", v.Label)
	t.field("  firmware", v.Firmware)
	switch {
	case v.PINLocked:
		t.row("  pin", "locked; the SO PIN unlocks it")
	case v.PINFinalTry:
		t.row("  pin", "one try left: the next wrong PIN locks the token")
	case v.PINCountLow:
		t.row("  pin", "a wrong PIN was sent since the last right one")
	}
	if v.Usable {
		t.row("  keys", v.Keys)
	}
	if v.RoundTripMS > 0 {
		t.row("  round trip", fmt.Sprintf("%.1f ms", v.RoundTripMS))
	}
	for _, n := range v.Nodes {
		state := n.State
		if n.Resting {
			state += ", resting"
		}
		if n.CertificateEnds != "" {
			state += ", certificate ends " + n.CertificateEnds
		}
		t.row("  node "+n.URL, state)
		t.field("    error", n.Error)
	}
	for _, note := range v.Notes {
		t.row("  note", note)
	}
	t.field("  error", v.Error)
}

// text is an error's, empty for none.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
