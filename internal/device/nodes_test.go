package device

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// fakeCluster is a device of several nodes.
type fakeCluster struct {
	fakeDevice

	nodes      []hsm.Node
	infoErr    error
	noState    bool
	randomErr  error
	nodesDelay time.Duration
}

func (c *fakeCluster) Info(context.Context) (hsm.Info, error) {
	if c.infoErr != nil || c.noState {
		return hsm.Info{}, c.infoErr
	}
	return hsm.Info{State: stateOf(c.nodes)}, nil
}

func (c *fakeCluster) Nodes(context.Context) []hsm.Node {
	time.Sleep(c.nodesDelay)
	return c.nodes
}

func (c *fakeCluster) Random(_ context.Context, n int) ([]byte, error) {
	return make([]byte, n), c.randomErr
}

func openNetHSM(t *testing.T, config Config, device hsm.Device) *Handle {
	t.Helper()
	handle, err := New(Options{Openers: map[string]Opener{TypeNetHSM: func(context.Context, string, Config, Secrets) (hsm.Device, error) {
		return device, nil
	}}}).Open("mount", "net", config)
	must(t, err)
	t.Cleanup(func() { must(t, handle.Close()) })
	return handle
}

func inState(states ...hsm.State) []hsm.Node {
	nodes := make([]hsm.Node, len(states))
	for i, state := range states {
		nodes[i] = hsm.Node{URL: fmt.Sprintf("https://n%d", i), State: state}
		if state != hsm.StateOperational {
			nodes[i].Err = fmt.Errorf("node %d is %s: %w", i, state, hsm.ErrUnavailable)
		}
	}
	return nodes
}

func TestStatusOfSeveralNodes(t *testing.T) {
	const up, locked, failed, fresh, absent = hsm.StateOperational, hsm.StateLocked, hsm.StateFailed, hsm.StateUnprovisioned, hsm.StateAbsent
	unlocksNone := func(c *Config) { c.UnlockPassphrase = "" }
	opens, forbidden := fakeKey{}, fakeKey{err: fmt.Errorf("decrypting (403): %w", hsm.ErrForbidden)}
	tests := map[string]struct {
		cluster *fakeCluster
		config  func(*Config)
		canOpen bool
		state   hsm.State
		err     error
		says    []string // of the error, or else of the notes
		saysNot string
	}{
		"all serve": {
			cluster: &fakeCluster{fakeDevice: fakeDevice{keys: []hsm.Key{opens}}, nodes: inState(up, up)},
			canOpen: true, state: up,
		},
		"one serves and one does not": {
			cluster: &fakeCluster{fakeDevice: fakeDevice{keys: []hsm.Key{opens}}, nodes: inState(locked, up)},
			canOpen: true, state: up, says: []string{"trouble with the node https://n0: node 0 is locked"},
		},
		"all are locked": {
			cluster: &fakeCluster{infoErr: hsm.ErrLocked, nodes: inState(locked, locked, locked)}, config: unlocksNone,
			state: locked, err: hsm.ErrLocked, says: []string{"all 3 nodes are locked", "unlock_passphrase"}, saysNot: "node 0",
		},
		"all are locked, and what is configured does not unlock them": {
			cluster: &fakeCluster{infoErr: hsm.ErrLocked, nodes: inState(locked, locked, absent)},
			state:   locked, err: hsm.ErrLocked,
			says:    []string{"2 nodes are locked", "the configured unlock_passphrase has not done it: node 0 is locked", "; 1 node is out of reach"},
			saysNot: "or configure",
		},
		"some are locked and the rest is away": {
			cluster: &fakeCluster{infoErr: hsm.ErrLocked, nodes: inState(locked, absent, absent)}, config: unlocksNone,
			state: locked, err: hsm.ErrLocked, says: []string{"1 node is locked", "2 nodes are out of reach: node 1 is absent", "; node 2 is absent"},
		},
		"the only one is away": {
			cluster: &fakeCluster{infoErr: hsm.ErrUnavailable, nodes: inState(absent)},
			state:   absent, err: hsm.ErrUnavailable, says: []string{"the node is out of reach"},
		},
		"all have failed": {
			cluster: &fakeCluster{infoErr: hsm.ErrUnavailable, nodes: inState(failed, failed)},
			state:   failed, err: hsm.ErrUnavailable, says: []string{"all 2 nodes are in the state Failed", "recovers by itself"},
		},
		"it is new": {
			cluster: &fakeCluster{infoErr: hsm.ErrUnavailable, nodes: inState(fresh)},
			state:   fresh, err: hsm.ErrUnavailable, says: []string{"not provisioned"},
		},
		"the nodes serve and the password is wrong": {
			cluster: &fakeCluster{infoErr: &hsm.PINError{TriesLeft: -1, Wrong: true, Detail: "the password is wrong"}, nodes: inState(up)},
			state:   up, says: []string{"the password is wrong"}, saysNot: "node",
		},
		"its user has another role": {
			cluster: &fakeCluster{
				fakeDevice: fakeDevice{keys: []hsm.Key{forbidden}}, nodes: inState(up), randomErr: fmt.Errorf("random (403): %w", hsm.ErrForbidden),
			},
			state: up, err: hsm.ErrForbidden, says: []string{"may list keys and not use them", "role Operator"},
		},
		"its user may use no key": {
			cluster: &fakeCluster{fakeDevice: fakeDevice{keys: []hsm.Key{forbidden, forbidden}}, nodes: inState(up)},
			state:   up, err: hsm.ErrForbidden, says: []string{"none of the keys is for this user", "tag", "403"},
		},
		"its user may not use the keys of others": {
			cluster: &fakeCluster{fakeDevice: fakeDevice{keys: []hsm.Key{forbidden, opens}}, nodes: inState(up)},
			canOpen: true, state: up,
		},
		"its user has another role, and there is no key yet": {
			cluster: &fakeCluster{randomErr: fmt.Errorf("random (403): %w", hsm.ErrForbidden), nodes: inState(up)},
			state:   up, err: hsm.ErrForbidden, says: []string{"may list keys and not use them"},
		},
		"its user has another role, and the keys are for something else": {
			cluster: &fakeCluster{
				fakeDevice: fakeDevice{keys: []hsm.Key{fakeKey{err: hsm.ErrUnsupported}}}, nodes: inState(up),
				randomErr: fmt.Errorf("random (403): %w", hsm.ErrForbidden),
			},
			state: up, err: hsm.ErrForbidden, says: []string{"may list keys and not use them"},
		},
		"there is no key yet": {
			cluster: &fakeCluster{nodes: inState(up)}, state: up,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			config := validNetHSM()
			if test.config != nil {
				test.config(&config)
			}
			status := openNetHSM(t, config, test.cluster).Status(t.Context())
			if status.CanOpen() != test.canOpen || status.Info.State != test.state || test.err != nil && !errors.Is(status.Err, test.err) ||
				len(status.Nodes) != len(test.cluster.nodes) {
				t.Errorf("CanOpen %v, state %q, %d nodes, error %v", status.CanOpen(), status.Info.State, len(status.Nodes), status.Err)
			}
			said := strings.Join(status.Info.Notes, "\n")
			if status.Err != nil {
				said = status.Err.Error()
			}
			for _, part := range test.says {
				if !strings.Contains(said, part) {
					t.Errorf("%q does not say %q", said, part)
				}
			}
			if test.saysNot != "" && strings.Contains(said, test.saysNot) || test.says == nil && said != "" {
				t.Errorf("%q says too much", said)
			}
		})
	}
}

// The role is wrong for all keys alike; tags are a matter of each key.
func TestStatusTriesNoOtherKeyWhereTheRoleIsWrong(t *testing.T) {
	for name, test := range map[string]struct {
		role error
		want int
	}{
		"the role is wrong": {fmt.Errorf("random (403): %w", hsm.ErrForbidden), 1},
		"the tags are":      {nil, 100},
	} {
		t.Run(name, func(t *testing.T) {
			tried := 0
			cluster := &fakeCluster{randomErr: test.role, nodes: inState(hsm.StateOperational)}
			for range 100 {
				cluster.keys = append(cluster.keys, countingKey{tried: &tried})
			}
			status := openNetHSM(t, validNetHSM(), cluster).Status(t.Context())
			if !errors.Is(status.Err, hsm.ErrForbidden) || tried != test.want {
				t.Errorf("%d keys were tried, want %d: %v", tried, test.want, status.Err)
			}
		})
	}
}

type countingKey struct {
	hsm.Agreer

	tried *int
}

func (k countingKey) Prove(context.Context) error {
	*k.tried++
	return hsm.ErrForbidden
}

func TestNodesAreAskedBesideTheRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cluster := &fakeCluster{nodes: inState(hsm.StateOperational), nodesDelay: 3 * time.Second}
		handle := openNetHSM(t, validNetHSM(), cluster)
		begin := time.Now()
		if status := handle.Status(t.Context()); len(status.Nodes) != 1 || time.Since(begin) != cluster.nodesDelay {
			t.Errorf("%d nodes after %v", len(status.Nodes), time.Since(begin))
		}
	})
}
