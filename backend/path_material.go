package backend

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/custody"
)

func itemFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"cluster": nameField("The cluster that the material belongs to."),
		"name":    nameField("The name of the item, unseal-keys for example."),
		"store": {
			Type: framework.TypeString, Query: true,
			Description: "The store; where it is left out, the one that the item has, or the mount's default_store.",
		},
	}
}

// materialAnswer describes an item without its secrets.
func materialAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"cluster": {Type: framework.TypeString, Description: "The cluster.", Required: true},
		"name":    {Type: framework.TypeString, Description: "The name.", Required: true},
		"state": {
			Type: framework.TypeString, Required: true,
			Description: "current, unconfirmed (a write ended unclear; opening confirms what it left), unrecorded (opening begins a record), " +
				"stale (an older one lies in the store), ahead (a newer one than foreseen), vanished.",
		},
		"store":               {Type: framework.TypeString, Description: "The store that keeps it.", Required: true},
		"key":                 {Type: framework.TypeString, Description: "The wrapping key that sealed it.", Required: true},
		"key_version":         {Type: framework.TypeInt, Description: "The version of that.", Required: true},
		"rewrap_due":          {Type: framework.TypeBool, Description: "Whether the key has a newer version.", Required: true},
		"generation":          {Type: framework.TypeInt64, Description: "Counts the writes; give it as cas with the next one. 0 where it vanished.", Required: true},
		"expected_generation": {Type: framework.TypeInt64, Description: "The generation that this mount expects in the store; 0 where it knows none.", Required: true},
		"kids":                {Type: framework.TypeStringSlice, Description: "The thumbprints of the HSM keys that open it.", Required: true},
		"hsms":                {Type: framework.TypeInt, Description: "On how many HSMs these lie.", Required: true},
		"size":                {Type: framework.TypeInt, Description: "The size of the envelope in bytes.", Required: true},
		"field_names":         {Type: framework.TypeStringSlice, Description: "The names of the fields, where this mount knows them.", Required: true},
		"created":             {Type: framework.TypeString, Description: "When it was first written, RFC 3339; empty where this mount does not know."},
		"updated":             {Type: framework.TypeString, Description: "When it was last written."},
		"updated_by":          {Type: framework.TypeString, Description: "Who wrote it last."},
	}
}

func (b *backend) materialPaths() []*framework.Path {
	pattern := "material/" + framework.GenericNameRegex("cluster") + "/" + framework.GenericNameRegex("name")
	write := itemFields()
	write["fields"] = &framework.FieldSchema{
		Type: framework.TypeKVPairs, Required: true,
		Description: "The secrets by their names, each base64: fields=\"key_1=$(base64 < FILE)\", repeated. At most 64 fields, 48 KiB together. " +
			"All of them are opened by one operation in the HSM.",
	}
	write["key"] = &framework.FieldSchema{
		Type: framework.TypeString, Description: "The wrapping key; the one that the item has, or the mount's default_key, where it is left out.",
	}
	write["cas"] = &framework.FieldSchema{
		Type: framework.TypeInt64, Query: true,
		Description: "Write or delete only where the item is at this generation; 0: only where there is none.",
	}
	write["request_id"] = &framework.FieldSchema{
		Type: framework.TypeString,
		Description: "Optional, for a write: names it, so that a repetition of it is recognised and is a success, not a conflict of cas with " +
			"itself. Clients repeat a request on their own after a 5xx answer, with the same body. With other fields, values or another key it " +
			"is refused: give every write a new one. At most 128 characters.",
	}
	write["cluster_id"] = &framework.FieldSchema{
		Type: framework.TypeString,
		Description: "The id of the Vault cluster that the material unseals, as vault status shows it. Where it is the cluster that this mount " +
			"lives in, a store of type vault is refused: it could not be opened when it is needed.",
	}
	write["discard_keys"] = &framework.FieldSchema{
		Type: framework.TypeBool, Query: true,
		Description: "For a deletion: delete what a cluster in custody is opened with. Its data is lost then, unless others have shares of it.",
	}
	open := itemFields()
	open["reveal_keys"] = &framework.FieldSchema{
		Type: framework.TypeBool,
		Description: "Show what a cluster in custody is opened with, all of its shares or its root token, which nobody needs to see to unseal or rekey it. " +
			"A policy can deny this parameter.",
	}
	accept := itemFields()
	accept["generation"] = &framework.FieldSchema{
		Type: framework.TypeInt64, Required: true, Description: "The generation that lies in the store and is to open from now on.",
	}
	display := &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "material"}
	return []*framework.Path{
		listPath("material/?$", "material-clusters", "List the clusters that material is kept of.", b.clusterList),
		{
			Pattern:      "material/" + framework.GenericNameRegex("cluster") + "/?$",
			Fields:       map[string]*framework.FieldSchema{"cluster": nameField("The cluster that the material belongs to.")},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "material"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: &framework.PathOperation{
					Callback:  b.materialList,
					Summary:   "List the material of a cluster.",
					Responses: listAnswer("The names of the items.", ""),
				},
			},
			HelpSynopsis:    "The material of a cluster.",
			HelpDescription: "The names of what is kept of a cluster, in all stores that this mount has a record of.",
		},
		{
			Pattern:      pattern,
			Fields:       write,
			DisplayAttrs: display,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:  b.materialRead,
					Summary:   "Read what is known of an item, without opening it.",
					Responses: answer(http.StatusOK, "What is known of it. It holds no secret.", materialAnswer()),
				},
				logical.UpdateOperation: &framework.PathOperation{
					Callback:                    b.materialWrite,
					Summary:                     "Seal the fields of an item into one envelope and store it.",
					Responses:                   answer(http.StatusOK, "What is known of it now.", materialAnswer()),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
				logical.DeleteOperation: &framework.PathOperation{
					Callback:                    b.materialDelete,
					Summary:                     "Delete an item from its store.",
					Responses:                   noContent("The item was deleted."),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "An item of a cluster's material: unseal keys, a root token, any secret of one or more fields.",
			HelpDescription: "Writing seals all fields into one envelope and stores it; no HSM is needed for that. Reading shows what is known " +
				"of it, never the secrets: those are at material/<cluster>/<name>/open, so that a policy can forbid it. A write without cas " +
				"replaces what is there. A write with cas whose answer was lost may have been stored: give every write a request_id, with " +
				"which a repetition is recognised, by its values as well, or read the item before you repeat. What a cluster in custody is opened with is " +
				"written by clusters/ only. Where the store is of type vault, a write is refused if cluster_id says that the material is this very Vault's, and warned about if there is no cluster_id.",
		},
		{
			Pattern:      pattern + "/open",
			Fields:       open,
			DisplayAttrs: display,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:     b.materialOpen,
					Summary:      "Open an item with one operation in an HSM.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "open"},
					Responses: answer(http.StatusOK, "The fields in the clear.", map[string]*framework.FieldSchema{
						"fields": {
							Type: framework.TypeMap, Description: "The secrets by their names, each base64.", Required: true,
							DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
						},
						"generation":  {Type: framework.TypeInt64, Description: "The generation that was opened.", Required: true},
						"key":         {Type: framework.TypeString, Description: "The wrapping key that sealed it.", Required: true},
						"key_version": {Type: framework.TypeInt, Description: "The version of that.", Required: true},
					}),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "The fields of an item, in the clear.",
			HelpDescription: "Costs one private-key operation for all fields. An envelope that is older than this mount expects, or newer, does " +
				"not open until material/<cluster>/<name>/accept-generation says so. Where this mount has no record of the item yet, the " +
				"first open begins one, and warns. What a cluster in custody is opened with (unseal, recovery, root) wants reveal_keys=true.",
		},
		{
			Pattern:      pattern + "/accept-generation",
			Fields:       accept,
			DisplayAttrs: display,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:                    b.materialAccept,
					Summary:                     "Accept an older or newer envelope than expected, after a backup was restored.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "accept", OperationSuffix: "material-generation"},
					Responses:                   answer(http.StatusOK, "What is known of it now.", materialAnswer()),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "Accept that the store holds another generation than expected.",
			HelpDescription: "Whoever can write the store could put an older envelope back, one with revoked keys for example. Accept it only " +
				"where you restored a backup of the store, or of this mount, yourself.",
		},
	}
}

func itemNames(data *framework.FieldData) (cluster, name string) {
	return data.Get("cluster").(string), data.Get("name").(string)
}

func (b *backend) clusterList(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	items, warnings, err := b.keeper.List(ctx, "")
	if err != nil {
		return nil, err
	}
	var clusters []string
	for _, item := range items {
		clusters = append(clusters, item.Cluster)
	}
	return listWithWarnings(slices.Compact(clusters), warnings), nil
}

func (b *backend) materialList(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	items, warnings, err := b.keeper.List(ctx, data.Get("cluster").(string))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, item := range items {
		names = append(names, item.Name)
	}
	return listWithWarnings(names, warnings), nil
}

func listWithWarnings(names, warnings []string) *logical.Response {
	response := logical.ListResponse(names)
	for _, warning := range warnings {
		response.AddWarning(warning)
	}
	return response
}

func (b *backend) materialRead(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	cluster, name := itemNames(data)
	metadata, err := b.keeper.Get(ctx, cluster, name, readOptions(nil, data))
	if errors.Is(err, custody.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return materialResponse(metadata), nil
}

func (b *backend) materialWrite(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	cluster, name := itemNames(data)
	for what, part := range map[string]string{"cluster": cluster, "item": name} {
		if err := checkName(what, part); err != nil {
			return nil, err
		}
	}
	if ours, err := b.ofCustody(ctx, cluster, name, data); err != nil {
		return nil, err
	} else if ours {
		return nil, mistake("%q of cluster %q belongs to custody: init and rekey of clusters/%s write it; take another name", name, cluster, cluster)
	}
	options := custody.PutOptions{Key: data.Get("key").(string), Store: data.Get("store").(string), By: by(req)}
	cas, err := readCAS(data)
	if err != nil {
		return nil, err
	}
	options.CAS = cas
	if options.RequestID, err = requestID(data); err != nil {
		return nil, err
	}
	if err := b.chooseKeyAndStore(ctx, cluster, name, &options); err != nil {
		return nil, err
	}
	warning, err := b.checkOwnCluster(ctx, data.Get("cluster_id").(string), options.Store)
	if err != nil {
		return nil, err
	}
	secrets, err := readFields(data)
	if err != nil {
		return nil, err
	}
	defer secrets.Wipe()
	metadata, err := b.keeper.Put(ctx, cluster, name, secrets, options)
	if err != nil {
		if passes(err) && options.CAS != nil && options.RequestID == "" {
			err = fmt.Errorf("%w; it may have been stored nevertheless: read the item before you repeat with cas, or give a request_id, with which "+
				"a repetition is recognised", err)
		}
		return nil, err
	}
	response := materialResponse(metadata)
	if warning != "" {
		response.AddWarning(warning)
	}
	return response, nil
}

// readCAS reads the generation that the item must be at; nil for any.
func readCAS(data *framework.FieldData) (*uint64, error) {
	if _, given := data.GetOk("cas"); !given {
		return nil, nil //nolint:nilnil // documented
	}
	expected, err := readGeneration(data, "cas")
	return &expected, err
}

func readGeneration(data *framework.FieldData, field string) (uint64, error) {
	number := data.Get(field).(int64)
	if number < 0 {
		return 0, mistake("%s %d is not a generation; give the one that a read shows, or 0 where there is no item", field, number)
	}
	return uint64(number), nil
}

// readOptions say where a request looks for an item.
func readOptions(req *logical.Request, data *framework.FieldData) custody.ReadOptions {
	options := custody.ReadOptions{Store: data.Get("store").(string)}
	if req != nil {
		options.By = by(req)
	}
	return options
}

// chooseKeyAndStore fills in what a write leaves out: what the item has, or else the mount's defaults.
func (b *backend) chooseKeyAndStore(ctx context.Context, cluster, name string, options *custody.PutOptions) error {
	if options.Key != "" && options.Store != "" {
		return nil
	}
	defaults, err := b.settings.get(ctx, b.storage)
	if err != nil {
		return err
	}
	current, err := b.keeper.Get(ctx, cluster, name, custody.ReadOptions{Store: options.Store})
	switch {
	case err == nil:
		defaults.DefaultKey, defaults.DefaultStore = current.Key, current.Store
	case !errors.Is(err, custody.ErrNotFound):
		return err
	}
	if options.Key == "" {
		options.Key = defaults.DefaultKey
	}
	if options.Store == "" {
		options.Store = defaults.DefaultStore
	}
	if options.Key == "" {
		return mistake("key is missing, and the mount has no default_key; name the wrapping key")
	}
	return nil
}

// checkOwnCluster refuses to keep the material of this very Vault in its own storage, where the writer says whose it is,
// and warns where that is not known.
func (b *backend) checkOwnCluster(ctx context.Context, clusterID, storeName string) (warning string, err error) {
	record, err := b.readStore(ctx, storeName)
	if err != nil {
		return "", err
	}
	if record == nil || record.Type != storeVault {
		return "", nil
	}
	if clusterID == "" {
		return fmt.Sprintf("store %q is the storage of this very Vault: what lies in it cannot be opened while this Vault is sealed. Give cluster_id, "+
			"and a mistake is refused", storeName), nil
	}
	own, err := b.System().ClusterID(ctx)
	if err != nil { // not every host answers that
		b.logger.Warn("asking the host for the id of its cluster", "error", err)
		return fmt.Sprintf("it could not be checked whether cluster_id is this very Vault's; store %q is its own storage", storeName), nil
	}
	if clusterID == own {
		return "", mistake("this material unseals the Vault that this mount lives in, and store %q is that Vault's own storage: it could not be opened "+
			"when it is needed; take a store outside of this Vault", storeName)
	}
	return "", nil
}

// readFields decodes the fields of an item; the caller wipes them.
func readFields(data *framework.FieldData) (custody.Fields, error) {
	encoded := data.Get("fields").(map[string]string)
	if len(encoded) == 0 {
		return nil, mistake("fields is missing; give each secret as NAME=BASE64: fields=\"key_1=$(base64 < FILE)\"")
	}
	secrets := custody.Fields{}
	for name, value := range encoded {
		decoded, err := decodeValue("field "+name, value)
		if err != nil {
			secrets.Wipe()
			return nil, err
		}
		secrets[name] = decoded
	}
	return secrets, nil
}

func (b *backend) materialOpen(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	cluster, name := itemNames(data)
	if !data.Get("reveal_keys").(bool) { // which may be said of a damaged one as well
		ours, err := b.ofCustody(ctx, cluster, name, data)
		switch {
		case err != nil:
			return nil, err
		case ours:
			return nil, mistake("%q of cluster %q opens the whole cluster, and nobody needs to see it to unseal or rekey; where that is meant, give "+
				"reveal_keys=true", name, cluster)
		}
	}
	secrets, metadata, err := b.keeper.Open(ctx, cluster, name, readOptions(req, data))
	if err != nil {
		return nil, err
	}
	defer secrets.Wipe()
	b.logger.Info("material opened", "cluster", cluster, "name", name, "generation", metadata.Generation, "by", by(req))
	shown := map[string]any{}
	for field, value := range secrets {
		shown[field] = base64.StdEncoding.EncodeToString(value)
	}
	response := &logical.Response{Data: map[string]any{
		"fields": shown, "generation": metadata.Generation, "key": metadata.Key, "key_version": metadata.Version,
	}}
	for _, warning := range metadata.Warnings {
		response.AddWarning(warning)
	}
	return response, nil
}

func (b *backend) materialDelete(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	cluster, name := itemNames(data)
	if !data.Get("discard_keys").(bool) { // which may be said of a damaged one as well
		ours, err := b.ofCustody(ctx, cluster, name, data)
		switch {
		case err != nil:
			return nil, err
		case ours:
			return nil, mistake("%q of cluster %q is what its nodes are opened with, and without it their data is lost; where that is meant, give "+
				"discard_keys=true", name, cluster)
		}
	}
	options := custody.DeleteOptions{Store: data.Get("store").(string), By: by(req)}
	cas, err := readCAS(data)
	if err != nil {
		return nil, err
	}
	options.CAS = cas
	if err := b.keeper.Delete(ctx, cluster, name, options); err != nil && !errors.Is(err, custody.ErrNotFound) {
		return nil, err
	}
	return nil, nil
}

func (b *backend) materialAccept(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	cluster, name := itemNames(data)
	generation, err := readGeneration(data, "generation")
	if err != nil {
		return nil, err
	}
	if generation == 0 {
		return nil, mistake("generation is missing; give the one that lies in the store, as a read of the item shows it")
	}
	metadata, err := b.keeper.AcceptGeneration(ctx, cluster, name, generation, readOptions(req, data))
	if err != nil {
		return nil, err
	}
	return materialResponse(metadata), nil
}

func materialResponse(metadata custody.Metadata) *logical.Response {
	response := &logical.Response{Data: map[string]any{
		"cluster":             metadata.Cluster,
		"name":                metadata.Name,
		"state":               string(metadata.State),
		"store":               metadata.Store,
		"key":                 metadata.Key,
		"key_version":         metadata.Version,
		"rewrap_due":          metadata.Version < metadata.LatestVersion,
		"generation":          metadata.Generation,
		"expected_generation": metadata.Expected,
		"kids":                present(metadata.KIDs),
		"hsms":                metadata.HSMs,
		"size":                metadata.Size,
		"field_names":         present(slices.Clone(metadata.Fields)),
		"created":             stamp(metadata.Created),
		"updated":             stamp(metadata.Updated),
		"updated_by":          metadata.UpdatedBy,
	}}
	for _, warning := range metadata.Warnings {
		response.AddWarning(warning)
	}
	return response
}
