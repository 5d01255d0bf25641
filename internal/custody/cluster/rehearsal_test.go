package cluster

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// lyingDisk takes what a rehearsal writes, and gives something else back.
type lyingDisk struct{ Local }

func (l lyingDisk) Get(ctx context.Context, name string) (store.Entry, error) {
	entry, err := l.Local.Get(ctx, name)
	if err == nil && strings.HasPrefix(name, "rehearsal/") {
		entry.Value = bytes.Clone(entry.Value)
		entry.Value[0] ^= 1
	}
	return entry, err
}

// What the local disk says that it has written is read back and compared: it may be the only place where the keys are.
func TestNothingIsInitialisedOnADiskThatGivesBackSomethingElse(t *testing.T) {
	s := newSite(t, nodetest.Alone, 1)
	k := s.host("one").process()
	k.local = lyingDisk{k.local}
	if _, err := k.Init(t.Context(), s.Cluster, InitOptions{}); !errors.Is(err, errReadBack) {
		t.Errorf("Init = %v", err)
	}
	if s.initialisations() != 0 {
		t.Error("sys/init was called")
	}
}
