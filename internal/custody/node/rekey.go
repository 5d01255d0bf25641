package node

import (
	"context"
	"errors"
	"net/http"
)

// KeyKind says which keys of a cluster a rekey replaces.
type KeyKind string

// The kinds.
const (
	UnsealKeys   KeyKind = "sys/rekey"              // of a Shamir seal
	RecoveryKeys KeyKind = "sys/rekey-recovery-key" // of an auto-seal
)

// RekeyRequest says what keys replace the present ones.
type RekeyRequest struct {
	Shares, Threshold int
	PGPKeys           []string // none, or one a share: base64 of a binary OpenPGP key
	// Verify makes the new keys valid only after the verification step. Vault knows it for all but the unseal keys of an
	// auto-seal.
	Verify bool
}

// RekeyStatus is how far a rekey has come.
type RekeyStatus struct {
	Started              bool
	Nonce                string
	N, T                 int // of the new keys
	Progress, Required   int // of the present keys
	PGPFingerprints      []string
	VerificationRequired bool
	VerificationNonce    string // set once the new keys are made and wait for their verification
}

// RekeyAnswer is what giving a share to a rekey led to. It belongs to the caller, who wipes the shares.
type RekeyAnswer struct {
	Progress             int
	Complete             bool
	Shares               [][]byte // the new ones, raw or PGP messages; only where Complete
	VerificationRequired bool     // the present keys stay valid until the new ones are verified
	VerificationNonce    string
}

// Wipe overwrites the shares.
func (a *RekeyAnswer) Wipe() {
	wipe(a.Shares)
	a.Shares = nil
}

// RekeyStatus reads the state of a rekey. Every node of a cluster that has an active one answers.
func (n *Node) RekeyStatus(ctx context.Context, kind KeyKind) (RekeyStatus, error) {
	return n.rekeyStatus(ctx, &call{op: "reading the state of a rekey at", method: http.MethodGet, path: string(kind) + "/init", active: true})
}

// RekeyStart begins a rekey. One that is under way is ErrInProgress.
func (n *Node) RekeyStart(ctx context.Context, kind KeyKind, request RekeyRequest) (RekeyStatus, error) {
	w := &writer{}
	w.count("secret_shares", request.Shares)
	w.count("secret_threshold", request.Threshold)
	w.texts("pgp_keys", request.PGPKeys)
	w.flag("require_verification", request.Verify)
	return n.rekeyStatus(ctx, &call{
		op: "starting a rekey at", method: http.MethodPut, path: string(kind) + "/init", body: w.end(), changes: true, active: true,
	})
}

// RekeyCancel ends the rekey with this nonce, also one that waits for its verification; the present keys stay. Where none
// is under way it does nothing. A rekey with another nonce is refused, for the first ten minutes of its life.
func (n *Node) RekeyCancel(ctx context.Context, kind KeyKind, nonce string) error {
	w := &writer{}
	w.text("nonce", nonce)
	return n.do(ctx, &call{
		op: "cancelling a rekey at", method: http.MethodDelete, path: string(kind) + "/init", body: w.end(), changes: true, active: true,
	})
}

func (n *Node) rekeyStatus(ctx context.Context, c *call) (RekeyStatus, error) {
	var status RekeyStatus
	var started bool
	c.field = func(name string, s *scanner) error {
		switch name {
		case "started":
			started = true
			return s.boolean(&status.Started)
		case "nonce":
			return s.into(&status.Nonce)
		case "n":
			return s.count(&status.N)
		case "t":
			return s.count(&status.T)
		case "progress":
			return s.count(&status.Progress)
		case "required":
			return s.count(&status.Required)
		case "pgp_fingerprints":
			return s.texts(func(text []byte) error {
				status.PGPFingerprints = append(status.PGPFingerprints, string(text))
				return nil
			})
		case "verification_required":
			return s.boolean(&status.VerificationRequired)
		case "verification_nonce":
			return s.into(&status.VerificationNonce)
		default:
			return s.skip()
		}
	}
	c.check = func() error {
		if !started {
			return errors.New("it is no state of a rekey")
		}
		return nil
	}
	if err := n.do(ctx, c); err != nil {
		return RekeyStatus{}, err
	}
	if !status.Started { // what remains of a verification that never was means nothing
		status.VerificationNonce = ""
	}
	return status, nil
}

// RekeyUpdate gives one of the present shares to the rekey with this nonce. With the share that completes the threshold the
// new ones come back. ErrWrongShares means that the shares given do not open it; progress is then 0 again.
func (n *Node) RekeyUpdate(ctx context.Context, kind KeyKind, share []byte, nonce string) (RekeyAnswer, error) {
	w := &writer{}
	w.share(share)
	w.text("nonce", nonce)
	var answer RekeyAnswer
	var shares shareList
	err := n.do(ctx, &call{
		op: "giving a share to the rekey at", method: http.MethodPut, path: string(kind) + "/update", body: w.end(), secret: share,
		changes: true, active: true,
		field: func(name string, s *scanner) error {
			switch name {
			case "progress":
				return s.count(&answer.Progress)
			case "complete":
				return s.boolean(&answer.Complete)
			case "keys":
				return shares.read(s, inHex)
			case "keys_base64":
				return shares.read(s, inBase64)
			case "verification_required":
				return s.boolean(&answer.VerificationRequired)
			case "verification_nonce":
				return s.into(&answer.VerificationNonce)
			default:
				return s.skip()
			}
		},
		check: func() error {
			switch {
			case answer.Complete && len(shares.raw) == 0:
				return errors.New("it says complete and holds no keys")
			case answer.Complete && answer.VerificationRequired && answer.VerificationNonce == "":
				return errors.New("it asks for a verification and holds no nonce for it")
			case !answer.Complete && answer.Progress == 0:
				return errors.New("it shows no progress")
			default:
				return nil
			}
		},
	})
	answer.Shares = shares.raw
	if err != nil && len(answer.Shares) == 0 {
		return RekeyAnswer{}, err
	}
	return answer, err
}
