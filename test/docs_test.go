package test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestDocumentedCommandsExist compares every vault command on the mount that a page or the demo shows with what the
// plugin itself says of its paths, operations and fields.
func TestDocumentedCommandsExist(t *testing.T) {
	site := vaulttest.StartSite(t, vaulttest.SiteOptions{})
	paths := readOpenAPI(t, site)
	pages := []string{"README.md", "docs/operations.md", "docs/nethsm.md", "scripts/demo", "scripts/demo-nethsm", "scripts/stage"}
	found := 0
	for _, page := range pages {
		content, err := os.ReadFile(filepath.Join(vaulttest.Root(), page))
		must(t, err)
		joined := strings.ReplaceAll(string(content), "\\\n", " ")
		for _, match := range documented.FindAllStringSubmatch(joined, -1) {
			found++
			verb, path, rest := match[1], match[2], match[3]
			if err := paths.check(verb, path, rest); err != nil {
				t.Errorf("%s: vault %s nitrokey/%s: %v", page, verb, path, err)
			}
		}
	}
	if found < 60 {
		t.Errorf("only %d commands were found: do the pages look different now?", found)
	}
}

// documented is a vault command: its verb, path and arguments.
var documented = regexp.MustCompile(`(?m)vault (write|read|list|delete)(?: -[-a-z]+(?:=\w+)?)* nitrokey/(\S+)([^\n]*)`)

// argument is a field of a command, outside of what a shell substitutes.
var argument = regexp.MustCompile(`(?:^|\s)"?([a-z_0-9]+)=`)

// described is a path of the plugin: a pattern for it, and its fields by HTTP method.
type described struct {
	pattern *regexp.Regexp
	fields  map[string][]string
	listed  bool
}

type describedPaths []described

func (paths describedPaths) check(verb, path, rest string) error {
	path = strings.TrimRight(path, "`\")'")
	for _, p := range paths {
		if !p.pattern.MatchString(path) {
			continue
		}
		method := map[string]string{"write": "post", "read": "get", "list": "get", "delete": "delete"}[verb]
		fields, ok := p.fields[method]
		if !ok || verb == "list" && !p.listed {
			continue
		}
		if verb != "write" {
			return nil
		}
		unquoted := regexp.MustCompile(`\$\([^)]*\)`).ReplaceAllString(rest, "X")
		for _, name := range argument.FindAllStringSubmatch(unquoted, -1) {
			if !slices.Contains(fields, name[1]) {
				return fmt.Errorf("it has no field %q, but %v", name[1], fields)
			}
		}
		return nil
	}
	return fmt.Errorf("there is no such path and operation")
}

// readOpenAPI reads what the plugin says of itself.
func readOpenAPI(t *testing.T, site *vaulttest.Site) describedPaths {
	t.Helper()
	response, err := site.Client(t).Logical().ReadRaw("sys/internal/specs/openapi")
	must(t, err)
	defer response.Body.Close()
	var document struct {
		Paths      map[string]map[string]json.RawMessage `json:"paths"`
		Components struct {
			Schemas map[string]struct {
				Properties map[string]json.RawMessage `json:"properties"`
			} `json:"schemas"`
		} `json:"components"`
	}
	must(t, json.NewDecoder(response.Body).Decode(&document))

	var paths describedPaths
	for path, item := range document.Paths {
		inMount, ours := strings.CutPrefix(path, "/{nitrokey_mount_path}/")
		if !ours {
			inMount, ours = strings.CutPrefix(path, "/nitrokey/")
		}
		if !ours {
			continue
		}
		pattern := regexp.MustCompile(`\\\{[a-z_]+\\\}`).ReplaceAllString(regexp.QuoteMeta(strings.TrimSuffix(inMount, "/")), `[^/]+`)
		p := described{pattern: regexp.MustCompile("^" + pattern + "/?$"), fields: map[string][]string{}}
		for method, raw := range item {
			if method != "get" && method != "post" && method != "delete" {
				continue
			}
			var operation struct {
				ID         string `json:"operationId"`
				Parameters []struct {
					Name string `json:"name"`
				} `json:"parameters"`
			}
			must(t, json.Unmarshal(raw, &operation))
			names := []string{}
			for _, parameter := range operation.Parameters {
				names = append(names, parameter.Name)
				p.listed = p.listed || parameter.Name == "list"
			}
			// Vault loses the reference to the schema on its way out of a plugin, but not its name.
			for field := range document.Components.Schemas[camelCase(operation.ID)+"Request"].Properties {
				names = append(names, field)
			}
			p.fields[method] = names
		}
		paths = append(paths, p)
	}
	if len(paths) < 20 {
		t.Fatalf("the plugin describes %d paths only", len(paths))
	}
	return paths
}

// camelCase turns "nitrokey-generate-random" into "NitrokeyGenerateRandom".
func camelCase(id string) string {
	var name strings.Builder
	for word := range strings.SplitSeq(id, "-") {
		if word != "" {
			name.WriteString(strings.ToUpper(word[:1]) + word[1:])
		}
	}
	return name.String()
}
