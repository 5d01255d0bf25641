package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/doctor"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// doctorTimeout is how long the whole examination may take; each part has a limit of its own.
const doctorTimeout = 5 * time.Minute

func newDoctorCommand(a *app) *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what is wrong, and say how to mend it",
		Long: `Look at the machine, each device, each wrapping key, each store, each cluster, the seal server and the Vault of the configuration, and say what is wrong
and how to mend it. Everything is tried as the program itself would use it: one private-key operation for each HSM key, one
value written, read and deleted in each store. The PIN rule holds: a PIN that was found wrong is not sent again. A
Nitrokey HSM 2 is asked about its backup by sc-hsm-tool, where that is installed; programs that are logged in to it may have to
log in again, which OpenSC does by itself. Of clusters no key is opened: "nitroseal drill" does that.

The exit code is 1 where a problem was found, 0 where there were warnings at most. What was found before Ctrl-C or --timeout ended
it is printed as well.`,
		Example: `  nitroseal doctor
  nitroseal doctor --quiet            only what needs somebody
  nitroseal doctor --output json`,
		Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.doctor(cmd.Context(), quiet) },
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show only warnings and problems")
	return cmd
}

// findingView is a finding as JSON.
type findingView struct {
	Subject string `json:"subject"`
	Check   string `json:"check"`
	Verdict string `json:"verdict"` // ok, skipped, warning or problem
	Seen    string `json:"seen"`
	Remedy  string `json:"remedy,omitempty"`
}

// examinationView is the whole examination as JSON.
type examinationView struct {
	Problems int           `json:"problems"`
	Warnings int           `json:"warnings"`
	Findings []findingView `json:"findings"`
}

func (a *app) doctor(ctx context.Context, quiet bool) error {
	patient, err := a.patient()
	if err != nil {
		return err
	}
	ctx, cancel := a.within(ctx, doctorTimeout)
	defer cancel()
	var result examinationView
	examination := doctor.Examine(ctx, patient, func(f doctor.Finding) {
		a.progress("%s: %s", f.Subject, f.Check)
		switch f.Verdict {
		case doctor.Problem:
			result.Problems++
		case doctor.Warning:
			result.Warnings++
		case doctor.OK, doctor.Skipped:
			if quiet {
				return
			}
		}
		result.Findings = append(result.Findings, findingView{f.Subject, f.Check, string(f.Verdict), f.Seen, f.Remedy})
	})
	result.Findings = list(result.Findings)
	printing := a.print(result, func(t *table) { showFindings(t, result) }) // what was found before it broke off, too
	if err := errors.Join(examination, printing); err != nil {
		return err
	}
	if result.Problems > 0 {
		return fmt.Errorf("%s found in %s", count(result.Problems, "problem"), patient.Config.Path)
	}
	return nil
}

// marks are how verdicts look in a table: good ones do not draw the eye.
var marks = map[string]string{string(doctor.OK): "ok", string(doctor.Skipped): "-", string(doctor.Warning): "WARNING", string(doctor.Problem): "PROBLEM"}

func showFindings(t *table, result examinationView) {
	subject := ""
	for _, f := range result.Findings {
		if f.Subject != subject {
			subject = f.Subject
			t.row(subject)
		}
		t.row("  "+marks[f.Verdict], f.Check, f.Seen)
		if f.Remedy != "" {
			t.row("", "", "→ "+f.Remedy)
		}
	}
	t.row(count(result.Problems, "problem") + ", " + count(result.Warnings, "warning"))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// patient is the configuration with the means to try it.
func (a *app) patient() (doctor.Patient, error) {
	c, err := a.config()
	if err != nil {
		return doctor.Patient{}, err
	}
	set, err := a.devices()
	if err != nil {
		return doctor.Patient{}, err
	}
	return doctor.Patient{
		Config: c, Device: set.handle, Store: a.store, Keys: a.keyring,
		Cluster: a.clusterStatus, Audit: a.auditSinks,
		Serve: doctor.Serve{
			Certificate: func() (chain, key []byte, err error) { return sealCertificate(c) },
			ClientCA:    func() ([]byte, error) { return clientCA(c) },
			Tokens:      a.listTokens,
			Ready: func(ctx context.Context, key string) error {
				keys, err := a.keyring()
				if err != nil {
					return err
				}
				return keys.Ready(ctx, key, keyring.PurposeEncrypt)
			},
		},
		VaultToken: func() ([]byte, error) { return vaultToken(c) },
	}, nil
}

// listTokens lists who may ask the seal server.
func (a *app) listTokens(ctx context.Context) ([]token.Listed, error) {
	kept, err := a.tokenStore(ctx)
	if err != nil {
		return nil, err
	}
	return token.List(ctx, kept)
}

// clusterStatus asks how a cluster is.
func (a *app) clusterStatus(ctx context.Context, name string) (cluster.Status, error) {
	c, err := a.cluster(name)
	if err != nil {
		return cluster.Status{}, err
	}
	custodian, err := a.custodian()
	if err != nil {
		return cluster.Status{}, err
	}
	return custodian.Status(ctx, c)
}

// auditSinks looks whether the audit log would take a line.
func (a *app) auditSinks(ctx context.Context) ([]audit.SinkStatus, error) {
	log, err := a.audit()
	if err != nil {
		return nil, err
	}
	err = log.Check(ctx)
	return log.Sinks(), err
}

// vaultToken reads the token for Vault; nil where none is configured. The caller wipes it.
func vaultToken(c *config.Config) ([]byte, error) {
	switch {
	case c.Vault == nil:
		return nil, nil
	case c.Vault.TokenFile != "":
		return c.SecretFiles().Read(c.Vault.TokenFile)
	case c.Vault.TokenEnv != "":
		token, trouble := device.CutSecret([]byte(os.Getenv(c.Vault.TokenEnv)))
		if trouble != "" {
			return nil, fmt.Errorf("%w: vault: the token in the environment variable %s %s", config.ErrInvalid, c.Vault.TokenEnv, trouble)
		}
		return token, nil
	}
	return nil, nil
}
