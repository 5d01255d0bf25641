package backend

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
)

func statusAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"usable":        {Type: framework.TypeBool, Description: "Whether the device can be used now.", Required: true},
		"error":         {Type: framework.TypeString, Description: "Why it cannot be used; empty where it can."},
		"state":         {Type: framework.TypeString, Description: "operational, locked, unprovisioned, absent or failed; empty where nothing answers."},
		"vendor":        {Type: framework.TypeString, Description: "The maker of the HSM."},
		"model":         {Type: framework.TypeString, Description: "Its model."},
		"serial":        {Type: framework.TypeString, Description: "Its serial number."},
		"label":         {Type: framework.TypeString, Description: "The label of the token."},
		"firmware":      {Type: framework.TypeString, Description: "Its firmware version."},
		"pin_count_low": {Type: framework.TypeBool, Description: "A wrong PIN was sent since the last right one."},
		"pin_final_try": {Type: framework.TypeBool, Description: "The next wrong PIN locks the token."},
		"pin_locked":    {Type: framework.TypeBool, Description: "The PIN is locked; the SO PIN unlocks it."},
		"keys":          {Type: framework.TypeInt, Description: "How many key pairs were found."},
		"round_trip_ms": {Type: framework.TypeFloat, Description: "How long one private-key operation took; 0 where none could be tried."},
		"mechanisms":    {Type: framework.TypeStringSlice, Description: "What the HSM can do, in its provider's words."},
		"notes":         {Type: framework.TypeStringSlice, Description: "What an operator should know."},
		"nodes": {
			Type: framework.TypeSlice,
			Description: "Each node of a NetHSM: url, state, serial and firmware where the user may ask for them, round_trip_ms of the " +
				"question, certificate_ends (RFC 3339), resting while requests avoid it, and error where it cannot serve.",
		},
		"checked": {Type: framework.TypeString, Description: "When this was found out, RFC 3339.", Required: true},
	}
}

func (b *backend) deviceStatus(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	_, handle, err := b.knownDevice(ctx, data)
	if errors.Is(err, device.ErrConfig) {
		return &logical.Response{Data: showStatus(device.Status{Err: err, Checked: time.Now()})}, nil
	}
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: showStatus(handle.Status(ctx))}, nil
}

func showStatus(status device.Status) map[string]any {
	shown := map[string]any{
		"usable":        status.Err == nil,
		"error":         "",
		"state":         string(status.Info.State),
		"vendor":        status.Info.Vendor,
		"model":         status.Info.Model,
		"serial":        status.Info.Serial,
		"label":         status.Info.Label,
		"firmware":      status.Info.Firmware,
		"pin_count_low": status.Info.PIN.CountLow,
		"pin_final_try": status.Info.PIN.FinalTry,
		"pin_locked":    status.Info.PIN.Locked,
		"keys":          len(status.Keys),
		"round_trip_ms": float64(status.RoundTrip) / float64(time.Millisecond),
		"mechanisms":    present(status.Info.Mechanisms),
		"notes":         present(status.Info.Notes),
		"checked":       stamp(status.Checked),
	}
	if status.Err != nil {
		shown["error"] = status.Err.Error()
	}
	if status.Nodes != nil {
		shown["nodes"] = showNodes(status.Nodes)
	}
	return shown
}

func showNodes(nodes []hsm.Node) []map[string]any {
	shown := make([]map[string]any, len(nodes))
	for i, node := range nodes {
		shown[i] = map[string]any{
			"url": node.URL, "state": string(node.State), "serial": node.Serial, "firmware": node.Firmware,
			"round_trip_ms":    float64(node.RoundTrip) / float64(time.Millisecond),
			"certificate_ends": stamp(node.CertificateEnds), "resting": node.Resting, "error": "",
		}
		if node.Err != nil {
			shown[i]["error"] = node.Err.Error()
		}
	}
	return shown
}

func (b *backend) deviceKeys(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name, _, err := b.knownDevice(ctx, data)
	if err != nil {
		return nil, err
	}
	opened, err := b.Device(ctx, name)
	if err != nil {
		return nil, err
	}
	keys, err := opened.FindKeys(ctx, hsm.KeyQuery{})
	if err != nil {
		return nil, fmt.Errorf("listing the keys on device %q: %w", name, err)
	}
	seen := map[string]int{}
	for _, key := range keys {
		seen[key.Ref().ID]++
	}
	var names []string
	info := map[string]any{}
	for _, key := range keys {
		ref, traits := key.Ref(), key.Traits()
		listed := ref.ID
		if listed == "" || seen[listed] > 1 {
			listed = ref.Fingerprint
		}
		names = append(names, listed)
		info[listed] = map[string]any{
			"key_label": ref.Label, "key_id": ref.ID, "fingerprint": ref.Fingerprint,
			"sensitive": traits.Sensitive, "extractable": traits.Extractable, "also_usable_for": present(traits.AlsoUsableFor),
		}
	}
	slices.Sort(names)
	return logical.ListResponseWithInfo(names, info), nil
}
