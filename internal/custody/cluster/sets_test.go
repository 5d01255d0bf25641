package cluster

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

var threeKeys = &Cluster{Name: "prod", Spread: &Spread{Needed: 2, Keys: []string{"office", "bunker", "bank"}}, Store: "main"}

// dealt is new material of a spread with one active set.
func dealt() *material {
	k := New(Config{Host: "one"})
	m := k.newMaterial(threeKeys, KindUnseal, anID, node.Status{Type: "shamir", StorageType: "raft"}, "alice")
	m.add(Set{ID: anID, Shares: 5, Threshold: 3, State: SetActive, Made: aDay}, dealtShares(5, 1), nil)
	return m
}

func dealtShares(count int, mark byte) map[int][]byte {
	shares := map[int][]byte{}
	for i := range count {
		shares[i] = []byte{mark, byte(i + 1)}
	}
	return shares
}

// items are the fields of all items, as the store would have them. The values are copies.
func (m *material) allFields(t interface{ Fatal(arguments ...any) }) []custody.Fields {
	var all []custody.Fields
	for _, item := range m.items {
		fields, err := m.fields(item)
		if err != nil {
			t.Fatal(err)
		}
		copied := custody.Fields{}
		for name, value := range fields {
			copied[name] = slices.Clone(value)
		}
		all = append(all, copied)
	}
	return all
}

// reopened is the material of some of the items.
func reopened(all []custody.Fields, which ...int) (*material, error) {
	var parts []*material
	for _, i := range which {
		key := threeKeys.Spread.Keys[i]
		part, err := readItem("prod", KindUnseal, materialItem{name: threeKeys.item(KindUnseal, key), key: key}, all[i])
		if err != nil {
			return nil, err
		}
		parts = append(parts, part)
	}
	return merge(parts)
}

func TestWhatIsDealtComesTogetherAgain(t *testing.T) {
	m := dealt()
	all := m.allFields(t)
	for _, which := range [][]int{{0, 1}, {0, 2}, {1, 2}, {0, 1, 2}} {
		opened, err := reopened(all, which...)
		if err != nil {
			t.Fatal(err)
		}
		if got := opened.take(opened.active(), 3); len(got) != 3 {
			t.Errorf("items %v hold %d shares", which, len(got))
		}
		for name, share := range opened.shares {
			if string(share) != string(m.shares[name]) {
				t.Errorf("share %d is another one", name.index)
			}
		}
	}
	if opened, err := reopened(all, 0); err != nil || len(opened.shares) != 2 {
		t.Errorf("one item holds %d shares, %v", len(opened.shares), err)
	}
}

// A rekey writes the items of a spread one after the other: first the new set beside the old one, then the new one alone. At
// every point any two items tell which set Vault takes, or have both.
func TestSetThatVaultTakesIsKnownAtEveryPointOfARekey(t *testing.T) {
	old := dealt().allFields(t)
	m := dealt()
	m.add(Set{ID: anotherID, Shares: 6, Threshold: 3, State: SetPending, Made: aDay}, dealtShares(6, 2), nil)
	both := m.allFields(t)
	m.promote(anotherID)
	promoted := m.allFields(t)

	for written := range 4 {
		now := append(slices.Clone(both[:written]), old[written:]...)
		for _, which := range [][]int{{0, 1}, {0, 2}, {1, 2}, {0, 1, 2}} {
			opened, err := reopened(now, which...)
			if err != nil {
				t.Fatal(err)
			}
			if opened.active() == nil || opened.active().ID != anID { // Vault was told when all three were written
				t.Errorf("%d written, items %v: the active set is %+v", written, which, opened.active())
			}
			if pending := opened.pending(); written == 3 && (pending == nil || len(opened.take(pending, 9)) < 3) {
				t.Errorf("all written, items %v: the pending set is %+v", which, pending)
			}
		}
	}
	for written := range 4 { // Vault takes the new one
		now := append(slices.Clone(promoted[:written]), both[written:]...)
		for _, which := range [][]int{{0, 1}, {0, 2}, {1, 2}, {0, 1, 2}} {
			opened, err := reopened(now, which...)
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, set := range []*Set{opened.active(), opened.pending()} {
				found = found || set != nil && set.ID == anotherID && len(opened.take(set, 3)) == 3
			}
			if !found {
				t.Errorf("%d promoted, items %v: the new set is not among %+v", written, which, opened.Sets)
			}
		}
	}
}

func TestDroppedSetIsWiped(t *testing.T) {
	m := dealt()
	shares := dealtShares(5, 2)
	m.add(Set{ID: anotherID, Shares: 5, Threshold: 3, State: SetPending, Made: aDay}, shares, map[int][]byte{})
	m.drop(anotherID)
	for i, share := range shares {
		if slices.ContainsFunc(share, func(b byte) bool { return b != 0 }) {
			t.Errorf("share %d is still in memory", i)
		}
	}
	if m.pending() != nil || m.active() == nil || len(m.allFields(t)) != 3 {
		t.Errorf("the sets are %+v", m.Sets)
	}
}

func TestItemsThatDoNotBelongTogetherAreRefused(t *testing.T) {
	for name, change := range map[string]func(m *material){
		"another origin":       func(m *material) { m.Origin = anotherID },
		"another seal":         func(m *material) { m.SealType = "transit" },
		"another storage":      func(m *material) { m.StorageType = "file" },
		"another cluster id":   func(m *material) { m.ClusterID = "two" },
		"a set of other sizes": func(m *material) { m.Sets[0].Threshold = 2 },
		"an active set of its own": func(m *material) {
			m.promote(anotherID)
			m.add(Set{ID: anotherID, Shares: 5, Threshold: 3, State: SetActive, Made: aDay}, dealtShares(5, 2), nil)
		},
	} {
		t.Run(name, func(t *testing.T) {
			first, second := dealt(), dealt()
			first.ClusterID = "one"
			change(second)
			all := first.allFields(t)
			all[1] = second.allFields(t)[1]
			if _, err := reopened(all, 0, 1); !errors.Is(err, ErrFacts) {
				t.Errorf("merge = %v, want ErrFacts", err)
			}
		})
	}
}

func TestDamagedItemsAreRefused(t *testing.T) {
	for name, change := range map[string]func(fields custody.Fields){
		"a share is missing":   func(fields custody.Fields) { delete(fields, shareField(anID, 0)) },
		"a share is empty":     func(fields custody.Fields) { fields[shareField(anID, 0)] = nil },
		"a field too many":     func(fields custody.Fields) { fields["more"] = []byte{1} },
		"no facts":             func(fields custody.Fields) { delete(fields, fieldFacts) },
		"a share of no set":    func(fields custody.Fields) { fields[shareField(anotherID, 0)] = []byte{1} },
		"a share of another's": func(fields custody.Fields) { fields[shareField(anID, 1)] = []byte{1} },
	} {
		t.Run(name, func(t *testing.T) {
			all := dealt().allFields(t)
			change(all[0])
			if _, err := reopened(all, 0); !errors.Is(err, ErrFacts) {
				t.Errorf("readItem = %v, want ErrFacts", err)
			}
		})
	}
}

// Whatever a spread is, what Check allows is what it says: any Needed of the keys reach the threshold, and no fewer do.
func TestSpreadsThatAreAllowedMeanWhatTheySay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keys := rapid.IntRange(2, 6).Draw(t, "keys")
		spread := &Spread{Needed: rapid.IntRange(1, keys).Draw(t, "needed")}
		for i := range keys {
			spread.Keys = append(spread.Keys, fmt.Sprint("key", i))
		}
		c := &Cluster{Spread: spread, Shares: rapid.IntRange(1, 12).Draw(t, "shares")}
		c.Threshold = rapid.IntRange(1, c.Shares).Draw(t, "threshold")
		held := map[string]int{}
		for i := range c.Shares {
			held[c.deal(i)]++
		}
		right := true
		for chosen := range 1 << keys {
			count, together := 0, 0
			for i, key := range spread.Keys {
				if chosen>>i&1 == 1 {
					count++
					together += held[key]
				}
			}
			right = right && (count < spread.Needed || together >= c.Threshold) && (count >= spread.Needed || together < c.Threshold)
		}
		if allowed := c.checkDeal("shares", c.Shares, c.Threshold) == nil; allowed != right {
			t.Errorf("allowed %t, right %t: %v of %d shares, threshold %d: %v", allowed, right, spread, c.Shares, c.Threshold, slices.Sorted(maps.Values(held)))
		}
	})
}
