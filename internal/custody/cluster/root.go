package cluster

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// A root token is made in these steps, and is never anywhere in the clear but in memory:
//
//	step                                        a crash after it leaves                     which the next run
//	1 the attempt is noted on the local disk    a note                                      forgets
//	2 Vault: attempt begun                      an attempt that shows the noted key         cancels
//	3 Vault: shares given, all but the last     the same                                    cancels
//	4 Vault: the last share given               a token that nobody has, and the note       warns of
//	5 the token is sealed to the local disk     the token, sealed                           revokes
//	6 it is used                                the same                                    revokes
//	7 Vault: the token is revoked               a sealed token that is worth nothing        removes
//	8 the sealed token and the note are gone    nothing
//
// Between 4 and 5 lies the only window: the answer is encrypted to a key that was in the memory of the process that died, so
// nobody can use that token, but Vault knows it.

// RootOptions say what a root token is made for: exactly one of Use, PGPKey and Revoke is given.
type RootOptions struct {
	By string
	// Use gets the address of the active node and the token, which is revoked when it returns, whatever it returns. It must
	// keep no copy.
	Use func(ctx context.Context, address string, token []byte) error
	// PGPKey is whom the token is encrypted to, by Vault itself, armored or binary. It is that person's to revoke.
	PGPKey []byte
	// Revoke only revokes a token that an earlier run left, and ends its attempt.
	Revoke bool
}

// RootResult is what [Custodian.Root] has done.
type RootResult struct {
	Cluster string
	Node    string
	// Message is the token encrypted to PGPKey, armored; Recipient says whose key that is.
	Message   []byte
	Recipient string
	// Revoked is true where the token was used and revoked.
	Revoked bool
	// LeftRevoked is true where a token that an earlier run left was revoked.
	LeftRevoked bool
	// Warnings are sentences that an operator should read, each with what to do.
	Warnings []string
}

// ErrTokenLeft is wrapped where a root token could not be revoked. It is kept, sealed, and the next run revokes it.
var ErrTokenLeft = errors.New("a root token is left, sealed, on the local disk")

// Root makes a root token with the shares in custody. An attempt that is under way in Vault and was not begun here is reported
// as [ErrBusy], and left as it is. A token that an earlier run left is revoked first. An error of Use comes through.
func (k *Custodian) Root(ctx context.Context, c *Cluster, options RootOptions) (result RootResult, err error) {
	given := 0
	for _, is := range []bool{options.Use != nil, len(options.PGPKey) > 0, options.Revoke} {
		if is {
			given++
		}
	}
	if given != 1 {
		return RootResult{}, fmt.Errorf("cluster %q: %w: a root token is used for one command, encrypted to one person, or an old one revoked", c.Name, ErrInvalid)
	}
	if err := c.Check(); err != nil {
		return RootResult{}, err
	}
	// Another lock than that of the keys: a command may take its time, and must not keep the cluster from being unsealed.
	unlock, err := k.local.Lock(ctx, "root-"+c.Name)
	if err != nil {
		return RootResult{}, fmt.Errorf("cluster %q: waiting for another root token's end: %w", c.Name, err)
	}
	defer unlock()
	r := &rooting{k: k, c: c, by: options.By, result: RootResult{Cluster: c.Name}}
	if r.to, err = r.recipient(options.PGPKey); err != nil {
		return RootResult{}, err
	}
	if err := r.open(ctx, options.Revoke); err != nil {
		return RootResult{}, err
	}
	defer r.m.wipe()
	detail := map[string]string{"for": "use"}
	if r.to != nil {
		detail = map[string]string{"for": r.to.Fingerprint}
	} else if options.Revoke {
		detail = map[string]string{"for": "revocation of what is left"}
	}
	end, err := k.act(ctx, "root", c, r.n.Address(), options.By, detail)
	if err != nil {
		return RootResult{}, err
	}
	defer func() { end(err) }()
	if err := r.settle(ctx); err != nil || options.Revoke {
		return r.result, err
	}
	if r.to != nil {
		return r.handOut(ctx)
	}
	return r.use(ctx, options.Use)
}

// rooting is one call of Root.
type rooting struct {
	k      *Custodian
	c      *Cluster
	by     string
	to     *PGPKey // nil for a token that is used here
	m      *material
	n      *node.Node
	result RootResult
}

func (r *rooting) recipient(raw []byte) (*PGPKey, error) {
	if len(raw) == 0 {
		return nil, nil //nolint:nilnil // nobody is an ordinary answer
	}
	key, err := ReadPGPKey(raw)
	if err != nil {
		return nil, fmt.Errorf("cluster %q: %w", r.c.Name, err)
	}
	if _, err := key.recipient(r.k.now()); err != nil {
		return nil, fmt.Errorf("cluster %q: %w", r.c.Name, err)
	}
	return key, nil
}

// open opens the shares, unless none are needed, and finds the node.
func (r *rooting) open(ctx context.Context, withoutShares bool) (err error) {
	if withoutShares {
		r.n, _, err = r.k.activeNode(ctx, r.c, nil)
		return err
	}
	kind, err := r.k.kindOf(ctx, r.c, "")
	if err != nil {
		return err
	}
	if r.m, err = r.k.load(ctx, r.c, kind); err != nil {
		return err
	}
	r.n, _, err = r.k.activeNode(ctx, r.c, r.m)
	return err
}

func leftTokenPath(c *Cluster) string { return "tokens/" + c.Name }

func leftTokenContext(c *Cluster) envelope.Context {
	return envelope.Context{Use: envelope.UseMaterial, Cluster: c.Name, Name: "held.token", Generation: 1}
}

// settle revokes the token and ends the attempt that an earlier run left.
func (r *rooting) settle(ctx context.Context) error {
	if err := r.revokeLeft(ctx); err != nil {
		return err
	}
	noted, err := r.k.notedAttempt(ctx, r.c, attemptRoot)
	if err != nil {
		return err
	}
	st, err := r.n.RootStatus(ctx)
	if err != nil {
		return r.k.refusedAttempt(r.c, r.n, whatRoot, err)
	}
	switch {
	case st.Started && (noted == nil || !isOurs([]string{st.PGPFingerprint}, noted.Fingerprint)):
		kind := "to a one-time password"
		if st.PGPFingerprint != "" {
			kind = "to the OpenPGP key " + printable(st.PGPFingerprint, 64)
		}
		return fmt.Errorf("cluster %q: %w: node %s is making a root token, %s, that was not asked for here: nonce %s, %d of %d shares were given, and it "+
			"does not tell by whom or since when; let whoever began it finish it, or end it with `vault operator generate-root -cancel`",
			r.c.Name, ErrBusy, r.n.Address(), kind, printable(st.Nonce, 64), st.Progress, st.Required)
	case st.Started:
		r.k.logger.Info("ending the making of a root token of ours that was cut off", "cluster", r.c.Name, "node", r.n.Address())
		if err := r.n.RootCancel(ctx); err != nil {
			return fmt.Errorf("cluster %q: ending the making of a root token that was cut off: %w", r.c.Name, err)
		}
	case noted != nil && !r.result.LeftRevoked:
		r.result.Warnings = append(r.result.Warnings, fmt.Sprintf("A root token that was asked for at %s may have been made and lost: nobody can use it, and "+
			"Vault may know it. `vault list auth/token/accessors` shows it among the others, with the policy root and no end; revoke it by its accessor.",
			noted.At.Format(time.RFC3339)))
	}
	if noted != nil {
		r.k.forgetAttempt(ctx, r.c, attemptRoot)
	}
	return nil
}

// revokeLeft revokes the token that an earlier run kept.
func (r *rooting) revokeLeft(ctx context.Context) error {
	entry, err := r.k.local.Get(ctx, leftTokenPath(r.c))
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cluster %q: looking for a root token that is left: %w", r.c.Name, err)
	}
	parsed, err := envelope.Parse(entry.Value)
	if err != nil {
		return fmt.Errorf("cluster %q: %w, and it cannot be read; remove %q there, and revoke it by its accessor: %w", r.c.Name, ErrTokenLeft,
			leftTokenPath(r.c), err)
	}
	opened, err := r.k.keyring.Open(ctx, parsed.Context().Key, entry.Value, leftTokenContext(r.c))
	if err != nil {
		return fmt.Errorf("cluster %q: %w, and no other one is made before it was revoked: %w", r.c.Name, ErrTokenLeft, err)
	}
	defer clear(opened.Payload)
	r.k.logger.Info("revoking a root token that an earlier run left", "cluster", r.c.Name)
	if err := r.revoke(ctx, opened.Payload); err != nil {
		return err
	}
	r.result.LeftRevoked = true
	return nil
}

// revoke revokes a token and removes what is kept of it. One that is not valid any more is revoked.
func (r *rooting) revoke(ctx context.Context, token []byte) error {
	err := r.n.RevokeSelf(ctx, token)
	if err != nil && !errors.Is(err, node.ErrDenied) {
		return fmt.Errorf("cluster %q: %w: `nitroseal root %s --revoke` revokes it when the cluster answers again: %w", r.c.Name, ErrTokenLeft, r.c.Name, err)
	}
	if err := r.k.deleteLocal(ctx, leftTokenPath(r.c)); err != nil {
		r.k.logger.Warn("removing a sealed root token that was revoked", "cluster", r.c.Name, "error", err)
	}
	r.k.forgetAttempt(ctx, r.c, attemptRoot)
	return nil
}

// handOut makes a token that Vault encrypts to a person.
func (r *rooting) handOut(ctx context.Context) (RootResult, error) {
	key, err := r.to.forVault(r.k.now())
	if err != nil {
		return RootResult{}, err
	}
	message, err := r.generate(ctx, key, r.to.Fingerprint)
	if err != nil {
		return RootResult{}, err
	}
	// The person has it from here on: there is nothing to end and nothing to revoke.
	r.k.forgetAttempt(context.WithoutCancel(ctx), r.c, attemptRoot)
	if r.result.Message, err = armorMessage(message); err != nil {
		return RootResult{}, err
	}
	r.result.Recipient = r.to.String()
	return r.result, nil
}

// revokeTime is how long the revocation of a token may take that goes on when its caller has gone.
const revokeTime = 30 * time.Second

// use makes a token, has it used, and revokes it.
func (r *rooting) use(ctx context.Context, use func(context.Context, string, []byte) error) (result RootResult, err error) {
	own, err := newOwnKey(r.k.now())
	if err != nil {
		return RootResult{}, err
	}
	token, err := r.make(ctx, own)
	if err != nil {
		return RootResult{}, err
	}
	defer clear(token)
	defer func() { // also where use panics
		defer r.k.critical(fmt.Sprintf("the revocation of a root token of cluster %q", r.c.Name))()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTime)
		defer cancel()
		if revoking := r.revoke(ctx, token); revoking != nil {
			err = join(err, revoking)
			return
		}
		r.result.Revoked = true
		result = r.result
	}()
	return r.result, use(ctx, r.n.Address(), token)
}

// make makes a token and keeps it, sealed, until it was revoked.
func (r *rooting) make(ctx context.Context, own *ownKey) (token []byte, err error) {
	defer r.k.critical(fmt.Sprintf("making a root token of cluster %q", r.c.Name))()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rekeyTimeout)
	defer cancel()
	message, err := r.generate(ctx, own.forVault(), own.fingerprint())
	if err != nil {
		return nil, err
	}
	if token, err = own.open(message); err != nil {
		return nil, fmt.Errorf("cluster %q: Vault made a root token that cannot be read, so that nobody can use it; revoke it by its accessor, "+
			"`vault list auth/token/accessors`: %w", r.c.Name, err)
	}
	sealed, err := r.k.keyring.Seal(ctx, r.c.keys()[0], leftTokenContext(r.c), token)
	if err == nil {
		err = r.k.putLocal(ctx, leftTokenPath(r.c), sealed.Envelope)
	}
	if err != nil { // then it is not used
		err = fmt.Errorf("cluster %q: keeping a root token, sealed, until it is revoked: %w", r.c.Name, err)
		err = join(err, r.revoke(ctx, token))
		clear(token)
		return nil, err
	}
	return token, nil
}

// generate gives the shares to a new attempt, and returns what Vault encrypted to the key, a binary message.
func (r *rooting) generate(ctx context.Context, key, fingerprint string) ([]byte, error) {
	active := r.m.active()
	shares := r.m.take(active, active.Threshold)
	if len(shares) < active.Threshold {
		return nil, fmt.Errorf("cluster %q: %w: the HSM holds %d of its shares and %d are needed; `vault operator generate-root` takes those of people",
			r.c.Name, ErrInvalid, len(shares), active.Threshold)
	}
	if err := r.k.noteAttempt(ctx, r.c, attemptRoot, attempt{What: whatRoot, Node: r.n.Address(), Fingerprint: fingerprint, By: r.by}); err != nil {
		return nil, err
	}
	begun, err := r.n.RootStart(ctx, key)
	if err != nil {
		r.cancel(ctx, fingerprint)
		return nil, r.k.refusedAttempt(r.c, r.n, whatRoot, err)
	}
	encoded, err := r.give(ctx, shares, begun.Nonce)
	if err != nil {
		if !errors.Is(err, node.ErrMayHaveHappened) { // else the note stays, and the next run looks what became of it
			r.cancel(ctx, fingerprint)
		}
		if errors.Is(err, node.ErrWrongShares) {
			err = fmt.Errorf("%w: %w", ErrWrongShares, err)
		}
		return nil, fmt.Errorf("cluster %q: making a root token: %w", r.c.Name, err)
	}
	defer clear(encoded)
	message := make([]byte, base64.StdEncoding.DecodedLen(len(encoded)))
	n, err := base64.StdEncoding.Decode(message, bytes.TrimSpace(encoded))
	if err != nil {
		return nil, fmt.Errorf("cluster %q: making a root token: %w: what came is no OpenPGP message", r.c.Name, node.ErrMalformed)
	}
	return message[:n], nil
}

func (r *rooting) give(ctx context.Context, shares [][]byte, nonce string) ([]byte, error) {
	for _, share := range shares {
		answer, err := r.n.RootUpdate(ctx, share, nonce)
		if err != nil {
			return nil, err
		}
		if answer.Complete {
			return answer.EncodedToken, nil
		}
	}
	return nil, fmt.Errorf("giving shares to node %s: %w: it took %d and wants more", r.n.Address(), ErrMismatch, len(shares))
}

// cancel ends an attempt of this call that failed. It outlives its caller.
func (r *rooting) cancel(ctx context.Context, fingerprint string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancel()
	st, err := r.n.RootStatus(ctx)
	if err == nil && st.Started && isOurs([]string{st.PGPFingerprint}, fingerprint) {
		err = r.n.RootCancel(ctx)
	}
	if err != nil {
		r.k.logger.Warn("ending the making of a root token: the next run does it", "cluster", r.c.Name, "node", r.n.Address(), "error", err)
		return
	}
	r.k.forgetAttempt(ctx, r.c, attemptRoot)
}
