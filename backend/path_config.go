package backend

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// Bounds of request_timeout. Vault gives a request up at 90 seconds with a 500 that says nothing, its clients at 60.
const (
	defaultRequestTimeout = 45 * time.Second
	minRequestTimeout     = time.Second
	maxRequestTimeout     = 80 * time.Second
)

// settings are the mount's defaults, stored as JSON.
type settings struct {
	RequestTimeout time.Duration `json:"request_timeout"`
	DefaultKey     string        `json:"default_key,omitempty"`
	DefaultStore   string        `json:"default_store,omitempty"`
}

// settingsCache keeps the settings in memory: every request asks for them.
type settingsCache struct {
	// writing is held while the settings are read, changed and written.
	writing turns

	mu     sync.Mutex // guards what follows
	cached *settings
	writes int // counts forget and put, so that a read that began before one does not cache what it replaced
}

func (c *settingsCache) get(ctx context.Context, storage logical.Storage) (settings, error) {
	c.mu.Lock()
	cached, writes := c.cached, c.writes
	c.mu.Unlock()
	if cached != nil {
		return *cached, nil
	}
	read := settings{RequestTimeout: defaultRequestTimeout}
	entry, err := storage.Get(ctx, configKey)
	if err != nil {
		return read, fmt.Errorf("reading the mount's configuration: %w", err)
	}
	if entry != nil {
		if err := json.Unmarshal(entry.Value, &read); err != nil {
			return read, fmt.Errorf("reading the mount's configuration: %w", err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writes == writes {
		c.cached = &read
	}
	return read, nil
}

func (c *settingsCache) put(ctx context.Context, storage logical.Storage, changed settings) error {
	entry, err := logical.StorageEntryJSON(configKey, changed)
	if err != nil {
		return fmt.Errorf("writing the mount's configuration: %w", err)
	}
	defer c.forget()
	if err := storage.Put(ctx, entry); err != nil {
		return fmt.Errorf("writing the mount's configuration: %w", err)
	}
	return nil
}

func (c *settingsCache) forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cached = nil
	c.writes++
}

// defaultStore is custody's view of the settings.
func (b *backend) defaultStore(ctx context.Context) (string, error) {
	current, err := b.settings.get(ctx, b.storage)
	return current.DefaultStore, err
}

// bound gives a request its deadline, and ends it when the mount is cleaned up.
func (b *backend) bound(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	stop := context.AfterFunc(b.closing, cancel)
	return ctx, func() { stop(); cancel() }
}

func (b *backend) configPaths() []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"request_timeout": {
			Type: framework.TypeDurationSecond,
			Description: "How long a request may take before it is answered with 503, 1 to 80 seconds. Vault itself answers " +
				"500 at 90 seconds and most clients give up at 60. The default is 45.",
			Default: int(defaultRequestTimeout / time.Second),
		},
		"default_key": {
			Type:        framework.TypeString,
			Description: "The wrapping key that seals material whose write names none.",
		},
		"default_store": {
			Type:        framework.TypeString,
			Description: "The store that keeps material whose write names none.",
		},
	}
	return []*framework.Path{{
		Pattern:        "config",
		Fields:         fields,
		ExistenceCheck: b.configExists,
		DisplayAttrs:   &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: &framework.PathOperation{
				Callback:     b.configRead,
				Summary:      "Read the mount's defaults.",
				DisplayAttrs: &framework.DisplayAttributes{OperationSuffix: "configuration"},
				Responses:    answer(http.StatusOK, "The defaults in force.", fields),
			},
			logical.CreateOperation: b.configWriteOperation(),
			logical.UpdateOperation: b.configWriteOperation(),
		},
		HelpSynopsis: "The defaults of this mount.",
		HelpDescription: "Set the time that a request may take, and the wrapping key and store that material goes to where " +
			"its write names none. Fields that a write leaves out keep their values.",
	}}
}

func (b *backend) configWriteOperation() *framework.PathOperation {
	return &framework.PathOperation{
		Callback:                    b.configWrite,
		Summary:                     "Change the mount's defaults.",
		DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "configure"},
		Responses:                   noContent("The defaults were changed."),
		ForwardPerformanceStandby:   true,
		ForwardPerformanceSecondary: true,
	}
}

func (b *backend) configExists(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (bool, error) {
	return b.exists(ctx, configKey)
}

func (b *backend) configRead(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	current, err := b.settings.get(ctx, b.storage)
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{
		"request_timeout": int64(current.RequestTimeout / time.Second),
		"default_key":     current.DefaultKey,
		"default_store":   current.DefaultStore,
	}}, nil
}

func (b *backend) configWrite(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	done, err := b.settings.writing.take(ctx, "the mount's configuration")
	if err != nil {
		return nil, err
	}
	defer done()
	changed, err := b.settings.get(ctx, b.storage)
	if err != nil {
		return nil, err
	}
	if timeout, given := duration(data, "request_timeout"); given {
		changed.RequestTimeout = timeout
	}
	if changed.RequestTimeout < minRequestTimeout || changed.RequestTimeout > maxRequestTimeout {
		return nil, mistake("request_timeout %v is out of range; use %v to %v", changed.RequestTimeout, minRequestTimeout, maxRequestTimeout)
	}
	for field, target := range map[string]*string{"default_key": &changed.DefaultKey, "default_store": &changed.DefaultStore} {
		if name, given := data.GetOk(field); given {
			*target = name.(string)
			if *target != "" && !validName(*target) {
				return nil, mistake("%s %q is not a name; use letters, digits, \".\", \"_\" and \"-\"", field, *target)
			}
		}
	}
	return nil, b.settings.put(ctx, b.storage, changed)
}
