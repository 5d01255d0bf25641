// Package doctor looks for what operators get wrong, and says how to mend it.
//
// [Examine] goes through one configuration: the machine, each device, each wrapping key, each store, each cluster in
// custody, the seal server, the Vault. Every look is a [Finding]: what was looked at, what was seen, and where that is not as it should be,
// what to do. A finding never hides another one: where a device does not answer, its stores and keys are still examined,
// and say so.
//
// The doctor uses the same parts as the rest of the program, so that what it finds is what the program would meet. It
// changes nothing but for one object that it writes into a store and deletes again, and it follows the PIN rule: it logs
// in only where an ordinary operation would.
//
// What cannot be found out is [Skipped] with a reason, never guessed to be right.
package doctor

import (
	"context"
	"fmt"
	"time"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// Verdict is how a finding counts.
type Verdict string

// The verdicts, from good to bad. Skipped means that nobody looked.
const (
	OK      Verdict = "ok"
	Skipped Verdict = "skipped"
	Warning Verdict = "warning" // works today
	Problem Verdict = "problem" // does not work, or will lose something
)

// Finding is one thing that was looked at.
type Finding struct {
	// Subject is what was examined: `device "usb"`, `store "etcd"`, "machine", "vault".
	Subject string
	// Check is what was looked at, a name that scripts may rely on: "module", "certificate", …
	Check   string
	Verdict Verdict
	// Seen is what was found, in a sentence.
	Seen string
	// Remedy is what to do; empty where nothing is to be done.
	Remedy string
}

// Patient is what is examined. The functions open the parts as the program itself does.
type Patient struct {
	Config *config.Config
	// Device returns the handle of a configured device; the doctor does not close it.
	Device func(name string) (*device.Handle, error)
	// Store opens a configured store; the doctor does not close it.
	Store func(ctx context.Context, name string) (store.Store, error)
	// Keys opens the wrapping keys of the configuration.
	Keys func() (*keyring.Keyring, error)
	// Cluster asks how a cluster of the configuration is; no secret is opened for it.
	Cluster func(ctx context.Context, name string) (cluster.Status, error)
	// Audit tells of the sinks of the audit log; the error says that none of them would take a line.
	Audit func(ctx context.Context) ([]audit.SinkStatus, error)
	// Serve opens the parts of the seal server; its functions are used where Config.Serve is.
	Serve Serve
	// VaultToken reads the token for Config.Vault; empty for none. The doctor wipes it.
	VaultToken func() ([]byte, error)
}

// patience bounds one look, so that a part that hangs costs its own findings and not the others.
const patience = 30 * time.Second

// certificateWarning is how long before its end a certificate is a warning.
const certificateWarning = 30 * 24 * time.Hour

// Examine looks at everything, one part after the other, and hands each finding to report as it comes. The error is
// ctx's alone.
func Examine(ctx context.Context, patient Patient, report func(Finding)) error {
	d := &doctor{Patient: patient, report: report}
	for _, part := range []func(context.Context){d.machine, d.devices, d.keys, d.stores, d.clusters, d.serve, d.vault} {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("examining the configuration %s: %w", patient.Config.Path, err)
		}
		part(ctx)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("examining the configuration %s: %w", patient.Config.Path, err)
	}
	return nil
}

type doctor struct {
	Patient
	report func(Finding)
}

// chart writes findings about one subject.
type chart struct {
	subject string
	report  func(Finding)
}

func (d *doctor) about(format string, args ...any) chart {
	return chart{subject: fmt.Sprintf(format, args...), report: d.report}
}

func (f chart) ok(check, seen string, args ...any) {
	f.report(Finding{Subject: f.subject, Check: check, Verdict: OK, Seen: fmt.Sprintf(seen, args...)})
}

func (f chart) skipped(check, seen string, args ...any) {
	f.report(Finding{Subject: f.subject, Check: check, Verdict: Skipped, Seen: fmt.Sprintf(seen, args...)})
}

func (f chart) warning(check, remedy, seen string, args ...any) {
	f.report(Finding{Subject: f.subject, Check: check, Verdict: Warning, Seen: fmt.Sprintf(seen, args...), Remedy: remedy})
}

func (f chart) problem(check, remedy, seen string, args ...any) {
	f.report(Finding{Subject: f.subject, Check: check, Verdict: Problem, Seen: fmt.Sprintf(seen, args...), Remedy: remedy})
}

// certificate says when a certificate ends.
func (f chart) certificate(of string, ends time.Time, remedy string) {
	day := ends.UTC().Format(time.DateOnly)
	switch left := time.Until(ends); {
	case left < 0:
		f.problem("certificate", remedy, "the certificate of %s ended on %s", of, day)
	case left < certificateWarning:
		f.warning("certificate", remedy, "the certificate of %s ends in %d days, on %s", of, int(left.Hours()/24), day)
	default:
		f.ok("certificate", "the certificate of %s ends on %s", of, day)
	}
}

// clock compares a clock with ours. Certificates and tokens have a begin and an end.
func (f chart) clock(of string, skew time.Duration, remedy string) {
	skew = skew.Round(time.Second)
	switch {
	case skew.Abs() > 5*time.Minute:
		f.problem("clock", remedy, "the clock of %s is %v away from this machine's", of, skew.Abs())
	case skew.Abs() > 30*time.Second:
		f.warning("clock", remedy, "the clock of %s is %v away from this machine's", of, skew.Abs())
	default:
		f.ok("clock", "the clock of %s agrees with this machine's", of)
	}
}
