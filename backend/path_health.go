package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// healthTimeout is how long one device or store gets to answer. A monitor asks often, and wants to hear of the others.
const healthTimeout = 10 * time.Second

func (b *backend) healthPaths() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"usable":  {Type: framework.TypeBool, Description: "Whether at least one device can open envelopes now.", Required: true},
		"version": {Type: framework.TypeString, Description: "The version of the plugin.", Required: true},
		"devices": {Type: framework.TypeMap, Description: "Each device: usable, error, state, serial, keys, round_trip_ms; a NetHSM also nodes.", Required: true},
		"stores":  {Type: framework.TypeMap, Description: "Each store: usable, error, type.", Required: true},
		"leases": {
			Type: framework.TypeMap, Required: true,
			Description: "By wrapping key: the key encryption keys that are held open, each with version, kek, until and locked. Empty in strict mode.",
		},
		"clusters": {
			Type: framework.TypeMap, Required: true,
			Description: "Each cluster in custody, as the watch found it last: watched, looked, and the nodes that are troubled: sealed, or not served.",
		},
	}
	return []*framework.Path{{
		Pattern:      "health",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "health"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback: b.health,
				Summary:  "Find out how all devices and stores of the mount fare.",
				Responses: map[int][]framework.Response{
					http.StatusOK: {{Description: "At least one device can open.", Fields: fields}},
					http.StatusServiceUnavailable: {{
						Description: "No device can open. The body holds the same data beside the errors.",
					}},
				},
			},
		},
		HelpSynopsis: "All devices and stores at a glance.",
		HelpDescription: "200 where at least one device can open envelopes, 503 where none can; the data says why in both cases. " +
			"Each device performs one private-key operation, at most once in five seconds.",
	}}
}

func (b *backend) health(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	devices, err := b.storage.List(ctx, devicesPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the devices: %w", err)
	}
	stores, err := b.storage.List(ctx, storesPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the stores: %w", err)
	}
	clusters, err := b.clustersHealth(ctx)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	data := map[string]any{
		"version": Version, "clusters": clusters, "leases": b.leasesHealth(),
		"devices": askAll(devices, func(name string) map[string]any { return b.deviceHealth(ctx, name) }),
		"stores":  askAll(stores, func(name string) map[string]any { return b.storeHealth(ctx, name) }),
	}
	usable := false
	for _, device := range data["devices"].(map[string]any) {
		usable = usable || device.(map[string]any)["usable"] == true
	}
	data["usable"] = usable
	if usable {
		return &logical.Response{Data: data}, nil
	}
	problem := "no device of this mount can open envelopes now"
	if len(devices) == 0 {
		problem = "this mount has no device; write devices/NAME first"
	}
	body, err := json.Marshal(map[string]any{"request_id": req.ID, "errors": []string{problem}, "data": data})
	if err != nil {
		return nil, fmt.Errorf("encoding the health of the mount: %w", err)
	}
	return &logical.Response{Data: map[string]any{
		logical.HTTPContentType: "application/json",
		logical.HTTPStatusCode:  http.StatusServiceUnavailable,
		logical.HTTPRawBody:     string(body),
	}}, nil
}

// askAll asks all at one time, so that one that hangs costs the others nothing.
func askAll(names []string, ask func(name string) map[string]any) map[string]any {
	answers := make([]map[string]any, len(names))
	var group sync.WaitGroup
	for i, name := range names {
		group.Go(func() { answers[i] = ask(name) })
	}
	group.Wait()
	all := map[string]any{}
	for i, name := range names {
		all[name] = answers[i]
	}
	return all
}

func (b *backend) deviceHealth(ctx context.Context, name string) map[string]any {
	handle, err := b.handle(ctx, name)
	if err != nil {
		return map[string]any{"usable": false, "error": err.Error()}
	}
	status := handle.Status(ctx)
	shown := showStatus(status)
	if status.Err == nil && !status.CanOpen() {
		shown["error"] = fmt.Sprintf("device %q answers and holds no key that can open an envelope; make or adopt one with keys/NAME", name)
	}
	health := map[string]any{
		"usable": status.CanOpen(), "error": shown["error"], "state": shown["state"], "serial": shown["serial"],
		"keys": shown["keys"], "round_trip_ms": shown["round_trip_ms"],
	}
	if nodes, clustered := shown["nodes"]; clustered {
		health["nodes"] = nodes
	}
	return health
}

func (b *backend) storeHealth(ctx context.Context, name string) map[string]any {
	record, err := b.readStore(ctx, name)
	if err != nil || record == nil {
		return map[string]any{"usable": false, "error": fmt.Sprint(errors.Join(err, errNoStore))}
	}
	shown := map[string]any{"type": record.Type, "usable": true, "error": ""}
	opened, err := b.Store(ctx, name)
	if err == nil {
		_, err = opened.Get(ctx, "nitroseal-health") // reading what is not there shows that reading works
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		shown["usable"], shown["error"] = false, err.Error()
	}
	return shown
}

// clustersHealth tells what the watch knows; no node is asked.
func (b *backend) clustersHealth(ctx context.Context) (map[string]any, error) {
	names, err := b.storage.List(ctx, clustersPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing the clusters: %w", err)
	}
	shown := map[string]any{}
	for _, name := range names {
		record, err := b.readCluster(ctx, name)
		if err != nil {
			shown[name] = map[string]any{"error": err.Error()}
			continue
		}
		if record == nil {
			continue // it was deleted just now
		}
		looked, troubled := b.clusters.watch.troubled(name, record.Nodes)
		shown[name] = map[string]any{"watched": record.Watch, "looked": stamp(looked), "troubled": present(troubled), "error": ""}
	}
	return shown, nil
}
