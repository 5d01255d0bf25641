package backend

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// guard wraps every handler of a path. Vault's framework only warns of fields that it does not know, gives a request no
// deadline, and lets errors through as they are: 500 to a client that then repeats the request three times.
func (b *backend) guard(path *framework.Path) {
	captured := captures(path.Pattern)
	for kind, handler := range path.Operations {
		operation, ok := handler.(*framework.PathOperation)
		if !ok {
			panic(fmt.Sprintf("path %s: operation of type %T", path.Pattern, handler)) // a bug of this package
		}
		operation.Callback = b.guarded(path, captured, operation.Callback)
		describeFailures(path.Pattern, captured, kind, operation)
	}
	if check := path.ExistenceCheck; check != nil {
		path.ExistenceCheck = func(ctx context.Context, req *logical.Request, data *framework.FieldData) (bool, error) {
			ctx, cancel := b.bound(ctx, defaultRequestTimeout)
			defer cancel()
			return check(ctx, req, data)
		}
	}
}

func (b *backend) guarded(path *framework.Path, captured []string, handle framework.OperationFunc) framework.OperationFunc {
	return func(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
		if err := checkFields(path, captured, req, data); err != nil {
			return b.fail(ctx, req, err)
		}
		current, err := b.settings.get(ctx, b.storage)
		if err != nil {
			return b.fail(ctx, req, err)
		}
		ctx, cancel := b.bound(ctx, current.RequestTimeout)
		defer cancel()
		response, err := handle(ctx, req, data)
		if err != nil {
			return b.fail(ctx, req, err)
		}
		return response, nil
	}
}

// checkFields refuses what the path does not know: a misspelt field is otherwise silently ignored, and the value that
// was meant for it lost.
func checkFields(path *framework.Path, captured []string, req *logical.Request, data *framework.FieldData) error {
	if path.TakesArbitraryInput {
		return nil
	}
	for _, field := range slices.Sorted(maps.Keys(req.Data)) {
		if path.Fields[field] == nil {
			return mistake("%s", unknownField(field, path, captured))
		}
		if slices.Contains(captured, field) && fmt.Sprint(req.Data[field]) != data.Get(field) {
			return mistake("the field %q says %q, and the request's path says %q; leave the field out", field, req.Data[field], data.Get(field))
		}
	}
	return nil
}

func unknownField(field string, path *framework.Path, captured []string) string {
	var known []string
	for name := range path.Fields {
		if !slices.Contains(captured, name) {
			known = append(known, name)
		}
	}
	if known == nil {
		return fmt.Sprintf("unknown field %q; this request takes none", field)
	}
	slices.Sort(known)
	return fmt.Sprintf("unknown field %q; this path knows %s", field, strings.Join(known, ", "))
}

// captures lists the names that a pattern takes out of the request's path.
func captures(pattern string) []string {
	names := regexp.MustCompile(pattern).SubexpNames()
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name == "" })
}
