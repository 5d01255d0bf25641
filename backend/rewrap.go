package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// rewrapsPrefix is where the state of a rewrap lies in the mount's storage: rewraps/<key>.
const rewrapsPrefix = "rewraps/"

// rewrapRecord says how the sealing anew of a wrapping key's stored material goes. It is written at the beginning and at
// the end, so that a process that comes later knows what to go on with.
type rewrapRecord struct {
	Running bool `json:"running"`
	// Waiting is true while clusters in custody wait for the newest version to be one that they may depend on.
	Waiting   bool      `json:"waiting,omitempty"`
	By        string    `json:"by"`
	Began     time.Time `json:"began"`
	Ended     time.Time `json:"ended"`
	Items     int       `json:"items"`
	Rewrapped int       `json:"rewrapped"`
	SingleHSM int       `json:"single_hsm"`
	// Problems are the items that are as they were, and the stores that could not be listed, with the reasons.
	Problems []string `json:"problems,omitempty"`
}

// rewrapPatience is for how long items that cannot be sealed anew are tried again, every minute.
const rewrapPatience = 24 * time.Hour

// maxProblems is how many problems of a rewrap are kept.
const maxProblems = 20

// startRewrap begins to seal a wrapping key's stored material anew, in the background. The journal makes Vault ask again
// where that is cut short, or where an item could not be reached. A failure to begin is logged and not returned: the
// rotation that it follows is done.
func (b *backend) startRewrap(ctx context.Context, key, by string) {
	entry, err := framework.PutWAL(ctx, b.storage, walRewrap, map[string]any{"key": key, "by": by})
	if err != nil {
		b.logger.Warn("journalling that stored material is to be sealed anew", "key", key, "error", err)
	}
	if err := b.putRewrap(ctx, key, rewrapRecord{Running: true, By: by, Began: time.Now()}); err != nil {
		b.logger.Warn("recording that stored material is to be sealed anew", "key", key, "error", err)
	}
	if !b.resumeRewrap(key, by, entry) {
		b.commit(ctx, entry)
	}
}

// resumeRewrap seals a wrapping key's stored material anew in the background, and tells whether it began to.
func (b *backend) resumeRewrap(key, by, entry string) bool {
	return b.jobs.start(b.closing, walRewrap+" "+key, func(ctx context.Context) {
		if err := b.rewrapMaterial(ctx, key, by); err != nil && !errors.Is(err, errRewrapWaits) {
			b.logger.Warn("sealing stored material anew; it is tried again", "key", key, "error", err)
			return
		}
		b.commit(ctx, entry)
	})
}

var (
	// errRewrapIncomplete is returned where some items could not be sealed anew.
	errRewrapIncomplete = errors.New("some material could not be sealed anew")
	// errRewrapWaits is returned where nothing was begun: the watch begins it when the key is ready.
	errRewrapWaits = errors.New("stored material is sealed anew once the key is ready for clusters")
)

// rewrapMaterial seals all material of a wrapping key to its newest version, where it is not, and records how that went.
func (b *backend) rewrapMaterial(ctx context.Context, key, by string) error {
	record := rewrapRecord{By: by, Began: time.Now()}
	if before, err := b.readRewrap(ctx, key); err == nil && before != nil {
		record.Began = before.Began // it goes on
	}
	if waits, err := b.readyForClusters(ctx, key); err != nil {
		return err
	} else if waits != nil {
		record.Waiting, record.Problems = true, []string{waits.Error()}
		if err := b.putRewrap(ctx, key, record); err != nil {
			return err
		}
		b.logger.Warn("sealing stored material anew waits", "key", key, "reason", waits)
		return errRewrapWaits
	}
	report, err := b.keeper.Rewrap(ctx, key, by, nil)
	if ctx.Err() != nil {
		return err // the next process goes on
	}
	record.Ended = time.Now()
	record.Items, record.Rewrapped, record.SingleHSM = report.Items, report.Rewrapped, report.SingleHSM
	record.Problems = rewrapProblems(report, err)
	if failed := b.putRewrap(ctx, key, record); failed != nil {
		b.logger.Warn("recording how sealing stored material anew went", "key", key, "error", failed)
	}
	if err != nil {
		return err
	}
	b.logger.Info("stored material sealed anew", "key", key, "items", report.Items, "rewrapped", report.Rewrapped,
		"single_hsm", report.SingleHSM, "failed", len(report.Failed))
	if len(record.Problems) > 0 {
		return fmt.Errorf("key %q: %w: %s", key, errRewrapIncomplete, record.Problems[0])
	}
	return nil
}

// readyForClusters returns why a key's newest version must not seal the keys of clusters in custody yet; nil where it may, or
// seals none. Were they sealed to it, the loss of one HSM, or of this mount, would lose them.
func (b *backend) readyForClusters(ctx context.Context, key string) (waits, err error) {
	clusters, err := b.clustersUsing(ctx, func(record *clusterRecord) bool { return slices.Contains(record.keys(), key) })
	if err != nil || len(clusters) == 0 {
		return nil, err
	}
	err = b.keys.Ready(ctx, key, keyring.PurposeCluster)
	if errors.Is(err, keyring.ErrNotReady) {
		return fmt.Errorf("what unseals %s stays sealed to the version before: %w", summarise(clusters), err), nil
	}
	return nil, err
}

// resumeWaiting begins to seal anew what has waited for a key to be ready.
func (b *backend) resumeWaiting(ctx context.Context) {
	names, err := b.storage.List(ctx, rewrapsPrefix)
	if err != nil {
		b.logger.Warn("looking for material whose sealing anew waits", "error", err)
		return
	}
	for _, name := range names {
		record, err := b.readRewrap(ctx, name)
		if err == nil && record != nil && record.Waiting {
			var waits error
			if waits, err = b.readyForClusters(ctx, name); err == nil && waits == nil {
				b.startRewrap(ctx, name, record.By)
			}
		}
		if err != nil {
			b.logger.Warn("looking for material whose sealing anew waits", "key", name, "error", err)
		}
	}
}

func rewrapProblems(report custody.Report, err error) []string {
	var problems []string
	if err != nil {
		problems = append(problems, err.Error())
	}
	for _, failed := range report.Failed {
		problems = append(problems, failed.Err.Error())
	}
	problems = append(problems, report.Warnings...)
	if more := len(problems) - maxProblems; more > 0 {
		problems = append(problems[:maxProblems], fmt.Sprintf("and %d more", more))
	}
	return problems
}

// resumeRewraps goes on with what an earlier process had begun to seal anew.
func (b *backend) resumeRewraps(ctx context.Context) {
	names, err := b.storage.List(ctx, rewrapsPrefix)
	if err != nil {
		b.logger.Warn("looking for material whose sealing anew was cut short", "error", err)
		return
	}
	for _, name := range names {
		if record, err := b.readRewrap(ctx, name); err != nil {
			b.logger.Warn("looking for material whose sealing anew was cut short", "key", name, "error", err)
		} else if record != nil && record.Running {
			b.resumeRewrap(name, record.By, "")
		}
	}
}

// rollbackRewrap is asked by Vault for a journal entry that is still there after a while.
func (b *backend) rollbackRewrap(ctx context.Context, key, by string) error {
	if b.jobs.isRunning(walRewrap + " " + key) {
		return fmt.Errorf("the material of key %q is still being sealed anew", key)
	}
	if _, err := b.keys.Get(ctx, key); errors.Is(err, keyring.ErrKeyNotFound) {
		return nil
	}
	record, err := b.readRewrap(ctx, key)
	if err != nil {
		return err
	}
	err = b.rewrapMaterial(ctx, key, by)
	if errors.Is(err, errRewrapWaits) {
		return nil
	}
	if errors.Is(err, errRewrapIncomplete) && record != nil && time.Since(record.Began) > rewrapPatience {
		b.logger.Warn("sealing stored material anew is given up until the next rotation; keys/<name> shows what is left", "key", key)
		return nil
	}
	return err
}

func (b *backend) readRewrap(ctx context.Context, key string) (*rewrapRecord, error) {
	entry, err := b.storage.Get(ctx, rewrapsPrefix+key)
	if err != nil {
		return nil, fmt.Errorf("reading how sealing the material of key %q anew goes: %w", key, err)
	}
	if entry == nil {
		return nil, nil //nolint:nilnil // "none" is an ordinary answer
	}
	record := new(rewrapRecord)
	if err := json.Unmarshal(entry.Value, record); err != nil {
		return nil, fmt.Errorf("reading how sealing the material of key %q anew goes: %w", key, err)
	}
	return record, nil
}

func (b *backend) putRewrap(ctx context.Context, key string, record rewrapRecord) error {
	entry, err := logical.StorageEntryJSON(rewrapsPrefix+key, record)
	if err != nil {
		return err
	}
	return b.storage.Put(ctx, entry)
}

// showRewrap is what a read of the key shows of it.
func (b *backend) showRewrap(ctx context.Context, key string) (map[string]any, error) {
	record, err := b.readRewrap(ctx, key)
	if err != nil || record == nil {
		return map[string]any{}, err
	}
	state := "done"
	switch {
	case record.Running:
		state = "running"
	case record.Waiting:
		state = "waiting"
	case len(record.Problems) > 0:
		state = "incomplete"
	}
	return map[string]any{
		"state": state, "by": record.By, "began": stamp(record.Began), "ended": stamp(record.Ended), "items": record.Items,
		"rewrapped": record.Rewrapped, "single_hsm": record.SingleHSM, "problems": present(record.Problems),
	}, nil
}
