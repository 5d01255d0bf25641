package nethsm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// carrierTag is on every carrier, so that no operator can do anything with the key itself: it has to be there, no more.
const carrierTag = "nitroseal-object"

// cacheLag is how long a node may answer from its cache after another one changed a key (10 s, and some more).
const cacheLag = 12 * time.Second

// fillGrace is how long a carrier that somebody else made is left to its maker, who fills it with the very next request.
const fillGrace = 2 * time.Second

// errForeign is what a carrier holds that somebody else wrote.
var errForeign = errors.New("the carrier holds a certificate that was not written as an object; look at it, and delete the key if nobody needs it")

// Objects implements [hsm.ObjectStore]. A carrier without a value is what an interrupted write left: it is no object, and
// the next write of that name fills it.
func (d *Device) Objects(ctx context.Context, application string) ([]hsm.ObjectRef, error) {
	var refs []hsm.ObjectRef
	err := d.keeping(ctx, func(node *Client) (err error) {
		refs, err = d.list(ctx, node, application)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listing the objects of %q: %w", application, err)
	}
	return refs, nil
}

// looks is how often a list is begun anew because objects are deleted under its eyes.
const looks = 10

func (d *Device) list(ctx context.Context, node *Client, application string) ([]hsm.ObjectRef, error) {
	for range looks {
		refs, empty, err := d.look(ctx, node, application)
		if err != nil || len(empty) == 0 {
			return refs, err
		}
		// Empty carriers are what interrupted writes left, as long as they are there. One that is not was deleted after it
		// had been listed, perhaps for a newer one that had not: such a list would have neither.
		there, err := d.carriers(ctx, node)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(empty, func(id string) bool { return !slices.Contains(there, id) }) {
			return refs, nil
		}
	}
	return nil, fmt.Errorf("%w: the objects change faster than they can be listed; try again", hsm.ErrUnavailable)
}

// look lists once: the objects of an application, and the carriers in which nothing was found.
func (d *Device) look(ctx context.Context, node *Client, application string) (refs []hsm.ObjectRef, empty []string, _ error) {
	ids, err := d.carriers(ctx, node)
	if err != nil {
		return nil, nil, err
	}
	ids = slices.DeleteFunc(ids, func(id string) bool { return !mayCarry(id, application) })
	found := make([]hsm.ObjectRef, len(ids))
	outcomes := make([]error, len(ids))
	err = several(ctx, len(ids), func(ctx context.Context, i int) error {
		var known bool
		if found[i], known = d.seen(ids[i]); known {
			return nil
		}
		var value []byte
		found[i], value, outcomes[i] = d.read(ctx, node, ids[i])
		clear(value)
		if errors.Is(outcomes[i], hsm.ErrNotFound) || errors.Is(outcomes[i], errForeign) {
			return nil
		}
		return outcomes[i]
	})
	if err != nil {
		return nil, nil, err
	}
	for i, id := range ids {
		switch {
		case errors.Is(outcomes[i], hsm.ErrNotFound):
			empty = append(empty, id)
		case outcomes[i] == nil && found[i].Application == application:
			refs = append(refs, found[i])
		}
	}
	slices.SortFunc(refs, func(a, b hsm.ObjectRef) int { return cmp.Compare(a.Label, b.Label) })
	return refs, empty, nil
}

// carriers lists the keys that carry objects, those of all applications. Older servers list no keys by the beginning of
// their ids.
func (d *Device) carriers(ctx context.Context, node *Client) ([]string, error) {
	ids, err := node.Keys(ctx, KeyFilter{Prefix: carrierPrefix})
	if errors.Is(err, ErrRequest) || errors.Is(err, hsm.ErrUnsupported) || errors.Is(err, hsm.ErrNotFound) {
		ids, err = node.Keys(ctx, KeyFilter{})
	}
	if err != nil {
		return nil, err
	}
	ids = slices.DeleteFunc(ids, func(id string) bool { return !isCarrier(id) })
	d.forgetOthers(ids)
	return ids, nil
}

// ReadObject implements [hsm.ObjectStore].
func (d *Device) ReadObject(ctx context.Context, ref hsm.ObjectRef) ([]byte, error) {
	var value []byte
	err := d.keeping(ctx, func(node *Client) (err error) {
		_, value, err = d.read(ctx, node, carrierID(ref))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", describeObject(ref), err)
	}
	return value, nil
}

// read reads the object in a carrier. Without a carrier, or a value in it, it is hsm.ErrNotFound.
func (d *Device) read(ctx context.Context, node *Client, id string) (hsm.ObjectRef, []byte, error) {
	certificate, err := node.KeyCertificate(ctx, id)
	if err != nil {
		if errors.Is(err, hsm.ErrNotFound) {
			d.forget(id)
		}
		return hsm.ObjectRef{}, nil, err
	}
	ref, value, ok := parseCertificate(id, certificate)
	if !ok {
		return hsm.ObjectRef{}, nil, fmt.Errorf("%w: key %q", errForeign, id)
	}
	d.remember(id, ref)
	return ref, value, nil
}

// WriteObject implements [hsm.ObjectStore]. First the carrier is made, then its certificate written, which a NetHSM does only
// where there is none: of two writers one wins, also where they share a carrier because the first of them was interrupted.
// Success means that the value was read back, also from the other nodes.
func (d *Device) WriteObject(ctx context.Context, ref hsm.ObjectRef, value []byte) error {
	err := d.keeping(ctx, func(node *Client) error { return d.write(ctx, node, ref, value) })
	if err != nil {
		return fmt.Errorf("writing %s: %w", describeObject(ref), err)
	}
	return nil
}

func (d *Device) write(ctx context.Context, node *Client, ref hsm.ObjectRef, value []byte) error {
	certificate := append(header(ref), value...)
	if len(certificate) > MaxKeyCertificate {
		return fmt.Errorf("%w: a value of %d bytes; at most %d are possible under this name", hsm.ErrUnsupported, len(value),
			MaxKeyCertificate-len(header(ref)))
	}
	id := carrierID(ref)
	err := d.put(ctx, node, id, certificate)
	if takesNothing(err) {
		// A database that is away for a moment, or one that has no room: that can be read, and refuses again.
		if _, unreadable := node.Keys(ctx, KeyFilter{}); unreadable != nil {
			return err
		}
		if err = d.put(ctx, node, id, certificate); takesNothing(err) {
			// Not wrapped: what was refused twice surely did not happen.
			return fmt.Errorf("%w: its database can be read and takes nothing more; look at the NetHSM's log and the database's quota: %s",
				hsm.ErrFull, err.Error())
		}
	}
	if err != nil {
		return err
	}
	d.remember(id, ref)
	return d.spread(ctx, node, id, certificate)
}

// takesNothing tells whether a node said that its database did not take a write.
func takesNothing(err error) bool {
	answer, is := errors.AsType[*Error](err)
	return is && answer.Status == http.StatusInternalServerError
}

// put makes the carrier, fills it and reads it back. An error means that the value is not there, unless it is
// hsm.ErrMayHaveHappened without an answer of the node.
func (d *Device) put(ctx context.Context, node *Client, id string, certificate []byte) error {
	_, made := node.GenerateKey(ctx, NewKey{
		ID: id, Type: TypeGeneric, Length: 128, Mechanisms: []Mechanism{AESEncryptionCBC}, Tags: []string{carrierTag},
	})
	there := made == nil || errors.Is(made, hsm.ErrExists)
	if !there && !errors.Is(made, hsm.ErrMayHaveHappened) {
		return made
	}
	if made != nil { // somebody else made it, or we did and never heard of it
		got, err := d.awaitMaker(ctx, node, id)
		switch {
		case err != nil:
			return err
		case bytes.Equal(got, certificate):
			return nil
		case got != nil:
			return hsm.ErrExists
		}
	}
	filled := node.PutKeyCertificate(ctx, id, certificate)
	switch {
	case filled == nil, errors.Is(filled, hsm.ErrMayHaveHappened):
	case errors.Is(filled, hsm.ErrNotFound) && !there:
		return made
	default:
		return filled
	}
	got, err := node.KeyCertificate(ctx, id)
	switch {
	case err == nil && bytes.Equal(got, certificate):
		return nil
	case err == nil && filled != nil:
		return hsm.ErrExists // another writer was faster than the one whose answer was lost
	case errors.Is(err, hsm.ErrNotFound) && filled != nil:
		return filled
	case err == nil, errors.Is(err, hsm.ErrNotFound):
		return fmt.Errorf("reading it back: %w: the NetHSM said yes and has something else", hsm.ErrUnavailable)
	default:
		return fmt.Errorf("reading it back: %w: %w", hsm.ErrMayHaveHappened, err)
	}
}

// awaitMaker gives whoever made a carrier the time to fill it, and returns what it holds then; nil for nothing: its maker is
// gone. One who did not make it must not fill it at the same moment: a node refuses a second certificate, but whether it
// looks and writes in one step nobody knows.
func (d *Device) awaitMaker(ctx context.Context, node *Client, id string) ([]byte, error) {
	limited, cancel := context.WithTimeout(ctx, d.grace)
	defer cancel()
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		got, err := node.KeyCertificate(ctx, id)
		if !errors.Is(err, hsm.ErrNotFound) {
			return got, err
		}
		select {
		case <-time.After(pause):
		case <-limited.Done():
			return nil, ctx.Err()
		}
	}
}

// spread waits until the other nodes show a certificate, those that answer. Nodes have caches: one that looked at the carrier
// before may need its time, and whoever asks it meanwhile finds nothing. One that needs more does no harm where another one
// shows it: its cache does not hold longer. But one that shows another certificate in the end is right: two nodes took both
// writes at the same moment, and the other one came last.
func (d *Device) spread(ctx context.Context, wrote *Client, id string, certificate []byte) error {
	var others []*node
	for _, n := range wrote.pool.nodes {
		if _, rests := n.resting(); !rests && n != wrote.only && !wrote.login.refusedAt(n) {
			others = append(others, n)
		}
	}
	shown := make(chan error, len(others))
	var all sync.WaitGroup
	defer all.Wait()
	limited, cancel := context.WithTimeout(ctx, d.lag)
	defer cancel() // runs before the waiting
	for _, n := range others {
		all.Go(func() {
			shown <- shows(limited, &Client{pool: wrote.pool, login: wrote.login, only: n}, id, certificate)
		})
	}
	var there bool
	var behind, replaced error
	for range others {
		switch err := <-shown; {
		case err == nil:
			there = true
		case errors.Is(err, hsm.ErrExists):
			replaced = err
		case errors.Is(err, errBehind):
			behind = err
		}
	}
	switch err := ctx.Err(); {
	case there && replaced == nil:
		return nil
	case err != nil:
		return fmt.Errorf("reading it from another node: %w: %w", hsm.ErrMayHaveHappened, err)
	case replaced != nil:
		return replaced
	case behind != nil:
		return fmt.Errorf("reading it from another node: %w: %w: %w", hsm.ErrUnavailable, hsm.ErrMayHaveHappened, behind)
	default:
		return nil // none answers
	}
}

// errBehind is a node that does not show what another one wrote.
var errBehind = errors.New("a node of the cluster does not show what another one wrote")

// shows waits until a node shows a certificate. One that shows another in the end is hsm.ErrExists, one that shows none
// errBehind, and one that does not answer some other error.
func shows(ctx context.Context, node *Client, id string, certificate []byte) error {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		there, err := node.KeyCertificate(ctx, id)
		switch {
		case err == nil && bytes.Equal(there, certificate):
			return nil
		case err != nil && !errors.Is(err, hsm.ErrNotFound):
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			if err == nil {
				return fmt.Errorf("%w: %s shows what another writer wrote at the same moment", hsm.ErrExists, node.URLs()[0])
			}
			return fmt.Errorf("%w: %s", errBehind, node.URLs()[0])
		}
	}
}

// DeleteObject implements [hsm.ObjectStore]: carrier and value go together.
func (d *Device) DeleteObject(ctx context.Context, ref hsm.ObjectRef) error {
	err := d.keeping(ctx, func(node *Client) error { return d.remove(ctx, node, carrierID(ref)) })
	if err != nil {
		return fmt.Errorf("deleting %s: %w", describeObject(ref), err)
	}
	return nil
}

func (d *Device) remove(ctx context.Context, node *Client, id string) error {
	_, value, err := d.read(ctx, node, id)
	clear(value)
	if err != nil {
		return err
	}
	d.forget(id)
	return d.destroy(ctx, node, id)
}

// keeping runs something on the node that keeps objects: always the same one while it serves, so that whoever wrote reads
// what was written, whatever another node still has in its cache.
func (d *Device) keeping(ctx context.Context, do func(*Client) error) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	if !d.objects {
		return fmt.Errorf("%w: this device keeps no objects; it does, with an administrator's rights, where its configuration says so",
			hsm.ErrUnsupported)
	}
	administrator, err := d.administrator()
	if err != nil {
		return err
	}
	return d.inOrder(ctx, administrator, do)
}

// remember notes the object that a carrier holds: it holds that as long as it is there, so that a list need not look again.
func (d *Device) remember(id string, ref hsm.ObjectRef) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.named[id] = ref
}

func (d *Device) seen(id string) (hsm.ObjectRef, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ref, known := d.named[id]
	return ref, known
}

func (d *Device) forget(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.named, id)
}

// forgetOthers forgets the carriers that are not listed any more.
func (d *Device) forgetOthers(listed []string) {
	there := make(map[string]bool, len(listed))
	for _, id := range listed {
		there[id] = true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for id := range d.named {
		if !there[id] {
			delete(d.named, id)
		}
	}
}

func describeObject(ref hsm.ObjectRef) string {
	return fmt.Sprintf("the object %q of %q", ref.Label, ref.Application)
}
