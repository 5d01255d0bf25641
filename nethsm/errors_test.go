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
		status  int
		message string
		state   State
		want    []error
	}{
		"not found":                {404, "", "", []error{hsm.ErrNotFound}},
		"no certificate":           {404, "There is no certificate for this KeyID.", "", []error{hsm.ErrNotFound}},
		"role too weak":            {403, "", "", []error{hsm.ErrForbidden}},
		"tag not met":              {403, "tags restriction not met", "", []error{hsm.ErrForbidden}},
		"another namespace":        {403, "N-User trying to create user for another namespace", "", []error{hsm.ErrForbidden}},
		"password refused":         {401, "", "", []error{hsm.ErrUnavailable}},
		"too many tries":           {429, "Too many requests", "", []error{hsm.ErrUnavailable}},
		"user exists":              {409, "user already exists", "", []error{hsm.ErrExists}},
		"key exists":               {400, "Key with id rsa1 already exists", "", []error{hsm.ErrExists}},
		"namespace exists":         {400, "Namespace ns1 already exists", "", []error{hsm.ErrExists}},
		"a bare end of a message":  {400, " already exists", "", []error{ErrRequest}},
		"bad padding":              {400, "Decryption failure", "", []error{hsm.ErrCiphertext}},
		"no block of AES":          {400, "Decryption failed: CBC: argument length 3", "", []error{hsm.ErrCiphertext}},
		"decrypting not allowed":   {400, "Key mechanisms do not allow requested decryption.", "", []error{hsm.ErrUnsupported}},
		"signing not allowed":      {400, "Key mechanisms do not allow requested signing.", "", []error{hsm.ErrUnsupported}},
		"a key that cannot sign":   {400, "Generic keys can't sign.", "", []error{hsm.ErrUnsupported}},
		"no public key":            {400, "Generic keys have no public key", "", []error{hsm.ErrUnsupported}},
		"wrong mechanism":          {400, "Mechanism does not match key type", "", []error{ErrRequest}},
		"bad JSON":                 {400, "Invalid JSON: Line 1, bytes 5-9:\nExpected ':'.", "", []error{ErrRequest}},
		"bad base64":               {400, "Couldn't decode data from base64: Wrong padding.", "", []error{ErrRequest}},
		"400 without a message":    {400, "", "", []error{ErrRequest}},
		"too large":                {413, "", "", []error{ErrRequest}},
		"other content":            {415, "", "", []error{ErrRequest}},
		"not acceptable":           {406, "", "", []error{ErrRequest}},
		"unknown method":           {405, "", "", []error{hsm.ErrUnsupported}},
		"not implemented":          {501, "", "", []error{hsm.ErrUnsupported}},
		"database gone":            {500, "Could not read from database. Check logs.", "", []error{hsm.ErrUnavailable}},
		"exception":                {503, "", "", []error{hsm.ErrUnavailable}},
		"bad gateway":              {502, "", "", []error{hsm.ErrUnavailable}},
		"redirect":                 {302, "", "", []error{hsm.ErrUnavailable}},
		"a teapot":                 {418, "", "", nil},
		"Locked":                   {412, messageState, StateLocked, []error{ErrState, hsm.ErrLocked}},
		"Failed":                   {412, messageState, StateFailed, []error{ErrState, hsm.ErrUnavailable}},
		"Unprovisioned":            {412, messageState, StateUnprovisioned, []error{ErrState, hsm.ErrUnavailable}},
		"Operational meanwhile":    {412, messageState, StateOperational, []error{ErrState, hsm.ErrUnavailable}},
		"a state nobody could ask": {412, messageState, "", []error{ErrState, hsm.ErrUnavailable}},
		"no backup passphrase":     {412, "Please configure backup key before doing a backup.", StateOperational, []error{ErrState}},
		"If-Match does not":        {412, "", StateOperational, []error{ErrState}},
	} {
		t.Run(sentence, func(t *testing.T) {
			answer := Error{"doing it", "hsm:443", c.status, c.message, c.state}
			wrapped := fmt.Errorf("around: %w", &answer)
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
			if !errors.As(wrapped, &as) || *as != answer {
				t.Errorf("errors.As gave %+v", as)
			}
			text := answer.Error()
			parts := []string{"doing it at hsm:443: ", fmt.Sprintf("HTTP %d", c.status)}
			if c.message != "" {
				parts = append(parts, fmt.Sprintf("%q", c.message))
			}
			for _, part := range parts {
				if !strings.Contains(text, part) {
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
