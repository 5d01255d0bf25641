package doctor

import (
	"context"
	"errors"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// devices examines every configured HSM.
func (d *doctor) devices(ctx context.Context) {
	if len(d.Config.Devices) == 0 {
		d.about("devices").warning("configuration", `add a block device "NAME" { … } to `+d.Config.Path, "no device is configured")
	}
	for _, configured := range d.Config.Devices {
		ctx, cancel := context.WithTimeout(ctx, patience)
		f := d.about("device %q", configured.Name)
		switch configured.Type {
		case device.TypePKCS11:
			d.token(ctx, f, configured)
		case device.TypeNetHSM:
			d.netHSM(ctx, f, configured)
		}
		cancel()
	}
}

// netHSM examines a NetHSM with all its nodes.
func (d *doctor) netHSM(ctx context.Context, f chart, configured config.Device) {
	handle, err := d.Device(configured.Name)
	if err != nil {
		f.problem("configuration", "mend the device's block in "+d.Config.Path, "%v", err)
		return
	}
	trust(f, configured)
	status := handle.Status(ctx)
	if status.Err != nil {
		f.problem("round trip", "the error says what the NetHSM answered; docs/nethsm.md has a table of what each answer means", "%v", status.Err)
	} else {
		d.notes(f, status.Info)
		roundTrip(f, configured.Name, status)
	}
	opened, err := handle.Device(ctx) // an error was reported above
	if client, ok := opened.(*nethsm.Device); ok && err == nil {
		d.roles(ctx, f, configured, client)
	}
	for _, node := range status.Nodes {
		d.node(f, node)
	}
}

// trust says how the node's certificate is checked.
func trust(f chart, configured config.Device) {
	const check = "trust"
	switch {
	case configured.Insecure:
		f.problem(check, "give ca_cert_file or tls_pins instead of tls_insecure", "the certificate is not checked: whoever is on the way learns the password")
	case len(configured.TLSPins) > 0:
		f.ok(check, "certificates are checked against %d pins", len(configured.TLSPins))
	case configured.CACert != "":
		f.ok(check, "certificates are checked against the configured authority")
	default:
		f.ok(check, "certificates are checked against the system's authorities")
	}
}

func (d *doctor) node(f chart, node hsm.Node) {
	f.subject += " node " + node.URL
	if !node.CertificateEnds.IsZero() {
		f.certificate("the node", node.CertificateEnds, "set a new one (docs/nethsm.md, rotation), adding its pin before the change")
	}
	switch {
	case node.State == hsm.StateOperational && node.Err == nil:
		f.ok("state", "operational, answered in %v", node.RoundTrip.Round(100*time.Microsecond))
	case node.State == hsm.StateLocked:
		f.problem("state", "nitroseal nethsm unlock; with unlock_passphrase_file it is unlocked whenever it is found locked, with unattended boot it "+
			"never locks by a restart", "locked: it serves nobody")
	case node.State == hsm.StateUnprovisioned:
		f.problem("state", "nitroseal nethsm provision, then nitroseal nethsm setup", "not provisioned")
	case node.State == hsm.StateFailed:
		f.problem("state", "see whether its database (etcd) is there; it recovers by itself when that returns", "failed")
	default:
		f.problem("state", "see whether it is switched on, whether a firewall is in between, and whether its certificate is the one that is trusted here", "%v", node.Err)
	}
}

// roles sees whether the users may do what they are for, and no more.
func (d *doctor) roles(ctx context.Context, f chart, configured config.Device, opened *nethsm.Device) {
	const check = "role"
	role, err := roleOf(ctx, opened.Operator(), configured.Username)
	switch {
	case err != nil:
		f.skipped(check, "the role of %s is not known: %v", configured.Username, err)
	case role != nethsm.RoleOperator:
		f.problem(check, "name a user with the role Operator as username; nitroseal nethsm setup makes one",
			"%s has the role %s, and only an Operator may decrypt", configured.Username, role)
	default:
		f.ok(check, "%s is an Operator: it may use keys and change none", configured.Username)
	}
	administrator := opened.Administrator()
	if administrator == nil {
		f.skipped("clock", "only an administrator may read the NetHSM's clock, and none is configured (nor needed)")
		return
	}
	switch role, err = roleOf(ctx, administrator, configured.AdminUsername); {
	case err != nil:
		f.problem(check, "put the right password in place, or leave admin_username out", "%s cannot be asked about: %v", configured.AdminUsername, err)
		return
	case role != nethsm.RoleAdministrator:
		f.problem(check, "name a user with the role Administrator as admin_username, or leave it out", "%s has the role %s", configured.AdminUsername, role)
		return
	case configured.ObjectStore:
		f.ok(check, "%s is an Administrator, which the object store needs", configured.AdminUsername)
	default:
		f.warning(check, "leave admin_username out once the keys are made: unwrapping needs an Operator only",
			"%s is an Administrator: whoever has this configuration may delete keys", configured.AdminUsername)
	}
	for _, url := range administrator.URLs() {
		clockOf(ctx, f, administrator, url)
	}
}

// clockOf compares the clock of one node with ours: each has its own.
func clockOf(ctx context.Context, f chart, administrator *nethsm.Client, url string) {
	f.subject += " node " + url
	node, err := administrator.At(url)
	if err != nil {
		f.skipped("clock", "the node's clock could not be read: %v", err)
		return
	}
	asked := time.Now()
	theirs, err := node.Time(ctx)
	switch {
	case errors.Is(err, hsm.ErrForbidden):
		f.skipped("clock", "only an administrator outside namespaces may read the node's clock")
	case err != nil:
		f.skipped("clock", "the node's clock could not be read: %v", err)
	default:
		f.clock("the node", theirs.Sub(asked), "set it by NTP or with the API (PUT /api/v1/config/time)")
	}
}

func roleOf(ctx context.Context, client *nethsm.Client, user string) (nethsm.Role, error) {
	found, err := client.User(ctx, user)
	return found.Role, err
}
