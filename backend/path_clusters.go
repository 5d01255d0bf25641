package backend

import (
	"cmp"
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
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

func clusterFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"name": nameField("The name of the cluster. What is kept of it is sealed for this name, which cannot be changed."),
		"nodes": {
			Type: framework.TypeCommaStringSlice,
			Description: "The API addresses of the nodes themselves, https://vault-1.example.org:8200; a balancer would see the shares. The first " +
				"one is initialised, the others join it.",
		},
		"ca_cert": {
			Type: framework.TypeString,
			Description: "PEM of the authority that signs the nodes' certificates: by it, or by tls_pins, a node is known before any share is sent. " +
				"The system's authorities are never asked.",
		},
		"tls_server_name": {Type: framework.TypeString, Description: "The name in the nodes' certificates, where it is not the host of the address."},
		"tls_pins": {
			Type: framework.TypeCommaStringSlice,
			Description: "SHA-256 of the public keys in the nodes' certificates: hexadecimal, or sha256/ and base64. Without ca_cert they replace it, " +
				"names and dates; with it, both must hold.",
		},
		"plain_http": {Type: framework.TypeBool, Description: "Accept nodes with http:// on this very machine. Elsewhere there is no http://."},
		"raft_leader_ca_cert": {
			Type:        framework.TypeString,
			Description: "PEM of the authority by which a node that joins a raft cluster knows its leader; ca_cert where it is left out.",
		},
		"timeout": {
			Type:        framework.TypeDurationSecond,
			Description: "How long one ordinary call to a node may take, at most 60 seconds. 0 means the default, 10 seconds. Initialising has its own, 5 minutes.",
		},
		"key": {Type: framework.TypeString, Description: "The wrapping key: each of its HSMs alone opens the shares. The mount's default_key where neither it nor spread is given."},
		"spread": {
			Type:        framework.TypeString,
			Description: "Instead of key: the wrapping keys that the shares are spread over, and how many of them must take part: \"2 of office, bunker, bank\".",
		},
		"store":              {Type: framework.TypeString, Description: "The store that keeps the shares; the mount's default_store where it is left out."},
		"shares":             {Type: framework.TypeInt, Description: "How many unseal keys Vault makes; 5 where no write said so.", Default: defaultShares},
		"threshold":          {Type: framework.TypeInt, Description: "How many of them unseal; 3 where no write said so.", Default: defaultThreshold},
		"recovery_shares":    {Type: framework.TypeInt, Description: "How many recovery keys a Vault makes that unseals itself. 0 means the default, 5."},
		"recovery_threshold": {Type: framework.TypeInt, Description: "How many of these are wanted together. 0 means the default, 3."},
		"pgp_keys": {
			Type: framework.TypeKVPairs,
			Description: "People who take one share each, as NAME=KEY, repeated; the key is OpenPGP, armored or base64. Their shares are encrypted by " +
				"Vault and never seen here; an answer of init or rekey holds the messages. A write replaces the whole list.",
		},
		"root_token": {
			Type:          framework.TypeString,
			Description:   "What becomes of the root token that init gets: discard (revoked, the default), keep (sealed with the shares) or pgp (encrypted to root_pgp_key).",
			AllowedValues: []any{string(cluster.RootDiscard), string(cluster.RootKeep), string(cluster.RootPGP)},
		},
		"root_pgp_key": {Type: framework.TypeString, Description: "The OpenPGP key for root_token=pgp, armored or base64."},
		"watch": {
			Type: framework.TypeBool, Default: true,
			Description: "Whether the nodes are looked at about once a minute, and unsealed where they are sealed. The default is true.",
		},
	}
}

func clusterAnswer() map[string]*framework.FieldSchema {
	fields := clusterFields()
	delete(fields, "name")
	delete(fields, "pgp_keys")
	fields["pgp_keys"] = &framework.FieldSchema{Type: framework.TypeMap, Description: "The people's keys by their names.", Required: true}
	fields["updated"] = &framework.FieldSchema{Type: framework.TypeString, Description: "When this was last written, RFC 3339."}
	fields["updated_by"] = &framework.FieldSchema{Type: framework.TypeString, Description: "Who wrote it."}
	fields["accept_destination"] = &framework.FieldSchema{
		Type:        framework.TypeMap,
		Description: "Who last let shares that are kept go elsewhere than before, when, and which fields changed; empty where nobody did.",
	}
	return fields
}

func (b *backend) clusterPaths() []*framework.Path {
	fields := clusterFields()
	fields["accept_destination"] = &framework.FieldSchema{
		Type: framework.TypeBool,
		Description: "Say that shares that are kept may go elsewhere than before: a write that changes nodes, how they are known, key, spread, store " +
			"or pgp_keys of a cluster with material wants it, and records who said so. A policy can deny this parameter.",
	}
	fields["force"] = &framework.FieldSchema{
		Type: framework.TypeBool, Query: true,
		Description: "For a deletion: forget the cluster although its material is kept. The material stays where it is.",
	}
	write := func() *framework.PathOperation {
		return &framework.PathOperation{
			Callback:                    b.clusterWrite,
			Summary:                     "Configure a cluster.",
			DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "configure"},
			Responses:                   configured("The cluster was configured. Nothing was done to it."),
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		}
	}
	return []*framework.Path{
		listPath("clusters/?$", "clusters", "List the clusters in custody.", b.clustersList),
		{
			Pattern:        "clusters/" + framework.GenericNameRegex("name"),
			Fields:         fields,
			ExistenceCheck: b.clusterExists,
			DisplayAttrs:   &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "cluster"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:  b.clusterRead,
					Summary:   "Read how a cluster is configured.",
					Responses: answer(http.StatusOK, "The configuration. It holds no secret.", clusterAnswer()),
				},
				logical.CreateOperation: write(),
				logical.UpdateOperation: write(),
				logical.DeleteOperation: &framework.PathOperation{
					Callback:                    b.clusterDelete,
					Summary:                     "Forget a cluster. Its material stays.",
					Responses:                   noContent("The cluster was forgotten."),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "A Vault or OpenBao cluster whose unseal keys this mount keeps.",
			HelpDescription: "Say where its nodes are, how they are known, what its keys are sealed with and where they are kept; then write " +
				"clusters/<name>/init. From then on its nodes are unsealed when they are found sealed. Whoever may write here decides where shares " +
				"go: give that right to those who may see them. Fields that a write leaves out keep their values. The Vault that this mount lives " +
				"in is refused.",
		},
	}
}

func (b *backend) clustersList(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	return b.listNames(ctx, clustersPrefix)
}

func (b *backend) clusterExists(ctx context.Context, _ *logical.Request, data *framework.FieldData) (bool, error) {
	return b.exists(ctx, clustersPrefix+data.Get("name").(string))
}

func (b *backend) clusterRead(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	record, err := b.readCluster(ctx, data.Get("name").(string))
	if err != nil || record == nil {
		return nil, err
	}
	people := map[string]any{}
	for person, key := range record.PGPKeys {
		people[person] = key
	}
	acceptance := map[string]any{}
	if record.Accepted != nil {
		acceptance = map[string]any{"by": record.Accepted.By, "at": stamp(record.Accepted.At), "changed": record.Accepted.Changed}
	}
	return &logical.Response{Data: map[string]any{
		"nodes": present(record.Nodes), "ca_cert": record.CACert, "tls_server_name": record.TLSServerName, "tls_pins": present(record.TLSPins),
		"plain_http": record.PlainHTTP, "raft_leader_ca_cert": record.RaftLeaderCA, "timeout": int64(record.Timeout / time.Second),
		"key": record.Key, "spread": record.Spread, "store": record.Store,
		"shares": record.Shares, "threshold": record.Threshold,
		"recovery_shares": record.RecoveryShares, "recovery_threshold": record.RecoveryThreshold,
		"pgp_keys": people, "root_token": record.RootToken, "root_pgp_key": record.RootPGPKey, "watch": record.Watch,
		"updated": stamp(record.Updated), "updated_by": record.UpdatedBy, "accept_destination": acceptance,
	}}, nil
}

func (b *backend) clusterWrite(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	if err := checkName("cluster", name); err != nil {
		return nil, err
	}
	done, err := b.clusters.writing.take(ctx, writingOf(name))
	if err != nil {
		return nil, err
	}
	defer done()
	old, err := b.readCluster(ctx, name)
	if err != nil {
		return nil, err
	}
	record := newClusterRecord()
	if old != nil {
		kept := *old
		record = &kept
	}
	if err := b.mergeCluster(ctx, record, data); err != nil {
		return nil, err
	}
	c, err := record.cluster(name)
	if err != nil {
		return nil, err
	}
	warnings, err := b.checkReferences(ctx, record)
	if err != nil {
		return nil, err
	}
	moved, err := b.checkMove(ctx, name, old, record, data.Get("accept_destination").(bool), by(req))
	if err != nil {
		return nil, err
	}
	if slices.Contains(moved, "spread") || slices.Contains(moved, "key") || slices.Contains(moved, "pgp_keys") {
		warnings = append(warnings, fmt.Sprintf("the shares that are kept are where they were; write clusters/%s/rekey now, which makes new ones and puts "+
			"them where this says. Until then a node may stay sealed", name))
	}
	unasked, err := b.checkOwnVault(ctx, c)
	if err != nil {
		return nil, err
	}
	if len(unasked) > 0 {
		warnings = append(warnings, fmt.Sprintf("%s did not tell yet whether it is the Vault that the mount lives in, which is refused; it is asked "+
			"again before anything is done", summarise(unasked)))
	}
	record.Updated, record.UpdatedBy = time.Now(), by(req)
	if err := b.putCluster(ctx, name, record); err != nil {
		return nil, err
	}
	if len(warnings) == 0 {
		return nil, nil
	}
	response := new(logical.Response)
	for _, warning := range warnings {
		response.AddWarning(warning)
	}
	return response, nil
}

// writingOf names the turn of those who write a cluster's record.
func writingOf(name string) string { return fmt.Sprintf("cluster %q", name) }

// maxNodeTimeout is the longest timeout of an ordinary call to a node.
const maxNodeTimeout = time.Minute

// mergeCluster changes what the request gives and leaves the rest.
func (b *backend) mergeCluster(ctx context.Context, record *clusterRecord, data *framework.FieldData) error {
	_, key := data.GetOk("key")
	_, spread := data.GetOk("spread")
	switch { // one replaces the other
	case key && !spread:
		record.Spread = ""
	case spread && !key:
		record.Key = ""
	}
	merge(data, map[string]*string{
		"ca_cert": &record.CACert, "tls_server_name": &record.TLSServerName, "raft_leader_ca_cert": &record.RaftLeaderCA,
		"key": &record.Key, "spread": &record.Spread, "store": &record.Store,
		"root_token": &record.RootToken, "root_pgp_key": &record.RootPGPKey,
	})
	merge(data, map[string]*[]string{"nodes": &record.Nodes, "tls_pins": &record.TLSPins})
	merge(data, map[string]*bool{"plain_http": &record.PlainHTTP, "watch": &record.Watch})
	merge(data, map[string]*int{
		"shares": &record.Shares, "threshold": &record.Threshold,
		"recovery_shares": &record.RecoveryShares, "recovery_threshold": &record.RecoveryThreshold,
	})
	merge(data, map[string]*map[string]string{"pgp_keys": &record.PGPKeys})
	if timeout, given := duration(data, "timeout"); given {
		record.Timeout = timeout
	}
	if record.Timeout < 0 || record.Timeout > maxNodeTimeout {
		return mistake("timeout %v is out of range; use 1 to %d seconds, or 0 for the default", record.Timeout, maxNodeTimeout/time.Second)
	}
	if record.RecoveryShares != 0 || record.RecoveryThreshold != 0 {
		record.RecoveryShares = cmp.Or(record.RecoveryShares, defaultShares)
		record.RecoveryThreshold = cmp.Or(record.RecoveryThreshold, defaultThreshold)
	}
	defaults, err := b.settings.get(ctx, b.storage)
	if err != nil {
		return err
	}
	if record.Key == "" && record.Spread == "" {
		record.Key = defaults.DefaultKey
	}
	if record.Store == "" {
		record.Store = defaults.DefaultStore
	}
	switch {
	case record.Key == "" && record.Spread == "":
		return mistake("key is missing, and the mount has no default_key; name the wrapping key, or give spread: \"2 of office, bunker, bank\"")
	case record.Store == "":
		return mistake("store is missing, and the mount has no default_store; name the store that keeps the shares")
	default:
		return nil
	}
}

// checkMove refuses a write by which shares that are kept would go elsewhere than before, unless it says that it is meant:
// whoever answers at a node's address and is taken for it gets them. That is recorded. It returns which fields moved them.
func (b *backend) checkMove(ctx context.Context, name string, old, changed *clusterRecord, accept bool, who string) (moved []string, err error) {
	from := old
	if old == nil {
		from = new(clusterRecord) // it may have been deleted while its material stayed
	}
	if moved = changed.moved(from); len(moved) == 0 {
		return nil, nil
	}
	kept, err := b.clusterMaterial(ctx, name, changed.Store, from.Store)
	if err != nil || len(kept) == 0 {
		return nil, err
	}
	if old != nil && slices.Contains(moved, "store") {
		return nil, mistake("what is kept of cluster %q (%s) lies in store %q, and would not be found in %q; nothing was changed",
			name, strings.Join(kept, ", "), old.Store, changed.Store)
	}
	if !accept {
		return nil, mistake("this write says %s of cluster %q, whose keys are kept (%s): shares would go where they did not go before. Give "+
			"accept_destination=true in the same write where that is meant; nothing was changed", strings.Join(moved, " and "), name, strings.Join(kept, ", "))
	}
	changed.Accepted = &accepted{Changed: moved, By: who, At: time.Now()}
	b.logger.Warn("shares of a cluster may go elsewhere than before", "cluster", name, "changed", strings.Join(moved, ","), "by", who)
	if old == nil {
		return nil, nil // it is written as it was, for all that is known
	}
	return moved, nil
}

func (b *backend) clusterDelete(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	if b.clusters.acts.busy(name) {
		return nil, &statusError{http.StatusServiceUnavailable, fmt.Errorf("cluster %q: %w; try again when it has ended", name, errAtWork)}
	}
	done, err := b.clusters.writing.take(ctx, writingOf(name))
	if err != nil {
		return nil, err
	}
	defer done()
	if !data.Get("force").(bool) {
		var stores []string
		if record, err := b.readCluster(ctx, name); err == nil && record != nil { // a damaged record can be deleted
			stores = []string{record.Store}
		}
		kept, err := b.clusterMaterial(ctx, name, stores...)
		switch {
		case errors.Is(err, custody.ErrInvalid): // no name of a cluster, so nothing is kept
		case err != nil:
			return nil, err
		case len(kept) > 0:
			return nil, mistake("the keys of cluster %q are kept (%s), and nobody would unseal it any more; export or delete them first, or forget the "+
				"cluster with force=true: the material stays where it is", name, strings.Join(slices.Sorted(slices.Values(kept)), ", "))
		}
	}
	if err := b.storage.Delete(ctx, clustersPrefix+name); err != nil {
		return nil, fmt.Errorf("deleting the record of cluster %q: %w", name, err)
	}
	b.clusters.watch.forget(name)
	b.clusters.letters.forget(name)
	b.clusters.acts.forget(name)
	b.logger.Info("a cluster was forgotten", "cluster", name, "by", by(req))
	return nil, nil
}
