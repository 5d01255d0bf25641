//go:build bench

package backend

import (
	"context"
	"net/http"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// benchPaths is a path that does nothing: what a request costs that does no work. Only builds for benchmarks have it.
func (b *backend) benchPaths() []*framework.Path {
	echoed := map[string]*framework.FieldSchema{"value": {Type: framework.TypeString, Description: "Given back as it came."}}
	return []*framework.Path{{
		Pattern:      "echo",
		Fields:       echoed,
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationVerb: "echo"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback: func(_ context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
					return &logical.Response{Data: map[string]any{"value": data.Get("value")}}, nil
				},
				Summary:   "Give a value back.",
				Responses: answer(http.StatusOK, "The value.", echoed),
			},
		},
		HelpSynopsis:    "Give a value back, to measure what a request costs.",
		HelpDescription: "Only builds for benchmarks have this path.",
	}}
}
