package backend

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// nameSyntax is the syntax of the names that a request's path carries: what Vault's own engines take.
var nameSyntax = regexp.MustCompile("^" + framework.GenericNameRegex("name") + "$")

func validName(name string) bool { return nameSyntax.MatchString(name) && len(name) <= maxName }

// maxName is the longest name in bytes. Two of them and a prefix make the name of a stored item.
const maxName = 64

// nameField describes a name that the request's path carries.
func nameField(description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: framework.TypeString, Description: description, Required: true}
}

// checkName refuses names that are too long to be stored; the pattern of the path checked their characters.
func checkName(what, name string) error {
	if len(name) > maxName {
		return mistake("the name of the %s has %d characters; use at most %d", what, len(name), maxName)
	}
	return nil
}

// answer documents a response with fields.
func answer(code int, description string, fields map[string]*framework.FieldSchema) map[int][]framework.Response {
	return map[int][]framework.Response{code: {{Description: description, Fields: fields}}}
}

// noContent documents a response without a body.
func noContent(description string) map[int][]framework.Response {
	return map[int][]framework.Response{http.StatusNoContent: {{Description: description}}}
}

// configured documents a write without an answer, unless there is something to warn of.
func configured(description string) map[int][]framework.Response {
	responses := noContent(description)
	responses[http.StatusOK] = []framework.Response{{
		Description: "The same; read the warnings.", Fields: map[string]*framework.FieldSchema{},
	}}
	return responses
}

// listAnswer documents a list, with something about each entry where info says what.
func listAnswer(keys, info string) map[int][]framework.Response {
	fields := map[string]*framework.FieldSchema{
		"keys": {Type: framework.TypeStringSlice, Description: keys},
	}
	if info != "" {
		fields["key_info"] = &framework.FieldSchema{Type: framework.TypeMap, Description: info}
	}
	return answer(http.StatusOK, "The names, sorted.", fields)
}

// listPath is a path that only lists.
func listPath(pattern, suffix, synopsis string, list framework.OperationFunc) *framework.Path {
	return &framework.Path{
		Pattern:      pattern,
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: suffix},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: &framework.PathOperation{
				Callback:  list,
				Summary:   synopsis,
				Responses: listAnswer("The names.", ""),
			},
		},
		HelpSynopsis:    synopsis,
		HelpDescription: "The answer holds the names, sorted; read each for more.",
	}
}

// duration reads a field of TypeDurationSecond.
func duration(data *framework.FieldData, field string) (given time.Duration, ok bool) {
	value, ok := data.GetOk(field)
	if !ok {
		return 0, false
	}
	seconds := value.(int)
	return time.Duration(seconds) * time.Second, true
}

// present is a list that is shown as empty, not as null.
func present(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

// requestIDField is the field that makes a creating request repeatable.
func requestIDField() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type: framework.TypeString,
		Description: "Optional. Names this request, so that a repetition of it is recognised and does nothing twice. Clients " +
			"repeat a request on their own after a 5xx answer. At most 128 characters.",
	}
}

// maxRequestID is the longest request_id in bytes.
const maxRequestID = 128

func requestID(data *framework.FieldData) (string, error) {
	id := data.Get("request_id").(string)
	if len(id) > maxRequestID {
		return "", mistake("request_id has %d characters; use at most %d", len(id), maxRequestID)
	}
	return id, nil
}

// exists tells whether the mount's storage has an entry: the only kind of existence check that there is here, because an
// error of one becomes a bare 500.
func (b *backend) exists(ctx context.Context, key string) (bool, error) {
	entry, err := b.storage.Get(ctx, key)
	if err != nil {
		return false, fmt.Errorf("looking up %s: %w", key, err)
	}
	return entry != nil, nil
}

// listNames lists the names under a prefix of the mount's storage.
func (b *backend) listNames(ctx context.Context, prefix string) (*logical.Response, error) {
	names, err := b.storage.List(ctx, prefix)
	if err != nil {
		return nil, fmt.Errorf("listing %s: %w", strings.TrimSuffix(prefix, "/"), err)
	}
	return logical.ListResponse(names), nil
}

// by says who makes a request, for the records: the display name of the token, and its entity where it has one.
func by(req *logical.Request) string {
	name := req.DisplayName
	if name == "" {
		name = "unknown"
	}
	if req.EntityID != "" {
		name += " (entity " + req.EntityID + ")"
	}
	return name
}
