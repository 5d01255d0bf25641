package envelope

import (
	"bytes"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files that are missing; none is ever replaced")

// golden is an envelope that every later release must open. Its file is testdata/golden/<name>.jwe.
type golden struct {
	name    string
	context Context
	to      []string
	sha1    bool // RSA-OAEP with SHA-1 for the RSA keys
	payload string
}

// goldens lists the golden files: each algorithm alone and among others, and each use.
func goldens() []golden {
	const payload = "a test payload"
	full := wrapContext()
	list := []golden{
		{name: "rsa-2048", context: full, to: []string{rsa2048}, payload: payload},
		{name: "rsa-2048-sha1", context: full, to: []string{rsa2048}, sha1: true, payload: payload},
		{name: "rsa-3072", context: full, to: []string{rsa3072}, payload: payload},
		{name: "ec-p256", context: full, to: []string{ecP256}, payload: payload},
		{name: "ec-p384", context: full, to: []string{ecP384}, payload: payload},
		{name: "two-rsa", context: full, to: []string{rsa2048, rsa3072}, payload: payload},
		{name: "two-rsa-sha1", context: full, to: []string{rsa2048, rsa3072}, sha1: true, payload: payload},
		{name: "two-ec", context: full, to: []string{ecP256, ecP384}, payload: payload},
		{name: "four", context: full, to: testKeys, payload: payload},
		{name: "empty", context: plainContext(), to: []string{rsa2048}, payload: ""},
	}
	for _, use := range Uses() {
		c := Context{Use: use, Key: "prod", Version: 1}
		value := payload
		switch use {
		case UseMaterial:
			c = materialContext()
		case UseAuth:
			value = string(testAuth[:])
		}
		list = append(list,
			golden{name: "use-" + string(use), context: c, to: []string{rsa2048}, payload: value},
			golden{name: "use-" + string(use) + "-four", context: c, to: testKeys, payload: value})
	}
	for _, carried := range leasedGoldens() {
		list = append(list, golden{
			name: carried.kek, context: kekContext("prod", 1, KEKID([]byte(testKEK))), to: carried.to, payload: testKEK,
		})
	}
	return list
}

func (g golden) path() string { return filepath.Join("testdata", "golden", g.name+".jwe") }

func (g golden) parties(t testing.TB) []party {
	t.Helper()
	var to []party
	for _, name := range g.to {
		algorithm := Algorithm("")
		if g.sha1 {
			algorithm = RSAOAEP
		}
		to = append(to, load(t, name, algorithm))
	}
	return to
}

func (g golden) read(t testing.TB) []byte {
	t.Helper()
	raw, err := os.ReadFile(g.path())
	if errors.Is(err, fs.ErrNotExist) && *update {
		raw = mustSeal(t, g.context, []byte(g.payload), g.parties(t)...)
		err = os.WriteFile(g.path(), raw, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestGoldenFilesOpenForEver(t *testing.T) {
	listed := map[string]bool{}
	for _, g := range goldens() {
		listed[filepath.Base(g.path())] = true
		t.Run(g.name, func(t *testing.T) {
			raw := g.read(t)
			e, err := Parse(raw)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(g.context, e.Context()); diff != "" {
				t.Errorf("context (-wanted +golden):\n%s", diff)
			}
			for _, p := range g.parties(t) {
				payload, err := e.Open(t.Context(), g.context, p.Recipient, p.key, testAuth)
				if err != nil {
					t.Fatal(err)
				}
				if string(payload) != g.payload {
					t.Errorf("opened %q, want %q", payload, g.payload)
				}
			}
		})
	}
	for _, g := range leasedGoldens() {
		listed[filepath.Base(g.path())] = true // opened in leased_test.go
	}
	files, err := os.ReadDir(filepath.Join("testdata", "golden"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !listed[file.Name()] {
			t.Errorf("nobody opens the golden file %s", file.Name())
		}
	}
}

// Seal writes today what it wrote when the golden files were made, but for what is random.
func TestSealStillWritesTheFormOfTheGoldenFiles(t *testing.T) {
	for _, g := range goldens() {
		t.Run(g.name, func(t *testing.T) {
			now := mustSeal(t, g.context, []byte(g.payload), g.parties(t)...)
			if diff := cmp.Diff(form(t, g.read(t)), form(t, now)); diff != "" {
				t.Errorf("form (-golden +now):\n%s", diff)
			}
		})
	}
}

// form is an envelope with its protected header in the clear and every random text replaced by its length.
func form(t testing.TB, raw []byte) string {
	t.Helper()
	protected := string(unb64(t, member(t, raw, "protected")))
	text := strings.Replace(string(raw), member(t, raw, "protected"), protected, 1)
	for _, name := range []string{"x", "y", "encrypted_key", "iv", "ciphertext", "tag"} {
		parts := strings.Split(text, `"`+name+`":"`)
		for i := range parts[1:] {
			value, rest, _ := strings.Cut(parts[i+1], `"`)
			parts[i+1] = strings.Repeat("x", len(value)) + `"` + rest
		}
		text = strings.Join(parts, `"`+name+`":"`)
	}
	return text
}

// The second implementation of docs/envelope.md, in forge_test.go, computes the same HMAC as Seal.
func TestTheHMACOfTheGoldenFilesIsTheDocumentedOne(t *testing.T) {
	for _, g := range goldens() {
		c := g.context
		if !bytes.Equal(c.mac(testAuth, []byte(g.payload)), referenceMAC(testAuth, c, []byte(g.payload))) {
			t.Errorf("%s: the two implementations disagree", g.name)
		}
	}
}
