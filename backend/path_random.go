package backend

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
)

// maxRandom is what hsm.Randomer gives at one time, in bytes.
const maxRandom = 1024

func (b *backend) randomPaths() []*framework.Path {
	return []*framework.Path{{
		Pattern: "random",
		Fields: map[string]*framework.FieldSchema{
			"device": {Type: framework.TypeString, Description: "The device; may be left out where the mount has only one."},
			"bytes":  {Type: framework.TypeInt, Description: "How many bytes, 1 to 1024.", Default: 32},
			"format": {
				Type: framework.TypeString, Description: "How they are written.", Default: "base64",
				AllowedValues: []any{"base64", "hex"},
			},
		},
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "random"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback:     b.random,
				Summary:      "Get random bytes from an HSM's generator.",
				DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "generate"},
				Responses: answer(http.StatusOK, "The bytes.", map[string]*framework.FieldSchema{
					"random_bytes": {
						Type: framework.TypeString, Description: "The bytes.", Required: true,
						DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
					},
					"device": {Type: framework.TypeString, Description: "The device that made them.", Required: true},
				}),
			},
		},
		HelpSynopsis:    "Random bytes from an HSM.",
		HelpDescription: "The bytes come from the generator of the HSM as they are. The field names are those of Vault's sys/tools/random.",
	}}
}

func (b *backend) random(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	count, format := data.Get("bytes").(int), data.Get("format").(string)
	switch {
	case count < 1 || count > maxRandom:
		return nil, mistake("bytes %d is out of range; use 1 to %d", count, maxRandom)
	case format != "base64" && format != "hex":
		return nil, mistake("format %q is not known; use base64 or hex", format)
	}
	name, err := b.chooseDevice(ctx, data.Get("device").(string))
	if err != nil {
		return nil, err
	}
	device, err := b.Device(ctx, name)
	if err != nil {
		return nil, adoptionError(fmt.Errorf("device %q: %w", name, err))
	}
	randomer, ok := device.(hsm.Randomer)
	if !ok {
		return nil, mistake("device %q makes no random bytes", name)
	}
	random, err := randomer.Random(ctx, count)
	if err != nil {
		return nil, fmt.Errorf("getting random bytes from device %q: %w", name, err)
	}
	defer clear(random)
	encode := base64.StdEncoding.EncodeToString
	if format == "hex" {
		encode = hex.EncodeToString
	}
	return &logical.Response{Data: map[string]any{"random_bytes": encode(random), "device": name}}, nil
}

// chooseDevice returns the device that a request names, or the only one there is.
func (b *backend) chooseDevice(ctx context.Context, name string) (string, error) {
	if name != "" {
		return name, nil
	}
	names, err := b.storage.List(ctx, devicesPrefix)
	if err != nil {
		return "", fmt.Errorf("listing the devices: %w", err)
	}
	switch len(names) {
	case 0:
		return "", mistake("this mount has no device; write devices/NAME first")
	case 1:
		return names[0], nil
	default:
		return "", mistake("this mount has several devices; name one: device=%s", strings.Join(names, " or device="))
	}
}
