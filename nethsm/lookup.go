package nethsm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"

	"vault-plugin-secrets-nitrokey/hsm"
)

// lookups is how many keys are asked for at one time.
const lookups = 8

// FindKeys implements [hsm.Device]. RSA keys of 2048 to 4096 bits are found, also those that cannot decrypt with OAEP and
// SHA-256: what is wrong with them is said when they are adopted. Where a label or id names nothing but another kind of
// key, the error says what it found.
func (d *Device) FindKeys(ctx context.Context, query hsm.KeyQuery) ([]hsm.Key, error) {
	during := fmt.Sprintf("looking for keys with %s", query)
	if err := d.begin(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	ids, err := d.candidates(ctx, query)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	keys, err := d.keys(ctx, ids)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	var found []hsm.Key
	var unusable []string
	for i, id := range ids {
		if keys[i] == nil || !named(id, keys[i].Label, query.Label) {
			continue
		}
		key, err := d.newKey(keys[i])
		switch {
		case err != nil:
			unusable = append(unusable, fmt.Sprintf("%q: %v", id, err))
		case query.Fingerprint == "" || query.Fingerprint == key.ref.Fingerprint:
			found = append(found, key)
		}
	}
	if found == nil && unusable != nil && (query.Label != "" || query.ID != "") {
		return nil, fmt.Errorf("%s: %w: what is there cannot be used: %s", during, hsm.ErrUnsupported, strings.Join(unusable, ", "))
	}
	slices.SortFunc(found, func(a, b hsm.Key) int { return cmp.Compare(a.Ref().ID, b.Ref().ID) })
	return found, nil
}

// named tells whether a key is called by a label; every key is, by none. Only labels are shortened: an id that does for one
// may be longer.
func named(id, label, wanted string) bool {
	if label == "" {
		label = id
	}
	return wanted == "" || wanted == label || shortLabel(wanted) == label
}

// candidates are the ids of keys that a query may mean.
func (d *Device) candidates(ctx context.Context, query hsm.KeyQuery) ([]string, error) {
	operator := d.shared.operator
	switch {
	case query.ID != "" && !mayBeKey(query.ID):
		return nil, nil
	case query.ID != "":
		return []string{query.ID}, nil
	case query.Label == "":
		return d.listed(operator.Keys(ctx, KeyFilter{}))
	}
	// Servers before 5.0 know no labels. They pass over the filter and list everything, or refuse it.
	ids, err := d.listed(operator.Keys(ctx, KeyFilter{Label: shortLabel(query.Label)}))
	if errors.Is(err, ErrRequest) || errors.Is(err, hsm.ErrUnsupported) {
		ids, err = d.listed(operator.Keys(ctx, KeyFilter{}))
	}
	if err == nil && mayBeKey(query.Label) && !slices.Contains(ids, query.Label) {
		ids = append(ids, query.Label) // a key without a label is called by its id
	}
	return ids, err
}

// mayBeKey tells whether a key of ours can have an id.
func mayBeKey(id string) bool { return checkID("", "the key", id) == nil && !isCarrier(id) }

// listed leaves out the carriers of objects.
func (d *Device) listed(ids []string, err error) ([]string, error) {
	return slices.DeleteFunc(ids, isCarrier), err
}

// keys asks for keys, a few at a time. What is not there is nil.
func (d *Device) keys(ctx context.Context, ids []string) ([]*described, error) {
	keys := make([]*described, len(ids))
	err := several(ctx, len(ids), func(ctx context.Context, i int) error {
		key, err := d.shared.operator.described(ctx, ids[i])
		if errors.Is(err, hsm.ErrNotFound) {
			return nil
		}
		keys[i] = key
		return err
	})
	return keys, err
}

// described is a key as a NetHSM tells of it. One that Go knows no such key for is no fault of the node that tells of it, as
// [Client.Key] has it, and keeps nobody from the keys beside it.
type described struct {
	Key

	odd error // why it cannot be used; nil: it may
}

// UnmarshalJSON implements json.Unmarshaler.
func (k *described) UnmarshalJSON(text []byte) error {
	k.odd = json.Unmarshal(text, &k.Key)
	if k.odd == nil {
		return nil
	}
	var some struct {
		Type KeyType `json:"type"`
	}
	if json.Unmarshal(text, &some) != nil || some.Type == "" {
		return k.odd // it is no key at all
	}
	return nil
}

// described is [Client.Key] for such keys.
func (c *Client) described(ctx context.Context, id string) (*described, error) {
	op := fmt.Sprintf("reading key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return nil, err
	}
	key := &described{}
	if _, err := c.do(ctx, call{op: op, method: http.MethodGet, path: path("keys", id), into: key}); err != nil {
		return nil, err
	}
	key.ID = id
	return key, nil
}

// several runs do for 0 to n-1, a few at one time, until the first error.
func several(ctx context.Context, n int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan int)
	var workers sync.WaitGroup
	for range min(n, lookups) {
		workers.Go(func() {
			for i := range next {
				if err := do(ctx, i); err != nil {
					cancel(err)
				}
			}
		})
	}
	for i := range n {
		if ctx.Err() != nil {
			break
		}
		next <- i
	}
	close(next)
	workers.Wait()
	return context.Cause(ctx)
}
