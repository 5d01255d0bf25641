package cluster

import (
	"bytes"
	"context"
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

// attempt is what this host notes of a rekey or of a root token's making before it begins. Vault has one of each under way at
// a time, tells nobody who began it, and keeps it until it is ended, loses its leader or is sealed. But it shows the
// fingerprints of the OpenPGP keys that its answer will be encrypted to: an attempt that shows a key of one call of ours is
// ours, whatever we learned of it before we were cut off, and may be cancelled. No other one is.
//
// It lies in [Config.Local] under "attempts/<cluster>/<name>" and holds no secret.
type attempt struct {
	Format int    `json:"format"`
	What   string `json:"what"` // "rekey", "proof" or "root"
	Node   string `json:"node"`
	// Fingerprint is that of the key of the one call, lower-case hexadecimal.
	Fingerprint string    `json:"fingerprint"`
	By          string    `json:"by,omitempty"`
	At          time.Time `json:"at"`
}

const (
	attemptFormat = 1
	attemptRoot   = "root" // the name of the attempt to make a root token; a rekey's is its kind
)

// What an attempt is for.
const (
	whatRekey = "rekey"
	whatProof = "proof"
	whatRoot  = "root"
)

func attemptPath(c *Cluster, name string) string { return "attempts/" + c.Name + "/" + name }

// noteAttempt writes an attempt down before it begins.
func (k *Custodian) noteAttempt(ctx context.Context, c *Cluster, name string, a attempt) error {
	a.Format, a.At = attemptFormat, k.today()
	raw, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("noting a %s of cluster %q: %w", a.What, c.Name, err)
	}
	if err := k.putLocal(ctx, attemptPath(c, name), raw); err != nil {
		return fmt.Errorf("noting a %s of cluster %q on the local disk, without which it is not begun: %w", a.What, c.Name, err)
	}
	return nil
}

// notedAttempt reads an attempt, nil for none.
func (k *Custodian) notedAttempt(ctx context.Context, c *Cluster, name string) (*attempt, error) {
	entry, err := k.local.Get(ctx, attemptPath(c, name))
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil //nolint:nilnil // none is an ordinary answer
	}
	if err != nil {
		return nil, fmt.Errorf("reading what was under way with cluster %q: %w", c.Name, err)
	}
	decoder := json.NewDecoder(bytes.NewReader(entry.Value))
	decoder.DisallowUnknownFields()
	a := new(attempt)
	if err := decoder.Decode(a); err != nil || a.Format != attemptFormat || a.Fingerprint == "" {
		return nil, fmt.Errorf("reading what was under way with cluster %q: %w: the note %q on the local disk; remove it", c.Name, ErrFacts, attemptPath(c, name))
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading what was under way with cluster %q: %w: the note %q on the local disk; remove it", c.Name, ErrFacts, attemptPath(c, name))
	}
	return a, nil
}

// forgetAttempt removes the note of an attempt that is over. Where that fails, the next run finds that nothing of it is left.
func (k *Custodian) forgetAttempt(ctx context.Context, c *Cluster, name string) {
	err := k.deleteLocal(ctx, attemptPath(c, name))
	if err != nil {
		err = k.deleteLocal(ctx, attemptPath(c, name))
	}
	if err != nil {
		k.logger.Warn("forgetting what is over", "cluster", c.Name, "note", attemptPath(c, name), "error", err)
	}
}

// putLocal writes a name of the local disk, whatever lies there. Whoever calls it holds the lock of the cluster.
func (k *Custodian) putLocal(ctx context.Context, name string, value []byte) error {
	revision := store.NoRevision
	entry, err := k.local.Get(ctx, name)
	switch {
	case err == nil:
		revision = entry.Revision
	case !errors.Is(err, store.ErrNotFound):
		return err
	}
	_, err = k.local.Put(ctx, name, value, revision)
	return err
}

// deleteLocal removes a name from the local disk; one that is not there is gone already.
func (k *Custodian) deleteLocal(ctx context.Context, name string) error {
	entry, err := k.local.Get(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := k.local.Delete(ctx, name, entry.Revision); err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	return nil
}

// endTimeout is how long ending an attempt may take that failed, or whose caller has gone.
const endTimeout = 20 * time.Second

// rekeying is a rekey that is under way at a node, begun by this call.
type rekeying struct {
	k     *Custodian
	c     *Cluster
	n     *node.Node
	kind  Kind
	own   *ownKey
	nonce string
}

// beginRekey begins a rekey with Vault's verification, so that the present keys stay what they are until new ones were
// verified. The first own of the new shares are asked for under a key of ours, the others under people's keys.
func (k *Custodian) beginRekey(ctx context.Context, c *Cluster, n *node.Node, kind Kind, what, by string, shares, threshold int, people []string) (*rekeying, error) {
	own, err := newOwnKey(k.now())
	if err != nil {
		return nil, err
	}
	keys := slices.Repeat([]string{own.forVault()}, shares-len(people))
	keys = append(keys, people...)
	if err := k.noteAttempt(ctx, c, string(kind), attempt{What: what, Node: n.Address(), Fingerprint: own.fingerprint(), By: by}); err != nil {
		return nil, err
	}
	r := &rekeying{k: k, c: c, n: n, kind: kind, own: own}
	begun, err := n.RekeyStart(ctx, kind.nodeKind(), node.RekeyRequest{Shares: shares, Threshold: threshold, PGPKeys: keys, Verify: true})
	if err != nil {
		r.end(ctx) // also where only the answer was lost
		return nil, k.refusedAttempt(c, n, what, err)
	}
	r.nonce = begun.Nonce
	if !begun.VerificationRequired || begun.Nonce == "" {
		r.end(ctx)
		return nil, fmt.Errorf("cluster %q: node %s knows no verification of new keys, without which a crash could lose them; update Vault", c.Name, n.Address())
	}
	return r, nil
}

// give gives shares of the present keys, and returns the answer to the last one. After an error the rekey still has to be
// ended.
func (r *rekeying) give(ctx context.Context, shares [][]byte) (node.RekeyAnswer, error) {
	for i, share := range shares {
		answer, err := r.n.RekeyUpdate(ctx, r.kind.nodeKind(), share, r.nonce)
		switch {
		case err != nil:
			answer.Wipe()
			return node.RekeyAnswer{}, err
		case answer.Complete:
			return answer, nil
		case i+1 == len(shares):
			return node.RekeyAnswer{}, fmt.Errorf("giving shares to node %s: %w: it took %d and wants more", r.n.Address(), ErrMismatch, len(shares))
		}
	}
	return node.RekeyAnswer{}, fmt.Errorf("giving shares to node %s: %w: there is none to give", r.n.Address(), ErrNoMaterial)
}

// end cancels the rekey, which changes nothing, and forgets it. It outlives its caller. Where Vault cannot be reached the note
// stays, and the next run ends the rekey.
func (r *rekeying) end(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	err := r.cancel(ctx)
	if err != nil { // an answer may have been lost
		err = r.cancel(ctx)
	}
	if err != nil {
		r.k.logger.Warn("cancelling a rekey of ours: the next run does it", "cluster", r.c.Name, "node", r.n.Address(), "error", err)
		return
	}
	r.k.forgetAttempt(ctx, r.c, string(r.kind))
}

func (r *rekeying) cancel(ctx context.Context) error {
	st, err := r.n.RekeyStatus(ctx, r.kind.nodeKind())
	if err != nil || !st.Started || !isOurs(st.PGPFingerprints, r.own.fingerprint()) {
		return err
	}
	return r.n.RekeyCancel(ctx, r.kind.nodeKind(), st.Nonce)
}

// isOurs tells whether an attempt shows the key of a call of ours.
func isOurs(shown []string, fingerprint string) bool {
	return fingerprint != "" && slices.ContainsFunc(shown, func(f string) bool { return strings.EqualFold(f, fingerprint) })
}

// endLeftRekey ends a rekey or proof that this host began and did not end, or the one with that nonce. One of somebody else is
// [ErrBusy]. Where none is under way it only forgets.
func (k *Custodian) endLeftRekey(ctx context.Context, c *Cluster, n *node.Node, kind Kind, nonce string) error {
	noted, err := k.notedAttempt(ctx, c, string(kind))
	if err != nil {
		return err
	}
	st, err := n.RekeyStatus(ctx, kind.nodeKind())
	if err != nil {
		return k.refusedAttempt(c, n, whatRekey, err)
	}
	if st.Started {
		if (nonce == "" || nonce != st.Nonce) && (noted == nil || !isOurs(st.PGPFingerprints, noted.Fingerprint)) {
			return foreignRekey(c, n, kind, st)
		}
		k.logger.Info("ending a rekey of ours that was cut off", "cluster", c.Name, "node", n.Address())
		if err := n.RekeyCancel(ctx, kind.nodeKind(), st.Nonce); err != nil {
			return fmt.Errorf("cluster %q: ending a rekey of ours that was cut off: %w", c.Name, err)
		}
	}
	if noted != nil {
		k.forgetAttempt(ctx, c, string(kind))
	}
	return nil
}

// foreignRekey is the error for a rekey that is not ours. Vault tells nobody who began it, nor when.
func foreignRekey(c *Cluster, n *node.Node, kind Kind, st node.RekeyStatus) error {
	stage := fmt.Sprintf("%d of %d present shares were given", st.Progress, st.Required)
	if st.VerificationNonce != "" {
		stage = "its new shares wait for their verification"
	}
	target := ""
	if kind == KindRecovery {
		target = " -target=recovery"
	}
	return fmt.Errorf("cluster %q: %w: node %s has a rekey under way that was not begun here: nonce %s, for %d shares with a threshold of %d, %s; "+
		"let whoever began it finish it, perhaps nitroseal on another host, or end it with `nitroseal rekey %s --cancel` (`vault operator rekey%s -cancel -nonce=%s`)",
		c.Name, ErrBusy, n.Address(), st.Nonce, st.N, st.T, stage, c.Name, target, st.Nonce)
}

// refusedAttempt says what to do where Vault serves these calls to nobody, as it can be configured.
func (k *Custodian) refusedAttempt(c *Cluster, n *node.Node, what string, err error) error {
	failed, ok := errors.AsType[*node.Error](err)
	if !ok || !errors.Is(err, node.ErrRefused) || !slices.Contains([]int{401, 403, 404, 405}, failed.Status) {
		return fmt.Errorf("cluster %q: %w", c.Name, err)
	}
	path, openBao := "rekey", "disable_unauthed_rekey_endpoints"
	if what == whatRoot {
		path, openBao = "generate-root", "disable_unauthed_generate_root_endpoints"
	}
	return fmt.Errorf("cluster %q: node %s does not serve sys/%s without a token: %w; allow that in its configuration for as long as this takes "+
		"(OpenBao: %s = false in its listener), and reload it", c.Name, n.Address(), path, err, openBao)
}
