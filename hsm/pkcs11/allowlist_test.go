package pkcs11

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tree makes a directory for modules. Modes are set in spite of the umask.
func tree(t *testing.T) string {
	t.Helper()
	root, err := filepath.EvalSymlinks(t.TempDir())
	must(t, err)
	must(t, os.Chmod(root, 0o755))
	return root
}

func put(t *testing.T, path string, mode os.FileMode) string {
	t.Helper()
	must(t, os.WriteFile(path, []byte("module"), 0o600))
	must(t, os.Chmod(path, mode))
	return path
}

func dir(t *testing.T, path string, mode os.FileMode) string {
	t.Helper()
	must(t, os.Mkdir(path, 0o700))
	must(t, os.Chmod(path, mode))
	return path
}

func link(t *testing.T, target, path string) string {
	t.Helper()
	must(t, os.Symlink(target, path))
	return path
}

func TestModulesThatMayBeLoaded(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, root string) (path string, allowed []string, want string){
		"the very path": func(t *testing.T, root string) (string, []string, string) {
			t.Helper()
			m := put(t, root+"/m.so", 0o644)
			return m, []string{"/other.so", m}, m
		},
		"the same path written otherwise": func(t *testing.T, root string) (string, []string, string) {
			t.Helper()
			m := put(t, root+"/m.so", 0o644)
			return root + "//./m.so", []string{m}, m
		},
		"an allowed link": func(t *testing.T, root string) (string, []string, string) {
			t.Helper()
			m := put(t, root+"/m.so.1.2", 0o644)
			l := link(t, "m.so.1.2", root+"/m.so")
			return l, []string{l}, m
		},
		"a link to an allowed file": func(t *testing.T, root string) (string, []string, string) {
			t.Helper()
			m := put(t, root+"/m.so.1.2", 0o644)
			return link(t, m, root+"/m.so"), []string{m}, m
		},
		"the file behind an allowed link": func(t *testing.T, root string) (string, []string, string) {
			t.Helper()
			m := put(t, root+"/m.so.1.2", 0o644)
			return m, []string{link(t, m, root+"/m.so")}, m
		},
		"a link to a link through a linked directory": func(t *testing.T, root string) (string, []string, string) {
			t.Helper()
			m := put(t, dir(t, root+"/lib", 0o755)+"/m.so.1", 0o644)
			link(t, "../lib/m.so.1", root+"/lib/m.so")
			link(t, "lib", root+"/lib64")
			return root + "/lib64/m.so", []string{root + "/lib64/m.so"}, m
		},
		"below a sticky directory of root's": func(t *testing.T, root string) (string, []string, string) {
			t.Helper()
			if os.Geteuid() != 0 { // /tmp itself is one
				m := put(t, root+"/m.so", 0o644)
				return m, []string{m}, m
			}
			m := put(t, dir(t, root+"/tmp", 0o777|os.ModeSticky)+"/m.so", 0o644)
			return m, []string{m}, m
		},
	} {
		t.Run(name, func(t *testing.T) {
			path, allowed, want := prepare(t, tree(t))
			got, err := resolveModule(path, allowed)
			if err != nil || got != want {
				t.Errorf("resolveModule(%q, %q) gives %q, %v; want %q", path, allowed, got, err, want)
			}
		})
	}
}

func TestModulesThatMayNotBeLoaded(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(t *testing.T, root string) (path string, allowed []string)
		says    []string
	}{
		"no list": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			return put(t, root+"/m.so", 0o644), nil
		}, []string{"-pkcs11-module"}},
		"not on the list": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			return put(t, root+"/m.so", 0o644), []string{put(t, root+"/other.so", 0o644)}
		}, []string{"-pkcs11-module=", "/m.so", "/other.so"}},
		"a relative path": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			t.Chdir(root)
			put(t, root+"/m.so", 0o644)
			return "m.so", []string{"m.so"}
		}, []string{"-pkcs11-module"}},
		"an empty path": {func(_ *testing.T, _ string) (string, []string) {
			return "", []string{""}
		}, []string{"-pkcs11-module"}},
		"on the list and missing": {func(_ *testing.T, root string) (string, []string) {
			return root + "/m.so", []string{root + "/m.so"}
		}, []string{"there is no PKCS#11 module", "/m.so"}},
		"a dangling link": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			l := link(t, "gone.so", root+"/m.so")
			return l, []string{l}
		}, []string{"there is no PKCS#11 module"}},
		"a link that leads to itself": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			l := link(t, "m.so", root+"/m.so")
			return l, []string{l}
		}, []string{"40 symbolic links"}},
		"a directory": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			d := dir(t, root+"/m.so", 0o755)
			return d, []string{d}
		}, []string{"not a regular file"}},
		"below a file": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			m := put(t, root+"/m.so", 0o644) + "/x"
			return m, []string{m}
		}, []string{"not a directory"}},
		"a file that everybody may write": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			m := put(t, root+"/m.so", 0o666)
			return m, []string{m}
		}, []string{"chmod go-w", "/m.so"}},
		"a file that a group may write": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			m := put(t, root+"/m.so", 0o664)
			return m, []string{m}
		}, []string{"chmod go-w"}},
		"in a directory that a group may write": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			m := put(t, dir(t, root+"/lib", 0o755)+"/m.so", 0o644)
			must(t, os.Chmod(root+"/lib", 0o775))
			return m, []string{m}
		}, []string{"chmod go-w", "/lib"}},
		"far below a directory that everybody may write": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			d := dir(t, dir(t, root+"/open", 0o755)+"/lib", 0o755)
			must(t, os.Chmod(root+"/open", 0o777))
			m := put(t, d+"/m.so", 0o644)
			return m, []string{m}
		}, []string{"chmod go-w", "/open"}},
		"a link in a directory that everybody may write, to a safe file": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			m := put(t, root+"/m.so", 0o644)
			d := dir(t, root+"/open", 0o777)
			l := link(t, m, d+"/m.so")
			return l, []string{l}
		}, []string{"chmod go-w", "/open"}},
		"a safe link to a file that everybody may write": {func(t *testing.T, root string) (string, []string) {
			t.Helper()
			l := link(t, put(t, root+"/open.so", 0o666), root+"/m.so")
			return l, []string{l}
		}, []string{"chmod go-w", "/open.so"}},
	} {
		t.Run(name, func(t *testing.T) {
			path, allowed := c.prepare(t, tree(t))
			got, err := resolveModule(path, allowed)
			if err == nil {
				t.Fatalf("resolveModule(%q, %q) gives %q", path, allowed, got)
			}
			for _, words := range c.says {
				if !strings.Contains(err.Error(), words) {
					t.Errorf("%q does not say %q", err, words)
				}
			}
		})
	}
}

func TestOwnersThatMayReplaceAModule(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give files to others")
	}
	const nobody = 65534
	for name, prepare := range map[string]func(t *testing.T, root string) (path string){
		"somebody else's file": func(t *testing.T, root string) string {
			t.Helper()
			m := put(t, root+"/m.so", 0o644)
			must(t, os.Chown(m, nobody, nobody))
			return m
		},
		"in somebody else's directory": func(t *testing.T, root string) string {
			t.Helper()
			m := put(t, dir(t, root+"/lib", 0o755)+"/m.so", 0o644)
			must(t, os.Chown(root+"/lib", nobody, nobody))
			return m
		},
		"behind somebody else's link in a sticky directory": func(t *testing.T, root string) string {
			t.Helper()
			m := put(t, root+"/m.so", 0o644)
			l := link(t, m, dir(t, root+"/tmp", 0o777|os.ModeSticky)+"/m.so")
			must(t, os.Lchown(l, nobody, nobody))
			return l
		},
		"in somebody else's sticky directory": func(t *testing.T, root string) string {
			t.Helper()
			m := put(t, dir(t, root+"/tmp", 0o777|os.ModeSticky)+"/m.so", 0o644)
			must(t, os.Chown(root+"/tmp", nobody, nobody))
			return m
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := prepare(t, tree(t))
			got, err := resolveModule(path, []string{path})
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("the user with id %d", nobody)) {
				t.Errorf("resolveModule gives %q, %v", got, err)
			}
		})
	}
}

func TestAPathThatIsNotAllowedTellsNothingAboutItsFile(t *testing.T) {
	root := tree(t)
	allowed := []string{put(t, root+"/m.so", 0o644)}
	put(t, root+"/there", 0o600)
	_, there := resolveModule(root+"/there", allowed)
	_, missing := resolveModule(root+"/nowhere", allowed)
	if there == nil || missing == nil {
		t.Fatalf("the errors are %v and %v", there, missing)
	}
	if strings.ReplaceAll(there.Error(), "/there", "") != strings.ReplaceAll(missing.Error(), "/nowhere", "") {
		t.Errorf("the errors differ:\n%v\n%v", there, missing)
	}
}

func TestAHostThatOthersCanReplaceIsNotRun(t *testing.T) {
	sum := sha256.Sum256([]byte("module")) // what put writes
	digest := hex.EncodeToString(sum[:])
	for name, c := range map[string]struct {
		prepare func(t *testing.T, root string) string
		says    string // empty where it may run
	}{
		"its owner alone can write": {func(t *testing.T, root string) string {
			t.Helper()
			return put(t, root+"/host", 0o755)
		}, ""},
		"a link leads to it": {func(t *testing.T, root string) string {
			t.Helper()
			put(t, root+"/host", 0o755)
			return link(t, "host", root+"/link")
		}, ""},
		"others can write": {func(t *testing.T, root string) string {
			t.Helper()
			return put(t, root+"/host", 0o757)
		}, "chmod go-w"},
		"its group can write": {func(t *testing.T, root string) string {
			t.Helper()
			return put(t, root+"/host", 0o775)
		}, "chmod go-w"},
		"its directory is open": {func(t *testing.T, root string) string {
			t.Helper()
			return put(t, dir(t, root+"/open", 0o777)+"/host", 0o755)
		}, "chmod go-w"},
		"its path is relative": {func(*testing.T, string) string { return "host" }, "does not begin with /"},
	} {
		t.Run(name, func(t *testing.T) {
			fd, err := openVerified(c.prepare(t, tree(t)), digest, 10)
			if err == nil {
				must(t, unix.Close(fd))
			}
			if (err == nil) != (c.says == "") || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("it gives %v, want %q", err, c.says)
			}
		})
	}
}
