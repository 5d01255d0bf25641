package node

import (
	"fmt"
	"log/slog"
)

// What holds secrets does not print them, whatever verb or logger it falls into.

// Format implements fmt.Formatter.
func (a InitAnswer) Format(f fmt.State, _ rune) { _, _ = fmt.Fprint(f, a.LogValue().String()) }

// LogValue implements slog.LogValuer.
func (a InitAnswer) LogValue() slog.Value {
	return slog.StringValue(fmt.Sprintf("%d shares, %d recovery shares, token %t", len(a.Shares), len(a.RecoveryShares), len(a.RootToken) > 0))
}

// Format implements fmt.Formatter.
func (a RekeyAnswer) Format(f fmt.State, _ rune) { _, _ = fmt.Fprint(f, a.LogValue().String()) }

// LogValue implements slog.LogValuer.
func (a RekeyAnswer) LogValue() slog.Value {
	return slog.StringValue(fmt.Sprintf("progress %d, complete %t, %d shares, verification required %t (nonce %q)",
		a.Progress, a.Complete, len(a.Shares), a.VerificationRequired, a.VerificationNonce))
}

// Format implements fmt.Formatter.
func (s RootStatus) Format(f fmt.State, _ rune) { _, _ = fmt.Fprint(f, s.LogValue().String()) }

// LogValue implements slog.LogValuer.
func (s RootStatus) LogValue() slog.Value {
	return slog.StringValue(fmt.Sprintf("started %t, progress %d of %d (nonce %q)", s.Started, s.Progress, s.Required, s.Nonce))
}

// Format implements fmt.Formatter.
func (a RootAnswer) Format(f fmt.State, _ rune) { _, _ = fmt.Fprint(f, a.LogValue().String()) }

// LogValue implements slog.LogValuer.
func (a RootAnswer) LogValue() slog.Value {
	return slog.StringValue(fmt.Sprintf("progress %d, complete %t", a.Progress, a.Complete))
}
