package node

import (
	"context"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
)

const rootPath = "sys/generate-root"

// RootStatus is how far the making of a root token has come.
type RootStatus struct {
	Started            bool
	Nonce              string
	OTP                []byte // only from RootStart without a PGP key: one half of the token. The caller wipes it
	Progress, Required int
	PGPFingerprint     string
}

// RootAnswer is what giving a share led to.
type RootAnswer struct {
	Progress int
	Complete bool
	// EncodedToken is what DecodeRoot takes, or the base64 of an OpenPGP message with the token. The caller wipes it.
	EncodedToken []byte
}

// RootStatus reads the state of a root token's making.
func (n *Node) RootStatus(ctx context.Context) (RootStatus, error) {
	return n.rootStatus(ctx, &call{op: "reading the state of a root token's making at", method: http.MethodGet, path: rootPath + "/attempt", active: true})
}

// RootStart begins to make a root token: encrypted to a PGP key (base64 of a binary one), or, with "", to a one-time pad that
// is returned here and nowhere else. An attempt under way is ErrInProgress.
func (n *Node) RootStart(ctx context.Context, pgpKey string) (RootStatus, error) {
	w := &writer{}
	if pgpKey != "" {
		w.text("pgp_key", pgpKey)
	}
	status, err := n.rootStatus(ctx, &call{
		op: "starting to make a root token at", method: http.MethodPut, path: rootPath + "/attempt", body: w.end(), changes: true, active: true,
	})
	if err == nil && pgpKey == "" && len(status.OTP) == 0 {
		return status, &Error{
			Op: "starting to make a root token at", Node: n.address, is: []error{ErrMalformed}, what: "the answer holds no one-time pad",
			advice: "cancel it and start again",
		}
	}
	return status, err
}

// RootCancel ends whatever attempt is under way; where none is, it does nothing.
func (n *Node) RootCancel(ctx context.Context) error {
	return n.do(ctx, &call{
		op: "cancelling a root token's making at", method: http.MethodDelete, path: rootPath + "/attempt", changes: true, active: true,
	})
}

func (n *Node) rootStatus(ctx context.Context, c *call) (RootStatus, error) {
	var status RootStatus
	var started bool
	c.field = func(name string, s *scanner) error {
		switch name {
		case "started":
			started = true
			return s.boolean(&status.Started)
		case "nonce":
			return s.into(&status.Nonce)
		case "otp":
			text, err := s.optional()
			if len(text) > 0 {
				status.OTP = slices.Clone(text)
			}
			return err
		case "progress":
			return s.count(&status.Progress)
		case "required":
			return s.count(&status.Required)
		case "pgp_fingerprint":
			return s.into(&status.PGPFingerprint)
		default:
			return s.skip()
		}
	}
	c.check = func() error {
		if !started {
			return errors.New("it is no state of a root token's making")
		}
		return nil
	}
	if err := n.do(ctx, c); err != nil {
		clear(status.OTP)
		return RootStatus{}, err
	}
	return status, nil
}

// RootUpdate gives a share to the attempt with this nonce. ErrWrongShares means that the shares given do not open it; progress
// is then 0 again.
func (n *Node) RootUpdate(ctx context.Context, share []byte, nonce string) (RootAnswer, error) {
	w := &writer{}
	w.share(share)
	w.text("nonce", nonce)
	var answer RootAnswer
	err := n.do(ctx, &call{
		op: "giving a share to a root token's making at", method: http.MethodPut, path: rootPath + "/update", body: w.end(), secret: share,
		changes: true, active: true,
		field: func(name string, s *scanner) error {
			switch name {
			case "progress":
				return s.count(&answer.Progress)
			case "complete":
				return s.boolean(&answer.Complete)
			case "encoded_token", "encoded_root_token": // the older name of the same
				text, err := s.optional()
				if len(text) > 0 && len(answer.EncodedToken) == 0 {
					answer.EncodedToken = slices.Clone(text)
				}
				return err
			default:
				return s.skip()
			}
		},
		check: func() error {
			switch {
			case answer.Complete && len(answer.EncodedToken) == 0:
				return errors.New("it says complete and holds no token")
			case answer.Progress == 0:
				return errors.New("it shows no progress")
			default:
				return nil
			}
		},
	})
	if err != nil {
		clear(answer.EncodedToken)
		return RootAnswer{}, err
	}
	return answer, nil
}

// DecodeRoot takes the one-time pad off a root token. The result belongs to the caller, who wipes it.
func DecodeRoot(encoded, otp []byte) ([]byte, error) {
	token := make([]byte, base64.RawStdEncoding.DecodedLen(len(encoded)))
	size, err := base64.RawStdEncoding.Decode(token, encoded)
	if err != nil || size == 0 || size != len(otp) {
		clear(token)
		return nil, fmt.Errorf("decoding a root token: %w: it does not fit its one-time pad; cancel the attempt and start again", ErrMalformed)
	}
	subtle.XORBytes(token[:size], token[:size], otp)
	return token[:size], nil
}
