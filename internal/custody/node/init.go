package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
)

// InitRequest says what keys a new cluster gets. A Shamir seal takes Shares and Threshold, an auto-seal takes
// RecoveryShares and RecoveryThreshold; Vault refuses the others.
type InitRequest struct {
	Shares, Threshold                 int
	RecoveryShares, RecoveryThreshold int
	// PGPKeys and RecoveryPGPKeys encrypt the shares: none, or one a share. Each is the base64 of a binary OpenPGP key.
	PGPKeys, RecoveryPGPKeys []string
	RootPGPKey               string // encrypts the root token; "": it comes in the clear
}

// InitAnswer is what nobody will ever tell again. It belongs to the caller, who wipes it.
type InitAnswer struct {
	// Shares and RecoveryShares are raw, or binary OpenPGP messages with the share in hex where PGP keys were given.
	Shares, RecoveryShares [][]byte
	// RootToken is the token, or a binary OpenPGP message with it where a PGP key was given.
	RootToken []byte
}

// Wipe overwrites the answer.
func (a *InitAnswer) Wipe() {
	if a == nil {
		return
	}
	wipe(a.Shares)
	wipe(a.RecoveryShares)
	clear(a.RootToken)
	*a = InitAnswer{}
}

func wipe(secrets [][]byte) {
	for _, secret := range secrets {
		clear(secret)
	}
}

// Init initialises the node, once: Vault goes on with it whoever hangs up, and refuses a second one. It runs under
// [Config.InitTimeout] and not under the cancellation of ctx, which is looked at only before anything is sent.
//
// A node that was initialised before is ErrAlreadyInitialized. ErrMayHaveHappened means that the node may be initialised now
// with keys that nobody holds. Where the answer broke off or is odd, but keys could be read from it, they are returned
// beside the error: keep them.
func (n *Node) Init(ctx context.Context, request InitRequest) (*InitAnswer, error) {
	w := &writer{}
	w.count("secret_shares", request.Shares)
	w.count("secret_threshold", request.Threshold)
	w.texts("pgp_keys", request.PGPKeys)
	w.count("recovery_shares", request.RecoveryShares)
	w.count("recovery_threshold", request.RecoveryThreshold)
	w.texts("recovery_pgp_keys", request.RecoveryPGPKeys)
	if request.RootPGPKey != "" {
		w.text("root_token_pgp_key", request.RootPGPKey)
	}
	var answer InitAnswer
	var shares, recovery shareList
	err := n.do(ctx, &call{
		op: "initialising", method: http.MethodPut, path: "sys/init", body: w.end(), changes: true, init: true,
		field: func(name string, s *scanner) error {
			switch name {
			case "keys":
				return shares.read(s, inHex)
			case "keys_base64":
				return shares.read(s, inBase64)
			case "recovery_keys":
				return recovery.read(s, inHex)
			case "recovery_keys_base64":
				return recovery.read(s, inBase64)
			case "root_token":
				if s.null() {
					return nil
				}
				text, err := s.text()
				if err != nil {
					return err
				}
				if request.RootPGPKey == "" {
					answer.RootToken = slices.Clone(text)
					return nil
				}
				answer.RootToken, err = inBase64.raw(text)
				return err
			default:
				return s.skip()
			}
		},
		check: func() error {
			if len(shares.raw) != request.Shares || len(recovery.raw) != request.RecoveryShares {
				return fmt.Errorf("it holds %d keys and %d recovery keys", len(shares.raw), len(recovery.raw))
			}
			if len(answer.RootToken) == 0 {
				return errors.New("it holds no root token")
			}
			return nil
		},
	})
	answer.Shares, answer.RecoveryShares = shares.raw, recovery.raw
	if len(answer.Shares)+len(answer.RecoveryShares)+len(answer.RootToken) == 0 {
		return nil, err
	}
	return &answer, err
}
