package bench

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"
)

// load sends one and the same HTTP request again and again over connections of its own, one for each client, as as many
// seals would. It does next to nothing else: the bytes of the request are made beforehand, and an answer is looked at only
// as far as it takes to see that it is the right one. It shares the processors with what it measures, so whatever it took
// for itself would bring a fast server and a slow one closer together.
type load struct {
	name    string
	request []byte
	wanted  []byte // the answer's body has this in it
	clients []*client
}

// client is one connection, which is kept.
type client struct {
	conn  *tls.Conn
	room  [8 << 10]byte // for an answer
	times []time.Duration
}

// target is a server that talks the wire of `seal "transit"`.
type target struct {
	address string // https://HOST:PORT
	caFile  string
	token   string
}

// newLoad opens the connections: HTTP/1.1 over TLS 1.3. The answer must have the plaintext in it.
func newLoad(b *testing.B, name string, t target, path string, body map[string]any, wanted string, clients int) *load {
	content, err := json.Marshal(body)
	must(b, err)
	address, err := url.Parse(t.address)
	must(b, err)
	l := &load{name: name, wanted: []byte(wanted)}
	l.request = fmt.Appendf(nil, "PUT /v1/%s HTTP/1.1\r\nHost: %s\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: %d\r\n"+
		"Accept-Encoding: gzip\r\nX-Vault-Request: true\r\nX-Vault-Token: %s\r\n\r\n%s", path, address.Host, len(content), t.token, content)
	ca, err := os.ReadFile(t.caFile)
	must(b, err)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	trust := &tls.Config{RootCAs: roots, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS13, NextProtos: []string{"http/1.1"}}
	for range clients {
		conn, err := (&tls.Dialer{Config: trust}).DialContext(b.Context(), "tcp", address.Host)
		must(b, err)
		b.Cleanup(func() { _ = conn.Close() }) // nothing is on its way any more
		l.clients = append(l.clients, &client{conn: conn.(*tls.Conn)})
	}
	for _, c := range l.clients { // a server does not wait for ever for the first request of a connection
		must(b, c.once(l))
	}
	return l
}

// once sends the request and reads its answer.
func (c *client) once(l *load) error {
	if _, err := c.conn.Write(l.request); err != nil {
		return fmt.Errorf("%s: %w", l.name, err)
	}
	have := 0
	for {
		n, err := c.conn.Read(c.room[have:])
		if err != nil {
			return fmt.Errorf("%s: after %q: %w", l.name, c.room[:have], err)
		}
		have += n
		whole, err := l.check(c.room[:have])
		if whole || err != nil {
			return err
		}
		if have == len(c.room) {
			return fmt.Errorf("%s: an answer of more than %d bytes", l.name, have)
		}
	}
}

// check tells whether the answer is there as a whole, and is the right one.
func (l *load) check(answer []byte) (whole bool, err error) {
	head, body, found := bytes.Cut(answer, []byte("\r\n\r\n"))
	if !found {
		return false, nil
	}
	const length = "\r\nContent-Length: "
	_, value, found := bytes.Cut(head, []byte(length))
	if !found {
		return false, fmt.Errorf("%s: an answer without its length: %q", l.name, answer)
	}
	value, _, _ = bytes.Cut(value, []byte("\r\n"))
	size, err := strconv.Atoi(string(value))
	switch {
	case err != nil || size < len(body):
		return false, fmt.Errorf("%s: a length of %q for %d bytes", l.name, value, len(body))
	case size > len(body):
		return false, nil
	case !bytes.HasPrefix(head, []byte("HTTP/1.1 200 ")) || !bytes.Contains(body, l.wanted):
		return false, fmt.Errorf("%s: %q", l.name, answer)
	}
	return true, nil
}

// alone sends the request once while nothing else runs.
func (l *load) alone(b *testing.B) time.Duration {
	began := time.Now()
	must(b, l.clients[0].once(l))
	return time.Since(began)
}

// crowd lets the first n clients send as fast as they can for a while, and returns how many requests were answered in a second, and
// how long each took, in order.
func (l *load) crowd(b *testing.B, n int, lasting time.Duration) (rate float64, times []time.Duration) {
	failures := make(chan error, n)
	var group sync.WaitGroup
	began := time.Now()
	end := began.Add(lasting)
	for _, c := range l.clients[:n] {
		c.times = c.times[:0]
		group.Go(func() {
			for at := time.Now(); at.Before(end); {
				if err := c.once(l); err != nil {
					failures <- err
					return
				}
				now := time.Now()
				c.times, at = append(c.times, now.Sub(at)), now
			}
		})
	}
	group.Wait()
	took := time.Since(began)
	close(failures)
	var all []error
	for err := range failures {
		all = append(all, err)
	}
	must(b, errors.Join(all...))
	for _, c := range l.clients[:n] {
		times = append(times, c.times...)
	}
	slices.Sort(times)
	return float64(len(times)) / took.Seconds(), times
}

// percentile of durations that are in order.
func percentile(sorted []time.Duration, p int) time.Duration { return sorted[(len(sorted)-1)*p/100] }
