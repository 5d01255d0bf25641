package config

import (
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/gohcl"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// block is a block of the file, or the file itself, while it is read.
type block struct {
	*reader
	kindOf, label string // device "one" { … }
	what          string // both, for people
	body          *hclsyntax.Body
	at            hcl.Range // of its first line
	again         bool      // there was one of the same name before
	good          bool      // no complaint about its attributes so far, so that what they mean can be judged
}

// secrets are attributes that would hold a secret itself.
var secrets = []string{"pin", "password", "admin_password", "unlock_passphrase", "backup_passphrase", "token", "client_key", "tls_key"}

// decode fills a struct with gohcl's tags from the block's attributes. Secrets and names that the struct does not know
// are complained about and left out.
func (b *block) decode(into any) {
	schema, _ := gohcl.ImpliedBodySchema(into)
	var known []string
	for _, attribute := range schema.Attributes {
		known = append(known, attribute.Name)
	}
	var blocks []string
	for _, nested := range schema.Blocks {
		blocks = append(blocks, nested.Type)
	}
	rest := *b.body
	rest.Attributes = hclsyntax.Attributes{}
	for _, name := range slices.Sorted(maps.Keys(b.body.Attributes)) {
		attribute := b.body.Attributes[name]
		switch {
		case slices.Contains(known, name) && !literal(attribute.Expr):
			b.refuse(attribute.Expr.Range(), "%s: %s is not written out; write the value itself, or a list of values in brackets, in one line: nothing is computed here", b.what, name)
		case slices.Contains(known, name):
			rest.Attributes[name] = attribute
		case slices.Contains(secrets, name):
			b.refuse(attribute.NameRange, "%s: %s would hold a secret, and this file holds none; %s", b.what, name, instead(name, known))
		case slices.Contains(blocks, name):
			b.refuse(attribute.NameRange, "%s: %s is a block; write %s { … } without \"=\"", b.what, name, name)
		default:
			b.refuse(attribute.NameRange, "%s: %s is not known%s", b.what, name, closest(name, known))
		}
	}
	rest.Blocks = nil
	for _, nested := range b.body.Blocks {
		switch {
		case slices.Contains(blocks, nested.Type):
			rest.Blocks = append(rest.Blocks, nested)
		case slices.Contains(known, nested.Type):
			b.refuse(nested.TypeRange, "%s: %s is not a block; write %s = …", b.what, nested.Type, nested.Type)
		default:
			b.refuse(nested.TypeRange, "%s: a block %s is not known%s", b.what, nested.Type, closest(nested.Type, blocks))
		}
	}
	diagnostics := gohcl.DecodeBody(&rest, nil, into)
	b.good = b.good && !diagnostics.HasErrors()
	b.note(diagnostics)
}

// refuse complains about a place in the block.
func (b *block) refuse(at hcl.Range, format string, args ...any) {
	b.good = false
	b.complain(at, format, args...)
}

// wrong complains about the value of an attribute, or about the block where the attribute is not there.
func (b *block) wrong(attribute, format string, args ...any) {
	at := b.at
	if given, ok := b.body.Attributes[attribute]; ok {
		at = given.Expr.Range()
	}
	b.refuse(at, "%s: "+format, append([]any{b.what}, args...)...)
}

// literal tells whether a value is written out: a string in quotes, a number, true, false, or a list of them.
func literal(value hclsyntax.Expression) bool {
	switch value := value.(type) {
	case *hclsyntax.LiteralValueExpr:
		return true
	case *hclsyntax.TemplateExpr:
		at := value.Range()
		return value.IsStringLiteral() && at.Start.Line == at.End.Line // no heredoc
	case *hclsyntax.TupleConsExpr:
		return !slices.ContainsFunc(value.Exprs, func(element hclsyntax.Expression) bool { return !literal(element) })
	}
	return false
}

// instead says how a secret is given.
func instead(name string, known []string) string {
	var ways []string
	if slices.Contains(known, name+"_file") {
		ways = append(ways, "set "+name+"_file to the path of a file that holds it")
	}
	if slices.Contains(known, name+"_env") {
		ways = append(ways, name+"_env to the name of an environment variable that does")
	}
	if ways == nil {
		return "leave it out"
	}
	return strings.Join(ways, ", or ")
}

// closest suggests the name that was probably meant, or lists all where none is near.
func closest(name string, known []string) string {
	best, distance := "", 3 // more than two mistakes is another word
	for _, candidate := range known {
		if strings.HasPrefix(candidate, name+"_") || strings.HasPrefix(name, candidate+"_") {
			return fmt.Sprintf("; did you mean %s?", candidate)
		}
		if d := edits(name, candidate); d < distance {
			best, distance = candidate, d
		}
	}
	if best != "" {
		return fmt.Sprintf("; did you mean %s?", best)
	}
	if len(known) == 0 {
		return ""
	}
	return "; known are " + strings.Join(slices.Sorted(slices.Values(known)), ", ")
}

// edits is the Levenshtein distance of two names.
func edits(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}

// checkName checks the label of a block: it becomes a part of file names and of paths in Vault.
func (b *block) checkName(at hcl.Range) {
	const longest = 64
	if len(b.label) > longest || strings.Contains(b.label, "/") || store.CheckName(b.label) != nil {
		b.refuse(at, "%s: the name is not one; use 1 to %d letters, digits, \".\", \"_\" and \"-\", a letter, a digit or \"_\" first",
			b.what, longest)
	}
}

// resolve makes a path of the file absolute.
func (b *block) resolve(path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(b.dir, path)
}

// duration reads an attribute such as "20s"; 0 where it is not given.
func (b *block) duration(attribute, value string) time.Duration {
	if value == "" {
		return 0
	}
	d, err := time.ParseDuration(value)
	if err != nil || d < 0 {
		b.wrong(attribute, "%s is not a duration; write a number with a unit: \"500ms\", \"20s\" or \"5m\"", attribute)
		return 0
	}
	return d
}

// maxPEM is the size of the largest file of certificates, in bytes.
const maxPEM = 1 << 20

// pem reads the certificates in a file that an attribute names; nil where none is named.
func (b *block) pem(attribute, path string) []byte { return b.trusted(attribute, path, maxPEM) }

// trusted reads a file that says whom to trust; nil where none is named.
func (b *block) trusted(attribute, path string, limit int64) []byte {
	if path == "" {
		return nil
	}
	path = b.resolve(path)
	content, err := readTrusted(path, limit)
	if err != nil {
		b.wrong(attribute, "%s: reading %s: %v", attribute, path, err)
		return nil
	}
	return content
}

// secretFile is the file of a secret: a path, or a credential of systemd, which stays as it is.
func (b *block) secretFile(attribute, path string) string {
	name, credential := strings.CutPrefix(path, device.CredentialPrefix)
	if !credential {
		return b.resolve(path)
	}
	if !device.IsCredential(path) {
		b.wrong(attribute, "%s names the credential %q, which is no file name; write %sNAME as after LoadCredential=", attribute, name, device.CredentialPrefix)
	}
	return path
}

// secret checks where a secret comes from: a file or the environment, not both.
func (b *block) secret(name, file, env string) {
	if file != "" && env != "" {
		b.wrong(name+"_env", "both %s_file and %s_env are given; keep one", name, name)
	}
	if env != "" && !IsVariable(env) {
		b.wrong(name+"_env", "%s_env names an environment variable and does not hold the secret", name)
	}
}

var variable = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// IsVariable tells whether a shell would take this for the name of an environment variable. What is none may be the secret
// itself, and must not be repeated in an error.
func IsVariable(name string) bool { return variable.MatchString(name) }
