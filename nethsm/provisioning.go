package nethsm

import (
	"context"
	"net/http"
	"time"
)

// slowly is the deadline of calls that stretch a passphrase: two seconds on a PC, more on an appliance.
const slowly = time.Minute

// Provisioning is what a new NetHSM needs.
type Provisioning struct {
	// UnlockPassphrase will unlock this node. Whoever loses it loses the keys at the next start.
	UnlockPassphrase Secret
	// AdminPassphrase is that of the user "admin", who is made by this.
	AdminPassphrase Secret
	// Time is set as the node's clock; zero means now.
	Time time.Time
}

// Provision makes an Unprovisioned node Operational, with one user, "admin". Doing it twice is [ErrState].
func (c *Client) Provision(ctx context.Context, p Provisioning) error {
	const op = "provisioning"
	if err := checkPassphrase(op, "the unlock passphrase", p.UnlockPassphrase); err != nil {
		return err
	}
	if err := checkPassphrase(op, "the passphrase of admin", p.AdminPassphrase); err != nil {
		return err
	}
	if p.Time.IsZero() {
		p.Time = time.Now()
	}
	return c.opened(ctx, call{
		op: op, method: http.MethodPost, path: "/provision", public: true, creates: true, timeout: slowly,
		body: struct {
			UnlockPassphrase secret `json:"unlockPassphrase"`
			AdminPassphrase  secret `json:"adminPassphrase"`
			SystemTime       string `json:"systemTime"`
		}{secret(p.UnlockPassphrase), secret(p.AdminPassphrase), timestamp(p.Time)},
	})
}

// Lock locks a node, as an Administrator of the root namespace.
func (c *Client) Lock(ctx context.Context) error {
	return c.doAlone(ctx, call{op: "locking", method: http.MethodPost, path: "/lock", creates: true})
}

// Unlock makes a Locked node Operational. It needs no credentials. A wrong passphrase is an [*hsm.PINError]; a node that is
// not Locked gives [ErrState], and then nobody knows whether the passphrase was right.
func (c *Client) Unlock(ctx context.Context, passphrase []byte) error {
	const op = "unlocking"
	if err := checkPassphrase(op, "the unlock passphrase", passphrase); err != nil {
		return err
	}
	err := c.opened(ctx, call{
		op: op, method: http.MethodPost, path: "/unlock", public: true, creates: true, timeout: slowly,
		body: passphraseBody{secret(passphrase)},
	})
	return wrongPassphrase(err, "unlock passphrase", true)
}

// opened sends a call that makes a node Operational. Requests that have left it alone need not wait for a probe afterwards.
func (c *Client) opened(ctx context.Context, in call) error {
	one, err := c.alone(in.op)
	if err != nil {
		return err
	}
	if _, err := one.do(ctx, in); err != nil {
		return err
	}
	one.only.serves(true)
	return nil
}

type passphraseBody struct {
	Passphrase secret `json:"passphrase"`
}
