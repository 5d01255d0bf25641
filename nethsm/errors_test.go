package nethsm

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// kinds are all that an answer can be to errors.Is.
var kinds = []error{
	hsm.ErrNotFound, hsm.ErrAmbiguous, hsm.ErrExists, hsm.ErrLocked, hsm.ErrUnavailable, hsm.ErrForbidden, hsm.ErrUnsupported,
	hsm.ErrFull, hsm.ErrMayHaveHappened, hsm.ErrCiphertext, hsm.ErrKeyChanged,
	ErrConfig, ErrRequest, ErrState, ErrManyNodes, ErrAnswer, ErrContainer,
}

func TestErrorIsWhatItMeans(t *testing.T) {
	for sentence, c := range map[string]struct {
		answer Error
		want   []error
	}{
		"not found":                {Error{Status: 404}, []error{hsm.ErrNotFound}},
		"no certificate":           {Error{Status: 404, Message: "There is no certificate for this KeyID."}, []error{hsm.ErrNotFound}},
		"role too weak":            {Error{Status: 403}, []error{hsm.ErrForbidden}},
		"tag not met":              {Error{Status: 403, Message: "tags restriction not met"}, []error{hsm.ErrForbidden}},
		"another namespace":        {Error{Status: 403, Message: "N-User trying to create user for another namespace"}, []error{hsm.ErrForbidden}},
		"password refused":         {Error{Status: 401}, []error{hsm.ErrUnavailable}},
		"too many tries":           {Error{Status: 429, Message: "Too many requests"}, []error{hsm.ErrUnavailable}},
		"user exists":              {Error{Status: 409, Message: "user already exists"}, []error{hsm.ErrExists}},
		"key exists":               {Error{Status: 400, Message: "Key with id rsa1 already exists"}, []error{hsm.ErrExists}},
		"namespace exists":         {Error{Status: 400, Message: "Namespace ns1 already exists"}, []error{hsm.ErrExists}},
		"a bare end of a message":  {Error{Status: 400, Message: " already exists"}, []error{ErrRequest}},
		"bad padding":              {Error{Status: 400, Message: "Decryption failure"}, []error{hsm.ErrCiphertext}},
		"no block of AES":          {Error{Status: 400, Message: "Decryption failed: CBC: argument length 3"}, []error{hsm.ErrCiphertext}},
		"decrypting not allowed":   {Error{Status: 400, Message: "Key mechanisms do not allow requested decryption."}, []error{hsm.ErrUnsupported}},
		"signing not allowed":      {Error{Status: 400, Message: "Key mechanisms do not allow requested signing."}, []error{hsm.ErrUnsupported}},
		"a key that cannot sign":   {Error{Status: 400, Message: "Generic keys can't sign."}, []error{hsm.ErrUnsupported}},
		"no public key":            {Error{Status: 400, Message: "Generic keys have no public key"}, []error{hsm.ErrUnsupported}},
		"wrong mechanism":          {Error{Status: 400, Message: "Mechanism does not match key type"}, []error{ErrRequest}},
		"bad JSON":                 {Error{Status: 400, Message: "Invalid JSON: Line 1, bytes 5-9:\nExpected ':'."}, []error{ErrRequest}},
		"bad base64":               {Error{Status: 400, Message: "Couldn't decode data from base64: Wrong padding."}, []error{ErrRequest}},
		"400 without a message":    {Error{Status: 400}, []error{ErrRequest}},
		"too large":                {Error{Status: 413}, []error{ErrRequest}},
		"other content":            {Error{Status: 415}, []error{ErrRequest}},
		"not acceptable":           {Error{Status: 406}, []error{ErrRequest}},
		"unknown method":           {Error{Status: 405}, []error{hsm.ErrUnsupported}},
		"not implemented":          {Error{Status: 501}, []error{hsm.ErrUnsupported}},
		"database gone":            {Error{Status: 500, Message: "Could not read from database. Check logs."}, []error{hsm.ErrUnavailable}},
		"exception":                {Error{Status: 503}, []error{hsm.ErrUnavailable}},
		"bad gateway":              {Error{Status: 502}, []error{hsm.ErrUnavailable}},
		"redirect":                 {Error{Status: 302}, []error{hsm.ErrUnavailable}},
		"a teapot":                 {Error{Status: 418}, nil},
		"Locked":                   {Error{Status: 412, Message: messageState, State: StateLocked}, []error{ErrState, hsm.ErrLocked}},
		"Failed":                   {Error{Status: 412, Message: messageState, State: StateFailed}, []error{ErrState, hsm.ErrUnavailable}},
		"Unprovisioned":            {Error{Status: 412, Message: messageState, State: StateUnprovisioned}, []error{ErrState, hsm.ErrUnavailable}},
		"Operational meanwhile":    {Error{Status: 412, Message: messageState, State: StateOperational}, []error{ErrState, hsm.ErrUnavailable}},
		"a state nobody could ask": {Error{Status: 412, Message: messageState}, []error{ErrState, hsm.ErrUnavailable}},
		"no backup passphrase":     {Error{Status: 412, Message: "Please configure backup key before doing a backup.", State: StateOperational}, []error{ErrState}},
		"If-Match does not":        {Error{Status: 412, State: StateOperational}, []error{ErrState}},
	} {
		t.Run(sentence, func(t *testing.T) {
			c.answer.Op, c.answer.Node = "doing it", "hsm:443"
			wrapped := fmt.Errorf("around: %w", &c.answer)
			for _, kind := range kinds {
				want := false
				for _, w := range c.want {
					want = want || kind == w //nolint:errorlint // the sentinels themselves
				}
				if errors.Is(wrapped, kind) != want {
					t.Errorf("errors.Is(%v, %q) = %v", wrapped, kind, !want)
				}
			}
			var as *Error
			if !errors.As(wrapped, &as) || *as != c.answer {
				t.Errorf("errors.As gave %+v", as)
			}
			text := c.answer.Error()
			for _, part := range []string{"doing it at hsm:443: ", fmt.Sprintf("HTTP %d", c.answer.Status), fmt.Sprintf("%.20s", fmt.Sprintf("%q", c.answer.Message))} {
				if c.answer.Message != "" && !strings.Contains(text, part) {
					t.Errorf("%q does not contain %q", text, part)
				}
			}
		})
	}
}

// Every state of a node has its sentence, and tells what to do.
func TestErrorSaysWhatToDo(t *testing.T) {
	for want, e := range map[string]*Error{
		`decrypting with key "seal" at hsm1:443: the NetHSM is Locked; unlock it with its unlock passphrase ` +
			`(HTTP 412 "Service not available")`: {`decrypting with key "seal"`, "hsm1:443", 412, messageState, StateLocked},
		`decrypting with key "seal" at hsm1:443: the key is restricted to tags that this user has none of; give the user one of ` +
			`them (HTTP 403 "tags restriction not met")`: {`decrypting with key "seal"`, "hsm1:443", 403, messageTags, ""},
		`deleting key "a" at hsm1:443: the NetHSM has no such thing, at least not in this user's namespace (HTTP 404)`: {
			`deleting key "a"`, "hsm1:443", 404, "", "",
		},
	} {
		if got := e.Error(); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

func TestStatesInTheWordsOfTheContract(t *testing.T) {
	for state, want := range map[State]hsm.State{
		StateUnprovisioned: hsm.StateUnprovisioned, StateLocked: hsm.StateLocked, StateOperational: hsm.StateOperational,
		StateFailed: hsm.StateFailed, "Confused": hsm.StateFailed, "": hsm.StateFailed,
	} {
		if got := state.HSM(); got != want {
			t.Errorf("%q is %q, want %q", state, got, want)
		}
	}
}

// A refused passphrase is a PIN error, a refused role is not.
func TestWrongPassphraseIsAPINError(t *testing.T) {
	unlock := func(c *Client) error { return c.Unlock(t.Context(), passphrase) }
	change := func(c *Client) error { return c.SetUnlockPassphrase(t.Context(), []byte("old passphrase"), passphrase) }
	backup := func(c *Client) error { return c.SetBackupPassphrase(t.Context(), []byte("old passphrase"), passphrase) }
	for sentence, c := range map[string]struct {
		call   func(*Client) error
		status int
		body   string
		pin    bool
	}{
		"unlocking":                           {unlock, 403, `{"message":"not authenticated"}`, true},
		"unlocking, without a word":           {unlock, 403, "", true},
		"unlocking where that is not allowed": {unlock, 404, "", false},
		"changing":                            {change, 403, `{"message":"unlock passphrase is incorrect."}`, true},
		"changing as an Operator":             {change, 403, "", false},
		"changing that of backups":            {backup, 403, `{"message":"backup passphrase is incorrect."}`, true},
		"changing that of backups otherwise":  {backup, 403, "", false},
	} {
		t.Run(sentence, func(t *testing.T) {
			client, _ := startNode(t, replying(c.status, c.body))
			err := c.call(client)
			var pin *hsm.PINError
			switch {
			case errors.As(err, &pin) != c.pin:
				t.Errorf("error = %#v", err)
			case c.pin && (pin.TriesLeft != -1 || !pin.Wrong || pin.Barred || errors.Is(err, hsm.ErrLocked)):
				t.Errorf("error = %#v", pin)
			case c.pin && !strings.Contains(pin.Detail, "127.0.0.1:"):
				t.Errorf("%q does not say where", pin.Detail)
			case !c.pin && errors.Is(err, hsm.ErrForbidden) != (c.status == http.StatusForbidden):
				t.Errorf("error = %v", err)
			}
			if strings.Contains(err.Error(), string(passphrase)) || strings.Contains(err.Error(), "old passphrase") {
				t.Errorf("%q tells a passphrase", err)
			}
		})
	}
}
