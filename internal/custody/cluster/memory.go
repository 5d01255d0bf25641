package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// memory is what a custodian remembers between two looks at its nodes, so that neither a node nor an HSM is asked again and
// again for what failed. It is lost with the process; alarms alone lie on the local disk. Custodian.mu guards it.
type memory struct {
	refusals map[nodeName]refusal
	given    map[nodeName]given
	alarms   map[nodeName]knownAlarm
	looked   map[nodeName]bool    // whether the local disk was asked for an alarm
	ids      map[string]string    // by cluster: its id, from the material that was opened last
	roots    map[string]time.Time // by cluster: when a root token that is to be revoked is looked for again
	kept     map[string]uint64    // by cluster: the generation of the root token that is there to stay
}

// refusal is why a node got nothing, or did not take what it got. It stands while neither the material nor the node changes,
// and for an hour at most.
type refusal struct {
	material string // what is in the store, see generations
	n, t     int
	until    time.Time
	err      error
}

// refusalTime is how long a refusal stands although nothing changes.
const refusalTime = time.Hour

// partialRefusalTime is how long one stands that was made while not all keys could be opened: that an HSM is plugged in again is
// a change that nobody sees.
const partialRefusalTime = 2 * time.Minute

// knownAlarm is an alarm that was raised or read by this process. One that could not be written to the disk stands as well.
type knownAlarm struct {
	*Alarm

	written bool
}

// given says which attempt of a node has our shares already, and goes on without us.
type given struct {
	nonce string // "" for a node that has them all and joins its cluster
	until time.Time
}

func (k *Custodian) remember(change func(*memory)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.memory.refusals == nil {
		k.memory = memory{
			refusals: map[nodeName]refusal{}, given: map[nodeName]given{}, alarms: map[nodeName]knownAlarm{},
			looked: map[nodeName]bool{}, ids: map[string]string{}, roots: map[string]time.Time{}, kept: map[string]uint64{},
		}
	}
	change(&k.memory)
}

// refuse remembers that a node and the material do not fit. partial says that not all of the material could be opened.
func (k *Custodian) refuse(ctx context.Context, c *Cluster, address string, st node.Status, partial bool, err error) {
	material, stands := k.generations(ctx, c), refusalTime
	if partial {
		stands = partialRefusalTime
	}
	k.remember(func(m *memory) {
		m.refusals[nodeName{c.Name, address}] = refusal{material, st.N, st.T, k.now().Add(stands), err}
	})
}

// refused returns why a node gets nothing now, nil where it should be tried.
func (k *Custodian) refused(ctx context.Context, c *Cluster, address string, st node.Status) error {
	name := nodeName{c.Name, address}
	var was refusal
	k.remember(func(m *memory) { was = m.refusals[name] })
	if was.err == nil {
		return nil
	}
	if k.now().Before(was.until) && was.n == st.N && was.t == st.T && was.material == k.generations(ctx, c) {
		return was.err
	}
	k.remember(func(m *memory) { delete(m.refusals, name) })
	return nil
}

// Retry lets nodes of a cluster be tried again that did not take its shares, or did not fit them, although nothing here has
// changed: a person asks, who may have mended them.
func (k *Custodian) Retry(c *Cluster) {
	k.remember(func(m *memory) {
		maps.DeleteFunc(m.refusals, func(name nodeName, _ refusal) bool { return name.cluster == c.Name })
	})
}

// generations tells what the store holds of the unseal keys, so that a change is noticed. No HSM is touched.
func (k *Custodian) generations(ctx context.Context, c *Cluster) string {
	var text string
	for _, item := range k.items(ctx, c, KindUnseal) {
		text += fmt.Sprintf("%s@%d ", item.Item, item.Generation)
	}
	return text
}

// alarmName is where an alarm lies on the local disk.
func alarmName(c *Cluster, address string) string {
	sum := sha256.Sum256([]byte(address))
	return "alarms/" + c.Name + "/" + hex.EncodeToString(sum[:8])
}

// alarmFormat is the version of the format of [Alarm].
const alarmFormat = 1

// raise notes that shares went to another cluster, on the local disk as well, so that no more go there until an operator has
// acted.
func (k *Custodian) raise(ctx context.Context, c *Cluster, address, recorded, seen string) *Alarm {
	alarm := &Alarm{Format: alarmFormat, Cluster: c.Name, Node: address, At: k.today(), Recorded: recorded, Seen: seen}
	k.logger.Error("ALARM: a node that is not of this cluster took its shares; rekey the cluster now", "cluster", c.Name, "node", address,
		"recorded_id", recorded, "seen_id", seen)
	raw, err := json.Marshal(alarm)
	if err == nil {
		_, err = k.local.Put(context.WithoutCancel(ctx), alarmName(c, address), raw, store.NoRevision)
	}
	if errors.Is(err, store.ErrConflict) { // one that is there already is as good
		err = nil
	}
	k.remember(func(m *memory) { m.alarms[nodeName{c.Name, address}] = knownAlarm{alarm, err == nil} })
	if err != nil {
		k.logger.Error("the alarm could not be written to the local disk; it stands while this process runs", "cluster", c.Name, "node", address,
			"error", err)
	}
	return alarm
}

// alarm returns the alarm of a node, nil for none. Unless surely is set, the local disk is asked once only while there is none.
func (k *Custodian) alarm(ctx context.Context, c *Cluster, address string, surely bool) (*Alarm, error) {
	name := nodeName{c.Name, address}
	var known knownAlarm
	var looked bool
	k.remember(func(m *memory) { known, looked = m.alarms[name], m.looked[name] })
	if known.Alarm == nil && looked && !surely {
		return nil, nil //nolint:nilnil // no alarm is the ordinary case
	}
	entry, err := k.local.Get(ctx, alarmName(c, address))
	switch {
	case errors.Is(err, store.ErrNotFound):
		k.remember(func(m *memory) {
			m.looked[name] = true
			if known.written { // another process has cleared it
				delete(m.alarms, name)
			}
		})
		if known.written {
			return nil, nil //nolint:nilnil // no alarm is the ordinary case
		}
		return known.Alarm, nil
	case err != nil:
		return nil, fmt.Errorf("looking for an alarm of node %s of cluster %q: %w", address, c.Name, err)
	}
	alarm := new(Alarm)
	if err := json.Unmarshal(entry.Value, alarm); err != nil || alarm.Format != alarmFormat {
		alarm = &Alarm{Format: alarmFormat, Cluster: c.Name, Node: address} // it cannot be read, and stands
	}
	k.remember(func(m *memory) { m.alarms[name], m.looked[name] = knownAlarm{alarm, true}, true })
	return alarm, nil
}

// ClearAlarm lets a node have shares again after an operator has found out what happened: mended its address or its trust, and
// rekeyed the cluster. It is no error where there is no alarm.
func (k *Custodian) ClearAlarm(ctx context.Context, c *Cluster, address string) error {
	entry, err := k.local.Get(ctx, alarmName(c, address))
	if err == nil {
		err = k.local.Delete(ctx, alarmName(c, address), entry.Revision)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("clearing the alarm of node %s of cluster %q: %w", address, c.Name, err)
	}
	name := nodeName{c.Name, address}
	k.remember(func(m *memory) {
		delete(m.alarms, name)
		delete(m.refusals, name)
	})
	k.logger.Warn("the alarm of a node was cleared", "cluster", c.Name, "node", address)
	return nil
}

// err is the alarm as an error.
func (a *Alarm) err() error {
	return fmt.Errorf("node %s of cluster %q: %w: it took them at %s, showing the cluster id %q where %q is recorded; rekey the cluster, find out "+
		"what is at that address, then clear the alarm", a.Node, a.Cluster, ErrForeignCluster, a.At.Format(time.RFC3339), a.Seen, a.Recorded)
}
