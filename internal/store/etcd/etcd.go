// Package etcd keeps values in an etcd cluster: the store for more than one machine.
//
// A name is the etcd key prefix/name, its value the value as it is. The revision is the key's mod revision, which
// etcd counts up with every write in the whole cluster: it does not recur after a delete. (It does after the cluster
// was restored from a snapshot without `etcdutl snapshot restore --bump-revision`.) Creating, replacing and deleting
// are transactions on that revision, so of all writers on all machines exactly one wins. There is no index to keep
// beside the records: the keys under a prefix are one, in order, and change in the very transaction of the record.
//
// Reads are linearizable: they see every write that was confirmed before. A read is tried again for a few seconds, on
// the next member, while a leader is elected. A write is sent once. When its answer is lost it may or may not have
// happened, the error is store.ErrUnavailable, and only reading the name tells.
//
// [Open] does no I/O; the connection is made by the first operation and lives until Close.
package etcd

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"vault-plugin-secrets-nitrokey/internal/store"
)

const (
	patience    = 5 * time.Second // how long a read is tried again: an election takes 1 to 2 s
	readAttempt = 3 * time.Second // what one member gets to answer a read
	firstPause  = 25 * time.Millisecond
	longPause   = 400 * time.Millisecond
)

// MaxNames is how many keys List lists at most: far more than there are clusters to unseal, and few enough for a heap.
const MaxNames = 10_000

// pageSize is how many keys one answer of etcd holds: with the longest names well below gRPC's 4 MiB.
const pageSize = 1_000

// maxLists is how often a list is begun at most. It is begun anew where etcd was compacted between two of its pages, which
// operators and timers do every few minutes.
const maxLists = 4

// Store is a prefix of an etcd cluster.
type Store struct {
	prefix     string // ends in "/"
	timeout    time.Duration
	connection *connection
}

var _ store.Store = (*Store)(nil)

// Open checks the configuration. It connects to nothing.
func Open(config Config) (*Store, error) {
	if config.RequestTimeout <= 0 {
		config.RequestTimeout = defaultRequestTimeout
	}
	client, err := config.client()
	if err != nil {
		return nil, fmt.Errorf("configuring the etcd store: %w", err)
	}
	return &Store{
		prefix:     config.Prefix + "/",
		timeout:    config.RequestTimeout,
		connection: newConnection(client),
	}, nil
}

// Get implements [store.Store].
func (s *Store) Get(ctx context.Context, name string) (store.Entry, error) {
	if err := store.CheckName(name); err != nil {
		return store.Entry{}, err
	}
	var found *clientv3.GetResponse
	err := s.read(ctx, func(ctx context.Context, client *clientv3.Client) (err error) {
		found, err = client.Get(ctx, s.prefix+name)
		return err
	})
	if err != nil {
		return store.Entry{}, fmt.Errorf("reading %q from etcd: %w", name, err)
	}
	if len(found.Kvs) == 0 {
		return store.Entry{}, fmt.Errorf("reading %q from etcd: %w", name, store.ErrNotFound)
	}
	return store.Entry{Value: found.Kvs[0].Value, Revision: revision(found.Kvs[0].ModRevision)}, nil
}

// Put implements [store.Store].
func (s *Store) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if err := store.CheckName(name); err != nil {
		return store.NoRevision, err
	}
	if err := store.CheckValue(value, store.MaxValueSize); err != nil {
		return store.NoRevision, fmt.Errorf("writing %q: %w", name, err)
	}
	done, err := s.write(ctx, func(ctx context.Context, client *clientv3.Client) clientv3.Txn {
		return client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(s.prefix+name), "=", modRevision(expected))).
			Then(clientv3.OpPut(s.prefix+name, string(value)))
	})
	if err != nil {
		return store.NoRevision, fmt.Errorf("writing %q to etcd: %w", name, err)
	}
	if !done.Succeeded {
		return store.NoRevision, fmt.Errorf("writing %q to etcd: %w: it is not at revision %q", name, store.ErrConflict, expected)
	}
	return revision(done.Header.Revision), nil
}

// List implements [store.Store]. More than [MaxNames] keys are store.ErrTooLarge. All pages are of one state of etcd.
func (s *Store) List(ctx context.Context, prefix string) ([]string, error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return nil, err
	}
	var names []string
	var err error
	for range maxLists {
		names, err = s.list(ctx, prefix)
		if !errors.Is(err, rpctypes.ErrCompacted) {
			break
		}
	}
	return names, err
}

// list reads all pages once; rpctypes.ErrCompacted says that etcd has dropped the state that the first one was of.
func (s *Store) list(ctx context.Context, prefix string) ([]string, error) {
	var names []string
	from, end := s.prefix+prefix, clientv3.GetPrefixRangeEnd(s.prefix+prefix)
	for at := int64(0); ; {
		var page *clientv3.GetResponse
		err := s.read(ctx, func(ctx context.Context, client *clientv3.Client) (err error) {
			page, err = client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithKeysOnly(), clientv3.WithLimit(pageSize),
				clientv3.WithRev(at), clientv3.WithSort(clientv3.SortByKey, clientv3.SortAscend))
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("listing %q in etcd: %w", prefix, err)
		}
		if page.Count > MaxNames {
			return nil, fmt.Errorf("listing %q in etcd: %w: there are %d keys under %q, and %d are listed at most; list a longer prefix, or "+
				"find out who writes so many", prefix, store.ErrTooLarge, page.Count, s.prefix+prefix, MaxNames)
		}
		for _, kv := range page.Kvs {
			name := strings.TrimPrefix(string(kv.Key), s.prefix)
			if store.CheckName(name) == nil { // a foreign key is none of ours
				names = append(names, name)
			}
		}
		if !page.More || len(page.Kvs) == 0 {
			return names, nil
		}
		if at == 0 {
			at = page.Header.Revision
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00" // the next possible key
	}
}

// Delete implements [store.Store].
func (s *Store) Delete(ctx context.Context, name string, expected store.Revision) error {
	if err := store.CheckName(name); err != nil {
		return err
	}
	done, err := s.write(ctx, func(ctx context.Context, client *clientv3.Client) clientv3.Txn {
		return client.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(s.prefix+name), "=", modRevision(expected))).
			Then(clientv3.OpDelete(s.prefix + name)).
			Else(clientv3.OpGet(s.prefix+name, clientv3.WithCountOnly()))
	})
	if err != nil {
		return fmt.Errorf("deleting %q in etcd: %w", name, err)
	}
	switch {
	case done.Succeeded && done.Responses[0].GetResponseDeleteRange().GetDeleted() > 0:
		return nil
	case !done.Succeeded && done.Responses[0].GetResponseRange().GetCount() > 0:
		return fmt.Errorf("deleting %q in etcd: %w: it is not at revision %q", name, store.ErrConflict, expected)
	default:
		return fmt.Errorf("deleting %q in etcd: %w", name, store.ErrNotFound)
	}
}

// Close implements [store.Store].
func (s *Store) Close() error {
	if err := s.connection.close(); err != nil {
		return fmt.Errorf("closing the connection to etcd: %w", err)
	}
	return nil
}

// request asks etcd for something.
type request func(context.Context, *clientv3.Client) error

// read asks until etcd answers, ctx ends or trying again is of no use.
func (s *Store) read(ctx context.Context, ask request) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	begin := time.Now()
	err := s.try(ctx, readAttempt, ask)
	for pause := firstPause; worthRepeating(err) && ctx.Err() == nil && time.Since(begin) < patience; {
		select {
		case <-time.After(pause):
			pause = min(2*pause, longPause)
			err = s.try(ctx, readAttempt, ask)
		case <-ctx.Done():
		}
	}
	return err
}

func worthRepeating(err error) bool {
	return errors.Is(err, store.ErrUnavailable) && !errors.Is(err, errClosed) && !errors.Is(err, rpctypes.ErrCompacted)
}

// write sends one transaction, once.
func (s *Store) write(ctx context.Context, txn func(context.Context, *clientv3.Client) clientv3.Txn) (done *clientv3.TxnResponse, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	err = s.try(ctx, s.timeout, func(ctx context.Context, client *clientv3.Client) (err error) {
		done, err = txn(ctx, client).Commit()
		return err
	})
	return done, err
}

// try runs one request with a time limit of its own. A request that was refused for a token that ran out, or for
// permissions that changed a moment ago, did nothing; the client has got a new token by then, and it runs once more.
func (s *Store) try(ctx context.Context, limit time.Duration, ask request) error {
	client, err := s.connection.client(ctx)
	if err != nil {
		return err
	}
	// A member without a leader says so at once, instead of keeping the request until it times out.
	limited, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), limit)
	defer cancel()
	err = ask(limited, client)
	if errors.Is(err, rpctypes.ErrInvalidAuthToken) || errors.Is(err, rpctypes.ErrAuthOldRevision) {
		err = ask(limited, client)
	}
	return explain(ctx, err)
}

// revision writes a mod revision as a store's revision: decimal, without leading zeros.
func revision(mod int64) store.Revision { return store.Revision(strconv.FormatInt(mod, 10)) }

// modRevision is the opposite of revision. etcd gives 0 to a key that does not exist, and never a negative one: what
// no store wrote is compared with -1 and conflicts.
func modRevision(r store.Revision) int64 {
	if r == store.NoRevision {
		return 0
	}
	mod, err := strconv.ParseInt(string(r), 10, 64)
	if err != nil || mod <= 0 || revision(mod) != r {
		return -1
	}
	return mod
}
