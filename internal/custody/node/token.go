package node

import (
	"context"
	"net/http"
)

// RevokeSelf revokes a token with its own right. A token that is not valid any more is ErrDenied.
func (n *Node) RevokeSelf(ctx context.Context, token []byte) error {
	return n.do(ctx, &call{
		op: "revoking a token at", method: http.MethodPut, path: "auth/token/revoke-self", token: token, changes: true, active: true,
	})
}

// LookupSelf asks whether a token is valid: nil, or ErrDenied.
func (n *Node) LookupSelf(ctx context.Context, token []byte) error {
	return n.do(ctx, &call{op: "looking up a token at", method: http.MethodGet, path: "auth/token/lookup-self", token: token, active: true})
}
