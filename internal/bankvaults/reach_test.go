package bankvaults_test

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestOnlyTheLocalCommandReaches PKCS#1 v1.5 and what other programs left on a token: whatever answers requests, the
// plugin's mounts and the daemon above all, would be the oracle that [bankvaults] is not.
func TestOnlyTheLocalCommandReaches(t *testing.T) {
	const root = "../.."
	guarded := map[string]bool{
		"LegacyDecrypter": true, "DecryptPKCS1v15": true, "DecryptPKCS1v15SessionKey": true,
		"ForeignObjects": true, "ForeignLabels": true, "ReadForeign": true, "DeleteForeign": true,
	}
	mayReach := func(path string) bool {
		return strings.HasPrefix(path, "hsm/") || strings.HasPrefix(path, "internal/bankvaults/") || // where it is done
			strings.HasPrefix(path, "cmd/nitroseal/import_bankvaults") || strings.HasPrefix(path, "nethsm/nethsmtest/")
	}
	reached := 0
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		path = filepath.ToSlash(strings.TrimPrefix(path, root+string(filepath.Separator)))
		if entry.IsDir() && (strings.HasPrefix(entry.Name(), ".") && entry.Name() != ".." || entry.Name() == "testdata" || path == "test") {
			return fs.SkipDir
		}
		if entry.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(gotoken.NewFileSet(), filepath.Join(root, path), nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			what := ""
			switch n := n.(type) {
			case *ast.Ident:
				if guarded[n.Name] {
					what = n.Name
				}
			case *ast.ImportSpec:
				if imported, _ := strconv.Unquote(n.Path.Value); strings.HasSuffix(imported, "/internal/bankvaults") {
					what = imported
				}
			}
			switch {
			case what == "":
			case mayReach(path):
				reached++
			default:
				t.Errorf("%s reaches %s", path, what)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if reached == 0 {
		t.Error("nothing reaches them at all: they have other names now")
	}
}
