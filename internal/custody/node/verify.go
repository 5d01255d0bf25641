package node

import (
	"context"
	"errors"
	"net/http"
)

// VerifyStatus is how far the verification of new keys has come.
type VerifyStatus struct {
	Started  bool // new keys wait for it
	Nonce    string
	N, T     int // of the new keys
	Progress int
}

// VerifyAnswer is what giving a new share to the verification led to.
type VerifyAnswer struct {
	Progress int
	Complete bool // the new keys are valid, the old ones are not any more
	Nonce    string
}

// VerifyStatus reads the state of a verification. Where no rekey is under way it is not started.
func (n *Node) VerifyStatus(ctx context.Context, kind KeyKind) (VerifyStatus, error) {
	status, err := n.verifyStatus(ctx, &call{
		op: "reading the state of a verification at", method: http.MethodGet, path: string(kind) + "/verify", active: true,
	})
	if errors.Is(err, ErrNotInProgress) {
		return VerifyStatus{}, nil
	}
	return status, err
}

// VerifyCancel makes the node forget the new shares given so far. The verification begins anew, with the nonce returned; the
// rekey itself is ended by RekeyCancel.
func (n *Node) VerifyCancel(ctx context.Context, kind KeyKind) (VerifyStatus, error) {
	return n.verifyStatus(ctx, &call{
		op: "restarting the verification at", method: http.MethodDelete, path: string(kind) + "/verify", changes: true, active: true,
	})
}

func (n *Node) verifyStatus(ctx context.Context, c *call) (VerifyStatus, error) {
	var status VerifyStatus
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
		default:
			return s.skip()
		}
	}
	c.check = func() error {
		if !started {
			return errors.New("it is no state of a verification")
		}
		return nil
	}
	err := n.do(ctx, c)
	if err != nil || !status.Started {
		return VerifyStatus{}, err
	}
	return status, nil
}

// VerifyUpdate gives one of the new shares to the verification with this nonce. ErrWrongShares means that the shares given are
// not the new ones; the verification then begins anew with another nonce, which VerifyStatus tells.
func (n *Node) VerifyUpdate(ctx context.Context, kind KeyKind, share []byte, nonce string) (VerifyAnswer, error) {
	w := &writer{}
	w.share(share)
	w.text("nonce", nonce)
	var answer VerifyAnswer
	err := n.do(ctx, &call{
		op: "giving a new share to the verification at", method: http.MethodPut, path: string(kind) + "/verify", body: w.end(), secret: share,
		changes: true, active: true,
		field: func(name string, s *scanner) error {
			switch name {
			case "progress":
				return s.count(&answer.Progress)
			case "complete":
				return s.boolean(&answer.Complete)
			case "nonce":
				return s.into(&answer.Nonce)
			default:
				return s.skip()
			}
		},
		check: func() error {
			if !answer.Complete && answer.Progress == 0 {
				return errors.New("it shows no progress")
			}
			return nil
		},
	})
	if err != nil {
		return VerifyAnswer{}, err
	}
	return answer, nil
}
