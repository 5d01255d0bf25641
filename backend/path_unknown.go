package backend

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// unknownPaths is the last path: it catches every request that no other took, and says what is wrong with it.
func (b *backend) unknownPaths() []*framework.Path {
	operations := map[logical.Operation]framework.OperationHandler{}
	for _, operation := range []logical.Operation{
		logical.ReadOperation, logical.UpdateOperation, logical.DeleteOperation, logical.ListOperation,
	} {
		operations[operation] = &framework.PathOperation{
			Callback:    b.unknown,
			Summary:     "Answer that there is no such path.",
			Unpublished: true,
			Responses:   answer(http.StatusNotFound, "There is no such path; the error names the nearest.", nil),
		}
	}
	return []*framework.Path{{
		Pattern:             ".*",
		TakesArbitraryInput: true,
		DisplayAttrs:        &framework.DisplayAttributes{OperationPrefix: operationPrefix},
		Operations:          operations,
		HelpSynopsis:        "Any other path is answered with what is wrong with it.",
		HelpDescription:     "There is nothing here. `vault path-help` on the mount lists the paths that there are.",
	}}
}

// shapes are the paths that there are, by their first part.
var shapes = map[string]string{
	"config":   "config",
	"devices":  "devices/NAME, and below it status, keys, unlock, lock, unbar and pin",
	"stores":   "stores/NAME",
	"keys":     "keys/NAME, and below it backup, restore, public.pem, rotate and recipients",
	"wrap":     "wrap/KEY",
	"unwrap":   "unwrap/KEY",
	"rewrap":   "rewrap/KEY",
	"encrypt":  "encrypt/KEY",
	"decrypt":  "decrypt/KEY",
	"material": "material/CLUSTER/NAME, and below it open and accept-generation",
	"clusters": "clusters/NAME, and below it init, unseal, status, rekey, root and alarm",
	"random":   "random",
	"health":   "health",
}

func (b *backend) unknown(_ context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	sentence := unknownPath(req.Path)
	// The CLI's read shows the warnings of a 404 only, its write and curl the errors.
	body, err := json.Marshal(map[string]any{"errors": []string{sentence}, "warnings": []string{sentence}})
	if err != nil {
		return nil, fmt.Errorf("encoding the answer to an unknown path: %w", err)
	}
	return &logical.Response{Data: map[string]any{
		logical.HTTPContentType: "application/json",
		logical.HTTPStatusCode:  http.StatusNotFound,
		logical.HTTPRawBody:     string(body), // a string is hashed in the audit log; bytes are not
	}}, nil
}

func unknownPath(path string) string {
	first, _, _ := strings.Cut(path, "/")
	if shape, known := shapes[first]; known {
		return fmt.Sprintf("there is no path %q here; what there is: %s. Names consist of letters, digits, \".\", \"_\" and \"-\", "+
			"and begin and end with a letter, a digit or \"_\"", path, shape)
	}
	return fmt.Sprintf("there is no path %q here; `vault path-help` on the mount lists the paths that there are", path)
}
