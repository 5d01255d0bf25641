package transit

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// DefaultMount is where Vault's own transit is mounted, and what the seal's mount_path is where nobody sets it.
const DefaultMount = "transit"

// DefaultMaxBody is the largest body of a request, in bytes: a ciphertext of the largest payload with the most recipients
// fits.
const DefaultMaxBody = 256 << 10

// Keys seal and open. *keyring.Keyring does.
type Keys interface {
	Wrap(ctx context.Context, name string, use envelope.Use, plaintext, caller []byte) (keyring.Sealed, error)
	Open(ctx context.Context, name string, raw []byte, want envelope.Context) (keyring.Opened, error)
}

// Auditor announces what is about to be opened. Sealing gives nothing away, and a Vault that starts needs it: it is not announced, so
// that a full disk keeps no Vault from starting. *audit.Log is one.
type Auditor interface {
	Begin(ctx context.Context, act audit.Act) (end func(error), err error)
}

// BusyError says that too many others wait, and when it is worth while to come again. [Keys] return it.
type BusyError struct {
	After time.Duration
	Cause string // what is busy, for people
}

func (e *BusyError) Error() string { return e.Cause + ": try again later" }

// HandlerOptions are what [NewHandler] is made of.
type HandlerOptions struct {
	Keys    Keys
	Tokens  Tokens
	Mount   string  // "" for [DefaultMount]; it may have several parts
	Auditor Auditor // nil for none
	// Limit is asked before each request of a token: how long it should wait, 0 for not at all. Nil for no limit.
	Limit func(r *http.Request, grant *token.Grant) time.Duration
	// Health answers /v1/sys/health; nil for 404.
	Health http.Handler
	// Observe is told of each request and must return at once; nil for nobody.
	Observe func(Observation)
	MaxBody int          // in bytes, 0 for [DefaultMaxBody]
	Logger  *slog.Logger // nil for none
}

// Operation is what a request asks for.
type Operation string

// The operations. Everything else is [OperationOther].
const (
	OperationEncrypt Operation = "encrypt"
	OperationDecrypt Operation = "decrypt"
	OperationRenew   Operation = "renew-self"
	OperationLookup  Operation = "lookup-self"
	OperationHealth  Operation = "health"
	OperationOther   Operation = "other"
)

// Operations lists every [Operation].
func Operations() []Operation {
	return []Operation{OperationEncrypt, OperationDecrypt, OperationRenew, OperationLookup, OperationHealth, OperationOther}
}

// Observation is a request that was answered.
type Observation struct {
	Operation Operation
	Code      int          // of the answer
	Grant     *token.Grant // nil where none was found
	Took      time.Duration
}

// NewHandler returns the wire: what a seal "transit" asks of a Vault, and nothing else.
func NewHandler(options HandlerOptions) (http.Handler, error) {
	mount := strings.Trim(options.Mount, "/")
	if options.Mount == "" {
		mount = DefaultMount
	}
	switch {
	case options.Keys == nil, options.Tokens == nil:
		return nil, errors.New("making the transit handler: it needs keys and tokens")
	case mount == "" || mount == "sys" || mount == "auth" || strings.HasPrefix(mount, "sys/") || strings.HasPrefix(mount, "auth/"):
		return nil, fmt.Errorf("making the transit handler: the mount %q is taken by what every Vault answers: choose another one", options.Mount)
	case options.MaxBody < 0:
		return nil, fmt.Errorf("making the transit handler: the largest body of %d bytes is negative", options.MaxBody)
	}
	h := &handler{HandlerOptions: options, mount: mount, encrypt: "/v1/" + mount + "/encrypt/", decrypt: "/v1/" + mount + "/decrypt/"}
	if h.MaxBody == 0 {
		h.MaxBody = DefaultMaxBody
	}
	if h.Logger == nil {
		h.Logger = slog.New(slog.DiscardHandler)
	}
	return h, nil
}

// handler is the wire.
type handler struct {
	HandlerOptions

	mount            string
	encrypt, decrypt string // what their paths begin with
	refusals         throttle
	failures         throttle
}

// The paths that every Vault answers.
const (
	renewPath  = "/v1/auth/token/renew-self"
	lookupPath = "/v1/auth/token/lookup-self"
	healthPath = "/v1/sys/health"
)

// call is a request that is being answered.
type call struct {
	w         http.ResponseWriter
	r         *http.Request
	operation Operation
	key       string // the wrapping key, of encrypt and decrypt
	text      string // of the token
	peer      token.Peer
	grant     *token.Grant
	code      int  // of the answer, 0 before it
	lost      bool // the answer was not taken
}

// ServeHTTP implements [http.Handler].
func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	begun := time.Now()
	c := &call{w: w, r: r}
	c.operation, c.key = h.route(r.URL.Path)
	defer func() {
		if cause := recover(); cause != nil {
			h.Logger.Error("answering a request went wrong: this is a fault of the server, please report it", "operation", string(c.operation),
				"key", c.key, "cause", fmt.Sprint(cause), "stack", string(debug.Stack()))
			if c.code == 0 {
				c.refuse(http.StatusInternalServerError, 0, "internal error")
			}
		}
		if h.Observe != nil {
			h.Observe(Observation{Operation: c.operation, Code: c.code, Grant: c.grant, Took: time.Since(begun)})
		}
	}()
	if err := h.answer(c); err != nil {
		h.fail(c, err)
	}
}

// route tells what a path asks for.
func (h *handler) route(path string) (Operation, string) {
	if key, found := strings.CutPrefix(path, h.decrypt); found && isKey(key) {
		return OperationDecrypt, key
	}
	if key, found := strings.CutPrefix(path, h.encrypt); found && isKey(key) {
		return OperationEncrypt, key
	}
	switch path {
	case renewPath:
		return OperationRenew, ""
	case lookupPath:
		return OperationLookup, ""
	case healthPath:
		return OperationHealth, ""
	}
	return OperationOther, ""
}

// isKey tells whether what follows in a path is one name.
func isKey(name string) bool { return name != "" && !strings.Contains(name, "/") }

// answer does what is asked for, or returns why not.
func (h *handler) answer(c *call) error {
	writes := c.operation == OperationEncrypt || c.operation == OperationDecrypt || c.operation == OperationRenew
	switch {
	case c.operation == OperationOther, c.operation == OperationHealth && h.Health == nil:
		c.refuse(http.StatusNotFound, 0)
		return nil
	case writes && c.r.Method != http.MethodPut && c.r.Method != http.MethodPost:
		return c.method("PUT, POST")
	case c.operation == OperationLookup && c.r.Method != http.MethodGet:
		return c.method("GET")
	case c.operation == OperationHealth:
		if c.r.Method != http.MethodGet && c.r.Method != http.MethodHead {
			return c.method("GET, HEAD")
		}
		watched := &codeWriter{ResponseWriter: c.w}
		h.Health.ServeHTTP(watched, c.r)
		c.code = max(watched.code, http.StatusOK)
		return nil
	}
	if err := h.authenticate(c); err != nil {
		return err
	}
	switch c.operation {
	case OperationEncrypt:
		return h.seal(c)
	case OperationDecrypt:
		return h.open(c)
	case OperationRenew:
		return c.write(http.StatusOK, appendRenewal(nil, c.text, c.grant))
	default:
		return c.write(http.StatusOK, appendLookup(nil, c.grant))
	}
}

// authenticate finds out who asks, and whether that is allowed, now.
func (h *handler) authenticate(c *call) error {
	c.peer = peerOf(c.r)
	c.text = tokenOf(c.r)
	if c.text == "" {
		return fmt.Errorf("%w: the request has no token", token.ErrDenied)
	}
	grant, err := h.Tokens.Authenticate(c.text, c.peer)
	if err != nil {
		return err
	}
	c.grant = grant
	if c.key != "" && !grant.Allows(c.key) {
		return fmt.Errorf("%w: token %s (%s) is not for key %q", token.ErrDenied, grant.ID, grant.Name, c.key)
	}
	if h.Limit == nil {
		return nil
	}
	if wait := h.Limit(c.r, grant); wait > 0 {
		return &limitError{wait}
	}
	return nil
}

// limitError says that a token asks too often.
type limitError struct{ wait time.Duration }

func (e *limitError) Error() string { return "rate limit quota exceeded" }

// peerOf tells where a request comes from.
func peerOf(r *http.Request) token.Peer {
	var peer token.Peer
	if at, err := netip.ParseAddrPort(r.RemoteAddr); err == nil { // else nobody's address, which is on no list
		peer.Address = at.Addr().Unmap().WithZone("")
	}
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		if shown := r.TLS.VerifiedChains[0][0]; time.Now().Before(shown.NotAfter) { // it may have ended since the connection was made
			peer.Certificate = shown
		}
	}
	return peer
}

// tokenOf returns the token of a request, as Vault takes it.
func tokenOf(r *http.Request) string {
	if text := r.Header.Get("X-Vault-Token"); text != "" {
		return text
	}
	bearer, found := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !found {
		return ""
	}
	return strings.TrimSpace(bearer)
}

// seal answers encrypt/.
func (h *handler) seal(c *call) error {
	body, err := h.body(c)
	if err != nil {
		return err
	}
	defer body.free()
	encoded, err := parseRequest(body.bytes, "plaintext")
	if err != nil {
		return mistake("%w", err)
	}
	if encoded == nil {
		return mistake("missing plaintext to encrypt")
	}
	plaintext, err := decodePlaintext(encoded)
	if err != nil {
		return err
	}
	defer clear(plaintext)
	sealed, err := h.Keys.Wrap(c.r.Context(), c.key, envelope.UseTransit, plaintext, nil)
	if err != nil {
		return inVaultsWords(err)
	}
	out := buffers.get()
	out.reserve(len(sealed.Envelope))
	out.bytes = appendSealed(out.bytes, sealed)
	return c.send(out)
}

// open answers decrypt/.
func (h *handler) open(c *call) error {
	version, raw, err := h.ciphertext(c)
	if err != nil {
		return err
	}
	end, err := h.begin(c)
	if err != nil {
		return err
	}
	outcome := errUnfinished
	defer func() { end(outcome) }()
	// The version outside must be the one inside: clients take it for the id of the key.
	opened, err := h.Keys.Open(c.r.Context(), c.key, raw, envelope.Context{Use: envelope.UseTransit, Version: version})
	outcome = err
	if err != nil {
		return inVaultsWords(err)
	}
	defer clear(opened.Payload)
	out := buffers.get()
	out.reserve(len(opened.Payload))
	out.bytes = appendOpened(out.bytes, opened.Payload)
	return c.send(out)
}

// ciphertext reads what is to be opened. The body is not kept: an opening may wait for its turn, beside thousands of others.
func (h *handler) ciphertext(c *call) (version int, raw []byte, err error) {
	body, err := h.body(c)
	if err != nil {
		return 0, nil, err
	}
	defer body.free()
	ciphertext, err := parseRequest(body.bytes, "ciphertext")
	if err != nil {
		return 0, nil, mistake("%w", err)
	}
	if ciphertext = trim(ciphertext); len(ciphertext) == 0 {
		return 0, nil, mistake("missing ciphertext to decrypt")
	}
	if version, raw, err = parse(ciphertext); err != nil {
		return 0, nil, mistake("%w", err)
	}
	return version, raw, nil
}

// decodePlaintext decodes the base64 of what is to be sealed. The caller wipes it.
func decodePlaintext(encoded []byte) ([]byte, error) {
	encoded = trim(encoded)
	plaintext := make([]byte, base64.StdEncoding.DecodedLen(len(encoded)))
	n, err := base64.StdEncoding.Decode(plaintext, encoded)
	switch {
	case err != nil:
		clear(plaintext)
		return nil, mistake("failed to base64-decode plaintext: it is not of the standard alphabet, with padding")
	case n > envelope.MaxPayload:
		clear(plaintext)
		return nil, mistake("plaintext is too large: at most %d bytes can be sealed", envelope.MaxPayload)
	}
	return plaintext[:n], nil
}

// errUnfinished is what the audit log says of what a panic cut short.
var errUnfinished = errors.New("it went wrong before its end")

// auditLimit is how long an opening may wait for the audit log: what is left of a client's minute is for the HSM.
const auditLimit = 10 * time.Second

// begin writes into the audit log what is about to be opened.
func (h *handler) begin(c *call) (end func(error), err error) {
	if h.Auditor == nil {
		return func(error) {}, nil
	}
	ctx, cancel := context.WithTimeout(c.r.Context(), auditLimit)
	defer cancel()
	return h.Auditor.Begin(ctx, audit.Act{
		Verb: string(c.operation), By: "token " + c.grant.ID + " (" + c.grant.Name + ")",
		Detail: map[string]string{"key": c.key, "from": c.peer.Address.String()},
	})
}

// fail answers with an error.
func (h *handler) fail(c *call, err error) {
	if limited := (*limitError)(nil); errors.As(err, &limited) {
		c.refuse(http.StatusTooManyRequests, limited.wait, limited.Error())
		return
	}
	v := judge(err)
	if errors.Is(err, context.Canceled) && c.r.Context().Err() != nil { // whoever asked went away
		c.refuse(v.code, v.after, v.text)
		return
	}
	switch v.code {
	case http.StatusForbidden:
		h.complain(&h.refusals, "a request was refused", c, err)
	case http.StatusInternalServerError:
		h.Logger.Error("answering a request failed: this is a fault of the server, please report it", "operation", string(c.operation),
			"key", c.key, "token", c.tokenID(), "cause", err)
	case http.StatusServiceUnavailable:
		if busy := (*BusyError)(nil); !errors.As(err, &busy) { // whoever is busy says so himself
			h.complain(&h.failures, "a request cannot be served now", c, err)
		}
	}
	c.refuse(v.code, v.after, v.text)
}

// complain writes to the log what anybody can make come as often as they like, now and then.
func (h *handler) complain(now *throttle, what string, c *call, err error) {
	if held, yes := now.pass(time.Now()); yes {
		h.Logger.Warn(what, "operation", string(c.operation), "key", c.key, "token", c.tokenID(), "from", c.peer.Address.String(),
			"not_logged_before", held, "cause", err)
	}
}

func (c *call) tokenID() string {
	if c.grant == nil {
		return ""
	}
	return c.grant.ID
}
