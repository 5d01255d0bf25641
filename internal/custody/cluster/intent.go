package cluster

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// intentFormat is the version of the format of [Intent].
const intentFormat = 1

// maxAttempts is how many earlier attempts an intent remembers.
const maxAttempts = 8

// Intent says that a host is about to initialise a cluster. It lies in the store, where only one host can create it, and a
// copy on that host's own disk from the moment on in which Vault may be asked. It holds no secret.
type Intent struct {
	Format  int       `json:"format"`
	ID      string    `json:"id"` // random, hexadecimal; the first set of shares has it as well
	Cluster string    `json:"cluster"`
	Node    string    `json:"node"`
	Host    string    `json:"host"`
	HostID  string    `json:"host_id"` // random, of the host's local disk
	By      string    `json:"by,omitempty"`
	At      time.Time `json:"at"`
	// Before are earlier attempts that this one took over from, the newest first. Each may have initialised the cluster
	// without anybody having its answer.
	Before []Attempt `json:"before,omitempty"`
}

// Attempt is an initialisation whose end nobody knows.
type Attempt struct {
	ID   string    `json:"id"`
	Host string    `json:"host"`
	At   time.Time `json:"at"`
}

// intentLife is how long an attempt may still be at work: the deadline of sys/init and a margin for clocks that differ.
const intentLife = node.DefaultInitTimeout + time.Minute

// intentName is where the intent of a cluster lies, in the store and on the local disk.
func intentName(cluster string) string { return "clusters/" + cluster + "/intent" }

// errIntent: what lies there is no intent.
var errIntent = fmt.Errorf("it is no intent of an initialisation: %w", store.ErrCorrupt)

// parseIntent reads an intent, strictly.
func parseIntent(raw []byte) (*Intent, error) {
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	i := new(Intent)
	if err := decoder.Decode(i); err != nil {
		return nil, fmt.Errorf("%w: %w", errIntent, err)
	}
	_, err := decoder.Token()
	switch {
	case !errors.Is(err, io.EOF):
		return nil, fmt.Errorf("%w: something follows it", errIntent)
	case i.Format != intentFormat:
		return nil, fmt.Errorf("%w: format %d, this program knows %d", errIntent, i.Format, intentFormat)
	case !validID(i.ID) || !validID(i.HostID) || store.CheckName(i.Cluster) != nil || i.At.IsZero() || len(i.Before) > maxAttempts:
		return nil, fmt.Errorf("%w: it lacks what every intent has", errIntent)
	}
	return i, nil
}

func validID(id string) bool {
	raw, err := hex.DecodeString(id)
	return err == nil && len(raw) == idSize && hex.EncodeToString(raw) == id
}

// attempt is the intent as a later one remembers it.
func (i *Intent) attempt() Attempt { return Attempt{ID: i.ID, Host: i.Host, At: i.At} }

// alive tells whether one of the attempts may still be at work.
func (i *Intent) alive(now time.Time) bool {
	last := i.At
	for _, attempt := range i.Before {
		if attempt.At.After(last) {
			last = attempt.At
		}
	}
	return now.Before(last.Add(intentLife))
}

// hosts names those that began, the newest first.
func (i *Intent) hosts() string {
	names := []string{fmt.Sprintf("host %q (%s)", i.Host, i.At.Format(time.RFC3339))}
	for _, attempt := range i.Before {
		names = append(names, fmt.Sprintf("host %q (%s)", attempt.Host, attempt.At.Format(time.RFC3339)))
	}
	return strings.Join(slices.Compact(names), ", ")
}

// foundIntent is an intent and the revision at which it was read; the zero value is "none".
type foundIntent struct {
	*Intent

	revision store.Revision
}

// readIntent reads the intent of a cluster. None is no error.
func readIntent(ctx context.Context, s store.Store, cluster string) (foundIntent, error) {
	entry, err := s.Get(ctx, intentName(cluster))
	if errors.Is(err, store.ErrNotFound) {
		return foundIntent{}, nil
	}
	if err != nil {
		return foundIntent{}, fmt.Errorf("reading the intent to initialise cluster %q: %w", cluster, err)
	}
	intent, err := parseIntent(entry.Value)
	if err == nil && intent.Cluster != cluster {
		err = fmt.Errorf("%w: it is of cluster %q", errIntent, intent.Cluster)
	}
	if err != nil {
		return foundIntent{}, fmt.Errorf("reading the intent to initialise cluster %q: %w; find out who put it there, and remove it", cluster, err)
	}
	return foundIntent{intent, entry.Revision}, nil
}

// writeIntent puts an intent in place of what was found; store.ErrConflict says that somebody else was faster. A write that was
// made although the store answered with an error is a success.
func writeIntent(ctx context.Context, s store.Store, intent *Intent, found store.Revision) (foundIntent, error) {
	raw, err := json.Marshal(intent)
	if err != nil {
		return foundIntent{}, fmt.Errorf("encoding the intent to initialise cluster %q: %w", intent.Cluster, err)
	}
	revision, err := s.Put(ctx, intentName(intent.Cluster), raw, found)
	if err == nil {
		return foundIntent{intent, revision}, nil
	}
	if !errors.Is(err, store.ErrConflict) {
		now, lookErr := afterwards(ctx, func(ctx context.Context) (foundIntent, error) { return readIntent(ctx, s, intent.Cluster) })
		if lookErr == nil && now.Intent != nil && now.ID == intent.ID {
			return now, nil
		}
	}
	return foundIntent{}, fmt.Errorf("writing the intent to initialise cluster %q: %w", intent.Cluster, err)
}

// removeIntent removes an intent that was found. One that is gone or that somebody replaced is fine.
func removeIntent(ctx context.Context, s store.Store, found foundIntent) error {
	if found.Intent == nil {
		return nil
	}
	err := s.Delete(ctx, intentName(found.Cluster), found.revision)
	if err == nil || errors.Is(err, store.ErrNotFound) || errors.Is(err, store.ErrConflict) {
		return nil
	}
	return fmt.Errorf("removing the intent to initialise cluster %q: %w", found.Cluster, err)
}

// afterwards asks how something ended that failed, although the caller may have gone.
func afterwards[T any](ctx context.Context, ask func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return ask(ctx)
}

// hostID is the random name of the local disk: two hosts may have one host name.
func (k *Custodian) hostID(ctx context.Context) (string, error) {
	const name = "host"
	for range 2 {
		entry, err := k.local.Get(ctx, name)
		if err == nil && validID(string(entry.Value)) {
			return string(entry.Value), nil
		}
		if err == nil {
			return "", fmt.Errorf("reading the id of this host: %w: the file %q of the local state is damaged; remove it", store.ErrCorrupt, name)
		}
		if !errors.Is(err, store.ErrNotFound) {
			return "", fmt.Errorf("reading the id of this host: %w", err)
		}
		id := newID()
		_, err = k.local.Put(ctx, name, []byte(id), store.NoRevision)
		if err == nil {
			return id, nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return "", fmt.Errorf("writing the id of this host: %w", err)
		}
	}
	return "", fmt.Errorf("reading the id of this host: %w: it changes all the time", ErrBusy)
}

// claim makes this host the one that initialises the cluster, by an intent that is created only where there is none. It is
// [ErrIntentElsewhere] where another host has that right. An intent of this host, which holds the local lock, is one that was
// cut off, and is taken over at once; that of another host when it cannot be at work any more.
func (k *Custodian) claim(ctx context.Context, c *Cluster, s store.Store, by string) (foundIntent, error) {
	hostID, err := k.hostID(ctx)
	if err != nil {
		return foundIntent{}, err
	}
	found, err := readIntent(ctx, s, c.Name)
	if err != nil {
		return foundIntent{}, err
	}
	next := &Intent{
		Format: intentFormat, ID: newID(), Cluster: c.Name, Node: c.Nodes[0], Host: k.host, HostID: hostID, By: by, At: k.today(),
	}
	if found.Intent != nil {
		asked, err := k.asked(ctx, found.Intent, hostID)
		if err != nil {
			return foundIntent{}, err
		}
		if found.HostID != hostID && found.alive(k.now()) {
			return foundIntent{}, found.elsewhere()
		}
		next.Before = found.Before
		if asked {
			next.Before = slices.Insert(slices.Clone(next.Before), 0, found.attempt())
		}
		next.Before = next.Before[:min(len(next.Before), maxAttempts)]
		k.logger.Warn("an initialisation that was cut off is taken over", "cluster", c.Name, "host", found.Host, "begun", found.At)
	}
	written, err := writeIntent(ctx, s, next, found.revision)
	if errors.Is(err, store.ErrConflict) {
		return foundIntent{}, fmt.Errorf("initialising cluster %q: %w: it was faster: %w", c.Name, ErrIntentElsewhere, err)
	}
	return written, err
}

// asked tells whether Vault may have been asked under an intent. Of an intent of its own a host knows it by the copy on its
// disk, which it writes before it asks.
func (k *Custodian) asked(ctx context.Context, intent *Intent, hostID string) (bool, error) {
	if intent.HostID != hostID {
		return true, nil
	}
	copied, err := readIntent(ctx, k.local, intent.Cluster)
	return copied.Intent != nil && copied.ID == intent.ID, err
}

// elsewhere says who is at work.
func (i *Intent) elsewhere() error {
	return fmt.Errorf("initialising cluster %q: %w: host %q (%s) has begun at %s", i.Cluster, ErrIntentElsewhere, i.Host, i.By, i.At.Format(time.RFC3339))
}

// withdraw removes an intent under which nothing happened. Earlier attempts that it took over from stay on record.
func (k *Custodian) withdraw(ctx context.Context, s store.Store, claimed foundIntent) error {
	_, err := afterwards(ctx, func(ctx context.Context) (struct{}, error) {
		copied, err := readIntent(ctx, k.local, claimed.Cluster)
		if err == nil {
			err = removeIntent(ctx, k.local, copied)
		}
		if err == nil && len(claimed.Before) == 0 {
			err = removeIntent(ctx, s, claimed)
		}
		return struct{}{}, err
	})
	return err
}
