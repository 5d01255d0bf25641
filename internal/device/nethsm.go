package device

import (
	"context"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// NetHSM opens devices of [TypeNetHSM] through a manager, which belongs to whoever made it: close it after the last
// handle. Opening asks nothing of the NetHSM, and the manager copies the secrets that it keeps.
func NetHSM(manager *nethsm.Manager) Opener {
	return func(_ context.Context, owner string, config Config, secrets Secrets) (hsm.Device, error) {
		wanted := nethsm.DeviceConfig{
			Options: nethsm.Options{
				URLs: config.URLs, Timeout: config.RequestTimeout, UserAgent: userAgent,
				TLS: nethsm.TLS{
					CA: []byte(config.CACert), Pins: config.TLSPins, ServerName: config.TLSServerName, Insecure: config.Insecure,
				},
			},
			Operator:         nethsm.Credentials{Username: config.Username, Password: secrets.Password},
			UnlockPassphrase: secrets.UnlockPassphrase, Objects: config.ObjectStore, Tags: config.KeyTags, Owner: owner,
		}
		if config.AdminUsername != "" {
			wanted.Administrator = &nethsm.Credentials{Username: config.AdminUsername, Password: secrets.AdminPassword}
		}
		device, err := manager.Open(wanted)
		switch {
		case errors.Is(err, nethsm.ErrConfig):
			return nil, fmt.Errorf("%w: %w", ErrConfig, err)
		case err != nil:
			return nil, err // not a typed nil in the interface
		}
		return device, nil
	}
}

// ErrRequest is what a NetHSM, or its client before anything is sent, refuses as wrong in itself: a passphrase that is too
// short, for example. Who made the request can mend it.
var ErrRequest = nethsm.ErrRequest

// userAgent is what a NetHSM's log shows of this project.
const userAgent = "nitroseal"
