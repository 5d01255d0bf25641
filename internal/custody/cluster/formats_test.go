package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody"
)

// A day for golden files.
var aDay = time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)

const (
	anID      = "000102030405060708090a0b0c0d0e0f"
	anotherID = "101112131415161718191a1b1c1d1e1f"
)

// someFacts are facts with everything that facts can have.
func someFacts() *Facts {
	return &Facts{
		Format: factsFormat, Cluster: "prod", Kind: KindUnseal, Origin: anID, SealType: "shamir", StorageType: "raft", ClusterName: "vault-cluster-1",
		ClusterID: "6f2a9c1e-0000-4000-8000-000000000001", Spread: "2 of office, bunker, bank", Made: aDay, MadeBy: "alice", Host: "vault-1",
		Sets: []Set{
			{
				ID: anID, Shares: 5, Threshold: 3, State: SetActive, Made: aDay, MadeBy: "alice", Indices: []int{0, 3},
				People: []PersonShare{{4, "bob", "0123456789abcdef0123456789abcdef01234567"}},
			},
			{ID: anotherID, Shares: 7, Threshold: 4, State: SetPending, Made: aDay, Indices: []int{}, VerificationNonce: "c0ffee"},
		},
	}
}

func TestFormatOfFactsIsFixed(t *testing.T) {
	raw, err := someFacts().encode()
	if err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "facts.golden.json", indented(t, raw))
	read, err := parseFacts(raw)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := read.encode(); err != nil || !bytes.Equal(again, raw) {
		t.Errorf("read and written again it is %s, %v", again, err)
	}
}

func someIntent() *Intent {
	return &Intent{
		Format: intentFormat, ID: anID, Cluster: "prod", Node: "https://vault-1:8200", Host: "vault-1", HostID: anotherID, By: "alice", At: aDay,
		Before: []Attempt{{anotherID, "vault-2", aDay.Add(-time.Hour)}},
	}
}

func TestFormatOfIntentsIsFixed(t *testing.T) {
	raw, err := json.Marshal(someIntent())
	if err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "intent.golden.json", indented(t, raw))
	read, err := parseIntent(raw)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := json.Marshal(read); err != nil || !bytes.Equal(again, raw) {
		t.Errorf("read and written again it is %s, %v", again, err)
	}
}

func TestFormatOfARootTokenIsFixed(t *testing.T) {
	root := &rootItem{
		rootFacts: rootFacts{
			Format: factsFormat, Cluster: "prod", Origin: anID, Purpose: RootPGP, Fingerprint: "0123", Made: aDay, MadeBy: "alice", Host: "vault-1",
		},
		message: []byte("a message"),
	}
	fields, err := root.fields()
	if err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "root.golden.json", indented(t, fields[fieldFacts]))
	if read, err := parseRoot("prod", fields); err != nil || string(read.message) != "a message" || read.rootFacts != root.rootFacts {
		t.Errorf("read again it is %+v, %v", read, err)
	}
}

func TestFormatOfWhatIsHeldIsFixed(t *testing.T) {
	raw, err := json.Marshal(held{
		Format: heldFormat, Cluster: "prod", Origin: anID,
		Items: []heldItem{{"unseal", json.RawMessage(`{"protected":"…"}`)}, {"root", json.RawMessage(`{"protected":"…"}`)}},
	})
	if err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "held.golden.json", indented(t, raw))
	if _, err := parseHeld("prod", raw); err != nil {
		t.Error(err)
	}
	if _, err := parseHeld("other", raw); !errors.Is(err, ErrFacts) {
		t.Errorf("of another cluster: %v", err)
	}
}

func TestFormatOfAnAlarmIsFixed(t *testing.T) {
	raw, err := json.Marshal(Alarm{alarmFormat, "prod", "https://vault-1:8200", aDay, "one", "other"})
	if err != nil {
		t.Fatal(err)
	}
	compareGolden(t, "alarm.golden.json", indented(t, raw))
}

func indented(t *testing.T, raw []byte) string {
	t.Helper()
	var out bytes.Buffer
	if err := json.Indent(&out, raw, "", "  "); err != nil {
		t.Fatal(err)
	}
	return out.String() + "\n"
}

func TestFactsThatContradictThemselvesAreRefused(t *testing.T) {
	for name, change := range map[string]func(f *Facts){
		"another format":              func(f *Facts) { f.Format = 2 },
		"no cluster":                  func(f *Facts) { f.Cluster = "" },
		"an unknown kind":             func(f *Facts) { f.Kind = "root" },
		"no origin":                   func(f *Facts) { f.Origin = "" },
		"no seal":                     func(f *Facts) { f.SealType = "" },
		"no set":                      func(f *Facts) { f.Sets = nil },
		"three sets":                  func(f *Facts) { f.Sets = append(f.Sets, f.Sets[0]) },
		"one set twice":               func(f *Facts) { f.Sets[1].ID = f.Sets[0].ID },
		"two active sets":             func(f *Facts) { f.Sets[1].State = SetActive },
		"a spread that is none":       func(f *Facts) { f.Spread = "3 of office" },
		"a set without an id":         func(f *Facts) { f.Sets[0].ID = "" },
		"an id in capitals":           func(f *Facts) { f.Sets[0].ID = strings.ToUpper(f.Sets[0].ID) },
		"no shares":                   func(f *Facts) { f.Sets[0].Shares = 0 },
		"a threshold above the count": func(f *Facts) { f.Sets[0].Threshold = 6 },
		"an unknown state":            func(f *Facts) { f.Sets[0].State = "old" },
		"a share beyond the count":    func(f *Facts) { f.Sets[0].Indices = []int{0, 5} },
		"a share twice":               func(f *Facts) { f.Sets[0].Indices = []int{3, 3} },
		"a share below 0":             func(f *Facts) { f.Sets[0].Indices = []int{-1} },
		"a person with our share":     func(f *Facts) { f.Sets[0].People[0].Index = 3 },
		"a person without a name":     func(f *Facts) { f.Sets[0].People[0].Name = "" },
	} {
		t.Run(name, func(t *testing.T) {
			f := someFacts()
			change(f)
			if _, err := f.encode(); !errors.Is(err, ErrFacts) {
				t.Errorf("encode = %v, want ErrFacts", err)
			}
			raw, err := json.Marshal(f)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parseFacts(raw); !errors.Is(err, ErrFacts) {
				t.Errorf("parseFacts = %v, want ErrFacts", err)
			}
		})
	}
	good, err := someFacts().encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string][]byte{
		"nothing": nil, "something behind it": append(slices.Clone(good), " 1"...),
		"an unknown member": bytes.Replace(good, []byte(`"format":1`), []byte(`"format":1,"more":1`), 1),
	} {
		if _, err := parseFacts(raw); !errors.Is(err, ErrFacts) {
			t.Errorf("%s: parseFacts = %v, want ErrFacts", name, err)
		}
	}
}

func FuzzParseFacts(f *testing.F) {
	good, err := someFacts().encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		facts, err := parseFacts(raw)
		if err != nil {
			if !errors.Is(err, ErrFacts) {
				t.Errorf("it is %v", err)
			}
			return
		}
		written, err := facts.encode()
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		again, err := parseFacts(written)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if twice, err := again.encode(); err != nil || !bytes.Equal(twice, written) {
			t.Errorf("%s became %s, %v", written, twice, err)
		}
	})
}

func FuzzParseIntent(f *testing.F) {
	good, err := json.Marshal(someIntent())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		intent, err := parseIntent(raw)
		if err != nil {
			if !errors.Is(err, errIntent) {
				t.Errorf("it is %v", err)
			}
			return
		}
		_ = intent.hosts() // whatever they are called
		intent.alive(aDay)
		written, err := json.Marshal(intent)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		if _, err := parseIntent(written); err != nil {
			t.Errorf("what was written cannot be read: %v", err)
		}
	})
}

func FuzzParseHeld(f *testing.F) {
	f.Add([]byte(`{"format":1,"cluster":"prod","origin":"` + anID + `","items":[{"item":"unseal","envelope":{}}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, err := parseHeld("prod", raw); err != nil && !errors.Is(err, ErrFacts) {
			t.Errorf("it is %v", err)
		}
	})
}

func FuzzParseRoot(f *testing.F) {
	f.Add([]byte(`{"format":1,"cluster":"prod","origin":"`+anID+`","purpose":"keep","made":"2026-03-01T03:00:00Z"}`), []byte("token"), []byte(nil))
	f.Fuzz(func(t *testing.T, facts, token, message []byte) {
		fields := custody.Fields{fieldFacts: facts}
		if token != nil {
			fields[fieldToken] = token
		}
		if message != nil {
			fields[fieldTokenMessage] = message
		}
		root, err := parseRoot("prod", fields)
		if err != nil {
			if !errors.Is(err, ErrFacts) {
				t.Errorf("it is %v", err)
			}
			return
		}
		if written, err := root.fields(); err != nil || len(written) != 2 {
			t.Errorf("what was read cannot be written: %v", err)
		}
	})
}

func FuzzParseSpread(f *testing.F) {
	f.Add("2 of office, bunker, bank")
	f.Fuzz(func(t *testing.T, text string) {
		spread, err := ParseSpread(text)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Errorf("it is %v", err)
			}
			return
		}
		if again, err := ParseSpread(spread.String()); err != nil || again.String() != spread.String() {
			t.Errorf("%q became %q, %v", spread, again, err)
		}
	})
}
