package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
)

func newNetHSMStatusCommand(a *app) *cobra.Command {
	target, admin := &nethsmTarget{app: a}, &nethsmAdministrator{}
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show every node of a NetHSM",
		Long: `Show the state of every node, its certificate and how fast it answers. With an administrator of the root
namespace, from the flags or the configuration, also version, serial number and how far its clock is off; nobody
is asked for a password.

The exit code tells the worst: 0 where every node can serve, 3 where one does not answer or failed, 5 where one
is locked.`,
		Example: `  nitroseal nethsm status --device hsm
  nitroseal nethsm status --url https://10.0.0.5 --admin-password-file /run/secrets/admin -o json`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			client, err := target.open(ctx)
			if err != nil {
				return err
			}
			if admin.known(target) {
				login, err := admin.credentials(ctx, target)
				if err != nil {
					return err
				}
				client = client.As(login)
			}
			working, cancel := a.within(ctx, loginTimeout)
			defer cancel()
			nodes, err := nodeStatuses(working, client, target.serverName, admin.known(target))
			return errors.Join(a.print(map[string]any{"nodes": nodes}, func(t *table) { nodeRows(t, nodes) }), err)
		},
	}
	target.add(cmd, false)
	admin.add(cmd)
	return cmd
}

// nodeStatus is one node, in JSON.
type nodeStatus struct {
	URL             string  `json:"url"`
	State           string  `json:"state"`
	Version         string  `json:"version,omitempty"`
	Serial          string  `json:"serial,omitempty"`
	CertificateEnds string  `json:"certificate_ends,omitempty"`
	Pin             string  `json:"tls_pin,omitempty"`
	RoundTrip       float64 `json:"round_trip_ms,omitempty"`
	// ClockSkew is how many seconds the node's clock is ahead; null where nobody may ask.
	ClockSkew *float64 `json:"clock_skew_seconds"`
	Error     string   `json:"error,omitempty"`

	trouble string // clock or certificate, for people
}

// nodeStatuses asks all nodes at one time. The error is why some cannot serve.
func nodeStatuses(ctx context.Context, client *nethsm.Client, serverName string, administrator bool) ([]nodeStatus, error) {
	nodes := client.Nodes(ctx)
	statuses := make([]nodeStatus, len(nodes))
	var work sync.WaitGroup
	for i, node := range nodes {
		work.Go(func() { statuses[i] = newNodeStatus(ctx, client, node, serverName, administrator) })
	}
	work.Wait()
	var failures []error
	for _, node := range nodes {
		if node.Err != nil {
			failures = append(failures, node.Err)
		}
	}
	if failures == nil {
		return statuses, nil
	}
	return statuses, fmt.Errorf("%d of %d nodes cannot serve: %w", len(failures), len(nodes), errors.Join(failures...))
}

// Clocks and certificates that need a look.
const (
	skewLimit        = 30 * time.Second
	certificateLimit = 30 * 24 * time.Hour
)

func newNodeStatus(ctx context.Context, client *nethsm.Client, node hsm.Node, serverName string, administrator bool) nodeStatus {
	status := nodeStatus{
		URL: node.URL, State: nodeState(node.State), Version: node.Firmware, Serial: node.Serial,
		CertificateEnds: stamp(node.CertificateEnds), RoundTrip: milliseconds(node.RoundTrip),
	}
	if node.Err != nil {
		status.Error = node.Err.Error()
	}
	var trouble []string
	if strings.HasPrefix(node.URL, "https://") {
		// The certificate is shown even where it is not the expected one: that is when somebody wants to see it.
		if shown, err := nethsm.ShowCertificate(ctx, node.URL, serverName); err == nil {
			status.Pin, status.CertificateEnds = shown.Pin, stamp(shown.NotAfter)
			if left := time.Until(shown.NotAfter); left < certificateLimit {
				trouble = append(trouble, "certificate ends soon")
			}
		}
	}
	if administrator && node.Err == nil {
		if alone, err := client.At(node.URL); err == nil {
			if skew, err := alone.ClockSkew(ctx); err == nil {
				seconds := skew.Seconds()
				status.ClockSkew = &seconds
				if skew.Abs() > skewLimit {
					trouble = append(trouble, "clock is off by "+skew.String())
				}
			}
		}
	}
	status.trouble = strings.Join(trouble, ", ")
	return status
}

// nodeState is a state as a NetHSM writes it, "Operational", and so every verb here. A node that does not answer is "absent".
func nodeState(state hsm.State) string {
	for _, own := range []nethsm.State{
		nethsm.StateOperational, nethsm.StateLocked, nethsm.StateUnprovisioned, nethsm.StateFailed,
	} {
		if own.HSM() == state {
			return string(own)
		}
	}
	return string(state)
}

func nodeRows(t *table, nodes []nodeStatus) {
	t.row("NODE", "STATE", "VERSION", "CERTIFICATE ENDS", "CLOCK", "SHA-256 OF THE CERTIFICATE", "TROUBLE")
	for _, node := range nodes {
		clock := ""
		if node.ClockSkew != nil {
			clock = fmt.Sprintf("%+.0fs", *node.ClockSkew)
		}
		t.row(node.URL, node.State, dash(node.Version), dash(node.CertificateEnds), dash(clock), dash(node.Pin), dash(node.trouble))
	}
}

// dash fills a cell that has nothing to tell.
func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
