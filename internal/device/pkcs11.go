package device

import (
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
)

// PKCS11 opens devices of TypePKCS11 through a manager, which belongs to whoever made it: close it after the last
// handle.
func PKCS11(manager *pkcs11.Manager) Opener {
	return func(ctx context.Context, owner string, config Config, secrets Secrets) (hsm.Device, error) {
		device, err := manager.Open(ctx, pkcs11.Config{
			Module: config.Module, Serial: config.Serial, TokenLabel: config.TokenLabel, Slot: config.Slot,
			PIN: secrets.PIN, Owner: owner,
			Parallel: config.Parallel, DecryptLimit: config.DecryptTimeout, GenerateLimit: config.GenerateTimeout,
		})
		switch {
		case errors.Is(err, pkcs11.ErrConfig):
			return nil, fmt.Errorf("%w: %w", ErrConfig, err)
		case err != nil:
			return nil, err // not a typed nil in the interface
		}
		return device, nil
	}
}
