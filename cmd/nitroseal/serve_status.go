package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/server"
)

func newServeStatusCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Ask the seal server of this machine how it is, and for how many Vaults it suffices",
		Long: `Ask the running seal server of this machine which wrapping keys it serves, whether their HSMs answer, and for how many Vaults that suffices: in
strict mode each Vault costs two operations of an HSM to come up, one every ten minutes after that, and one a minute while its seal is unhealthy. The
capacity is how many come up within three minutes of a power cut. No HSM is asked.

The exit code is that of a health check: 0 where all is well, 1 where a key that is there does not seal or open, or none is there, 3 where
the server does not answer.`,
		Example: "  nitroseal serve status -o json",
		Args:    noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := a.serve(); err != nil {
				return err
			}
			ctx, cancel := a.within(cmd.Context(), ordinaryTimeout)
			defer cancel()
			view := a.sealServer(ctx)
			if err := ctx.Err(); errors.Is(err, context.Canceled) {
				return err
			}
			v := view.judge()
			return errors.Join(a.print(view, view.rows), verdictOf([]verdict{v}))
		},
	}
}

// sealServerView is the seal server of this machine as JSON.
type sealServerView struct {
	Listen  string             `json:"listen"`
	Healthy bool               `json:"healthy"`
	Version string             `json:"version"`
	Keys    []server.KeyHealth `json:"keys"`
	Error   string             `json:"error"`

	err   error
	named []string // keys that the configuration wants to be served; nil for those that tokens name
}

// sealServer asks the seal server of this machine.
func (a *app) sealServer(ctx context.Context) *sealServerView {
	health, at, err := sealHealth(ctx, a.configuration)
	view := &sealServerView{Listen: at, Version: health.Version, Error: text(err), err: err, named: a.configuration.Serve.Keys}
	view.Keys = list(health.Nitroseal.Keys)
	v := view.judge()
	view.Healthy = v.wrong == nil && v.silent == nil
	return view
}

// counts tells whether a key must work for the server to be well. One that a token alone names and that is not there or not ready harms
// nobody but the token's holder, who may have it from another server.
func (v *sealServerView) counts(k *server.KeyHealth) bool {
	return k.Version > 0 || slices.Contains(v.named, k.Name)
}

// adviceFor says what to do about a served key that does not work.
func adviceFor(k *server.KeyHealth) string {
	if k.Version == 0 {
		return "it is not there, or not ready; nitroseal key show " + k.Name + " says what it needs"
	}
	return fmt.Sprintf("%d of %s answer, and a Vault that starts waits; nitroseal device status says what for", k.RecipientsUp, countHSMs(k.Recipients))
}

// judge says what is wrong with the server.
func (v *sealServerView) judge() verdict {
	var found verdict
	switch {
	case errors.Is(v.err, errSilent):
		found.silent = append(found.silent, strings.TrimPrefix(v.Error, errSilent.Error()+": "))
	case v.err != nil:
		found.wrong = append(found.wrong, v.Error)
	}
	served := 0
	for i := range v.Keys {
		k := &v.Keys[i]
		if !v.counts(k) {
			continue
		}
		served++
		if troubleOf(k) != "" {
			found.wrong = append(found.wrong, fmt.Sprintf("seal server: key %q %s: %s", k.Name, troubleOf(k), adviceFor(k)))
		}
	}
	if v.err == nil && served == 0 {
		found.wrong = append(found.wrong, "seal server: it has no key that is fit for use, so it answers no Vault; nitroseal serve token list says what its tokens are for")
	}
	return found
}

func (v *sealServerView) rows(t *table) {
	if v.err != nil {
		t.row("seal server " + v.Listen)
		t.row("  error", v.Error)
		return
	}
	t.row("seal server "+v.Listen, v.Version)
	if len(v.Keys) == 0 {
		t.row("  serves no key", "a token names the first one: nitroseal serve token create NAME --key KEY")
	}
	for i := range v.Keys {
		k := &v.Keys[i]
		if !v.counts(k) {
			t.row("  key "+k.Name, "a token names it, and "+adviceFor(k))
			continue
		}
		t.row("  key "+k.Name, servedKey(k))
	}
}

// troubleOf says what a served key cannot do; "" for nothing.
func troubleOf(k *server.KeyHealth) string {
	switch {
	case !k.Seals && !k.Opens:
		return "NEITHER SEALS NOR OPENS"
	case !k.Seals:
		return "DOES NOT SEAL"
	case !k.Opens:
		return "DOES NOT OPEN"
	}
	return ""
}

// servedKey says how a served key is.
func servedKey(k *server.KeyHealth) string {
	var parts []string
	if trouble := troubleOf(k); trouble != "" {
		parts = append(parts, trouble)
	}
	mode := k.Mode
	if k.LeaseUntil != nil {
		mode += " until " + stamp(*k.LeaseUntil)
	}
	if k.LeaseLocked != nil && !*k.LeaseLocked {
		mode += " (its memory may be swapped)"
	}
	parts = append(parts, fmt.Sprintf("version %d", k.Version), fmt.Sprintf("%d of %s answer", k.RecipientsUp, countHSMs(k.Recipients)), mode)
	if k.OperationSeconds > 0 {
		parts = append(parts, fmt.Sprintf("%.3g s an operation", k.OperationSeconds))
	}
	if k.Capacity > 0 {
		parts = append(parts, fmt.Sprintf("suffices for %d Vaults", k.Capacity))
	}
	return strings.Join(parts, ", ")
}
