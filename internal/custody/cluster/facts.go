package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// factsFormat is the version of the format of [Facts].
const factsFormat = 1

// fieldFacts is the field of an item that holds its facts, as JSON.
const fieldFacts = "facts"

// Facts are what is known of a cluster, and lie in the envelope beside its shares. Whoever can write the store cannot change
// them. They hold no secret. As JSON, in this order, without unknown members:
//
//	{"format":1,"cluster":"prod","kind":"unseal","origin":"…","seal":"shamir","recovery_seal":false,"storage":"raft",
//	 "cluster_name":"vault-cluster-1","cluster_id":"…","spread":"2 of office, bunker, bank",
//	 "made":"2026-03-01T03:00:00Z","made_by":"alice","host":"vault-1",
//	 "sets":[{"id":"…","shares":5,"threshold":3,"state":"active","made":"…","indices":[0,3],
//	          "people":[{"index":4,"name":"alice","fingerprint":"…"}]}]}
type Facts struct {
	Format  int    `json:"format"`
	Cluster string `json:"cluster"`
	Kind    Kind   `json:"kind"`
	// Origin is the id of the initialisation or import that began the material. It stays for its life.
	Origin string `json:"origin"`
	// SealType, RecoverySeal and StorageType are what a node says of itself, sealed or not.
	SealType     string `json:"seal"`
	RecoverySeal bool   `json:"recovery_seal"`
	StorageType  string `json:"storage,omitempty"`
	// ClusterName and ClusterID are shown by an unsealed node only: "" until one was seen.
	ClusterName string `json:"cluster_name,omitempty"`
	ClusterID   string `json:"cluster_id,omitempty"`
	// Spread is how the shares were dealt, as [Spread.String] writes it; "" for one item with all of them.
	Spread string    `json:"spread,omitempty"`
	Made   time.Time `json:"made"`
	MadeBy string    `json:"made_by,omitempty"`
	Host   string    `json:"host,omitempty"`
	Sets   []Set     `json:"sets"`
}

// SetState says whether Vault takes the shares of a set.
type SetState string

// The states of a set.
const (
	SetActive  SetState = "active"
	SetPending SetState = "pending" // a rekey made it, and Vault has not been told yet that it was kept
	SetFormer  SetState = "former"  // the active one before the last rekey, in items of its own
)

// Set is one generation of a cluster's keys: shares that belong together. An item holds one, or during a rekey two.
type Set struct {
	ID        string    `json:"id"` // random, hexadecimal
	Shares    int       `json:"shares"`
	Threshold int       `json:"threshold"`
	State     SetState  `json:"state"`
	Made      time.Time `json:"made"`
	MadeBy    string    `json:"made_by,omitempty"`
	// Indices are the shares of the set that the item holds, from 0, in order. Those of people are not among them.
	Indices []int `json:"indices"`
	// People are those whose shares the item holds as messages that only they can open.
	People []PersonShare `json:"people,omitempty"`
	// VerificationNonce names Vault's verification of a pending set.
	VerificationNonce string `json:"verification_nonce,omitempty"`
}

// PersonShare says who has a share.
type PersonShare struct {
	Index       int    `json:"index"`
	Name        string `json:"name"`
	Fingerprint string `json:"fingerprint"`
}

// encode writes the facts. It is deterministic.
func (f *Facts) encode() ([]byte, error) {
	if err := f.check(); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(f)
	if err != nil {
		return nil, fmt.Errorf("encoding the facts of cluster %q: %w", f.Cluster, err)
	}
	return raw, nil
}

// parseFacts reads what encode wrote. Anything else is [ErrFacts].
func parseFacts(raw []byte) (*Facts, error) {
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	f := new(Facts)
	if err := decoder.Decode(f); err != nil {
		return nil, fmt.Errorf("%w: the facts: %w", ErrFacts, err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: something follows the facts", ErrFacts)
	}
	if err := f.check(); err != nil {
		return nil, err
	}
	return f, nil
}

// check returns [ErrFacts] where the facts contradict themselves.
func (f *Facts) check() error {
	switch {
	case f.Format != factsFormat:
		return fmt.Errorf("%w: format %d, this program knows %d", ErrFacts, f.Format, factsFormat)
	case store.CheckName(f.Cluster) != nil:
		return fmt.Errorf("%w: they name no cluster", ErrFacts)
	case f.Kind != KindUnseal && f.Kind != KindRecovery:
		return fmt.Errorf("%w: the kind %q", ErrFacts, f.Kind)
	case !validID(f.Origin):
		return fmt.Errorf("%w: they name no origin", ErrFacts)
	case f.SealType == "":
		return fmt.Errorf("%w: they name no type of seal", ErrFacts)
	case len(f.Sets) == 0 || len(f.Sets) > 2:
		return fmt.Errorf("%w: %d sets of shares; there are one or two", ErrFacts, len(f.Sets))
	}
	if f.Spread != "" {
		if _, err := ParseSpread(f.Spread); err != nil {
			return fmt.Errorf("%w: %w", ErrFacts, err)
		}
	}
	for i := range f.Sets {
		if err := f.Sets[i].check(); err != nil {
			return err
		}
	}
	if len(f.Sets) == 2 && (f.Sets[0].ID == f.Sets[1].ID || f.Sets[0].State == f.Sets[1].State) {
		return fmt.Errorf("%w: two sets that are both %s, or one twice", ErrFacts, f.Sets[0].State)
	}
	return nil
}

func (s *Set) check() error {
	if !validID(s.ID) {
		return fmt.Errorf("%w: the id of a set", ErrFacts)
	}
	switch {
	case s.Shares < 1 || s.Shares > 255 || s.Threshold < 1 || s.Threshold > s.Shares:
		return fmt.Errorf("%w: a set of %d shares with a threshold of %d", ErrFacts, s.Shares, s.Threshold)
	case s.State != SetActive && s.State != SetPending && s.State != SetFormer:
		return fmt.Errorf("%w: the state %q of a set", ErrFacts, s.State)
	}
	last := -1
	for _, index := range s.Indices {
		if index <= last || index >= s.Shares {
			return fmt.Errorf("%w: share %d of %d", ErrFacts, index, s.Shares)
		}
		last = index
	}
	last = -1
	for _, person := range s.People {
		if person.Index <= last || person.Index >= s.Shares || person.Name == "" || slices.Contains(s.Indices, person.Index) {
			return fmt.Errorf("%w: the share %d of person %q", ErrFacts, person.Index, person.Name)
		}
		last = person.Index
	}
	return nil
}

// differs says in a sentence what a node has that is not as recorded, "" where it is the recorded one. fitting are the sets with
// the numbers that the node shows, the active one first.
func (f *Facts) differs(st node.Status) (fitting []Set, sentence string) {
	switch {
	case st.Type != f.SealType:
		return nil, fmt.Sprintf("its seal is of type %q, recorded is %q", st.Type, f.SealType)
	case st.RecoverySeal != f.RecoverySeal:
		return nil, fmt.Sprintf("recovery_seal is %t, recorded is %t", st.RecoverySeal, f.RecoverySeal)
	case f.StorageType != "" && st.StorageType != f.StorageType:
		return nil, fmt.Sprintf("its storage is %q, recorded is %q", st.StorageType, f.StorageType)
	case f.ClusterID != "" && st.ClusterID != "" && st.ClusterID != f.ClusterID:
		return nil, fmt.Sprintf("its cluster id is %s, recorded is %s", st.ClusterID, f.ClusterID)
	}
	for _, state := range []SetState{SetActive, SetPending, SetFormer} {
		for _, set := range f.Sets {
			if set.State == state && set.Shares == st.N && set.Threshold == st.T {
				fitting = append(fitting, set)
			}
		}
	}
	if len(fitting) == 0 {
		return nil, fmt.Sprintf("it has %d key shares with a threshold of %d, recorded are %d and %d", st.N, st.T, f.Sets[0].Shares, f.Sets[0].Threshold)
	}
	return fitting, ""
}

// fits returns the sets that a node may take, the likeliest first, or says in a sentence why it takes none. A set of which
// neither enough is in hand nor each opened item has a part is none of them.
func (m *material) fits(st node.Status) (sets []*Set, difference string) {
	fitting, difference := m.differs(st)
	for _, state := range []SetState{SetActive, SetPending, SetFormer} {
		for _, set := range m.inState(state) {
			fits := slices.ContainsFunc(fitting, func(other Set) bool { return other.ID == set.ID })
			if fits && (m.held(set.ID) || m.inHand(set)) {
				sets = append(sets, set)
			}
		}
	}
	if difference == "" && len(sets) == 0 {
		return nil, "its numbers of shares are those of a rekey that did not end, and not all items hold the new shares"
	}
	return sets, difference
}
