package nethsmtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// Sixty-four clients ask for everything while faults, states and certificates change under them. Nobody may see the double
// panic, and in the end it works as at first. The race detector makes this test worth its name.
func TestSixtyFourClientsWhileEverythingChanges(t *testing.T) {
	h := Start(t, Options{Provisioned: true, UnattendedBoot: true, Nodes: 2, Parallel: 4})
	for _, k := range []Key{{ID: "sign", Type: typeP256}, {ID: "aes", Type: typeGeneric}} {
		if _, _, err := h.AddKey(k); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			c := newCaller(t, h)
			for ctx.Err() == nil {
				q := anything(i)
				n := h.Node(rand.N(2))
				if rand.N(2) == 0 {
					_, _, _ = c.try(q.method, n.URL()+"/api/v1/"+q.path, q.login, q.body) // whatever comes
					continue
				}
				if thrown := served(ctx, n, q); thrown != nil {
					t.Errorf("%s %s: the double panicked: %v", q.method, q.path, thrown)
				}
			}
		})
	}
	for i := range 2 {
		all.Go(func() {
			for ctx.Err() == nil {
				disturb(t, h.Node(i))
			}
		})
	}
	all.Wait()
	for _, n := range h.Nodes() {
		n.ClearFaults()
		n.SetState(Operational)
		n.ReturnEtcd()
		c := newCaller(t, h)
		until(t, func() bool { return !n.limited("127.0.0.1", OperatorUser) })
		c.must(200, "POST", n.URL()+"/api/v1/keys/sign/sign", operatorLogin, `{"mode":"ECDSA","message":"AAAA"}`)
		until(t, func() bool { return n.Held() == 0 && len(n.slots) == 0 }) // nobody hangs or has a place who is not there
	}
}

type wish struct{ method, path, login, body string }

// anything is one of many requests; several clients ask for the same things.
func anything(client int) wish {
	id := fmt.Sprintf("k%d", client%4)
	wishes := []wish{
		{"GET", "health/state", "", ""},
		{"GET", "health/diagnose", "", ""},
		{"GET", "metrics", MetricsUser + ":" + MetricsPassphrase, ""},
		{"GET", "keys", operatorLogin, ""},
		{"GET", "keys", operatorLogin, ""},
		{"GET", "users", adminLogin, ""},
		{"POST", "keys/sign/sign", operatorLogin, `{"mode":"ECDSA","message":"AAAA"}`},
		{"POST", "keys/aes/encrypt", operatorLogin, `{"mode":"AES_CBC","message":"AAAAAAAAAAAAAAAAAAAAAA=="}`},
		{"POST", "random", operatorLogin, `{"length":16}`},
		{"POST", "keys/generate", adminLogin, generic + `,"id":"` + id + `"}`},
		{"GET", "keys/" + id, adminLogin, ""},
		{"PUT", "keys/" + id + "/label", adminLogin, fmt.Sprintf(`{"label":"%d"}`, rand.N(3))},
		{"PUT", "keys/" + id + "/restrictions/tags/t", adminLogin, `{}`},
		{"DELETE", "keys/" + id, adminLogin, ""},
		{"POST", "keys/" + id + "/move", adminLogin, `{"newId":"k0"}`},
		{"PUT", "users/" + id, adminLogin, `{"realName":"x","role":"Operator","passphrase":"OperatorPassphrase"}`},
		{"GET", "users/" + id, adminLogin, ""},
		{"GET", "users/" + id + "/tags", adminLogin, ""},
		{"PUT", "users/" + id + "/tags/t", adminLogin, `{}`},
		{"DELETE", "users/" + id + "/tags/t", adminLogin, ""},
		{"DELETE", "users/" + id, adminLogin, ""},
		{"PUT", "namespaces/" + id, adminLogin, ""},
		{"DELETE", "namespaces/" + id, adminLogin, ""},
		{"GET", "keys", id + ":WrongPassphrase", ""},
		{"GET", "config/tls/cert.pem", adminLogin, ""},
		{"PUT", "config/unattended-boot", adminLogin, `{"status":"on"}`},
		{"GET", "cluster/members", adminLogin, ""},
	}
	return wishes[rand.N(len(wishes))]
}

// served asks a node as a handler and returns what it panicked with, but for the way in which handlers give up.
func served(ctx context.Context, n *Node, q wish) (thrown any) {
	defer func() {
		thrown = recover()
		if err, ok := thrown.(error); ok && errors.Is(err, http.ErrAbortHandler) {
			thrown = nil
		}
	}()
	r := httptest.NewRequestWithContext(ctx, q.method, "/api/v1/"+q.path, strings.NewReader(q.body))
	r.Header.Set("Content-Type", typeJSON)
	if user, passphrase, ok := strings.Cut(q.login, ":"); ok {
		r.SetBasicAuth(user, passphrase)
	}
	n.ServeHTTP(httptest.NewRecorder(), r)
	return nil
}

// disturb changes one thing about a node and, mostly, changes it back.
func disturb(t *testing.T, n *Node) {
	t.Helper()
	for _, change := range []func(){
		func() { n.Fail(503, 3) },
		func() { n.FailPath("/keys", 429, 2) },
		func() { n.CutConnection(3, 2) },
		func() { n.DropConnection(2) },
		func() { n.HugeAnswer(100_000, 1) },
		func() { n.SetLatency(time.Millisecond) },
		func() { n.SetHang(true); n.SetHang(false) },
		func() { n.SetLatency(0) },
		func() { n.SetState(Locked) },
		func() { n.SetState(Failed) },
		func() { n.SetState(Operational) },
		func() { n.LoseEtcd(); n.ReturnEtcd() },
		func() { _, _, _ = n.Requests(), n.Pin(), n.Certificate(); n.ResetCounters() },
		func() {
			if err := n.Restart(); err != nil {
				t.Error(err)
			}
		},
		func() {
			if err := n.ReplaceCertificate(Renewed); err != nil {
				t.Error(err)
			}
		},
		n.ClearFaults,
	} {
		change()
	}
}

// openFiles counts this process's descriptors.
func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("there is no /proc to count descriptors in")
	}
	return len(files)
}

func TestAThousandRestartsLeaveNothingBehind(t *testing.T) {
	h := Start(t, Options{Provisioned: true, UnattendedBoot: true})
	n, c := h.Node(0), newCaller(t, h)
	ask := func() {
		t.Helper()
		c.must(200, "GET", n.URL()+"/api/v1/keys", operatorLogin, "")
	}
	ask()
	url, files, goroutines := n.URL(), openFiles(t), runtime.NumGoroutine()
	for i := range 1000 {
		if err := n.Restart(); err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			c.client.CloseIdleConnections() // it may not have noticed yet
			ask()
		}
	}
	c.client.CloseIdleConnections()
	ask()
	if n.URL() != url {
		t.Errorf("it moved from %s to %s", url, n.URL())
	}
	until(t, func() bool { return openFiles(t) <= files && runtime.NumGoroutine() <= goroutines })
}

func TestServiceTimeIsForWorkAndForNothingElse(t *testing.T) {
	const each = 40 * time.Millisecond
	h := Start(t, Options{Provisioned: true, ServiceTime: each, Parallel: 2})
	n, c := h.Node(0), newCaller(t, h)
	addRSA(t, h, "one")
	url := h.URLs()[0]
	decrypt := func(key string, status int) asked {
		return asked{name: key, method: "POST keys/" + key + "/decrypt", login: operatorLogin, body: `{"mode":"OAEP_SHA256","encrypted":"AAAA"}`, status: status}
	}
	took := func(requests ...asked) time.Duration {
		t.Helper()
		begin := time.Now()
		var all sync.WaitGroup
		for _, q := range requests {
			all.Go(func() { c.holds(url, []asked{q}) })
		}
		all.Wait()
		return time.Since(begin)
	}
	fails := decrypt("one", 400)
	if d := took(fails, fails, fails, fails, fails); d < 3*each {
		t.Errorf("five failing operations, two at a time, took %v, less than three times %v", d, each)
	}
	if n.Operations() != 5 || n.Decrypts() != 5 || h.DecryptCount() != 5 {
		t.Errorf("five operations were carried out, counted are %d, %d and %d", n.Operations(), n.Decrypts(), h.DecryptCount())
	}
}

func TestWhatIsRefusedTakesNoServiceTime(t *testing.T) {
	h := Start(t, Options{Provisioned: true, ServiceTime: time.Hour})
	if _, _, err := h.AddKey(Key{ID: "tagged", Type: typeGeneric, Tags: []string{"t"}}); err != nil {
		t.Fatal(err)
	}
	body := `{"mode":"AES_CBC","message":"AAAAAAAAAAAAAAAAAAAAAA=="}`
	newCaller(t, h).holds(h.URLs()[0], []asked{
		{name: "a tag that is missing", method: "POST keys/tagged/encrypt", login: operatorLogin, body: body, status: 403},
		{name: "a key that is missing", method: "POST keys/none/encrypt", login: operatorLogin, body: body, status: 404},
		{name: "what needs no private key", method: "GET keys", login: operatorLogin, status: 200},
	})
	if n := h.Node(0).Operations(); n != 0 {
		t.Errorf("%d operations were counted", n)
	}
}

func TestAnOperationThatNeverBeganIsNotCounted(t *testing.T) {
	h := Start(t, Options{Provisioned: true, ServiceTime: time.Hour, Parallel: 1})
	n, c := h.Node(0), newCaller(t, h)
	addRSA(t, h, "one")
	body := `{"mode":"OAEP_SHA256","encrypted":"AAAA"}`
	ask := func(ctx context.Context, done chan<- error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, n.URL()+"/api/v1/keys/one/decrypt", strings.NewReader(body))
		if err != nil {
			done <- err
			return
		}
		r.SetBasicAuth(OperatorUser, OperatorPassphrase)
		answer, err := c.client.Do(r)
		if err == nil {
			_ = answer.Body.Close()
		}
		done <- err
	}
	active := func(want int) func() bool {
		return func() bool { n.mu.Lock(); defer n.mu.Unlock(); return n.active == want }
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	first, second := make(chan error, 1), make(chan error, 1)
	go ask(ctx, first)
	until(t, func() bool { return n.Operations() == 1 })
	waiting, leave := context.WithCancel(t.Context())
	go ask(waiting, second)
	until(t, active(2))
	leave()
	if err := <-second; err == nil {
		t.Error("an answer came to a client that had left")
	}
	until(t, active(1))
	if n.Operations() != 1 || n.Decrypts() != 1 {
		t.Errorf("one operation began, counted are %d and %d", n.Operations(), n.Decrypts())
	}
	cancel()
	if err := <-first; err == nil {
		t.Error("an answer came an hour early")
	}
}
