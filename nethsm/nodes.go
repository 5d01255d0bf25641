package nethsm

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// nodesTimeout is what each node gets to tell how it fares.
const nodesTimeout = 5 * time.Second

// Nodes asks the nodes of this view how they fare, all at one time, each with a deadline of its own, and lists them in the
// order of the configuration. Serial and firmware are asked for only where the view has the credentials of an Administrator
// of the root namespace: a NetHSM tells nobody else.
func (c *Client) Nodes(ctx context.Context) []hsm.Node {
	nodes := c.nodes()
	out := make([]hsm.Node, len(nodes))
	var wait sync.WaitGroup
	for i, n := range nodes {
		wait.Go(func() { out[i] = c.describe(ctx, n) })
	}
	wait.Wait()
	return out
}

// describe asks one node.
func (c *Client) describe(ctx context.Context, n *node) hsm.Node {
	ctx, cancel := context.WithTimeout(ctx, nodesTimeout)
	defer cancel()
	out := hsm.Node{URL: n.url, State: hsm.StateAbsent}
	state, took, err := n.measure(ctx)
	if ends := n.certificateEnds.Load(); ends != nil {
		out.CertificateEnds = *ends
	}
	resting, rests := n.resting()
	out.Resting = rests
	if err != nil {
		out.Err = err
		return out
	}
	out.State, out.RoundTrip = state.HSM(), took
	switch {
	case state != StateOperational:
		out.Err = &Error{
			Op: "asking how it fares", Node: n.host, Status: http.StatusPreconditionFailed, Message: messageState, State: state,
		}
		if rests && resting.unlockErr != nil {
			out.Err = &unlockError{out.Err, resting.unlockErr}
		}
	case rests:
		out.Err = reworded(resting.cause, "asking how it fares")
	default:
		out.Err = c.identify(ctx, n, &out)
	}
	return out
}

// identify asks a node for its serial number and software, where this view may. The error is why it could not be used.
func (c *Client) identify(ctx context.Context, n *node, out *hsm.Node) error {
	if !c.login.refusedAt(n) && c.administers(ctx, n) {
		alone := &Client{pool: c.pool, login: c.login, only: n}
		info, err := alone.SystemInfo(ctx)
		if err != nil {
			return err
		}
		out.Serial, out.Firmware = info.DeviceID, info.SoftwareVersion
	}
	_, err := c.login.refusal(n, "asking how it fares")
	return err
}

// administers is true where the view's user is an Administrator of the root namespace, as the NetHSM says. It is asked once.
func (c *Client) administers(ctx context.Context, n *node) bool {
	if c.login == nil || strings.Contains(c.login.username, "~") {
		return false
	}
	if known := c.login.role.Load(); known != nil {
		return *known == RoleAdministrator
	}
	var got struct {
		Role Role `json:"role"`
	}
	alone := &Client{pool: c.pool, login: c.login, only: n}
	_, err := alone.do(ctx, call{
		op: "asking for the user's role", method: http.MethodGet, path: "/users/" + url.PathEscape(c.login.username), into: &got,
	})
	if errors.Is(err, hsm.ErrForbidden) { // Metrics and Backup may not even ask
		got.Role, err = "none of an Administrator", nil
	}
	if err != nil {
		return false
	}
	c.login.role.Store(&got.Role)
	return got.Role == RoleAdministrator
}
