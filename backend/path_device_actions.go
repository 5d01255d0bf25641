package backend

import (
	"context"
	"errors"
	"net/http"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// deviceActionPaths are what can be done with one device besides configuring it.
func (b *backend) deviceActionPaths() []*framework.Path {
	pattern := "devices/" + framework.GenericNameRegex("name")
	name := nameField("The name of the device.")
	onlyName := map[string]*framework.FieldSchema{"name": name}
	display := &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "device"}
	write := func(
		handle framework.OperationFunc, verb, summary string, responses map[int][]framework.Response,
	) map[logical.Operation]framework.OperationHandler {
		return map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback:                    handle,
				Summary:                     summary,
				DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: verb},
				Responses:                   responses,
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		}
	}
	return []*framework.Path{
		{
			Pattern:      pattern + "/status",
			Fields:       onlyName,
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "device-status"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:  b.deviceStatus,
					Summary:   "Find out whether a device works, with one operation in the HSM.",
					Responses: answer(http.StatusOK, "How the device fares.", statusAnswer()),
				},
			},
			HelpSynopsis: "Whether a device works.",
			HelpDescription: "The answer comes from the HSM itself: what it is, its PIN flags, its keys, and how long one private-key " +
				"operation took; for a NetHSM also how each of its nodes fares. It is 200 also where the device cannot be used: read " +
				"usable and error. Results are reused for five seconds.",
		},
		{
			Pattern:      pattern + "/keys/?$",
			Fields:       onlyName,
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "device-keys"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: &framework.PathOperation{
					Callback: b.deviceKeys,
					Summary:  "List the key pairs on the HSM.",
					Responses: listAnswer("The ids of the keys; a key without an id, or with one that another has, is listed by its fingerprint.",
						"Label, id, fingerprint and traits of each key."),
				},
			},
			HelpSynopsis:    "The key pairs on an HSM.",
			HelpDescription: "Use a key's label or id to adopt it: write keys/<name> with device and key_label or key_id.",
		},
		{
			Pattern: pattern + "/unlock",
			Fields: map[string]*framework.FieldSchema{
				"name": name,
				"passphrase": {
					Type:         framework.TypeString,
					Description:  "The passphrase that unlocks the HSM; the configured unlock_passphrase where it is left out.",
					DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
				},
			},
			DisplayAttrs: display,
			Operations:   write(b.deviceUnlock, "unlock", "Unlock an HSM that starts locked.", configured("The HSM is unlocked.")),
			HelpSynopsis: "Unlock an HSM that starts locked.",
			HelpDescription: "A NetHSM is locked after a restart unless it boots unattended. Every locked node that answers is unlocked; a " +
				"warning names the others. A wrong passphrase costs nothing but a second: a NetHSM does not lock for good. PKCS#11 " +
				"tokens have no such lock: they log in with the PIN by themselves.",
		},
		{
			Pattern:      pattern + "/lock",
			Fields:       onlyName,
			DisplayAttrs: display,
			Operations:   write(b.deviceLock, "lock", "Lock an HSM.", configured("The HSM is locked.")),
			HelpSynopsis: "Lock an HSM until its passphrase is given again.",
			HelpDescription: "Every node of the NetHSM that answers is locked, for all who use it, and a warning names the others; this " +
				"needs an admin_username of the root namespace. It is not unlocked by itself before devices/<name>/unlock, not even with " +
				"a configured unlock_passphrase, unless the plugin starts anew or the device is written. PKCS#11 tokens have no such lock.",
		},
		{
			Pattern:      pattern + "/unbar",
			Fields:       onlyName,
			DisplayAttrs: display,
			Operations: write(b.deviceUnbar, "unbar", "Lift the bar that a wrong PIN left on this machine.",
				noContent("The bar is lifted; the next operation logs in once.")),
			HelpSynopsis: "Let a barred PIN be tried once more.",
			HelpDescription: "A PIN that was wrong once is not sent again from this machine, because a token locks after three wrong " +
				"ones. Where the PIN is right after all (it was set to it, or the bar hit a PIN that only looks like a wrong one, 1 in " +
				"1,024), lift the bar: one try is then spent where it is wrong. Only this device's PIN is let through, and not while " +
				"another mount uses the token with a PIN that is right, nor on the last try where the token rejected this very PIN. The " +
				"better way is to write the right PIN.",
		},
		{
			Pattern: pattern + "/pin",
			Fields: map[string]*framework.FieldSchema{
				"name": name,
				"new_pin": {
					Type: framework.TypeString, Description: "The new user PIN.", Required: true,
					DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
				},
				"on_token": {
					Type: framework.TypeBool, Default: true,
					Description: "True, the default, changes the PIN on the token and stores it. False replaces the stored PIN only, where " +
						"the token has the new one already: it is tried once, and the old one stays stored and logged in where the new " +
						"one is wrong. That counts as your word for this one try, although the token shows that a try is missing.",
				},
				"force": {
					Type: framework.TypeBool,
					Description: "With on_token=false: try the PIN although the token shows its last try. Where it is wrong the token is " +
						"locked, and only the SO-PIN unlocks it.",
				},
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "device-pin"},
			Operations:   write(b.devicePIN, "change", "Change a token's PIN, or the stored one.", noContent("The PIN was changed.")),
			HelpSynopsis: "Change the PIN on the token, or replace the stored one.",
			HelpDescription: "The new PIN is recorded before the token hears of it, so that a crash in between loses neither. " +
				"After a wrong PIN was stored and sent, give the right one here with on_token=false: that tries it once, also where the " +
				"token shows a missing try and unbar would be needed otherwise. A PIN that was wrong before on this machine is not sent, " +
				"and the last try is spent with force=true only. A device with pin_file keeps its PIN in the file: change it on the " +
				"token with the vendor's tool, then in the file.",
		},
	}
}

// knownDevice returns the handle of the device that a request names; 404 where it is not configured.
func (b *backend) knownDevice(ctx context.Context, data *framework.FieldData) (string, *device.Handle, error) {
	name := data.Get("name").(string)
	handle, err := b.handle(ctx, name)
	if errors.Is(err, keyring.ErrNoDevice) {
		return name, nil, absent("device %q: %w; write devices/%s first", name, err, name)
	}
	return name, handle, err
}
