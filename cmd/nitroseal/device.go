package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
)

func newDeviceCommand(a *app) *cobra.Command {
	return group("device", "Look after HSMs", "Devices are the HSMs that the configuration names: PKCS#11 tokens, a Nitrokey HSM 2 for example, and NetHSMs.",
		newDeviceListCommand(a), newDeviceStatusCommand(a), newDeviceKeysCommand(a), newDeviceUnlockCommand(a), newDeviceLockCommand(a),
		newDeviceRandomCommand(a), newDevicePINCommand(a))
}

func newDeviceListCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the devices of the configuration",
		Long:  "List the devices of the configuration. No HSM is asked: \"nitroseal device status\" does that.",
		Args:  noArguments,
		RunE: func(*cobra.Command, []string) error {
			c, err := a.config()
			if err != nil {
				return err
			}
			view := deviceListView{Devices: []deviceView{}}
			for _, d := range c.Devices {
				view.Devices = append(view.Devices, deviceView{Name: d.Name, Type: d.Type, Where: where(d)})
			}
			return a.print(view, func(t *table) {
				t.row("NAME", "TYPE", "WHERE")
				for _, d := range view.Devices {
					t.row(d.Name, d.Type, d.Where)
				}
			})
		},
	}
}

type deviceListView struct {
	Devices []deviceView `json:"devices"`
}

type deviceView struct {
	Name  string `json:"name"`
	Type  string `json:"type"`
	Where string `json:"where"`
}

// where says how a device is found.
func where(d config.Device) string {
	switch {
	case d.Type == device.TypeNetHSM:
		return strings.Join(d.URLs, " ")
	case d.Serial != "":
		return "serial " + d.Serial
	case d.TokenLabel != "":
		return "token " + d.TokenLabel
	case d.Slot != nil:
		return fmt.Sprintf("slot %d", *d.Slot)
	}
	return ""
}
