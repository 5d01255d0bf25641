package node

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
)

var secretShare = []byte("0123456789abcdefghijklmnopqrstuvw")

// TestBuffersAreWiped looks into the buffers that a call used, after it.
func TestBuffersAreWiped(t *testing.T) {
	encoded := base64.StdEncoding.EncodeToString(secretShare)
	long := `{"keys_base64":["` + encoded + `"],"x":"` + strings.Repeat("y", 5000) + `","root_token":"hvs.secret"`
	for name, c := range map[string]struct {
		answer  string
		length  int64 // as announced
		failure bool
	}{
		"an answer":                   {long + "}", -1, false},
		"one of announced length":     {long + "}", int64(len(long)) + 1, false},
		"an answer that is malformed": {long, -1, true},
	} {
		t.Run(name, func(t *testing.T) {
			var sent []byte
			var received [][]byte
			n := answered(t, func(r *http.Request) *http.Response {
				out := r.Body.(*body)
				sent = out.bytes
				if !bytes.Contains(sent, []byte(encoded)) && r.URL.Path != "/v1/sys/init" {
					t.Errorf("the request does not hold the share: %s", sent)
				}
				_, _ = io.Copy(io.Discard, r.Body)
				return &http.Response{StatusCode: http.StatusOK, ContentLength: c.length, Body: io.NopCloser(&spy{from: strings.NewReader(c.answer), seen: &received})}
			})
			answer, err := n.Init(t.Context(), InitRequest{Shares: 1, Threshold: 1, PGPKeys: []string{"a key"}})
			if (err != nil) != c.failure || len(answer.Shares) != 1 || !bytes.Equal(answer.Shares[0], secretShare) {
				t.Errorf("%v, %v", answer, err)
			}
			_, _ = n.RekeyUpdate(t.Context(), UnsealKeys, secretShare, "nonce")
			if len(bytes.Trim(sent, "\x00")) > 0 {
				t.Errorf("the request is still there: %s", sent)
			}
			for i, buffer := range received {
				if len(bytes.Trim(buffer, "\x00")) > 0 {
					t.Errorf("buffer %d is still there: %.40q", i, buffer)
				}
			}
		})
	}
}

// spy keeps the buffers that it fills.
type spy struct {
	from io.Reader
	seen *[][]byte
}

func (s *spy) Read(p []byte) (int, error) {
	*s.seen = append(*s.seen, p)
	return s.from.Read(p)
}

// answered is a node without a network.
func answered(t testing.TB, answer func(*http.Request) *http.Response) *Node {
	t.Helper()
	n, err := New(Config{
		Address: "http://127.0.0.1:1", TLS: TLS{PlainHTTP: true},
		Transport: func(http.RoundTripper) http.RoundTripper {
			return roundTrip(func(r *http.Request) (*http.Response, error) {
				response := answer(r)
				if response.Header == nil {
					response.Header = http.Header{}
				}
				response.Request = r
				return response, nil
			})
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestNoTransportAsksTheEnvironment: what a proxy variable would change is loopback never, so it is looked at directly.
func TestNoTransportAsksTheEnvironment(t *testing.T) {
	n := answered(t, nil)
	for name, line := range map[string]*http.Transport{"kept": n.lines.kept, "fresh": n.lines.fresh} {
		if line.Proxy != nil || line.OnProxyConnectResponse != nil || !line.DisableCompression {
			t.Errorf("the %s transport has a proxy, or undoes compression", name)
		}
	}
	identity, err := newTrust(TLS{Pins: []string{strings.Repeat("00", 32)}})
	if err != nil {
		t.Fatal(err)
	}
	if config := identity.config(); config.ClientSessionCache != nil || config.VerifyConnection == nil {
		t.Error("sessions are resumed, or nothing looks at the pins")
	}
}

// FuzzAnswers gives any answer to every call that reads one: no panic, and no error with a part of a secret.
func FuzzAnswers(f *testing.F) {
	secret := base64.StdEncoding.EncodeToString(secretShare)
	for _, text := range []string{
		`{"type":"shamir","initialized":true,"sealed":true,"t":3,"n":5}`, `{"keys_base64":["%s"],"root_token":"%s"}`, `{"keys":["%s"],"complete":true}`,
		`{"errors":["a","%s"]}`, `{"started":true,"otp":"%s","nonce":"n"}`, `{"complete":true,"progress":1,"encoded_token":"%s"}`, `<html>%s`, `{"%s":1}`,
	} {
		f.Add(200, text)
		f.Add(400, text)
	}
	f.Fuzz(func(t *testing.T, status int, text string) {
		if status < 100 || status > 999 {
			return
		}
		text = strings.ReplaceAll(text, "%s", secret)
		n := answered(t, func(*http.Request) *http.Response {
			return &http.Response{StatusCode: status, ContentLength: -1, Body: io.NopCloser(strings.NewReader(text))}
		})
		defer n.Close()
		ctx := t.Context()
		var errs []error
		collect := func(_ any, err error) { errs = append(errs, err) }
		collect(n.Status(ctx))
		collect(n.Leader(ctx))
		collect(n.Unseal(ctx, secretShare))
		answer, err := n.Init(ctx, InitRequest{Shares: 1, Threshold: 1})
		answer.Wipe()
		errs = append(errs, err)
		collect(n.RekeyStatus(ctx, UnsealKeys))
		collect(n.RekeyUpdate(ctx, UnsealKeys, secretShare, "n"))
		collect(n.VerifyStatus(ctx, UnsealKeys))
		collect(n.VerifyUpdate(ctx, UnsealKeys, secretShare, "n"))
		collect(n.RootStart(ctx, ""))
		collect(n.RootUpdate(ctx, secretShare, "n"))
		collect(n.Join(ctx, JoinRequest{LeaderAddress: "https://a"}))
		errs = append(errs, n.LookupSelf(ctx, secretShare))
		for i, err := range errs {
			if err == nil {
				continue
			}
			told := fmt.Sprint(err)
			for at := 0; at+12 <= len(secret); at++ {
				// What was not sent can stand in an error of Vault's: only in its messages, never in an answer of success.
				knows := i == 2 || i == 5 || i == 7 || i == 9 || i == 11
				if strings.Contains(told, secret[at:at+12]) && (knows || status >= 200 && status <= 299) {
					t.Fatalf("call %d: %s", i, told)
				}
			}
			if len(told) > 4*maxMessage+1000 || strings.ContainsAny(told, "\n\x00\x1b") {
				t.Fatalf("call %d: %s", i, strconv.Quote(told))
			}
		}
	})
}
