package main

import (
	"crypto"
	"crypto/ecdh"
	"crypto/rsa"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
)

func newDeviceKeysCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "keys NAME",
		Short:             "List the key pairs on a device",
		Example:           "  nitroseal device keys stick",
		Args:              arguments("NAME"),
		ValidArgsFunction: a.completeDevice,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			device, err := a.device(ctx, args[0])
			if err != nil {
				return err
			}
			keys, err := device.FindKeys(ctx, hsm.KeyQuery{})
			if err != nil {
				return fmt.Errorf("device %q: listing its keys: %w", args[0], err)
			}
			view := deviceKeysView{Device: args[0], Keys: []deviceKeyView{}}
			for _, key := range keys {
				view.Keys = append(view.Keys, showDeviceKey(key))
			}
			return a.print(view, func(t *table) {
				t.row("LABEL", "ID", "KIND", "FINGERPRINT", "REMARKS")
				for _, k := range view.Keys {
					t.row(k.Label, k.ID, k.Kind, k.Fingerprint, k.remarks())
				}
			})
		},
	}
}

type deviceKeysView struct {
	Device string          `json:"device"`
	Keys   []deviceKeyView `json:"keys"`
}

// deviceKeyView is a key pair on an HSM.
type deviceKeyView struct {
	Label         string   `json:"label"`
	ID            string   `json:"id"`
	Kind          string   `json:"kind"` // rsa-2048, ecdh-p256, …; empty for one that we cannot use
	Fingerprint   string   `json:"fingerprint"`
	Sensitive     bool     `json:"sensitive"`
	Extractable   bool     `json:"extractable"`
	AlsoUsableFor []string `json:"also_usable_for"`
}

func showDeviceKey(key hsm.Key) deviceKeyView {
	ref, traits := key.Ref(), key.Traits()
	return deviceKeyView{
		Label: ref.Label, ID: ref.ID, Kind: kindOf(key.Public()), Fingerprint: ref.Fingerprint,
		Sensitive: traits.Sensitive, Extractable: traits.Extractable, AlsoUsableFor: list(traits.AlsoUsableFor),
	}
}

func kindOf(public crypto.PublicKey) string {
	switch key := public.(type) {
	case *rsa.PublicKey:
		return fmt.Sprintf("rsa-%d", key.N.BitLen())
	case *ecdh.PublicKey:
		return "ecdh-" + strings.ToLower(strings.ReplaceAll(fmt.Sprint(key.Curve()), "-", ""))
	}
	return ""
}

func (v deviceKeyView) remarks() string {
	var all []string
	if v.Extractable {
		all = append(all, "extractable")
	}
	if !v.Sensitive {
		all = append(all, "not sensitive")
	}
	if len(v.AlsoUsableFor) > 0 {
		all = append(all, "also for "+strings.Join(v.AlsoUsableFor, ", "))
	}
	return strings.Join(all, "; ")
}
