package node

import (
	"context"
	"net/http"
)

// Unseal gives one raw share to the node and returns the status after it; it never asks for a seal migration.
//
// With the share that completes the threshold the status is unsealed, and tells the cluster id; a raft node that has just
// joined stays sealed for a moment with progress 0. ErrWrongShares means that the shares given since the last reset do not
// open it, and progress is 0 again. A share given twice counts once. An unsealed node ignores it.
func (n *Node) Unseal(ctx context.Context, share []byte) (Status, error) {
	w := &writer{}
	w.share(share)
	return n.sealStatus(ctx, &call{
		op: "giving a share to", method: http.MethodPut, path: "sys/unseal", body: w.end(), secret: share, changes: true,
	})
}

// ResetUnseal makes the node forget the shares given so far. An unsealed node refuses it.
func (n *Node) ResetUnseal(ctx context.Context) (Status, error) {
	w := &writer{}
	w.flag("reset", true)
	return n.sealStatus(ctx, &call{
		op: "resetting the unsealing of", method: http.MethodPut, path: "sys/unseal", body: w.end(), changes: true,
	})
}
