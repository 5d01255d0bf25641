package nethsm

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// adminUser is whom provisioning makes.
const adminUser = "admin"

// pollInterval is how often a node is asked whether it has become ready.
const pollInterval = 200 * time.Millisecond

// ShownCertificate is what a node showed of itself to somebody who did not know it yet. Nothing of it is proved.
type ShownCertificate struct {
	// Pin is the SHA-256 of the certificate in lower-case hexadecimal, as [TLS].Pins takes it.
	Pin             string
	Subject, Issuer string
	// SelfSigned is true for the certificate that a NetHSM makes for itself until it gets another one.
	SelfSigned bool
	// Verified is true where an authority that this machine trusts signed it, for this name and this time: then it needs
	// no pin.
	Verified            bool
	NotBefore, NotAfter time.Time
}

// ShowCertificate asks the node at a URL for its certificate and trusts it in nothing: no request is sent. A person
// compares the pin with what the node's own console, or whoever set it up, says.
func ShowCertificate(ctx context.Context, nodeURL, serverName string) (ShownCertificate, error) {
	base, err := parseURL(nodeURL)
	if err != nil {
		return ShownCertificate{}, err
	}
	parsed, err := url.Parse(base)
	if err != nil || parsed.Scheme != "https" {
		return ShownCertificate{}, fmt.Errorf("%w: %s has no certificate to show", ErrConfig, base)
	}
	if serverName == "" {
		serverName = parsed.Hostname()
	}
	dialer := tls.Dialer{
		NetDialer: &net.Dialer{},
		// The certificate is looked at, not trusted: nothing is sent over this connection.
		Config: &tls.Config{MinVersion: tls.VersionTLS12, ServerName: serverName, InsecureSkipVerify: true}, //nolint:gosec // see above
	}
	conn, err := dialer.DialContext(ctx, "tcp", parsed.Host)
	if err != nil {
		return ShownCertificate{}, fmt.Errorf("looking at the certificate of %s: %w: %w", parsed.Host, hsm.ErrUnavailable, err)
	}
	defer conn.Close()
	secured, ok := conn.(*tls.Conn)
	if !ok || len(secured.ConnectionState().PeerCertificates) == 0 {
		return ShownCertificate{}, fmt.Errorf("looking at the certificate of %s: it shows none: %w",
			parsed.Host, hsm.ErrUnavailable)
	}
	return shown(secured.ConnectionState().PeerCertificates, serverName), nil
}

func shown(chain []*x509.Certificate, serverName string) ShownCertificate {
	leaf, intermediates := chain[0], x509.NewCertPool()
	for _, certificate := range chain[1:] {
		intermediates.AddCert(certificate)
	}
	_, err := leaf.Verify(x509.VerifyOptions{DNSName: serverName, Intermediates: intermediates})
	return ShownCertificate{
		Verified:   err == nil,
		Pin:        fingerprint(leaf),
		Subject:    leaf.Subject.String(),
		Issuer:     leaf.Issuer.String(),
		SelfSigned: leaf.CheckSignature(leaf.SignatureAlgorithm, leaf.RawTBSCertificate, leaf.Signature) == nil,
		NotBefore:  leaf.NotBefore,
		NotAfter:   leaf.NotAfter,
	}
}

// Provisionable is nil for a node that waits to be provisioned, and says what to do about one that does not.
func (c *Client) Provisionable(ctx context.Context) error {
	const op = "provisioning"
	state, err := c.State(ctx)
	if err != nil {
		return err
	}
	switch node := c.URLs()[0]; state {
	case StateUnprovisioned:
		return nil
	case StateLocked:
		return fmt.Errorf("%s: %w: %s is provisioned already, and Locked; unlock it, or reset it to its factory "+
			"settings, which destroys its keys: %w",
			op, ErrState, node, hsm.ErrExists)
	case StateOperational:
		return fmt.Errorf("%s: %w: %s is provisioned already, and Operational; only a reset to its factory settings, "+
			"which destroys its keys, would change that: %w",
			op, ErrState, node, hsm.ErrExists)
	default:
		return fmt.Errorf("%s: %w: %s is %s; most often its database (etcd) is away: %w",
			op, ErrState, node, state, hsm.ErrUnavailable)
	}
}

// Commission provisions a node that is new, or was reset, and returns when it is Operational. A node in another state
// is [ErrState] and gets no passphrase. Where the answer is lost the node is asked: one that has become Operational
// and knows the new password of admin was provisioned by this.
func (c *Client) Commission(ctx context.Context, p Provisioning) error {
	if err := c.Provisionable(ctx); err != nil {
		return err
	}
	err := c.Provision(ctx, p)
	switch {
	case err == nil:
		return c.await(ctx, StateOperational)
	case !errors.Is(err, hsm.ErrMayHaveHappened):
		return err
	}
	// Whether it happened shows in the state, and whether it was this one in the password.
	if waiting := c.await(ctx, StateOperational); waiting != nil {
		return errors.Join(err, waiting)
	}
	if _, login := c.As(Credentials{Username: adminUser, Password: p.AdminPassphrase}).User(ctx, adminUser); login != nil {
		return errors.Join(err, login)
	}
	return nil
}

// await asks a node for its state until it is the wanted one, or ctx ends.
func (c *Client) await(ctx context.Context, wanted State) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		state, err := c.State(ctx)
		if err == nil && state == wanted {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if err == nil {
				err = fmt.Errorf("it is still %s", state)
			}
			return fmt.Errorf("waiting for %s to become %s: %w: %w", c.URLs()[0], wanted, ctx.Err(), err)
		}
	}
}

// NodeResult is what became of one node.
type NodeResult struct {
	URL string
	// Before and After are the node's states; empty where it did not tell.
	Before, After State
	// Err is why the node is not as wanted; nil where it is.
	Err error
}

// Changed tells whether the node's state was changed.
func (r NodeResult) Changed() bool { return r.Err == nil && r.Before != r.After }

// UnlockNodes unlocks every node of the view that is Locked, all at one time, and leaves the others alone: an
// Operational one gets no passphrase. Every node has an unlock passphrase of its own, so a wrong one at one node is
// no reason to spare the others.
func (c *Client) UnlockNodes(ctx context.Context, passphrase []byte) []NodeResult {
	return c.eachNode(func(node *Client, result *NodeResult) {
		if result.Before, result.Err = node.State(ctx); result.Err != nil {
			return
		}
		result.After = result.Before
		switch result.Before {
		case StateOperational:
			return
		case StateLocked:
		case StateUnprovisioned:
			result.Err = fmt.Errorf("unlocking: %w: %s is Unprovisioned, so it has no passphrase yet; provision it, or "+
				"restore a backup", ErrState, result.URL)
			return
		default:
			result.Err = fmt.Errorf("unlocking: %w: %s is %s; most often its database (etcd) is away: %w",
				ErrState, result.URL, result.Before, hsm.ErrUnavailable)
			return
		}
		result.Err = node.Unlock(ctx, passphrase)
		if result.Err == nil || errors.Is(result.Err, ErrState) {
			// Another program may have unlocked it meanwhile.
			if state, err := node.State(ctx); err == nil {
				result.After = state
				if state == StateOperational {
					result.Err = nil
				}
			}
		}
	})
}

// LockNodes locks every node of the view that is Operational, all at one time. The view must have the credentials of an
// Administrator of the root namespace.
func (c *Client) LockNodes(ctx context.Context) []NodeResult {
	return c.eachNode(func(node *Client, result *NodeResult) {
		if result.Before, result.Err = node.State(ctx); result.Err != nil {
			return
		}
		result.After = result.Before
		switch result.Before {
		case StateLocked:
		case StateOperational:
			if result.Err = node.Lock(ctx); result.Err == nil {
				result.After = StateLocked
			}
		default:
			result.Err = fmt.Errorf("locking: %w: %s is %s, and only an Operational one can be locked",
				ErrState, result.URL, result.Before)
		}
	})
}

// eachNode does something at every node, all at one time.
func (c *Client) eachNode(do func(node *Client, result *NodeResult)) []NodeResult {
	results := make([]NodeResult, len(c.URLs()))
	var work sync.WaitGroup
	for i, nodeURL := range c.URLs() {
		work.Go(func() {
			results[i].URL = nodeURL
			node, err := c.At(nodeURL)
			if err != nil {
				results[i].Err = err
				return
			}
			do(node, &results[i])
		})
	}
	work.Wait()
	return results
}

// LogIn finds out whether the password of the view is right. A wrong one is an [*hsm.PINError], and finding that out
// takes more than a minute: a NetHSM that lost its database refuses right ones too. ctx bounds the patience.
func (c *Client) LogIn(ctx context.Context) error {
	for {
		_, err := c.User(ctx, c.login.username)
		if err == nil || errors.Is(err, hsm.ErrForbidden) {
			// Only a right password gets to hear that something is forbidden: users of a namespace that does not exist yet may do
			// nothing at all, and of the others only administrators and operators may read themselves.
			return nil
		}
		if _, wrong := errors.AsType[*hsm.PINError](err); wrong || !c.login.refusedAnywhere() {
			return err
		}
		if !c.pool.sleep(ctx, firstRetry, nil) {
			return errors.Join(err, ctx.Err())
		}
	}
}

// ClockSkew is how far the clock of a node is ahead of ours; negative where it is behind. A NetHSM tells its time in whole
// seconds, to an Administrator of the root namespace, so a second more or less means nothing.
func (c *Client) ClockSkew(ctx context.Context) (time.Duration, error) {
	before := time.Now()
	at, err := c.Time(ctx)
	if err != nil {
		return 0, err
	}
	middle := before.Add(time.Since(before) / 2)
	return at.Add(time.Second / 2).Sub(middle).Round(time.Second), nil // it drops the part of a second, half of one on average
}
