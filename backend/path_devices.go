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
			Responses:                   configured("The device was configured. The HSM was not touched; devices/:name/status does that."),
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
			HelpDescription: "A device is a PKCS#11 token (type=pkcs11, the default) or a NetHSM (type=nethsm). For a token, module " +
				"names the vendor's library, one of serial, token_label and slot the token, pin or pin_file the user PIN. For a " +
				"NetHSM, urls names its nodes, username and password a user with the role Operator; admin_username and " +
				"admin_password, an Administrator, are needed only to make and delete keys and for object_store; ca_cert or " +
				"tls_pins say which certificates are trusted. Fields that a write leaves out keep their values. Secrets are " +
				"never shown, and a write that would send one somewhere else must carry each of them again, or name its file again. " +
				"Writing touches no HSM: read devices/<name>/status to see whether it works. Where a wrong PIN was sent, give the " +
				"right one with devices/<name>/pin and on_token=false, which tries it once.",
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
	if record.Config.Type == device.TypePKCS11 {
		shown["pin_change_pending"] = record.NextPIN != ""
	}
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
	old, err := b.readDevice(ctx, name)
	if err != nil {
		return nil, err
	}
	record := &deviceRecord{Config: device.Config{Type: data.Get("type").(string)}}
	if old != nil {
		kept := *old
		record = &kept
	}
	if kind, given := data.GetOk("type"); given && kind.(string) != record.Config.Type {
		return nil, mistake("device %q is of type %q and stays so; configure the other HSM under another name", name, record.Config.Type)
	}
	secrets, err := mergeDevice(&record.Config, data)
	if err != nil {
		return nil, err
	}
	if old != nil {
		if err := checkDestination(old.Config, record.Config, secrets); err != nil {
			return nil, err
		}
	}
	if err := b.tryDevice(ctx, name, record.Config); err != nil {
		return nil, err
	}
	if slices.Contains(secrets, "pin") {
		record.NextPIN = ""
	}
	if err := b.writeDevice(ctx, name, record); err != nil {
		return nil, err
	}
	if !record.Config.Insecure {
		return nil, nil
	}
	b.logger.Warn("a device takes any certificate", "device", name)
	response := new(logical.Response)
	response.AddWarning("tls_insecure: whoever answers at one of the urls is taken for the NetHSM, and gets its passwords and what it is to " +
		"open; give ca_cert or tls_pins instead, and tls_insecure=false")
	return response, nil
}

// checkDestination refuses a write that would send a stored secret somewhere else than before without carrying it again.
// Given are the names of the secrets that the write carries.
func checkDestination(old, changed device.Config, given []string) error {
	fields := changed.DestinationChanged(old)
	if fields == nil {
		return nil
	}
	var kept, wanted []string
	for _, secret := range changed.SecretFields() {
		if *secret.Value+*secret.File != "" && !slices.Contains(given, secret.Name) {
			kept = append(kept, secret.Name)
			wanted = append(wanted, secret.Name+" or "+secret.FileName())
		}
	}
	if kept == nil {
		return nil
	}
	return mistake("this write changes %s, and %s would go somewhere else than before; give %s in the same write; nothing was changed",
		strings.Join(fields, " and "), strings.Join(kept, " and "), strings.Join(wanted, ", and "))
}

// mergeDevice changes what the request gives and leaves the rest. It returns the names of the secrets that are given.
func mergeDevice(config *device.Config, data *framework.FieldData) (secrets []string, err error) {
	mergeToken(config, data)
	if slot, given := data.GetOk("slot"); given {
		number := slot.(int)
		if number < 0 {
			return nil, mistake("slot %d is not a slot number; pkcs11-tool --list-slots shows them", number)
		}
		chosen := uint(number)
		config.Slot = &chosen
	}
	for _, secret := range config.SecretFields() {
		given, err := mergeSecret(secret, data)
		if err != nil {
			return nil, err
		}
		if given {
			secrets = append(secrets, secret.Name)
		}
	}
	merge(data, map[string]*string{
		"module": &config.Module, "username": &config.Username, "admin_username": &config.AdminUsername, "ca_cert": &config.CACert,
		"tls_server_name": &config.TLSServerName,
	})
	merge(data, map[string]*[]string{"urls": &config.URLs, "tls_pins": &config.TLSPins, "key_tags": &config.KeyTags})
	merge(data, map[string]*bool{"tls_insecure": &config.Insecure, "object_store": &config.ObjectStore})
	merge(data, map[string]*int{"parallel": &config.Parallel})
	for field, limit := range map[string]*time.Duration{
		"decrypt_timeout": &config.DecryptTimeout, "generate_timeout": &config.GenerateTimeout, "request_timeout": &config.RequestTimeout,
	} {
		if given, ok := duration(data, field); ok {
			*limit = given
		}
	}
	return secrets, nil
}

// merge sets what the request gives.
func merge[T any](data *framework.FieldData, fields map[string]*T) {
	for field, target := range fields {
		if value, given := data.GetOk(field); given {
			*target = value.(T)
		}
	}
}

// mergeSecret sets a secret, or the file that holds it, and tells whether the request gives either: one replaces the other.
func mergeSecret(secret device.SecretField, data *framework.FieldData) (given bool, err error) {
	value, err := secretField(data, secret.Name)
	if err != nil {
		return false, err
	}
	_, valueGiven := data.GetOk(secret.Name)
	file, fileGiven := data.GetOk(secret.FileName())
	if !valueGiven && !fileGiven {
		return false, nil
	}
	*secret.Value, *secret.File = value, ""
	if fileGiven {
		*secret.File = file.(string)
	}
	return true, nil
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
	b.keys.EndLeases()
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
