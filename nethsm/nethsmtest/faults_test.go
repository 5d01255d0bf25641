package nethsmtest

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestFaultsStrikeAsAsked(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	n, c := h.Node(0), newCaller(t, h)
	state := n.URL() + "/api/v1/health/state"
	for name, test := range map[string]struct {
		inject func()
		check  func(t *testing.T, status int, body string, err error)
	}{
		"an error of the database": {
			func() { n.Fail(500, 1) },
			func(t *testing.T, status int, body string, _ error) {
				t.Helper()
				if status != 500 || body != `{"message":"Could not read from database. Check logs."}` {
					t.Errorf("got %d %s", status, body)
				}
			},
		},
		"an exception": {
			func() { n.Fail(503, 1) },
			func(t *testing.T, status int, body string, _ error) {
				t.Helper()
				if status != 503 || strings.HasPrefix(body, "{") {
					t.Errorf("got %d %s", status, body)
				}
			},
		},
		"too many requests": {
			func() { n.Fail(429, 1) },
			func(t *testing.T, status int, body string, _ error) {
				t.Helper()
				if status != 429 || body != `{"message":"Too many requests"}` {
					t.Errorf("got %d %s", status, body)
				}
			},
		},
		"a connection that closes unanswered": {
			func() { n.DropConnection(2) }, // net/http tries a GET on a kept connection again
			func(t *testing.T, _ int, _ string, err error) {
				t.Helper()
				if !errors.Is(err, io.EOF) {
					t.Errorf("got %v", err)
				}
			},
		},
		"half an answer": {
			func() { n.CutConnection(3, 1) },
			func(t *testing.T, status int, body string, err error) {
				t.Helper()
				if status != 200 || body != `{"s` || !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("got %d %q %v", status, body, err)
				}
			},
		},
		"a huge answer": {
			func() { n.HugeAnswer(5<<20, 1) },
			func(t *testing.T, status int, body string, err error) {
				t.Helper()
				if status != 200 || len(body) < 5<<20 || err != nil {
					t.Errorf("got %d, %d bytes, %v", status, len(body), err)
				}
			},
		},
		"an answer of the wrong shape": {
			func() { n.WrongShape(`["no","object"]`, 1) },
			func(t *testing.T, status int, body string, _ error) {
				t.Helper()
				if status != 200 || body != `["no","object"]` {
					t.Errorf("got %d %s", status, body)
				}
			},
		},
		"nothing where the path is another": {
			func() { n.FailPath("/keys", 500, 1) },
			func(t *testing.T, status int, body string, _ error) {
				t.Helper()
				if status != 200 || body != `{"state":"Operational"}` {
					t.Errorf("got %d %s", status, body)
				}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			test.inject()
			status, body, err := c.try("GET", state, "", "")
			test.check(t, status, body, err)
			n.ClearFaults()
			c.must(200, "GET", state, "", "")
		})
	}
}

func TestARedirectNamesAnotherPlace(t *testing.T) {
	h := Start(t, Options{})
	c := newCaller(t, h)
	c.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	h.Node(0).Redirect("https://elsewhere.example/")
	c.must(307, "GET", h.URLs()[0]+"/api/v1/info", "", "")
	h.Node(0).Redirect("")
	c.must(200, "GET", h.URLs()[0]+"/api/v1/info", "", "")
}

func TestARequestHangsUntilItIsReleasedOrItsClientLeaves(t *testing.T) {
	h := Start(t, Options{})
	n, c := h.Node(0), newCaller(t, h)
	n.SetHang(true)
	c.client.Timeout = 50 * time.Millisecond
	if _, _, err := c.try("GET", n.URL()+"/api/v1/info", "", ""); err == nil {
		t.Fatal("an answer came")
	}
	until(t, func() bool { return n.Held() == 0 })
	c.client.Timeout = 10 * time.Second
	done := make(chan error, 1)
	go func() {
		_, _, err := c.try("POST", n.URL()+"/api/v1/unlock", "", `{"passphrase":"whatever it is"}`)
		done <- err
	}()
	until(t, func() bool { return n.Held() == 1 })
	n.SetHang(false)
	if err := <-done; err == nil {
		t.Fatal("the request that hung was answered")
	}
	c.must(200, "GET", n.URL()+"/api/v1/info", "", "")
}

// until polls a condition that is about to come true.
func until(t *testing.T, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for tick := time.NewTicker(time.Millisecond); ; <-tick.C {
		if condition() {
			tick.Stop()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("it did not come true within ten seconds")
		}
	}
}

func TestStoppingANodeEndsWhatHangs(t *testing.T) {
	h := Start(t, Options{Provisioned: true, ServiceTime: time.Hour})
	c := newCaller(t, h)
	done := make(chan error, 2)
	url := h.URLs()[0]
	go func() {
		_, _, err := c.try("POST", url+"/api/v1/random", operatorLogin, `{"length":1}`)
		done <- err
	}()
	h.Node(0).Inject(Fault{Path: "/info", Latency: time.Hour})
	go func() {
		_, _, err := c.try("GET", url+"/api/v1/info", "", "")
		done <- err
	}()
	until(t, func() bool {
		h.Node(0).mu.Lock()
		defer h.Node(0).mu.Unlock()
		return h.Node(0).active == 2
	})
	h.Node(0).Stop()
	h.Node(0).mu.Lock()
	if left := h.Node(0).active; left != 0 {
		t.Errorf("it stopped with %d requests in flight", left)
	}
	h.Node(0).mu.Unlock()
	for range 2 {
		if err := <-done; err == nil {
			t.Fatal("an answer came from a node that stopped")
		}
	}
	if err := h.Node(0).Start(); err != nil {
		t.Fatal(err)
	}
	if got := h.URLs()[0]; got != url {
		t.Fatalf("the node came back at %s, not %s", got, url)
	}
}

func TestANodeComesBackWhereSomebodyWasGivenItsPortMeanwhile(t *testing.T) {
	n := Start(t, Options{}).Node(0)
	n.Stop()
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", strings.TrimPrefix(n.URL(), "https://"))
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, func() { _ = taken.Close() })
	if err := n.Start(); err != nil {
		t.Error(err)
	}
}

func TestALostEtcdLooksLikeAWrongPasswordForAMinute(t *testing.T) {
	now := time.Now()
	var mu sync.Mutex
	clock := func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return now
	}
	advance := func(d time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		now = now.Add(d)
	}
	h := Start(t, Options{Provisioned: true, Now: clock})
	n, c := h.Node(0), newCaller(t, h)
	url := n.URL() + "/api/v1/"
	n.LoseEtcd()
	c.must(200, "GET", url+"health/ready", "", "")
	c.must(401, "GET", url+"keys", adminLogin, "")
	c.must(429, "GET", url+"keys", adminLogin, "")
	advance(59 * time.Second)
	if body := c.must(200, "GET", url+"health/state", "", ""); body != `{"state":"Operational"}` {
		t.Fatalf("after 59 seconds: %s", body)
	}
	c.must(401, "GET", url+"keys", adminLogin, "")
	advance(time.Second)
	if body := c.must(200, "GET", url+"health/state", "", ""); body != `{"state":"Failed"}` {
		t.Fatalf("after a minute: %s", body)
	}
	c.must(412, "GET", url+"keys", adminLogin, "")
	c.must(412, "GET", url+"health/ready", "", "")
	c.must(412, "GET", url+"health/alive", "", "")
	n.ReturnEtcd()
	c.must(200, "GET", url+"keys", adminLogin, "")

	pin := n.Pin()
	n.LoseEtcd()
	if err := n.Restart(); err != nil {
		t.Fatal(err)
	}
	if n.State() != Failed || n.Pin() == pin {
		t.Errorf("started without etcd it is %s with the certificate %s, before %s", n.State(), n.Pin(), pin)
	}
	n.ReturnEtcd()
	if n.State() != Locked || n.Pin() != pin {
		t.Errorf("etcd is back: %s with the certificate %s, before %s", n.State(), n.Pin(), pin)
	}
}

func TestCertificatesChange(t *testing.T) {
	h := Start(t, Options{})
	n := h.Node(0)
	url := n.URL() + "/api/v1/info"
	for _, test := range []struct {
		name   string
		change CertificateChange
		ok     bool
	}{
		{"renewed", Renewed, true},
		{"expired", Expired, false},
		{"of another authority", OtherAuthority, false},
		{"for another name", OtherName, false},
		{"self-signed", FellBack, false},
		{"good again", Renewed, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			pin := n.Pin()
			if err := n.ReplaceCertificate(test.change); err != nil {
				t.Fatal(err)
			}
			if n.Pin() == pin {
				t.Error("the certificate is the old one")
			}
			_, _, err := newCaller(t, h).try("GET", url, "", "")
			var refused *tls.CertificateVerificationError
			if (err == nil) != test.ok || (err != nil && !errors.As(err, &refused)) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestStatesThatAreForced(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	n, c := h.Node(0), newCaller(t, h)
	url := n.URL() + "/api/v1/"
	n.SetState(Locked)
	c.must(412, "GET", url+"keys", adminLogin, "")
	c.must(204, "POST", url+"unlock", "", `{"passphrase":"`+UnlockPassphrase+`"}`)
	c.must(200, "GET", url+"keys", adminLogin, "")
	n.SetState(Failed)
	c.must(412, "GET", url+"keys", adminLogin, "")
	c.must(200, "GET", url+"health/diagnose", "", "")
	c.must(204, "POST", url+"system/reboot", "", "")
	if got := n.State(); got != Locked {
		t.Fatalf("after a reboot: %s", got)
	}
	n.SetState(Operational)
	c.must(200, "GET", url+"keys", adminLogin, "")
}

func TestOperationsTakeTheirTimeAndTheirPlace(t *testing.T) {
	const each = 30 * time.Millisecond
	h := Start(t, Options{Provisioned: true, ServiceTime: each, Parallel: 1})
	c := newCaller(t, h)
	begin := time.Now()
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			if status, _, err := c.try("POST", h.URLs()[0]+"/api/v1/random", operatorLogin, `{"length":8}`); status != 200 {
				t.Errorf("got %d %v", status, err)
			}
		})
	}
	all.Wait()
	if took := time.Since(begin); took < 3*each {
		t.Fatalf("three operations, one at a time, took %v", took)
	}
}

func TestCountersCountAndTheLogHoldsNoPassword(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	n, c := h.Node(0), newCaller(t, h)
	for range 3 {
		c.must(200, "GET", n.URL()+"/api/v1/keys?filter=", operatorLogin, "")
	}
	if n.Handshakes() != 1 {
		t.Errorf("%d handshakes for requests on one connection", n.Handshakes())
	}
	want := Request{Method: "GET", Path: "/api/v1/keys?filter=", User: OperatorUser, Status: 200}
	if got := n.Requests(); len(got) != 3 || got[0] != want {
		t.Errorf("the log holds %+v", got)
	}
	n.ResetCounters()
	if n.Handshakes()+n.Operations()+n.Decrypts()+len(n.Requests()) != 0 {
		t.Error("counters are not zero after ResetCounters")
	}
}
