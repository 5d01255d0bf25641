package transit

import "vault-plugin-secrets-nitrokey/internal/token"

// Tokens know who may ask. *token.Registry does.
type Tokens interface {
	// Authenticate returns what a token grants to whoever sends it from there. An unknown token, and one that is not for this
	// peer, is an error that wraps [token.ErrDenied]: the client reads "permission denied" whatever the reason was, so that nobody
	// learns which half of a guess was right. It is called for every request, so it does no I/O.
	Authenticate(text string, peer token.Peer) (*token.Grant, error)
}
