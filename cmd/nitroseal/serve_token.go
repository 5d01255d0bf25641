package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// serveDir is the folder of the state directory that holds the tokens where the configuration names no store, and else a copy of
// their list. No secret lies there.
const serveDir = "serve"

// tokensCopy is the file of that copy.
const tokensCopy = "tokens.cache"

func newServeTokenCommand(a *app) *cobra.Command {
	return group("token", "Make, list and revoke the tokens of seals", `A Vault or OpenBao with seal "transit" shows a token to the seal server, which knows by it whose keys it may open. Give each cluster one of its
own: it is bound to wrapping keys, and on request to client certificates and addresses. It never expires, since a seal's token that ended
by itself would keep the Vault from starting; it ends by being revoked.

What is kept of a token is a hash. All servers that share the store of the tokens (tokens in the block serve) take it.`,
		newServeTokenCreateCommand(a), newServeTokenListCommand(a), newServeTokenRevokeCommand(a))
}

// serve returns the block serve of the configuration, which must be there.
func (a *app) serve() (*config.Serve, error) {
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	if c.Serve == nil {
		return nil, fmt.Errorf("%w: %s has no block serve; write one: serve { … }, with tls_cert_file and tls_key_file in it", config.ErrInvalid, c.Path)
	}
	return c.Serve, nil
}

// tokenStore opens the store of the tokens.
func (a *app) tokenStore(ctx context.Context) (store.Store, error) {
	settings, err := a.serve()
	if err != nil {
		return nil, err
	}
	if settings.Tokens != "" {
		return a.store(ctx, settings.Tokens)
	}
	if err := a.checkStateDir(); err != nil {
		return nil, err
	}
	kept, err := file.Open(filepath.Join(a.configuration.StateDir, serveDir))
	if err != nil {
		return nil, fmt.Errorf("opening the tokens: %w", err)
	}
	a.onClose(kept.Close)
	return kept, nil
}

// tokens are what the server knows who asks by.
func (a *app) tokens(ctx context.Context) (*token.Registry, error) {
	kept, err := a.tokenStore(ctx)
	if err != nil {
		return nil, err
	}
	options := token.RegistryOptions{Store: kept, Logger: a.logger()}
	c := a.configuration
	if configured, _ := c.Store(c.Serve.Tokens); configured.Type == config.StoreEtcd {
		dir := filepath.Join(c.StateDir, serveDir)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			a.logger().Warn("the tokens are not copied to this machine, so a restart while their store is away knows none", "cause", err)
		} else {
			options.Cache = filepath.Join(dir, tokensCopy)
			options.Origin = configured.Type + " " + strings.Join(configured.Endpoints, ",") + " " + configured.Prefix
		}
	}
	return token.NewRegistry(options), nil
}

// tokenView is a token as JSON. It holds no secret.
type tokenView struct {
	ID               string   `json:"id"`
	Name             string   `json:"name"`
	Keys             []string `json:"keys"`
	CertificateNames []string `json:"certificate_names"`
	Addresses        []string `json:"addresses"`
	Rate             *int     `json:"rate"` // in a second, 0 for no limit; null for that of the server
	Burst            *int     `json:"burst"`
	Created          string   `json:"created"`
	CreatedBy        string   `json:"created_by"`
}

func showToken(t *token.Token) tokenView {
	view := tokenView{
		ID: t.ID, Name: t.Name, Keys: list(t.Keys), CertificateNames: list(t.CertificateNames), Addresses: []string{}, Created: stamp(t.Created),
		CreatedBy: t.CreatedBy,
	}
	for _, network := range t.Addresses {
		view.Addresses = append(view.Addresses, network.String())
	}
	if t.Limit != nil {
		view.Rate, view.Burst = &t.Limit.Rate, &t.Limit.Burst
	}
	return view
}

// bound says in a few words where a token is taken from.
func (v *tokenView) bound() string {
	var to []string
	if len(v.CertificateNames) > 0 {
		to = append(to, "certificate "+strings.Join(v.CertificateNames, ","))
	}
	if len(v.Addresses) > 0 {
		to = append(to, "address "+strings.Join(v.Addresses, ","))
	}
	if to == nil {
		return "-"
	}
	return strings.Join(to, ", ")
}

// limit says in a few words how often it may ask.
func (v *tokenView) limit() string {
	switch {
	case v.Rate == nil:
		return "-"
	case *v.Rate == 0:
		return "none"
	}
	return fmt.Sprintf("%d/s, %d at once", *v.Rate, *v.Burst)
}

// unserved says why a wrapping key that a token names is of no use on this machine; "" for nothing.
func (a *app) unserved(ctx context.Context, key string) string {
	if served := a.configuration.Serve.Keys; len(served) > 0 && !slices.Contains(served, key) {
		return fmt.Sprintf("key %q is not among the keys of the block serve", key)
	}
	keys, err := a.keyring()
	if err == nil {
		err = keys.Ready(ctx, key, keyring.PurposeEncrypt)
	}
	return text(err)
}
