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

// errForeign is what a carrier holds that somebody else wrote.
var errForeign = errors.New("the carrier holds a certificate that was not written as an object; look at it, and delete the key if nobody needs it")

// Objects implements [hsm.ObjectStore]. A carrier without a value is what an interrupted write left: it is no object, and
// the next write of that name fills it.
func (d *Device) Objects(ctx context.Context, application string) ([]hsm.ObjectRef, error) {
	refs, err := d.list(ctx, application)
	if err != nil {
		return nil, fmt.Errorf("listing the objects of %q on %s: %w", application, d.name, err)
	}
	return refs, nil
}

func (d *Device) list(ctx context.Context, application string) ([]hsm.ObjectRef, error) {
	view, err := d.keeping(ctx)
	if err != nil {
		return nil, err
	}
	carriers, err := d.carriers(ctx, view)
	if err != nil {
		return nil, err
	}
	ids := slices.DeleteFunc(carriers, func(id string) bool { return !mayCarry(id, application) })
	refs := make([]*hsm.ObjectRef, len(ids))
	err = several(ctx, len(ids), func(ctx context.Context, i int) error {
		if ref, known := d.seen(ids[i]); known {
			refs[i] = &ref
			return nil
		}
		ref, value, err := d.read(ctx, view, ids[i])
		clear(value)
		switch {
		case errors.Is(err, hsm.ErrNotFound), errors.Is(err, errForeign):
			return nil
		case err != nil:
			return err
		}
		refs[i] = &ref
		return nil
	})
	if err != nil {
		return nil, err
	}
	var found []hsm.ObjectRef
	for _, ref := range refs {
		if ref != nil && ref.Application == application {
			found = append(found, *ref)
		}
	}
	slices.SortFunc(found, func(a, b hsm.ObjectRef) int { return cmp.Compare(a.Label, b.Label) })
	return found, nil
}

// carriers lists the keys that carry objects, those of all applications. Older servers list no keys by the beginning of
// their ids.
func (d *Device) carriers(ctx context.Context, view *Client) ([]string, error) {
	ids, err := view.Keys(ctx, KeyFilter{Prefix: carrierPrefix})
	if errors.Is(err, ErrRequest) || errors.Is(err, hsm.ErrUnsupported) || errors.Is(err, hsm.ErrNotFound) {
		ids, err = view.Keys(ctx, KeyFilter{})
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
	during := "reading " + d.describeObject(ref)
	view, err := d.keeping(ctx)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	_, value, err := d.read(ctx, view, carrierID(ref))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", during, err)
	}
	return value, nil
}

// read reads the object in a carrier. Without a carrier, or a value in it, it is hsm.ErrNotFound.
func (d *Device) read(ctx context.Context, view *Client, id string) (hsm.ObjectRef, []byte, error) {
	certificate, err := view.KeyCertificate(ctx, id)
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
// Success means that the value was read back, by another node where there is one.
func (d *Device) WriteObject(ctx context.Context, ref hsm.ObjectRef, value []byte) error {
	if err := d.write(ctx, ref, value); err != nil {
		return fmt.Errorf("writing %s: %w", d.describeObject(ref), err)
	}
	return nil
}

func (d *Device) write(ctx context.Context, ref hsm.ObjectRef, value []byte) error {
	view, err := d.keeping(ctx)
	if err != nil {
		return err
	}
	certificate := append(header(ref), value...)
	if len(certificate) > MaxKeyCertificate {
		return fmt.Errorf("%w: a value of %d bytes; at most %d are possible under this name", hsm.ErrUnsupported, len(value),
			MaxKeyCertificate-len(header(ref)))
	}
	id := carrierID(ref)
	_, err = view.GenerateKey(ctx, NewKey{
		ID: id, Type: TypeGeneric, Length: 128, Mechanisms: []Mechanism{AESEncryptionCBC}, Tags: []string{carrierTag},
	})
	if err != nil && !errors.Is(err, hsm.ErrExists) && !errors.Is(err, hsm.ErrMayHaveHappened) {
		return d.full(ctx, view, err)
	}
	// Where the carrier's answer was lost, the write tells whether it is there.
	written := view.PutKeyCertificate(ctx, id, certificate)
	if written != nil && !errors.Is(written, hsm.ErrMayHaveHappened) {
		return d.full(ctx, view, written)
	}
	switch there, err := view.KeyCertificate(ctx, id); {
	case err == nil && !bytes.Equal(there, certificate) && written != nil:
		return hsm.ErrExists // another writer was faster than the one whose answer was lost
	case err == nil && !bytes.Equal(there, certificate):
		return fmt.Errorf("%w: the NetHSM holds something else than was written", hsm.ErrUnavailable)
	case errors.Is(err, hsm.ErrNotFound) && written != nil:
		return written
	case err != nil:
		return fmt.Errorf("reading it back: %w: %w", hsm.ErrMayHaveHappened, err)
	}
	if err := d.spread(ctx, view, id, certificate); err != nil {
		return err
	}
	d.remember(id, ref)
	return nil
}

// spread waits until another node than the one that wrote shows a certificate, where another one answers. Nodes have
// caches: one that looked at the carrier before may need its time.
func (d *Device) spread(ctx context.Context, view *Client, id string, certificate []byte) error {
	urls := view.URLs()
	if len(urls) == 1 {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	shown := make(chan error, len(urls))
	var all sync.WaitGroup
	defer all.Wait()
	for _, url := range urls {
		node, err := view.At(url)
		if err != nil {
			return err
		}
		all.Go(func() { shown <- d.shows(ctx, node, id, certificate) })
	}
	defer cancel() // before the waiting
	seen := 0
	var behind error
	for range urls {
		switch err := <-shown; {
		case err == nil:
			if seen++; seen == 2 { // so one of them is not the one that wrote
				return nil
			}
		case errors.Is(err, errBehind):
			behind = err
		}
	}
	if behind != nil {
		return fmt.Errorf("reading it from all nodes: %w: %w: %w", hsm.ErrUnavailable, hsm.ErrMayHaveHappened, behind)
	}
	return ctx.Err()
}

// errBehind is a node that does not show what another one wrote.
var errBehind = errors.New("a node of the cluster does not show what another one wrote")

// shows waits until a node shows a certificate. A node that does not answer is some other error than errBehind.
func (d *Device) shows(ctx context.Context, node *Client, id string, certificate []byte) error {
	ctx, cancel := context.WithTimeout(ctx, d.lag)
	defer cancel()
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
			return fmt.Errorf("%w: %s", errBehind, node.URLs()[0])
		}
	}
}

// full tells a database that takes no more from one that is away: what cannot be written while everything can be read has
// no room.
func (d *Device) full(ctx context.Context, view *Client, refused error) error {
	answer, ok := errors.AsType[*Error](refused)
	if !ok || answer.Status != http.StatusInternalServerError && answer.Status != http.StatusRequestEntityTooLarge {
		return refused
	}
	if answer.Status == http.StatusInternalServerError {
		if _, err := view.Keys(ctx, KeyFilter{}); err != nil {
			return refused
		}
	}
	return fmt.Errorf("%w: the NetHSM's database reads and does not write; look at its quota and its log: %w", hsm.ErrFull, refused)
}

// DeleteObject implements [hsm.ObjectStore]: carrier and value go together.
func (d *Device) DeleteObject(ctx context.Context, ref hsm.ObjectRef) error {
	if err := d.remove(ctx, carrierID(ref)); err != nil {
		return fmt.Errorf("deleting %s: %w", d.describeObject(ref), err)
	}
	return nil
}

func (d *Device) remove(ctx context.Context, id string) error {
	view, err := d.keeping(ctx)
	if err != nil {
		return err
	}
	_, value, err := d.read(ctx, view, id)
	clear(value)
	if err != nil {
		return err
	}
	d.forget(id)
	if err := view.DeleteKey(ctx, id); !errors.Is(err, hsm.ErrNotFound) {
		return err
	}
	return nil // it was there a moment ago: this call, sent twice, or somebody else deleted it
}

// keeping is the client that keeps objects.
func (d *Device) keeping(ctx context.Context) (*Client, error) {
	if err := d.begin(ctx); err != nil {
		return nil, err
	}
	if !d.objects {
		return nil, fmt.Errorf("%w: this device keeps no objects; it does, with an administrator's rights, where its configuration says so",
			hsm.ErrUnsupported)
	}
	return d.administrator()
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

func (d *Device) describeObject(ref hsm.ObjectRef) string {
	return fmt.Sprintf("the object %q of %q on %s", ref.Label, ref.Application, d.name)
}
