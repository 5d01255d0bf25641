package bankvaults_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"vault-plugin-secrets-nitrokey/internal/bankvaults"
)

// manifest is a Secret as kubectl prints it.
func manifest(name string, data map[string][]byte) string {
	var text strings.Builder
	fmt.Fprintf(&text, "apiVersion: v1\nkind: Secret\nmetadata:\n  name: %s\n  namespace: default\n  annotations: {a: b}\ntype: Opaque\ndata:\n", name)
	for key, value := range data {
		fmt.Fprintf(&text, "  %s: %s\n", key, base64.StdEncoding.EncodeToString(value))
	}
	return text.String()
}

func TestSecretsOfKubernetes(t *testing.T) {
	k := newToken(t, now)
	blocks := map[string][]byte{"unrelated": []byte("x")}
	for name, text := range kept() {
		blocks[name] = now(t, k.key, text)
	}
	whole := manifest("vault-unseal-keys", blocks)
	object, err := yaml.YAMLToJSON([]byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	root := map[string][]byte{"vault-root": blocks["vault-root"]}
	unseal := map[string][]byte{"vault-unseal-0": blocks["vault-unseal-0"]}
	for name, test := range map[string]struct {
		text string
		want int
	}{
		"YAML":                 {whole, 7},
		"JSON":                 {string(object), 7},
		"two documents":        {"---\n" + manifest("a", root) + "---\r\n" + manifest("b", unseal) + "--- \n", 2},
		"a List":               {`{"kind":"List","apiVersion":"v1","items":[` + string(object) + `,{"kind":"ConfigMap","data":{"vault-root":"text"}}]}`, 7},
		"a List of its own":    {`{"kind":"SecretList","items":[` + string(object) + `]}`, 7},
		"plain text beside":    {`{"kind":"List","items":[{"kind":"ConfigMap","data":{"vault-root":"no base64!","n":1}},` + string(object) + `]}`, 7},
		"words at the dashes":  {"--- # Source: a\n" + manifest("a", root) + "---\t# b\n" + manifest("b", unseal), 2},
		"ends of documents":    {manifest("a", root) + "...\n---\n" + manifest("b", unseal) + "...\n", 2},
		"copies in two":        {manifest("a", root) + "---\n" + manifest("b", root), 2},
		"base64 in stringData": {"kind: Secret\nstringData:\n  vault-root: " + base64.StdEncoding.EncodeToString(blocks["vault-root"]) + "\n", 1},
	} {
		t.Run(name, func(t *testing.T) {
			copies, err := bankvaults.Secret([]byte(test.text))
			if err != nil || len(copies) != test.want {
				t.Fatalf("%d copies, want %d: %v", len(copies), test.want, err)
			}
			if _, err := bankvaults.Decrypt(t.Context(), k.key, copies, false); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSecretsThatAreNone(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		want error
	}{
		"nothing":                   {"", bankvaults.ErrNothing},
		"no key of its names":       {manifest("a", map[string][]byte{"vault-unseal-999": make([]byte, 256)}), bankvaults.ErrNothing},
		"a ConfigMap":               {"kind: ConfigMap\ndata: {}\n", bankvaults.ErrInvalid},
		"no object":                 {"- 1\n- 2\n", bankvaults.ErrInvalid},
		"no YAML":                   {"kind: [Secret\n", bankvaults.ErrInvalid},
		"a key twice":               {"kind: Secret\nkind: Secret\n", bankvaults.ErrInvalid},
		"a value that is no base64": {"kind: Secret\ndata:\n  vault-root: '!!'\n", bankvaults.ErrInvalid},
		"an empty value":            {"kind: Secret\ndata:\n  vault-root: ''\n", bankvaults.ErrInvalid},
		"a value that is too large": {manifest("a", map[string][]byte{"vault-root": make([]byte, bankvaults.MaxBlock+1)}), bankvaults.ErrInvalid},
		"a List in a List":          {`{"kind":"List","items":[{"kind":"List","items":[{"kind":"Secret"}]}]}`, bankvaults.ErrNothing},
		"an alias":                  {"kind: Secret\nmetadata: &a {name: a}\nmore: *a\n", bankvaults.ErrInvalid},
		"a bomb of aliases":         {"kind: Secret\na: &a " + strings.Repeat("x", 1<<20) + "\nb: [" + strings.Repeat("*a, ", 400) + "]\n", bankvaults.ErrInvalid},
		"a merge of itself":         {"kind: Secret\ndata: &a\n  <<: *a\n", bankvaults.ErrInvalid},
		"a binary name":             {"kind: Secret\ndata:\n  !!binary dmF1bHQtcm9vdA==: AAAA\n", bankvaults.ErrInvalid},
		"a list of lists of lists":  {strings.Repeat("[", 1<<20), bankvaults.ErrInvalid},
		"one key very often":        {"kind: Secret\ndata:\n" + strings.Repeat("  a: b\n", 1<<15), bankvaults.ErrInvalid},
		"very many keys":            {"kind: Secret\nmetadata: {name: a, name: b}\ndata:\n" + numbered(1<<16), bankvaults.ErrInvalid},
		"a value that is a list":    {"kind: Secret\ndata:\n  vault-root: [AAAA]\n", bankvaults.ErrInvalid},
		"more than is read":         {strings.Repeat("#", bankvaults.MaxSecret+1), bankvaults.ErrInvalid},
	} {
		if copies, err := bankvaults.Secret([]byte(test.text)); !errors.Is(err, test.want) {
			t.Errorf("%s: %d copies, %v; want %v", name, len(copies), err, test.want)
		}
	}
	// What was given may be the plain text of a secret by mistake.
	if _, err := bankvaults.Secret([]byte("kind: Secret\ndata:\n  vault-root: s3cr3t!\n")); err == nil || strings.Contains(err.Error(), "s3cr3t") {
		t.Errorf("it says %v", err)
	}
}

// numbered are n different keys of a mapping.
func numbered(n int) string {
	var text strings.Builder
	for i := range n {
		fmt.Fprintf(&text, "  a%d: b\n", i)
	}
	return text.String()
}

func FuzzSecret(f *testing.F) {
	f.Add([]byte(manifest("a", map[string][]byte{"vault-root": make([]byte, 256)})))
	f.Add([]byte(`{"kind":"List","items":[{"kind":"Secret","data":{"vault-unseal-0":"AAAA"}}]}`))
	f.Add([]byte("---\nkind: Secret\nstringData: {vault-test: x}\n---\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		copies, err := bankvaults.Secret(text)
		if err == nil && (len(copies) == 0 || len(copies) > bankvaults.MaxBlocks) {
			t.Errorf("%d copies", len(copies))
		}
		for _, c := range copies {
			if _, known := bankvaults.ParseName(c.Name.String()); !known || len(c.Block) == 0 || len(c.Block) > bankvaults.MaxBlock {
				t.Errorf("%v with %d bytes", c, len(c.Block))
			}
		}
	})
}
