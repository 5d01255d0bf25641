package nethsm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// apiPath is where every path of the API begins.
const apiPath = "/api/v1"

// defaultLimit is how large an answer may be where the call does not say.
const defaultLimit = 1 << 20

// call is one request to a NetHSM.
type call struct {
	op     string // what it does, a gerund for errors: "decrypting with key \"k\""
	method string
	path   string // below /api/v1, escaped
	query  url.Values

	body        any    // sent as JSON and wiped; see [secret] for what must not stay in memory
	raw         []byte // sent as it is, with contentType; not wiped, it is the caller's
	contentType string // of raw
	ifMatch     string // an ETag; empty: no condition

	into any       // where a JSON answer goes; the body is wiped afterwards
	sink io.Writer // where any other answer goes piece by piece
	ok   []int     // the statuses that are no error; nil: 200, 201 and 204

	creates bool          // not repeated unless the first surely did not happen
	public  bool          // no credentials are sent
	timeout time.Duration // of the whole call; 0: the client's
	limit   int64         // largest answer in bytes; 0: 1 MiB
}

// answer is what a NetHSM said.
type answer struct {
	status int
	header http.Header
	body   []byte // empty where the call had into or sink
	node   string // host:port of the node that answered
}

// secret is a value of a JSON body that is wiped with it: a passphrase.
type secret []byte

// MarshalJSON implements json.Marshaler.
func (s secret) MarshalJSON() ([]byte, error) { return json.Marshal(string(s)) }

// do sends a call and returns the answer. An answer with another status than the wanted is an [*Error]. No answer at all is
// hsm.ErrUnavailable, with hsm.ErrMayHaveHappened where a call that creates had been sent. When ctx ends its error is
// returned.
func (c *Client) do(ctx context.Context, in call) (answer, error) {
	timeout := in.timeout
	if timeout == 0 {
		timeout = c.pool.timeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	body, err := in.encode()
	if err != nil {
		return answer{}, err
	}
	if in.body != nil {
		defer clear(body)
	}
	return c.send(ctx, c.nodes()[0], in, body)
}

// encode returns the body of the request; nil for none.
func (in *call) encode() ([]byte, error) {
	if in.body == nil {
		return in.raw, nil
	}
	body, err := json.Marshal(in.body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", in.op, err)
	}
	return body, nil
}

// send sends a call to one node, once.
func (c *Client) send(ctx context.Context, n *node, in call, body []byte) (answer, error) {
	address := n.url + apiPath + in.path
	if len(in.query) > 0 {
		address += "?" + in.query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, in.method, address, bytes.NewReader(body))
	if err != nil {
		return answer{}, fmt.Errorf("%s: %w", in.op, err)
	}
	request.Header.Set("User-Agent", c.pool.userAgent)
	switch {
	case in.contentType != "":
		request.Header.Set("Content-Type", in.contentType)
	case in.body != nil:
		request.Header.Set("Content-Type", "application/json")
	}
	if in.ifMatch != "" {
		request.Header.Set("If-Match", in.ifMatch)
	}
	if c.login != nil && !in.public {
		request.Header.Set("Authorization", c.login.header)
	}
	response, err := n.http.Do(request)
	if err != nil {
		return answer{}, c.lost(ctx, n, in, err)
	}
	defer response.Body.Close()
	out := answer{status: response.StatusCode, header: response.Header, node: n.host}
	if !in.accepts(out.status) {
		text, err := io.ReadAll(io.LimitReader(response.Body, defaultLimit))
		if err != nil {
			return answer{}, c.lost(ctx, n, in, err)
		}
		return out, &Error{Op: in.op, Node: n.host, Status: out.status, Message: message(out.header, text)}
	}
	if in.sink != nil {
		if _, err := io.Copy(in.sink, response.Body); err != nil {
			return answer{}, c.lost(ctx, n, in, err)
		}
		return out, nil
	}
	limit := in.limit
	if limit == 0 {
		limit = defaultLimit
	}
	if out.body, err = io.ReadAll(io.LimitReader(response.Body, limit+1)); err != nil {
		return answer{}, c.lost(ctx, n, in, err)
	}
	if int64(len(out.body)) > limit {
		return answer{}, fmt.Errorf("%s at %s: the answer is larger than %d bytes: %w", in.op, n.host, limit, hsm.ErrUnavailable)
	}
	if in.into != nil {
		defer func() { clear(out.body); out.body = nil }()
		if err := json.Unmarshal(out.body, in.into); err != nil {
			return answer{}, fmt.Errorf("%s at %s: the answer (%s) is not the JSON that was expected: %w",
				in.op, n.host, out.header.Get("Content-Type"), hsm.ErrUnavailable)
		}
	}
	return out, nil
}

func (in *call) accepts(status int) bool {
	if in.ok == nil {
		return status == http.StatusOK || status == http.StatusCreated || status == http.StatusNoContent
	}
	return slices.Contains(in.ok, status)
}

// lost is the error of a request without an answer.
func (c *Client) lost(ctx context.Context, n *node, in call, err error) error {
	if in.creates {
		err = errors.Join(hsm.ErrMayHaveHappened, err)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%s at %s: %w", in.op, n.host, err)
	}
	return fmt.Errorf("%s at %s: %w: %w", in.op, n.host, hsm.ErrUnavailable, err)
}

// message is the sentence of an error's body: {"message": "…"}. Many errors have none, whatever their content type says.
func message(header http.Header, body []byte) string {
	if kind, _, _ := mime.ParseMediaType(header.Get("Content-Type")); kind != "application/json" {
		return ""
	}
	var said struct {
		Message string `json:"message"`
	}
	if json.Unmarshal(body, &said) != nil {
		return ""
	}
	return said.Message
}
