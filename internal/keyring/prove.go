package keyring

import (
	"context"
	"crypto"
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// weaknesses names what makes a key unfit unless somebody accepts it.
func weaknesses(traits hsm.Traits) []string {
	var weak []string
	if traits.Extractable {
		weak = append(weak, "extractable")
	}
	if !traits.Sensitive {
		weak = append(weak, "not sensitive")
	}
	// On a PKCS#11 token every RSA key signs as well, because the PIN holder chooses the mechanism: a warning. Where
	// the device itself keeps a list, the other use is somebody's decision, and an oracle for ours.
	if traits.ForeignUsesRefused && len(traits.AlsoUsableFor) > 0 {
		weak = append(weak, "also usable for "+strings.Join(traits.AlsoUsableFor, ", "))
	}
	return weak
}

// prove finds the best algorithm that the key can open.
func prove(ctx context.Context, key hsm.Key) (envelope.Algorithm, error) {
	hash, err := hsm.Prove(ctx, key)
	switch {
	case err != nil && (ctx.Err() != nil || hsm.Away(err)):
		return "", fmt.Errorf("proving what the key can do: %w", err)
	case err != nil:
		return "", fmt.Errorf("%w: it does not do what it is needed for; choose another key: %w", ErrUnusableKey, err)
	}
	switch hash {
	case crypto.SHA256:
		return envelope.RSAOAEP256, nil
	case crypto.SHA1:
		return envelope.RSAOAEP, nil
	default:
		return envelope.ECDHESA256KW, nil
	}
}
