package backend

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/device"
)

// deviceTypesToCome are types that the documentation speaks of and this version does not have.
var deviceTypesToCome = map[string]string{
	"nethsm": "devices of type \"nethsm\" are not in this version of the plugin; use type=pkcs11",
}

func deviceFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"name": nameField("The name of the device."),
		"type": {
			Type:          framework.TypeString,
			Description:   "The kind of HSM: pkcs11.",
			AllowedValues: []any{device.TypePKCS11},
			Default:       device.TypePKCS11,
		},
		"module": {
			Type: framework.TypeString,
			Description: "The path of the vendor's PKCS#11 module, one that the plugin was registered with " +
				"(-args=-pkcs11-module=PATH).",
		},
		"serial": {
			Type:        framework.TypeString,
			Description: "The serial number of the token. One of serial, token_label and slot chooses the token.",
		},
		"token_label": {Type: framework.TypeString, Description: "The label of the token; exactly one token must have it."},
		"slot":        {Type: framework.TypeInt, Description: "The slot that the token is in. Slots may change when a token is pulled."},
		"pin": {
			Type:         framework.TypeString,
			Description:  "The user PIN. It is never shown. A write that chooses another module or token must carry it again.",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"pin_file": {
			Type: framework.TypeString,
			Description: "A file that holds the user PIN, under the plugin's -secrets-dir on every node that serves this mount. " +
				"It is read anew when it changes.",
		},
		"parallel": {
			Type:        framework.TypeInt,
			Description: "How many operations the token takes at one time: 1 for a card, the default; 8 suits SoftHSM.",
			Default:     1,
		},
		"decrypt_timeout": {
			Type: framework.TypeDurationSecond,
			Description: "How long one operation may stay inside the module before its process is killed. 0 means the default, " +
				"20 seconds.",
		},
		"generate_timeout": {
			Type:        framework.TypeDurationSecond,
			Description: "The same for the making of a key. 0 means the default, 5 minutes.",
		},
	}
}

// deviceAnswer is what a read shows: everything but secrets.
func deviceAnswer() map[string]*framework.FieldSchema {
	fields := deviceFields()
	delete(fields, "name")
	delete(fields, "pin")
	for _, field := range fields {
		field.Default = nil
	}
	fields["pin_set"] = &framework.FieldSchema{Type: framework.TypeBool, Description: "Whether a PIN is stored here.", Required: true}
	fields["pin_change_pending"] = &framework.FieldSchema{
		Type:        framework.TypeBool,
		Description: "Whether a change of the PIN was cut short; the next use of the device finds out which PIN the token took.",
	}
	return fields
}

func (b *backend) devicePaths() []*framework.Path {
	fields := deviceFields()
	fields["force"] = &framework.FieldSchema{
		Type: framework.TypeBool, Query: true,
		Description: "For a deletion: delete the device although wrapping keys or stores use it.",
	}
	write := func() *framework.PathOperation {
		return &framework.PathOperation{
			Callback:                    b.deviceWrite,
			Summary:                     "Configure a device.",
			DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "configure"},
			Responses:                   noContent("The device was configured. The HSM was not touched; devices/:name/status does that."),
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		}
	}
	return []*framework.Path{
		listPath("devices/?$", "devices", "List the configured devices.", b.deviceList),
		{
			Pattern:        "devices/" + framework.GenericNameRegex("name"),
			Fields:         fields,
			ExistenceCheck: b.deviceExists,
			DisplayAttrs:   &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "device"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:  b.deviceRead,
					Summary:   "Read how a device is configured, without its secrets.",
					Responses: answer(http.StatusOK, "The configuration.", deviceAnswer()),
				},
				logical.CreateOperation: write(),
				logical.UpdateOperation: write(),
				logical.DeleteOperation: &framework.PathOperation{
					Callback:                    b.deviceDelete,
					Summary:                     "Forget a device. Nothing on the HSM changes.",
					Responses:                   noContent("The device was forgotten."),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "An HSM that this mount may use.",
			HelpDescription: "A device is a PKCS#11 token: module names the vendor's library, one of serial, token_label and " +
				"slot the token, pin or pin_file the user PIN. Fields that a write leaves out keep their values. The PIN is " +
				"never shown, and a write that would send it somewhere else must carry it again, or name pin_file again. Writing " +
				"touches no HSM: read devices/<name>/status to see whether it works. Where a wrong PIN was sent, give the right one " +
				"with devices/<name>/pin and on_token=false, which tries it once.",
		},
	}
}

func (b *backend) deviceList(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	return b.listNames(ctx, devicesPrefix)
}

func (b *backend) deviceExists(ctx context.Context, _ *logical.Request, data *framework.FieldData) (bool, error) {
	return b.exists(ctx, devicesPrefix+data.Get("name").(string))
}

func (b *backend) deviceRead(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	record, err := b.readDevice(ctx, data.Get("name").(string))
	if err != nil || record == nil {
		return nil, err
	}
	shown := record.Config.Redacted()
	shown["pin_change_pending"] = record.NextPIN != ""
	return &logical.Response{Data: shown}, nil
}

func (b *backend) deviceWrite(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	if err := checkName("device", name); err != nil {
		return nil, err
	}
	done, err := b.changingDevice(ctx, name)
	if err != nil {
		return nil, err
	}
	defer done()
	record, err := b.readDevice(ctx, name)
	if err != nil {
		return nil, err
	}
	var old *device.Config
	if record == nil {
		record = &deviceRecord{Config: device.Config{Type: device.TypePKCS11}}
	} else {
		kept := record.Config
		old = &kept
	}
	if err := mergeDevice(&record.Config, data); err != nil {
		return nil, err
	}
	_, pin := data.GetOk("pin")
	_, pinFile := data.GetOk("pin_file")
	if old != nil && !pin && !pinFile {
		if changed := record.Config.DestinationChanged(*old); changed != nil {
			return nil, mistake("this write changes %s, and the PIN would go somewhere else than before; give pin or pin_file in the same write; "+
				"nothing was changed", strings.Join(changed, " and "))
		}
	}
	if err := b.tryDevice(ctx, name, record.Config); err != nil {
		return nil, err
	}
	if pin || pinFile {
		record.NextPIN = ""
	}
	return nil, b.writeDevice(ctx, name, record)
}

// mergeDevice changes what the request gives and leaves the rest.
func mergeDevice(config *device.Config, data *framework.FieldData) error {
	if kind, given := data.GetOk("type"); given {
		if sentence, toCome := deviceTypesToCome[kind.(string)]; toCome {
			return mistake("%s", sentence)
		}
		config.Type = kind.(string)
	}
	if module, given := data.GetOk("module"); given {
		config.Module = module.(string)
	}
	mergeToken(config, data)
	if slot, given := data.GetOk("slot"); given {
		number := slot.(int)
		if number < 0 {
			return mistake("slot %d is not a slot number; pkcs11-tool --list-slots shows them", number)
		}
		chosen := uint(number)
		config.Slot = &chosen
	}
	pin, err := secretField(data, "pin")
	if err != nil {
		return err
	}
	_, pinGiven := data.GetOk("pin")
	file, fileGiven := data.GetOk("pin_file")
	if pinGiven || fileGiven { // one replaces the other
		config.PIN, config.PINFile = "", ""
	}
	if pinGiven {
		config.PIN = pin
	}
	if fileGiven {
		config.PINFile = file.(string)
	}
	if parallel, given := data.GetOk("parallel"); given {
		config.Parallel = parallel.(int)
	}
	for field, limit := range map[string]*time.Duration{
		"decrypt_timeout": &config.DecryptTimeout, "generate_timeout": &config.GenerateTimeout,
	} {
		if given, ok := duration(data, field); ok {
			*limit = given
		}
	}
	return nil
}

// mergeToken sets how the token is chosen: a way that is given replaces the one before.
func mergeToken(config *device.Config, data *framework.FieldData) {
	serial, serialGiven := data.GetOk("serial")
	label, labelGiven := data.GetOk("token_label")
	_, slotGiven := data.GetOk("slot")
	if !serialGiven && !labelGiven && !slotGiven {
		return
	}
	config.Serial, config.TokenLabel, config.Slot = "", "", nil
	if serialGiven {
		config.Serial = serial.(string)
	}
	if labelGiven {
		config.TokenLabel = label.(string)
	}
}

func (b *backend) deviceDelete(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	done, err := b.changingDevice(ctx, name)
	if err != nil {
		return nil, err
	}
	defer done()
	if !data.Get("force").(bool) {
		users, err := b.usersOfDevice(ctx, name)
		if err != nil {
			return nil, err
		}
		if len(users) > 0 {
			return nil, mistake("device %q is used by %s; delete those first, or delete the device with force=true: "+
				"what only its keys can open is then closed until the device is configured again", name, strings.Join(users, ", "))
		}
	}
	err = b.storage.Delete(ctx, devicesPrefix+name)
	b.dropDevice(name)
	if err != nil {
		return nil, fmt.Errorf("deleting the record of device %q: %w", name, err)
	}
	return nil, nil
}

// usersOfDevice names the wrapping keys and stores that need a device, "keys/prod" for example.
func (b *backend) usersOfDevice(ctx context.Context, name string) ([]string, error) {
	users := map[string]bool{}
	keys, err := b.keys.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, keyName := range keys {
		key, err := b.keys.Get(ctx, keyName)
		if err != nil {
			return nil, err
		}
		if key.Pending != nil && key.Pending.Device == name {
			users[keysPrefix+keyName] = true
		}
		for _, version := range key.Versions {
			for _, recipient := range version.Recipients {
				if recipient.Device == name {
					users[keysPrefix+keyName] = true
				}
			}
		}
	}
	stores, err := b.storage.List(ctx, storesPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the stores: %w", err)
	}
	for _, storeName := range stores {
		record, err := b.readStore(ctx, storeName)
		if err != nil {
			return nil, err
		}
		if record != nil && record.Device == name {
			users[storesPrefix+storeName] = true
		}
	}
	return slices.Sorted(maps.Keys(users)), nil
}
