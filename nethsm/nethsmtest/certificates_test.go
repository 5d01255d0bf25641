package nethsmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"
)

// What a real server was seen to take and to refuse.
func TestACertificateSlotTakesWhatTheOriginalTakes(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c := newCaller(t, h)
	addRSA(t, h, "slot")
	url := h.URLs()[0] + "/api/v1/keys/slot/cert"
	random := make([]byte, 1_040_000)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		kind   string
		body   []byte
		status int
		answer string
	}{
		"nothing at all":           {typeBytes, nil, 201, ""},
		"a mebibyte of text":       {typeBytes, bytes.Repeat([]byte("t"), 1<<20), 201, ""},
		"a byte more":              {typeBytes, bytes.Repeat([]byte("t"), 1<<20+1), 413, ""},
		"261,000 NUL bytes":        {typeBytes, make([]byte, 261_000), 201, ""},
		"262,000 NUL bytes":        {typeBytes, make([]byte, 262_000), 500, `{"message":"Could not write to database. Check logs."}`},
		"990 kB of random bytes":   {typeBytes, random[:990_000], 201, ""},
		"1,040 kB of random bytes": {typeBytes, random, 500, `{"message":"Could not write to database. Check logs."}`},
		"text":                     {"text/plain", []byte("x"), 415, ""},
		"bytes with a parameter":   {typeBytes + "; charset=utf-8", []byte("x"), 415, ""},
		"bytes in another case":    {"Application/Octet-Stream", []byte("x"), 400, `{"message":"Content-Type must be application/octet-stream."}`},
		"something without a type": {"", []byte("x"), 415, ""},
	} {
		t.Run(name, func(t *testing.T) {
			status, answer := put(t, c, url, test.kind, bytes.NewReader(test.body))
			if status != test.status || (test.answer != "" && answer != test.answer) {
				t.Fatalf("got %d %s", status, answer)
			}
			if status == 201 {
				if got := c.must(200, "GET", url, operatorLogin, ""); got != string(test.body) {
					t.Errorf("%d bytes came back as %d others", len(test.body), len(got))
				}
				if status, _ := put(t, c, url, typeBytes, bytes.NewReader([]byte("more"))); status != http.StatusConflict {
					t.Errorf("it was overwritten: %d", status)
				}
				c.must(204, "DELETE", url, adminLogin, "")
			}
		})
	}
	c.must(405, "HEAD", url, adminLogin, "")
}

func put(t *testing.T, c *caller, url, kind string, body io.Reader) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, url, body)
	if err != nil {
		t.Fatal(err)
	}
	r.SetBasicAuth(AdminUser, AdminPassphrase)
	if kind != "" {
		r.Header.Set("Content-Type", kind)
	}
	answer, err := c.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(data)
}

func TestAHugeChunkedUploadStopsAllWritesUntilARestart(t *testing.T) {
	h := Start(t, Options{Provisioned: true, UnattendedBoot: true})
	c := newCaller(t, h)
	addRSA(t, h, "slot")
	url := h.URLs()[0] + "/api/v1/keys/slot"
	hangs := func(method, url string, body io.Reader) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, method, url, body)
		if err != nil {
			t.Fatal(err)
		}
		r.SetBasicAuth(AdminUser, AdminPassphrase)
		r.Header.Set("Content-Type", typeBytes)
		answer, err := c.client.Do(r)
		if err == nil {
			_ = answer.Body.Close()
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("%s did not hang: %v", method, err)
		}
	}
	hangs("PUT", url+"/cert", io.MultiReader(bytes.NewReader(make([]byte, chunkedLimit)))) // chunked: no known length
	hangs("DELETE", url, nil)
	c.must(200, "GET", url, adminLogin, "")
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	c.must(200, "GET", url, adminLogin, "") // on a new connection
	c.must(204, "DELETE", url, adminLogin, "")
}

func TestVersionsOfWhatIsRead(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c := newCaller(t, h)
	addRSA(t, h, "one")
	url := h.URLs()[0] + "/api/v1/keys/one"
	send := func(method, url, header, value string) (status int, tag string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, url, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		r.SetBasicAuth(AdminUser, AdminPassphrase)
		if header != "" {
			r.Header.Set(header, value)
		}
		answer, err := c.client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_ = answer.Body.Close()
		return answer.StatusCode, answer.Header.Get("Etag")
	}
	_, tag := send("GET", url, "", "")
	for _, test := range []struct {
		method, header, value string
		status                int
	}{
		{"GET", "If-None-Match", tag, 304},
		{"GET", "If-None-Match", `"00000000000000000000000000000000"`, 200},
		{"GET", "If-Match", tag, 200},
		{"DELETE", "If-Match", `"00000000000000000000000000000000"`, 412},
		{"DELETE", "If-None-Match", tag, 412},
		{"GET", "Accept", "text/plain", 406},
		{"GET", "Accept", "text/*, application/json;q=0", 406},
		{"GET", "Accept", "text/*, */*;q=0.1", 200},
		{"DELETE", "If-Match", tag, 204},
	} {
		if got, _ := send(test.method, url, test.header, test.value); got != test.status {
			t.Errorf("%s with %s %s: %d, want %d", test.method, test.header, test.value, got, test.status)
		}
	}
}

// A server that never says 100 Continue makes a client wait for its own time-out, and then answers all the same.
func TestExpectingClientsAreLeftWaiting(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c := newCaller(t, h)
	transport, ok := c.client.Transport.(*http.Transport)
	if !ok {
		t.Fatalf("the transport is a %T", c.client.Transport)
	}
	transport.ExpectContinueTimeout = 200 * time.Millisecond
	addRSA(t, h, "slot")
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, h.URLs()[0]+"/api/v1/keys/slot/cert", bytes.NewReader([]byte("x")))
	if err != nil {
		t.Fatal(err)
	}
	r.SetBasicAuth(AdminUser, AdminPassphrase)
	r.Header.Set("Content-Type", typeBytes)
	r.Header.Set("Expect", "100-continue")
	begin := time.Now()
	answer, err := c.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = answer.Body.Close()
	if took := time.Since(begin); answer.StatusCode != http.StatusCreated || took < 200*time.Millisecond {
		t.Fatalf("HTTP %d after %v", answer.StatusCode, took)
	}
}
