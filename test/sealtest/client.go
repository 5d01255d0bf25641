package sealtest

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Config is what the stanza of a seal says, and how patient its Vault is.
type Config struct {
	// Address is the server's: https://HOST:PORT.
	Address string
	// Mount is "transit" unless given.
	Mount string
	// Key is the name of the wrapping key.
	Key string
	// Token is sent with every call.
	Token string
	// TLS trusts the server, and holds the client's certificate where there is one.
	TLS *tls.Config

	// Timeout is how long a call may take with its repetitions: 60 s unless given.
	Timeout time.Duration
	// Retries is how often a call is repeated: twice unless given; -1 for never.
	Retries int
	// RetryWait is the shortest pause before a repetition where the server asks for none: a second unless given. The
	// longest is half as long again.
	RetryWait time.Duration
	// UnsealWait is the pause between two tries to unseal, and between the end of a Vault whose seal did not answer at its
	// start and its next start: five seconds unless given.
	UnsealWait time.Duration
	// Observe is told of each call.
	Observe func(Call)
}

func (c Config) withDefaults() Config {
	if c.Mount == "" {
		c.Mount = "transit"
	}
	if c.Timeout == 0 {
		c.Timeout = time.Minute
	}
	switch {
	case c.Retries == 0:
		c.Retries = 2
	case c.Retries < 0:
		c.Retries = 0
	}
	if c.RetryWait == 0 {
		c.RetryWait = time.Second
	}
	if c.UnsealWait == 0 {
		c.UnsealWait = 5 * time.Second
	}
	if c.Observe == nil {
		c.Observe = func(Call) {}
	}
	return c
}

// answer is what a seal reads of one.
type answer struct {
	Errors []string `json:"errors"`
	Data   struct {
		Ciphertext string `json:"ciphertext"`
		Plaintext  []byte `json:"plaintext"` // standard base64
	} `json:"data"`
	Auth *struct {
		ClientToken   string `json:"client_token"`
		Renewable     bool   `json:"renewable"`
		LeaseDuration int    `json:"lease_duration"`
	} `json:"auth"`
}

// client makes calls as Vault's does. It has connections of its own: a Vault is a machine of its own.
type client struct {
	config Config
	http   *http.Client
}

func newClient(config Config) *client {
	config = config.withDefaults()
	trust := config.TLS.Clone()
	if trust == nil {
		trust = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	trust.NextProtos = []string{"h2", "http/1.1"}
	dialer := tls.Dialer{Config: trust}
	return &client{config: config, http: &http.Client{
		Transport: &http.Transport{
			DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
				select {
				case handshakes <- struct{}{}:
					defer func() { <-handshakes }()
				case <-ctx.Done():
					return nil, ctx.Err()
				}
				return dialer.DialContext(ctx, network, address)
			},
			ForceAttemptHTTP2: true, IdleConnTimeout: 90 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// handshakes bounds how many connections are made at one time. A thousand Vaults have a thousand processors for it; those that are
// played share the few of the test, and would look like clients that dawdle: a server hangs up on these.
var handshakes = make(chan struct{}, 64)

// call makes a call, and repeats it as Vault's client does.
func (c *client) call(ctx context.Context, op Op, path string, body any) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, c.config.Timeout)
	defer cancel()
	content, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	for try := 0; ; try++ {
		got, err := c.once(ctx, op, path, content)
		if err == nil {
			return got, nil
		}
		wait := c.config.RetryWait + rand.N(c.config.RetryWait/2+1) //nolint:gosec // spreads repetitions, guards nothing
		var refused *StatusError
		if errors.As(err, &refused) {
			if !repeated(refused.Status) {
				return nil, err
			}
			if refused.RetryAfter > 0 {
				wait = refused.RetryAfter
			}
		}
		if try == c.config.Retries || !pause(ctx, wait) {
			return nil, err
		}
	}
}

// repeated tells which answers Vault's client takes as an invitation to come again.
func repeated(status int) bool {
	return status == http.StatusTooManyRequests || status == http.StatusPreconditionFailed ||
		status >= http.StatusInternalServerError && status != http.StatusNotImplemented
}

// once makes one request.
func (c *client) once(ctx context.Context, op Op, path string, content []byte) (*answer, error) {
	began := time.Now()
	status, header, body, err := c.send(ctx, path, content)
	after, _ := strconv.Atoi(header.Get("Retry-After"))
	var got answer
	malformed := json.Unmarshal(body, &got)
	c.config.Observe(Call{
		Op: op, Status: status, RetryAfter: after > 0, Reason: strings.Join(got.Errors, "; "), Took: time.Since(began), Err: err,
	})
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", op, err)
	case status >= http.StatusBadRequest:
		return nil, &StatusError{op, status, got.Errors, time.Duration(after) * time.Second} // whatever its body is
	case malformed != nil:
		return nil, fmt.Errorf("%w to %s: %d: %w", ErrWrong, op, status, malformed)
	}
	return &got, nil
}

// send makes one request and reads all of its answer.
func (c *client) send(ctx context.Context, path string, content []byte) (status int, header http.Header, body []byte, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, strings.TrimSuffix(c.config.Address, "/")+"/v1/"+path, bytes.NewReader(content))
	if err != nil {
		return 0, nil, nil, err
	}
	request.Header = http.Header{"X-Vault-Request": {"true"}, "X-Vault-Token": {c.config.Token}, "User-Agent": {"Go-http-client/1.1"}}
	response, err := c.http.Do(request)
	if err != nil {
		return 0, nil, nil, err
	}
	defer response.Body.Close()
	body, err = io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return 0, nil, nil, err
	}
	return response.StatusCode, response.Header, body, nil
}

// pause waits, and tells whether there is still time.
func pause(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
