package pkcs11

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// goldenLedger has a clock that stands still.
func goldenLedger(t *testing.T) *ledger {
	t.Helper()
	l := testLedger(t)
	l.now = func() time.Time { return time.Date(2026, 3, 1, 3, 0, 0, 123, time.FixedZone("somewhere", 3600)) }
	return l
}

// TestTheRecordsFormat guards the format, and with it the fingerprints: a later version must still know what was barred.
func TestTheRecordsFormat(t *testing.T) {
	for name, history := range map[string]func(t *testing.T, l *ledger){
		"intent":   func(t *testing.T, l *ledger) { t.Helper(); must(t, begins(t, l, "111111", allTries).unresolved()) },
		"good":     func(t *testing.T, l *ledger) { t.Helper(); good(t, l, "648219") },
		"rejected": func(t *testing.T, l *ledger) { t.Helper(); must(t, begins(t, l, "111111", allTries).wrong()) },
		"unbarred-one": func(t *testing.T, l *ledger) {
			t.Helper()
			good(t, l, "648219")
			must(t, l.unbar(serial, []byte("111111"), shows(allTries)))
		},
		"changed": func(t *testing.T, l *ledger) {
			t.Helper()
			must(t, begins(t, l, "111111", allTries).changed([]byte("648219")))
		},
		"everything": everything,
	} {
		t.Run(name, func(t *testing.T) {
			l := goldenLedger(t)
			history(t, l)
			got, err := os.ReadFile(l.files.path(serial, ".json"))
			must(t, err)
			golden := filepath.Join("testdata", "ledger", name+".json")
			if *update {
				must(t, os.MkdirAll(filepath.Dir(golden), 0o755))
				must(t, os.WriteFile(golden, got, 0o644))
			}
			want, err := os.ReadFile(golden)
			must(t, err)
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("%s (-want +got):\n%s", golden, diff)
			}
			if _, err := parseRecord(want, escapeSerial(serial)); err != nil {
				t.Errorf("%s does not read: %v", golden, err)
			}
		})
	}
}

// TestRecordsOfEarlierVersionsRead goes through all that was ever written, also what is not written any more.
func TestRecordsOfEarlierVersionsRead(t *testing.T) {
	files, err := filepath.Glob(filepath.Join("testdata", "ledger", "*.json"))
	must(t, err)
	for _, file := range files {
		content, err := os.ReadFile(file)
		must(t, err)
		if _, err := parseRecord(content, escapeSerial(serial)); err != nil {
			t.Errorf("%s does not read: %v", file, err)
		}
	}
}

// everything is a history that uses every field but the pass.
func everything(t *testing.T, l *ledger) {
	t.Helper()
	must(t, begins(t, l, "111111", allTries).wrong())
	must(t, begins(t, l, "222222", allTries).unresolved())
	refuses(t, l, "222222", countLow)
	good(t, l, "648219")
	must(t, begins(t, l, "648219", countLow).unresolved())
	must(t, begins(t, l, "648219", countLow).unresolved())
}

func FuzzParseRecord(f *testing.F) {
	files, err := filepath.Glob(filepath.Join("testdata", "ledger", "*.json"))
	if err != nil || len(files) == 0 {
		f.Fatalf("golden files %q, %v", files, err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		must(f, err)
		f.Add(content)
	}
	token := escapeSerial(serial)
	f.Fuzz(func(t *testing.T, content []byte) {
		r, err := parseRecord(content, token)
		if err != nil {
			return
		}
		encoded, err := json.Marshal(recordFile{Version: ledgerVersion, Token: token, record: r})
		if err != nil {
			t.Fatalf("what was read does not encode: %v", err)
		}
		again, err := parseRecord(encoded, token)
		if err != nil {
			t.Fatalf("what was written does not read: %v\n%s", err, encoded)
		}
		if diff := cmp.Diff(r, again); diff != "" {
			t.Fatalf("it changes when written (-read +written):\n%s", diff)
		}
		if bytes.ContainsRune(encoded, 0) {
			t.Fatal("a NUL in JSON")
		}
	})
}

func TestSerialsMakeDifferentNames(t *testing.T) {
	names := map[string]string{}
	for _, s := range []string{"", "A", "a", "%41", "A/", "A%2F", ".", "..", " ", "A ", "\x00", "\xff", "ÿ", "ünit"} {
		name := escapeSerial(s)
		if other, taken := names[name]; taken {
			t.Errorf("%q and %q are both %q", s, other, name)
		}
		names[name] = s
		if filepath.Base("x"+name) != "x"+name {
			t.Errorf("%q becomes %q, which is no single name", s, name)
		}
	}
}

func TestAKeyIsMadeOnceWhoeverComesFirst(t *testing.T) {
	dir := t.TempDir()
	names := make([]string, 8)
	var all sync.WaitGroup
	for i := range names {
		all.Go(func() {
			key, err := openLedger(dir).files.key()
			if err != nil {
				t.Error(err)
				return
			}
			names[i] = keyName(key)
		})
	}
	all.Wait()
	if len(slices.Compact(names)) != 1 {
		t.Errorf("several keys were made: %q", names)
	}
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("%d files are left, want the key alone", len(entries))
	}
	info, err := os.Stat(filepath.Join(dir, "pin.key"))
	must(t, err)
	if info.Mode().Perm() != 0o600 || info.Size() != keySize {
		t.Errorf("the key has mode %v and %d bytes", info.Mode(), info.Size())
	}
}
