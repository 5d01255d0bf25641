package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/object"
)

func storeFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"name": nameField("The name of the store."),
		"type": {
			Type:          framework.TypeString,
			Description:   "The kind of store: etcd, object (data objects on a token, certificate slots on a NetHSM), vault (this mount's own storage) or file.",
			AllowedValues: []any{storeEtcd, storeObject, storeVault, storeFile},
		},
		"endpoints": {Type: framework.TypeCommaStringSlice, Description: "etcd: the members' client URLs, https://host:2379."},
		"prefix":    {Type: framework.TypeString, Description: "etcd: the folder of all keys, without a leading \"/\"; nitroseal/prod for example."},
		"username":  {Type: framework.TypeString, Description: "etcd: the user name, where etcd asks for one."},
		"password": {
			Type: framework.TypeString, Description: "etcd: the password. It is never shown; a write that changes where it is sent must carry it again.",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"ca_cert":     {Type: framework.TypeString, Description: "etcd: PEM of the authorities that sign the members' certificates."},
		"client_cert": {Type: framework.TypeString, Description: "etcd: PEM of the client certificate."},
		"client_key": {
			Type: framework.TypeString, Description: "etcd: PEM of its private key. It is never shown; as password.",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"server_name": {Type: framework.TypeString, Description: "etcd: the name in the members' certificates, where it is not the host of the endpoint."},
		"request_timeout": {
			Type: framework.TypeDurationSecond, Description: "etcd: how long one operation may take, at most 60 seconds. 0 means the default, 10 seconds.",
		},
		"insecure": {
			Type: framework.TypeBool,
			Description: "etcd: accept endpoints with http:// beyond this machine. Whoever is on the way can then read names and envelopes, put " +
				"old ones back, and answer in etcd's place. TLS is verified in any case.",
		},
		"device":      {Type: framework.TypeString, Description: "object: the device that holds the data objects; a NetHSM needs object_store=true."},
		"application": {Type: framework.TypeString, Description: "object: CKA_APPLICATION of the data objects, or what takes its place on a NetHSM; nitroseal where it is left out."},
		"dir":         {Type: framework.TypeString, Description: "file: the name of a directory under the plugin's -state-dir."},
	}
}

// storeSecrets are the fields that are never shown.
var storeSecrets = []string{"password", "client_key"}

func storeAnswer() map[string]*framework.FieldSchema {
	fields := storeFields()
	delete(fields, "name")
	for _, secret := range storeSecrets {
		delete(fields, secret)
		fields[secret+"_set"] = &framework.FieldSchema{Type: framework.TypeBool, Description: "etcd: whether a " + secret + " is stored here."}
	}
	fields["type"].Required = true
	return fields
}

func (b *backend) storePaths() []*framework.Path {
	fields := storeFields()
	fields["check"] = &framework.FieldSchema{
		Type:        framework.TypeBool,
		Description: "Write, read back and delete a value first; where that fails, nothing is changed.",
	}
	fields["take_over"] = &framework.FieldSchema{
		Type: framework.TypeBool,
		Description: "file and object: use the directory, or the application on the token, although it belongs to another mount of this " +
			"plugin, one that is lost for good. That mount cannot write there any more.",
	}
	fields["force"] = &framework.FieldSchema{
		Type: framework.TypeBool, Query: true,
		Description: "For a deletion: forget the store although stored material lies in it. The material stays where it is.",
	}
	write := func() *framework.PathOperation {
		return &framework.PathOperation{
			Callback:                    b.storeWrite,
			Summary:                     "Configure a store.",
			DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "configure"},
			Responses:                   configured("The store was configured."),
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		}
	}
	return []*framework.Path{
		listPath("stores/?$", "stores", "List the configured stores.", b.storeList),
		{
			Pattern:        "stores/" + framework.GenericNameRegex("name"),
			Fields:         fields,
			ExistenceCheck: b.storeExists,
			DisplayAttrs:   &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "store"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:  b.storeRead,
					Summary:   "Read how a store is configured, without its secrets.",
					Responses: answer(http.StatusOK, "The configuration.", storeAnswer()),
				},
				logical.CreateOperation: write(),
				logical.UpdateOperation: write(),
				logical.DeleteOperation: &framework.PathOperation{
					Callback:                    b.storeDelete,
					Summary:                     "Forget a store. What lies in it stays there.",
					Responses:                   noContent("The store was forgotten."),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "A place where envelopes are kept.",
			HelpDescription: "etcd serves more than one machine; object keeps data objects on the HSM itself; file is for one machine. " +
				"vault is this mount's own storage: what lies there is out of reach while this very Vault is sealed, so it is no " +
				"place for the keys that unseal this Vault: material is refused there where its cluster_id is this Vault's own, and warned " +
				"about where no cluster_id is given. etcd is spoken to with TLS, or on this machine; elsewhere insecure=true accepts " +
				"http://. Fields that a write leaves out keep their values; secrets are never shown, " +
				"and a write that would send one somewhere else must carry it again.",
		},
	}
}

func (b *backend) storeList(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	return b.listNames(ctx, storesPrefix)
}

func (b *backend) storeExists(ctx context.Context, _ *logical.Request, data *framework.FieldData) (bool, error) {
	return b.exists(ctx, storesPrefix+data.Get("name").(string))
}

func (b *backend) storeRead(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	record, err := b.readStore(ctx, data.Get("name").(string))
	if err != nil || record == nil {
		return nil, err
	}
	shown := map[string]any{"type": record.Type}
	switch record.Type {
	case storeEtcd:
		shown["endpoints"] = record.Endpoints
		shown["prefix"] = record.Prefix
		shown["username"] = record.Username
		shown["password_set"] = record.Password != ""
		shown["ca_cert"] = record.CACert
		shown["client_cert"] = record.ClientCert
		shown["client_key_set"] = record.ClientKey != ""
		shown["server_name"] = record.ServerName
		shown["insecure"] = record.Insecure
		shown["request_timeout"] = int64(record.RequestTimeout / time.Second)
	case storeObject:
		shown["device"] = record.Device
		shown["application"] = record.Application
	case storeFile:
		shown["dir"] = record.Dir
	}
	return &logical.Response{Data: shown}, nil
}

func (b *backend) storeWrite(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	if err := checkName("store", name); err != nil {
		return nil, err
	}
	done, err := b.stores.writing.take(ctx, fmt.Sprintf("store %q", name))
	if err != nil {
		return nil, err
	}
	defer done()
	old, err := b.readStore(ctx, name)
	if err != nil {
		return nil, err
	}
	record := new(storeRecord)
	if old != nil {
		*record = *old
	}
	if err := mergeStore(record, data); err != nil {
		return nil, err
	}
	if old != nil {
		if err := checkStoreDestination(*old, *record, data); err != nil {
			return nil, err
		}
	}
	if err := b.checkStoreRecord(ctx, record, data); err != nil {
		return nil, err
	}
	takeOver := data.Get("take_over").(bool)
	if takeOver && record.Type != storeFile && record.Type != storeObject {
		return nil, mistake("take_over is for stores of the types file and object; leave it out")
	}
	claim, err := b.tryStore(ctx, name, record, data.Get("check").(bool), takeOver)
	if err != nil {
		return nil, err
	}
	if err := b.writeStore(ctx, name, record); err != nil {
		return nil, err
	}
	if err := claim(); err != nil {
		return nil, err
	}
	response := new(logical.Response)
	switch {
	case record.Insecure:
		response.AddWarning("etcd is spoken to without TLS: whoever is on the way can read the names and envelopes that are kept there, put " +
			"old ones back, and answer in etcd's place; what the envelopes hold stays sealed. Give etcd certificates and write https://")
		return response, nil
	case record.Type != storeVault:
		return nil, nil
	}
	response.AddWarning("this store is the storage of this very Vault: what lies in it cannot be opened while this Vault is sealed, so it is " +
		"no place for the keys that unseal this Vault")
	return response, nil
}

// mergeStore changes what the request gives and leaves the rest.
func mergeStore(record *storeRecord, data *framework.FieldData) error {
	if kind, given := data.GetOk("type"); given {
		if record.Type != "" && record.Type != kind.(string) {
			return mistake("the store is of type %q and stays so; configure another one under another name", record.Type)
		}
		record.Type = kind.(string)
	}
	if record.Type == "" {
		return mistake("type is missing; use one of %s", strings.Join(storeTypes, ", "))
	}
	if endpoints, given := data.GetOk("endpoints"); given {
		record.Endpoints = endpoints.([]string)
	}
	for field, target := range map[string]*string{
		"prefix": &record.Prefix, "username": &record.Username, "ca_cert": &record.CACert,
		"client_cert": &record.ClientCert, "client_key": &record.ClientKey, "server_name": &record.ServerName,
		"device": &record.Device, "application": &record.Application, "dir": &record.Dir,
	} {
		if value, given := data.GetOk(field); given {
			*target = value.(string)
		}
	}
	if _, given := data.GetOk("password"); given {
		password, err := secretField(data, "password")
		if err != nil {
			return err
		}
		record.Password = password
	}
	if insecure, given := data.GetOk("insecure"); given {
		record.Insecure = insecure.(bool)
	}
	if timeout, given := duration(data, "request_timeout"); given {
		record.RequestTimeout = timeout
	}
	return nil
}

// storeTypeFields are the fields that belong to each kind of store.
var storeTypeFields = map[string][]string{
	storeEtcd: {
		"endpoints", "prefix", "username", "password", "ca_cert", "client_cert", "client_key", "server_name", "request_timeout",
		"insecure",
	},
	storeObject: {"device", "application"},
	storeVault:  nil,
	storeFile:   {"dir"},
}

// maxStoreTimeout is the longest request_timeout of a store.
const maxStoreTimeout = time.Minute

// checkStoreRecord finds what openStore does not: fields of another kind of store, and a device that is not there.
func (b *backend) checkStoreRecord(ctx context.Context, record *storeRecord, data *framework.FieldData) error {
	known, ok := storeTypeFields[record.Type]
	if !ok {
		return mistake("type %q is not known; use one of %s", record.Type, strings.Join(storeTypes, ", "))
	}
	for kind, fields := range storeTypeFields {
		for _, field := range fields {
			if _, given := data.GetOk(field); given && !slices.Contains(known, field) {
				return mistake("%s belongs to stores of type %q, and this one is of type %q; leave it out", field, kind, record.Type)
			}
		}
	}
	if record.RequestTimeout < 0 || record.RequestTimeout > maxStoreTimeout {
		return mistake("request_timeout %v is out of range; use 1 to %d seconds, or 0 for the default", record.RequestTimeout, maxStoreTimeout/time.Second)
	}
	if record.Type != storeObject {
		return nil
	}
	if record.Application == "" {
		record.Application = object.DefaultApplication
	}
	switch {
	case !validName(record.Application):
		return mistake("application %q is not a name; use letters, digits, \".\", \"_\" and \"-\"", record.Application)
	case b.options.StateDir == "":
		return mistake("stores of type \"object\" keep a lock file under the plugin's -state-dir, and it was registered without one; " +
			"register it with -args=-state-dir=DIR")
	}
	if record.Device == "" {
		return mistake("device is missing; name the device that holds the data objects")
	}
	held, err := b.readDevice(ctx, record.Device)
	switch {
	case err != nil:
		return err
	case held == nil:
		return mistake("device %q is not configured in this mount; write devices/%s first", record.Device, record.Device)
	case held.Config.Type == device.TypeNetHSM && !held.Config.ObjectStore:
		return mistake("device %q is a NetHSM, which keeps values in the certificate slots of keys only where that is allowed: write devices/%s "+
			"with object_store=true, and an Administrator", record.Device, record.Device)
	}
	return nil
}

// checkStoreDestination refuses a write that would send a stored secret somewhere else than before without carrying it.
func checkStoreDestination(old, changed storeRecord, data *framework.FieldData) error {
	var fields []string
	note := func(field string, differs bool) {
		if differs {
			fields = append(fields, field)
		}
	}
	note("endpoints", !slices.Equal(old.Endpoints, changed.Endpoints))
	note("ca_cert", old.CACert != changed.CACert)
	note("server_name", old.ServerName != changed.ServerName)
	note("username", old.Username != changed.Username)
	note("insecure", old.Insecure != changed.Insecure)
	if len(fields) == 0 {
		return nil
	}
	for field, kept := range map[string]bool{
		"password":   old.Password != "" && changed.Password != "",
		"client_key": old.ClientKey != "" && changed.ClientKey != "",
	} {
		if _, given := data.GetOk(field); kept && !given {
			return mistake("this write changes %s, and %s would be used somewhere else than before; give %s in the same write; nothing was changed",
				strings.Join(fields, " and "), field, field)
		}
	}
	return nil
}

// tryStore opens a store as its record says, and checks it where that is asked for. Without a check the HSM of an object
// store may lie in a drawer; its first use finds out whether it belongs to another mount. The caller calls claim once the
// record is written: it notes that what the store lies in belongs to this mount.
func (b *backend) tryStore(ctx context.Context, name string, record *storeRecord, check, takeOver bool) (claim func() error, err error) {
	claim = func() error { return nil }
	if record.Type == storeObject && !check && !takeOver {
		return claim, nil
	}
	opened, err := b.openStore(ctx, name, record)
	if err != nil {
		return nil, err
	}
	defer b.closeStore(name, opened)
	tried := opened
	if owned, ok := opened.(*ownedStore); ok {
		if err := owned.owners.check(); err != nil && !(takeOver && errors.Is(err, errOthers)) {
			return nil, err
		}
		claim = func() error { return owned.owners.claim(takeOver) }
		tried = owned.Store // a check leaves no note
	}
	if !check {
		return claim, nil
	}
	if err := checkStore(ctx, tried); err != nil {
		return nil, storeCheckError(name, err)
	}
	return claim, nil
}

// storeCheckError says that a check failed. What the store refused is for the user to mend.
func storeCheckError(name string, err error) error {
	err = fmt.Errorf("checking store %q; nothing was changed: %w", name, err)
	if errors.Is(err, store.ErrDenied) {
		return &statusError{http.StatusBadRequest, err}
	}
	return err
}

func (b *backend) storeDelete(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	done, err := b.stores.writing.take(ctx, fmt.Sprintf("store %q", name))
	if err != nil {
		return nil, err
	}
	defer done()
	if !data.Get("force").(bool) {
		clusters, err := b.clustersUsing(ctx, func(record *clusterRecord) bool { return record.Store == name })
		if err != nil {
			return nil, err
		}
		if len(clusters) > 0 {
			return nil, mistake("store %q is where %s keeps its keys, or is to; delete that first, or forget the store with force=true", name, summarise(clusters))
		}
		if err := b.checkEmpty(ctx, name); err != nil {
			return nil, err
		}
	}
	err = b.storage.Delete(ctx, storesPrefix+name)
	b.dropStore(name)
	if err != nil {
		return nil, fmt.Errorf("deleting the record of store %q: %w", name, err)
	}
	return nil, nil
}

// checkEmpty refuses to forget a store that holds material, or may hold some.
func (b *backend) checkEmpty(ctx context.Context, name string) error {
	items, _, err := b.keeper.List(ctx, "")
	if err != nil {
		return err
	}
	var held []string
	for _, item := range items {
		metadata, err := b.keeper.Get(ctx, item.Cluster, item.Name, custody.ReadOptions{})
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil || metadata.Store == name {
			held = append(held, item.Cluster+"/"+item.Name)
		}
	}
	if held == nil {
		return nil
	}
	return mistake("store %q holds or may hold %s; delete the material first, or forget the store with force=true: the material stays where it is "+
		"and is out of reach until the store is configured again", name, summarise(held))
}

// summarise names the first few of a list.
func summarise(names []string) string {
	const shown = 5
	if len(names) <= shown {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), len(names)-shown)
}
