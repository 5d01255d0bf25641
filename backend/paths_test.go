package backend

import (
	"bytes"
	"context"
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// existenceChecks are the only paths that may have one: their records lie in the mount's own storage.
var existenceChecks = []string{"config", "devices/", "stores/", "keys/", "clusters/"}

func TestEveryPathIsDocumented(t *testing.T) {
	m := newMount(t)
	sentence := regexp.MustCompile(`(?s)^[A-Z].*\.$`)
	for _, path := range m.Paths {
		t.Run(path.Pattern, func(t *testing.T) {
			if !sentence.MatchString(path.HelpSynopsis) {
				t.Errorf("synopsis %q is no sentence", path.HelpSynopsis)
			}
			if len(path.HelpDescription) < 30 || !strings.HasSuffix(path.HelpDescription, ".") {
				t.Errorf("description %q explains nothing", path.HelpDescription)
			}
			if path.DisplayAttrs == nil || path.DisplayAttrs.OperationPrefix != operationPrefix {
				t.Error("no OperationPrefix")
			}
			for name, field := range path.Fields {
				checkField(t, name, field)
			}
			for operation, handler := range path.Operations {
				properties := handler.Properties()
				if !sentence.MatchString(properties.Summary) {
					t.Errorf("%s: summary %q is no sentence", operation, properties.Summary)
				}
				checkResponses(t, operation, properties.Responses)
			}
			if path.Operations[logical.ListOperation] != nil && !strings.HasSuffix(path.Pattern, "/?$") && path.Pattern != ".*" {
				t.Errorf("a pattern that lists must end in /?$, else path-help breaks")
			}
		})
	}
}

func checkField(t *testing.T, name string, field *framework.FieldSchema) {
	t.Helper()
	if len(field.Description) < 5 || !strings.HasSuffix(strings.TrimSpace(field.Description), ".") {
		t.Errorf("field %s: description %q is no sentence", name, field.Description)
	}
	secret := regexp.MustCompile(`^(pin|new_pin|passphrase|unlock_passphrase|password|admin_password|client_key)$`).MatchString(name)
	if secret && (field.DisplayAttrs == nil || !field.DisplayAttrs.Sensitive) {
		t.Errorf("field %s is a secret and not marked as sensitive", name)
	}
}

func checkResponses(t *testing.T, operation logical.Operation, responses map[int][]framework.Response) {
	t.Helper()
	good := false
	for code, described := range responses {
		good = good || code < 300 || code == 404
		for _, response := range described {
			if response.Description == "" {
				t.Errorf("%s: response %d is not described", operation, code)
			}
			if code == 200 && response.Fields == nil {
				t.Errorf("%s: response 200 has no fields", operation)
			}
			for name, field := range response.Fields {
				if field.Description == "" {
					t.Errorf("%s: field %s of response %d is not described", operation, name, code)
				}
			}
		}
	}
	if !good {
		t.Errorf("%s: no answer but errors is documented", operation)
	}
	for _, code := range []int{400, 503} {
		if responses[code] == nil {
			t.Errorf("%s: response %d is not documented", operation, code)
		}
	}
}

func TestErrorsAreDocumentedWhereTheyOccur(t *testing.T) {
	m := newMount(t)
	for _, test := range []struct {
		operation logical.Operation
		path      string
		codes     []int
	}{
		{logical.ReadOperation, "devices/a", []int{404}},
		{logical.UpdateOperation, "devices/a", nil},
		{logical.DeleteOperation, "devices/a", nil},
		{logical.ListOperation, "devices/", []int{404}},
		{logical.ListOperation, "devices/a/keys/", []int{404}},
		{logical.UpdateOperation, "devices/a/pin", []int{404}},
		{logical.UpdateOperation, "stores/a", []int{409, 507}},
		{logical.UpdateOperation, "keys/a", []int{404}},
		{logical.UpdateOperation, "unwrap/a", []int{404}},
		{logical.UpdateOperation, "decrypt/a", []int{404}},
		{logical.ReadOperation, "material/c/a", []int{404, 409}},
		{logical.UpdateOperation, "material/c/a", []int{404, 409, 507}},
		{logical.UpdateOperation, "material/c/a/open", []int{404, 409}},
		{logical.DeleteOperation, "material/c/a", []int{409}},
		{logical.ReadOperation, "clusters/a", []int{404}},
		{logical.UpdateOperation, "clusters/a", nil},
		{logical.DeleteOperation, "clusters/a", nil},
		{logical.UpdateOperation, "clusters/a/init", []int{404, 409, 507}},
		{logical.UpdateOperation, "clusters/a/unseal", []int{404, 409, 507}},
		{logical.ReadOperation, "clusters/a/status", []int{404, 409}},
		{logical.UpdateOperation, "random", nil},
		{logical.ReadOperation, "config", nil},
	} {
		responses := m.Route(test.path).Operations[test.operation].Properties().Responses
		for _, code := range []int{404, 409, 507} {
			if documented := responses[code] != nil; documented != slices.Contains(test.codes, code) {
				t.Errorf("%s %s: %d documented: %v", test.operation, test.path, code, documented)
			}
		}
	}
}

func TestExistenceChecksOnlyAskTheMountsOwnStorage(t *testing.T) {
	m := newMount(t)
	for _, path := range m.Paths {
		allowed := slices.ContainsFunc(existenceChecks, func(prefix string) bool {
			return strings.HasPrefix(strings.TrimPrefix(path.Pattern, "^"), prefix)
		})
		if path.ExistenceCheck != nil && !allowed {
			t.Errorf("%s has an existence check: an error of it would be a bare 500, and policies for seals grant update only", path.Pattern)
		}
		if path.ExistenceCheck == nil && path.Operations[logical.CreateOperation] != nil {
			t.Errorf("%s creates without an existence check", path.Pattern)
		}
	}
}

func TestOpenAPIDocumentIsWholeAndItsOperationIDsAreUnique(t *testing.T) {
	m := newMount(t)
	var log bytes.Buffer
	config := logical.TestBackendConfig()
	config.Logger = hclog.New(&hclog.LoggerOptions{Output: &log, Level: hclog.Warn})
	config.StorageView = m.storage
	config.System = m.System()
	if err := m.Setup(context.Background(), config); err != nil {
		t.Fatal(err)
	}
	response, err := m.HandleRequest(context.Background(), &logical.Request{Operation: logical.HelpOperation, Storage: m.storage})
	if err != nil {
		t.Fatal(err)
	}
	if log.Len() > 0 {
		t.Errorf("making the document warned: %s", log.String())
	}
	raw, err := json.Marshal(response.Data["openapi"])
	if err != nil {
		t.Fatal(err)
	}
	var document struct {
		Paths map[string]map[string]json.RawMessage
	}
	if err := json.Unmarshal(raw, &document); err != nil {
		t.Fatal(err)
	}
	ids := map[string]string{}
	for path, item := range document.Paths {
		for _, method := range []string{"get", "post", "delete"} {
			if item[method] == nil {
				continue
			}
			var operation struct {
				OperationID string
				Summary     string
			}
			if err := json.Unmarshal(item[method], &operation); err != nil {
				t.Fatal(err)
			}
			if other, taken := ids[operation.OperationID]; taken {
				t.Errorf("operation id %q belongs to %s and to %s %s", operation.OperationID, other, method, path)
			}
			ids[operation.OperationID] = method + " " + path
			if !strings.HasPrefix(operation.OperationID, operationPrefix+"-") {
				t.Errorf("operation id %q of %s %s has no prefix", operation.OperationID, method, path)
			}
		}
	}
	for _, want := range []string{
		"/config", "/devices/", "/devices/{name}", "/devices/{name}/status", "/devices/{name}/keys/", "/devices/{name}/unlock",
		"/devices/{name}/lock", "/devices/{name}/unbar", "/devices/{name}/pin", "/stores/", "/stores/{name}", "/keys/", "/keys/{name}",
		"/keys/{name}/backup", "/keys/{name}/restore", "/keys/{name}/public.pem", "/keys/{name}/rotate", "/keys/{name}/recipients",
		"/wrap/{name}", "/unwrap/{name}", "/rewrap/{name}", "/encrypt/{name}", "/decrypt/{name}", "/random", "/health",
		"/material/", "/material/{cluster}/", "/material/{cluster}/{name}", "/material/{cluster}/{name}/open",
		"/material/{cluster}/{name}/accept-generation",
		"/clusters/", "/clusters/{name}", "/clusters/{name}/init", "/clusters/{name}/unseal", "/clusters/{name}/status", "/clusters/{name}/rekey",
		"/clusters/{name}/root", "/clusters/{name}/alarm",
	} {
		if document.Paths[want] == nil {
			t.Errorf("the document lacks %s; it has %v", want, keysOf(document.Paths))
		}
	}
}

func TestPathHelpWorksForEveryPath(t *testing.T) {
	m := newMount(t)
	for _, path := range []string{
		"", "config", "devices", "devices/a", "devices/a/keys", "stores", "keys", "keys/a", "keys/a/public.pem", "wrap/a", "material",
		"material/c", "material/c/n", "material/c/n/open", "clusters", "clusters/c", "clusters/c/init", "clusters/c/unseal", "clusters/c/root", "health", "nothing/here",
	} {
		response, err := m.HandleRequest(context.Background(), &logical.Request{Operation: logical.HelpOperation, Path: path})
		if err != nil {
			t.Errorf("path-help %q: %v", path, err)
			continue
		}
		if help, _ := response.Data["help"].(string); len(help) < 100 {
			t.Errorf("path-help %q says only %q", path, help)
		}
	}
}
