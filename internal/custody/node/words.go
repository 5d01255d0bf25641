package node

import (
	"net/http"
	"strings"
)

// sentences are what Vault's messages mean. Vault tells most cases apart by text alone, with 400 and 500 for all of them,
// so this table is the one place where text is looked at. Seen with Vault 1.21.0; a message matches where it holds the
// words, in any case. OpenBao's are the same but for its name, which no entry has.
var sentences = []struct {
	words  string
	is     []error
	advice string
}{
	{"is already initialized", []error{ErrAlreadyInitialized, ErrRefused}, "unseal it with its own keys"},
	{"is not initialized", []error{ErrUninitialized, ErrRefused}, "initialise it, or join it to its cluster"},
	{"is not yet initialized", []error{ErrUninitialized, ErrRefused}, "initialise it, or join it to its cluster"},
	{"is sealed", []error{ErrSealed, ErrUnavailable}, "unseal it"},
	// A node without HA answers so as long as it is sealed.
	{"node is not active", []error{ErrSealed, ErrUnavailable}, "unseal it"},
	{"no active vault instance found", []error{ErrStandby, ErrUnavailable}, "try again when the cluster has an active node"},
	{"no active node", []error{ErrStandby, ErrUnavailable}, "try again when the cluster has an active node"},
	{"in standby mode", []error{ErrStandby, ErrUnavailable}, "ask the active node"},

	// Wrong shares: of unseal, rekey, verify and generate-root, with unseal and with recovery keys.
	{"failed to decrypt keys from storage", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"message authentication failed", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"failed to compute combined key", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"failed to compute root key", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"failed to compute recovery key", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"recovery key verification failed", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"failed to verify recovery key", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"root key verification failed", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"rekey verification failed", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"key is shorter than minimum", []error{ErrWrongShares, ErrRefused}, adviceShares},
	{"key is longer than maximum", []error{ErrWrongShares, ErrRefused}, adviceShares},

	{"rekey already in progress", []error{ErrInProgress, ErrRefused}, adviceProgress},
	{"root generation already in progress", []error{ErrInProgress, ErrRefused}, adviceProgress},
	{"incorrect nonce supplied", []error{ErrInProgress, ErrRefused}, adviceProgress},
	{"incorrect strategy supplied", []error{ErrInProgress, ErrRefused}, adviceProgress},
	{"rekey operation already finished", []error{ErrInProgress, ErrRefused}, "verify the new shares, or cancel the rekey"},

	{"no rekey in progress", []error{ErrNotInProgress, ErrRefused}, adviceStart},
	{"no barrier rekey in progress", []error{ErrNotInProgress, ErrRefused}, adviceStart},
	{"no recovery rekey in progress", []error{ErrNotInProgress, ErrRefused}, adviceStart},
	{"rekey operation not in progress", []error{ErrNotInProgress, ErrRefused}, adviceStart},
	{"no rekey configuration found", []error{ErrNotInProgress, ErrRefused}, adviceStart},
	{"no rekey verification in progress", []error{ErrNotInProgress, ErrRefused}, adviceStart},
	{"no root generation in progress", []error{ErrNotInProgress, ErrRefused}, adviceStart},

	{"invalid rekey seal configuration", []error{ErrRefused}, adviceNumbers},
	{"invalid recovery configuration", []error{ErrRefused}, adviceNumbers},

	{"raft backend not in use", []error{ErrRefused}, "nodes of this storage need no joining"},
	{"failed to join raft cluster", []error{ErrUnavailable}, "check the leader's address, that it is unsealed, and the CA that the node shall know it by"},
	{"removed from a ha cluster", []error{ErrRefused}, "empty its storage and let it join again"},

	// What sys/init says before it has done anything. Any other complaint of it may come after it stored keys.
	{"invalid seal configuration", []error{ErrRefused}, adviceNumbers},
	{"not applicable to seal type", []error{ErrRefused}, "a seal with a key of its own takes recovery shares, any other takes shares"},
	{"incorrect number of", []error{ErrRefused}, "give one PGP key for each share"},
	{"pgp keys not supported", []error{ErrRefused}, "leave the PGP keys out"},
	{"recovery configuration must", []error{ErrRefused}, adviceNumbers},
	{"failed to parse json input", []error{ErrRefused}, ""},
}

const (
	adviceShares   = "these are not the shares of this node, or not all of them are; do not repeat it with the same ones"
	adviceProgress = "look at what is under way; finish it or cancel it before another attempt"
	adviceStart    = "begin a new attempt"
	adviceNumbers  = "correct the numbers of shares, or the PGP keys"
)

// meaning looks the messages up; nil where none is known.
func meaning(messages []string) (is []error, advice string) {
	all := strings.ToLower(strings.Join(messages, "\n"))
	for _, s := range sentences {
		if strings.Contains(all, s.words) {
			return s.is, s.advice
		}
	}
	return nil, ""
}

// judge says what an answer with an error means. doubtful is true where the call changes something and this answer leaves
// open whether it did.
func (c *call) judge(status int, messages []string) (is []error, advice string, doubtful bool) {
	if is, advice = meaning(messages); is != nil {
		return is, advice, false
	}
	switch {
	case status >= 300 && status < 400:
		is, advice = []error{ErrRedirect}, "give the address of the node itself, not of a balancer; redirects are not followed"
		if c.active && status == http.StatusTemporaryRedirect {
			is, advice = []error{ErrRedirect, ErrStandby}, "ask the active node; redirects are not followed"
		}
		return is, advice, false
	case status == http.StatusTooManyRequests:
		return []error{ErrUnavailable}, "ask less often", false
	case status == http.StatusForbidden:
		return []error{ErrDenied, ErrRefused}, "use a token that is valid and may do this", false
	case status >= 500:
		return []error{ErrUnavailable}, "try again; if it lasts, see the log of the node", c.changes
	case c.init && status == http.StatusBadRequest:
		return []error{ErrRefused}, "look whether the node is initialised now", true
	default:
		return []error{ErrRefused}, "see the log of the node; if it is no Vault, check the address", false
	}
}
