package doctor

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/internal/config"
)

// vault examines the Vault that runs the plugin: whether it answers, and whether it runs the very file that lies here.
func (d *doctor) vault(ctx context.Context) {
	f := d.about("vault")
	configured := d.Config.Vault
	if configured == nil {
		f.skipped("address", "no vault block is configured")
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	token, err := d.VaultToken()
	if err != nil {
		f.problem("token", "mend the vault block in "+d.Config.Path+", or what it names", "%v", err)
	}
	defer clear(token)
	client, err := newVaultClient(configured, token)
	if err != nil {
		f.problem("address", "mend the vault block in "+d.Config.Path, "%v", err)
		return
	}
	health, err := client.Sys().HealthWithContext(ctx)
	switch {
	case err != nil:
		f.problem("address", "see whether Vault runs, and whether ca_cert_file is the authority of its certificate", "%s does not answer: %v", configured.Address, err)
		return
	case !health.Initialized:
		f.warning("state", "initialise it: vault operator init", "Vault %s is not initialised", health.Version)
	case health.Sealed:
		f.warning("state", "unseal it", "Vault %s is sealed: plugins cannot be looked at", health.Version)
	default:
		f.ok("state", "Vault %s is unsealed", health.Version)
	}
	if health.ServerTimeUTC != 0 {
		f.clock("Vault", time.Until(time.Unix(health.ServerTimeUTC, 0)), "run NTP on both machines")
	}
	switch {
	case !health.Initialized || health.Sealed:
	case len(token) == 0:
		f.skipped("plugin", "the catalog of plugins is shown to a token only; give token_file or token_env in the vault block")
	default:
		plugin(ctx, f, client, configured)
	}
}

// newVaultClient makes a client that goes where the configuration says, whatever the environment holds.
func newVaultClient(configured *config.Vault, token []byte) (*api.Client, error) {
	settings := &api.Config{
		Address: configured.Address, MaxRetries: 0, Timeout: patience,
		HttpClient: &http.Client{
			Transport:     &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12}}, // no proxy
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	if err := settings.ConfigureTLS(&api.TLSConfig{CACertBytes: configured.CACert, TLSServerName: configured.TLSServerName}); err != nil {
		return nil, err
	}
	client, err := api.NewClient(settings)
	if err != nil {
		return nil, err
	}
	client.ClearNamespace()
	client.ClearToken() // one from the environment was not meant for this address
	if len(token) > 0 {
		client.SetToken(string(token))
	}
	return client, client.SetAddress(configured.Address)
}

// plugin compares the file on disk with what Vault has in its catalog and what its mount runs.
func plugin(ctx context.Context, f chart, client *api.Client, configured *config.Vault) {
	const check = "plugin"
	mounts, err := client.Sys().ListMountsWithContext(ctx)
	if err != nil {
		f.skipped(check, "the mounts cannot be listed (a policy with read on sys/mounts allows it): %s", firstLine(err))
		return
	}
	mount, mounted := mounts[strings.Trim(configured.Mount, "/")+"/"]
	switch {
	case !mounted:
		f.problem(check, fmt.Sprintf("vault secrets enable -path=%s %s", configured.Mount, configured.PluginName), "nothing is mounted at %s/", configured.Mount)
		return
	case mount.Type != configured.PluginName:
		f.problem(check, "name the right mount and plugin_name in the vault block", "%s/ is of type %s, not %s", configured.Mount, mount.Type, configured.PluginName)
		return
	}
	if configured.PluginFile == "" {
		f.ok(check, "%s/ runs %s %s", configured.Mount, mount.Type, mount.RunningVersion)
		f.skipped("checksum", "plugin_file is not configured")
		return
	}
	sum, err := checksum(configured.PluginFile)
	switch {
	case err != nil:
		f.problem("checksum", "name the file in Vault's plugin_directory as plugin_file", "%v", err)
	case mount.RunningSha256 == "":
		f.skipped("checksum", "Vault does not say which file %s/ runs", configured.Mount)
	case mount.RunningSha256 != sum:
		f.problem("checksum", fmt.Sprintf("register the file and reload: vault plugin register -sha256=%s … secret %s; vault plugin reload -plugin=%s",
			sum, configured.PluginName, configured.PluginName),
			"%s has the checksum %s, and %s/ runs %s: a restart of Vault would fail to start the plugin", configured.PluginFile, sum, configured.Mount, mount.RunningSha256)
	default:
		f.ok("checksum", "%s/ runs %s %s, and its checksum is that of %s", configured.Mount, mount.Type, mount.RunningVersion, configured.PluginFile)
	}
}

func checksum(path string) (string, error) {
	opened, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer opened.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, opened); err != nil {
		return "", fmt.Errorf("reading %s: %w", path, err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// firstLine shortens an error of Vault's client, which spans several lines.
func firstLine(err error) string {
	if answer := (*api.ResponseError)(nil); errors.As(err, &answer) {
		return fmt.Sprintf("%d %s", answer.StatusCode, strings.Join(answer.Errors, "; "))
	}
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}
