package nethsm

import (
	"context"
	"errors"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// A right password is refused for a minute while the NetHSM's etcd is away, then the node is Failed; when etcd returns all is
// well again. Nobody may have been told that the password is wrong.
func TestRightPasswordRefusedForAMinuteIsNotCalledWrong(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		operator := s.operator()
		if err := ask(t.Context(), operator); err != nil {
			t.Fatal(err)
		}
		h.Node(0).LoseEtcd()
		sawFailed := false
		for range 100 { // seconds
			began := time.Now()
			err := ask(t.Context(), operator)
			if !errors.Is(err, hsm.ErrUnavailable) || errors.As(err, new(*hsm.PINError)) {
				t.Fatalf("error = %v, want ErrUnavailable that is no verdict", err)
			}
			if took := time.Since(began); took > 2*time.Second {
				t.Fatalf("a caller waited for %v", took)
			}
			if strings.Contains(err.Error(), "is Failed") {
				sawFailed = true
			}
			later(time.Second)
		}
		if !sawFailed {
			t.Error("no error said that the node was Failed")
		}
		tries := withStatus(s.peers[0].saw(""), http.StatusUnauthorized)
		if len(tries) < 4 || len(tries) > 8 {
			t.Errorf("the password was tried %d times, want a few", len(tries))
		}
		for i, gap := range gaps(tries) {
			if gap <= time.Second {
				t.Errorf("try %d came %v after the one before", i+1, gap)
			}
		}
		h.Node(0).ReturnEtcd()
		back := time.Now()
		for ask(t.Context(), operator) != nil {
			later(100 * time.Millisecond)
		}
		if took := time.Since(back); took > 5*time.Second {
			t.Errorf("it took %v until the NetHSM was used again", took)
		}
	})
}

// While etcd is away for a shorter time the node never fails, and the verifier finds out.
func TestPasswordIsTakenAgainWhenEtcdReturnsWithinTheMinute(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		operator := s.operator()
		if err := ask(t.Context(), operator); err != nil {
			t.Fatal(err)
		}
		h.Node(0).LoseEtcd()
		began := time.Now()
		if err := ask(t.Context(), operator); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "etcd") {
			t.Errorf("error = %v, want one that tells of etcd", err)
		}
		if took := time.Since(began); took < time.Second || took > 1500*time.Millisecond {
			t.Errorf("it waited %v for the next try, want about 1.1 s", took)
		}
		h.Node(0).ReturnEtcd()
		later(3 * time.Second)
		if err := ask(t.Context(), operator); err != nil {
			t.Errorf("after etcd has returned: %v", err)
		}
	})
}

// A caller who comes when the next try is due waits for it, and is served if it succeeds.
func TestCallerWaitsForTheNextTryAndIsServed(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		operator := s.operator()
		h.Node(0).LoseEtcd()
		go func() {
			later(500 * time.Millisecond)
			h.Node(0).ReturnEtcd()
		}()
		if err := ask(t.Context(), operator); err != nil {
			t.Errorf("error = %v, want none: etcd returned before the second try", err)
		}
	})
}

func TestWrongPasswordIsCalledWrongAfterMoreThanAMinute(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		wrong := s.client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte("not the password")})
		began := time.Now()
		var verdict *hsm.PINError
		var last error
		for time.Since(began) < 2*time.Minute {
			last = ask(t.Context(), wrong)
			if last == nil {
				t.Fatal("a wrong password was served")
			}
			if strings.Contains(last.Error(), "not the password") {
				t.Fatalf("the error tells the password: %v", last)
			}
			if errors.As(last, &verdict) {
				break
			}
			if !errors.Is(last, hsm.ErrUnavailable) {
				t.Fatalf("error = %v, want ErrUnavailable before the verdict", last)
			}
			later(time.Second)
		}
		took := time.Since(began)
		if verdict == nil || took <= time.Minute || took > 80*time.Second {
			t.Fatalf("after %v: %v, want the verdict after more than a minute", took, last)
		}
		if verdict.TriesLeft != -1 || !verdict.Wrong || verdict.Barred {
			t.Errorf("verdict = %+v", verdict)
		}
		for _, part := range []string{`"operator"`, "127.0.0.1:1", "correct the password", "once a minute"} {
			if !strings.Contains(last.Error(), part) {
				t.Errorf("the verdict does not say %s: %v", part, last)
			}
		}
		tries := withStatus(s.peers[0].saw(""), http.StatusUnauthorized)
		for i, gap := range gaps(tries) {
			if gap <= time.Second {
				t.Errorf("try %d came %v after the one before", i+1, gap)
			}
		}
		if limited := withStatus(s.peers[0].saw(""), http.StatusTooManyRequests); len(limited) > 0 {
			t.Errorf("%d tries came too soon", len(limited))
		}

		// After the verdict callers get it at once, and a password that is corrected on the NetHSM recovers by itself.
		s.peers[0].forget()
		at := time.Now()
		if err := ask(t.Context(), wrong); !errors.As(err, new(*hsm.PINError)) || time.Since(at) > 0 {
			t.Errorf("after the verdict: %v, after %v", err, time.Since(at))
		}
		if err := h.SetUserPassphrase(nethsmtest.OperatorUser, "not the password"); err != nil {
			t.Fatal(err)
		}
		later(62 * time.Second)
		if err := ask(t.Context(), wrong); err != nil {
			t.Errorf("a minute after the password was corrected: %v", err)
		}
	})
}

// One database has all users: what one node finally says of a password holds for the others, even for one that is away.
func TestVerdictOfOneNodeIsTold(t *testing.T) {
	withDouble(t, 2, func(s *scene, _ *nethsmtest.HSM) {
		t := s.T
		wrong := s.client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte("not the password")})
		s.network.stop(s.peers[1].address)
		for range 90 {
			_ = ask(t.Context(), wrong)
			later(time.Second)
		}
		err := ask(t.Context(), wrong)
		if verdict, is := errors.AsType[*hsm.PINError](err); !is || !verdict.Wrong || !strings.Contains(err.Error(), "connection refused") {
			t.Errorf("error = %v, want the verdict, and what keeps the other node from serving", err)
		}
	})
}

// The verdict is taken back when the node turns out to have lost its database.
func TestTroubleInBetweenBeginsTheMinuteAnew(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		wrong := s.client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte("not the password")})
		began := time.Now()
		_ = ask(t.Context(), wrong)
		later(40 * time.Second)
		h.Node(0).SetState(nethsmtest.Failed)
		later(30 * time.Second)
		if err := ask(t.Context(), wrong); errors.As(err, new(*hsm.PINError)) {
			t.Errorf("the verdict came while the node was Failed: %v", err)
		}
		h.Node(0).SetState("")
		returned := time.Now()
		for !errors.As(ask(t.Context(), wrong), new(*hsm.PINError)) {
			if time.Since(began) > 10*time.Minute {
				t.Fatal("the verdict never came")
			}
			later(time.Second)
		}
		if took := time.Since(returned); took <= time.Minute {
			t.Errorf("the verdict came %v after the node was Operational again", took)
		}
	})
}

func TestCorrectedPasswordInANewViewStartsFresh(t *testing.T) {
	withDouble(t, 1, func(s *scene, _ *nethsmtest.HSM) {
		t := s.T
		wrong := s.client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte("not the password")})
		_ = ask(t.Context(), wrong)
		later(20 * time.Second)
		began := time.Now()
		if err := ask(t.Context(), s.operator()); err != nil {
			t.Errorf("the right password: %v", err)
		}
		if took := time.Since(began); took > 1500*time.Millisecond {
			t.Errorf("the right password waited for %v", took)
		}
		if err := ask(t.Context(), wrong); err == nil {
			t.Error("the wrong password was served")
		}
	})
}

// Many callers with a wrong password cost one try, not one each.
func TestNoHerdTriesAPassword(t *testing.T) {
	withDouble(t, 1, func(s *scene, _ *nethsmtest.HSM) {
		t := s.T
		wrong := s.client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte("not the password")})
		var all sync.WaitGroup
		for range 32 {
			all.Go(func() {
				if err := ask(t.Context(), wrong); !errors.Is(err, hsm.ErrUnavailable) {
					t.Errorf("error = %v, want ErrUnavailable", err)
				}
			})
		}
		all.Wait()
		if tries := s.peers[0].saw("/keys"); len(tries) != 1 {
			t.Errorf("the password was tried %d times", len(tries))
		}
		if tries := s.peers[0].saw("/users/operator"); len(tries) != 1 {
			t.Errorf("it was verified %d times", len(tries))
		}
	})
}

// A slow first request does not keep the others waiting for long.
func TestSlowFirstRequestDoesNotHoldTheOthers(t *testing.T) {
	slow := func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/keys/generate") {
			later(8 * time.Second)
		}
		healthy(w, r)
	}
	within(t, Options{}, handlers(slow), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		go func() { _ = create(t.Context(), view) }()
		synctest.Wait()
		began := time.Now()
		if err := ask(t.Context(), view); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("it waited for %v", took)
		}
		later(10 * time.Second)
	})
}

func TestAnotherNodeServesWhileOneRefusesThePassword(t *testing.T) {
	withDouble(t, 2, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		operator := s.operator()
		h.Node(0).LoseEtcd()
		began := time.Now()
		for range 20 {
			if err := ask(t.Context(), operator); err != nil {
				t.Fatal(err)
			}
			if _, err := operator.Random(t.Context(), 8); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("it took %v", took)
		}
		if n := len(withStatus(s.peers[0].saw(""), http.StatusUnauthorized)); n != 1 {
			t.Errorf("the node without etcd was asked %d times", n)
		}
	})
}

// A request that creates goes elsewhere as well: 401 means that it did not happen.
func TestRefusedCreationGoesToTheNextNode(t *testing.T) {
	within(t, Options{}, handlers(saying(http.StatusUnauthorized), healthy), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		for range 4 {
			if err := create(t.Context(), view); err != nil {
				t.Error(err)
			}
		}
		if n := len(s.peers[1].saw("/keys/generate")); n != 4 {
			t.Errorf("it was carried out %d times, want 4", n)
		}
	})
}

// Roles that may not even ask for themselves get 403, which only a right password gets.
func TestForbiddenProvesThePassword(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		metrics := s.client.As(Credentials{Username: nethsmtest.MetricsUser, Password: []byte(nethsmtest.MetricsPassphrase)})
		h.Node(0).LoseEtcd()
		_ = ask(t.Context(), metrics)
		h.Node(0).ReturnEtcd()
		later(3 * time.Second)
		if err := ask(t.Context(), metrics); !errors.Is(err, hsm.ErrForbidden) {
			t.Errorf("error = %v, want ErrForbidden", err)
		}
		if n := len(withStatus(s.peers[0].saw("/users/metrics"), http.StatusForbidden)); n != 1 {
			t.Errorf("the verifier got 403 %d times, want once", n)
		}
	})
}

// Nobody uses the password any more: it is no longer tried. Somebody does again: it is.
func TestForgottenPasswordIsNotTriedForEver(t *testing.T) {
	withDouble(t, 1, func(s *scene, h *nethsmtest.HSM) {
		t := s.T
		wrong := s.client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte("not the password")})
		_ = ask(t.Context(), wrong)
		later(time.Hour)
		if n := len(s.peers[0].saw("")); n > 40 {
			t.Errorf("in an hour it was asked %d times", n)
		}
		s.peers[0].forget()
		later(time.Hour)
		if n := len(s.peers[0].saw("")); n != 0 {
			t.Errorf("in the second hour it was asked %d times", n)
		}
		if err := h.SetUserPassphrase(nethsmtest.OperatorUser, "not the password"); err != nil {
			t.Fatal(err)
		}
		if err := ask(t.Context(), wrong); err != nil {
			t.Errorf("the password is right now: %v", err)
		}
	})
}

// A try that is overdue is made, whatever the real clock has done meanwhile.
func TestOverdueTryIsMade(t *testing.T) {
	client := reach(t, Options{}, "http://127.0.0.1:1")
	s := client.login.standing[0]
	done := make(chan bool, 1)
	go func() { done <- s.sleep(time.Now().Add(-time.Second)) }()
	select {
	case went := <-done:
		if !went {
			t.Error("it was given up")
		}
	case <-time.After(5 * time.Second):
		t.Error("it sleeps on")
	}
}

func TestTooManyRequests(t *testing.T) {
	// limiting answers 429 so many times.
	limiting := func(times int) http.HandlerFunc {
		var mu sync.Mutex
		return func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			limited := times > 0 && !strings.Contains(r.URL.Path, "/health/")
			if limited {
				times--
			}
			mu.Unlock()
			if limited {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusTooManyRequests)
				_, _ = w.Write([]byte(`{"message":"Too many requests"}`))
				return
			}
			healthy(w, r)
		}
	}
	tests := []struct {
		name     string
		nodes    func() []http.Handler
		timeout  time.Duration // of the caller; 0: none
		fails    bool
		min, max time.Duration
	}{
		{"one node: wait for more than a second, then it is served", func() []http.Handler { return handlers(limiting(1)) }, 0, false, time.Second + 1, 1400 * time.Millisecond},
		{"one node that goes on: one wait, one more try, then the error", func() []http.Handler { return handlers(limiting(9)) }, 0, true, time.Second + 1, 1400 * time.Millisecond},
		{"two nodes: the other one serves at once", func() []http.Handler { return handlers(limiting(9), healthy) }, 0, false, 0, 0},
		{"no time to wait: the error comes at once", func() []http.Handler { return handlers(limiting(1)) }, time.Second, true, 0, 0},
	}
	for _, test := range tests {
		for name, send := range map[string]func(context.Context, *Client) error{"reading": ask, "creating": create} {
			t.Run(test.name+", "+name, func(t *testing.T) {
				within(t, Options{}, test.nodes(), func(s *scene) {
					t := s.T
					view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
					ctx := t.Context()
					if test.timeout > 0 {
						var cancel context.CancelFunc
						ctx, cancel = context.WithTimeout(ctx, test.timeout)
						defer cancel()
					}
					began := time.Now()
					err := send(ctx, view)
					took := time.Since(began)
					if (err != nil) != test.fails || took < test.min || took > test.max {
						t.Errorf("error %v after %v", err, took)
					}
					if refused, is := errors.AsType[*Error](err); test.fails && (!is || refused.Status != http.StatusTooManyRequests ||
						errors.Is(err, hsm.ErrMayHaveHappened)) {
						t.Errorf("error = %v, want a 429", err)
					}
				})
			})
		}
	}
}

// Close ends a verifier that waits.
func TestCloseEndsTheVerifier(t *testing.T) {
	withDouble(t, 1, func(s *scene, _ *nethsmtest.HSM) {
		t := s.T
		wrong := s.client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte("not the password")})
		_ = ask(t.Context(), wrong)
		began := time.Now()
		_ = s.client.Close()
		if took := time.Since(began); took > 0 {
			t.Errorf("Close took %v", took)
		}
		if err := ask(t.Context(), wrong); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("after Close: %v", err)
		}
	})
}

// Making a view must not wait for what a node thinks of some password: whoever changes that starts things in the background,
// which views wait for.
func TestViewsAreMadeWhileAPasswordIsRefused(t *testing.T) {
	client := reach(t, Options{}, "http://127.0.0.1:1")
	s := client.login.standing[0]
	s.mu.Lock()
	made := make(chan struct{})
	go func() {
		client.As(Credentials{Username: "other", Password: []byte("p")})
		close(made)
	}()
	select {
	case <-made:
	case <-time.After(5 * time.Second):
		t.Error("As waits")
	}
	s.mu.Unlock()
	<-made
}

// A password that is refused and taken in turns is tried by one verifier, not by one more each time.
func TestPasswordRefusedAgainAndAgainHasOneVerifier(t *testing.T) {
	within(t, Options{}, handlers(saying(http.StatusUnauthorized)), func(s *scene) {
		t := s.T
		view := s.client.As(Credentials{Username: "u", Password: []byte("p")})
		standing := view.login.standing[0]
		for range 8 {
			standing.refuse(1, true)
			standing.accept(1)
		}
		later(30 * time.Second)
		if n := len(s.peers[0].saw("")); n > 0 {
			t.Errorf("a password that is taken was tried %d times", n)
		}
		for range 8 {
			standing.accept(1)
			standing.refuse(1, true)
		}
		later(30 * time.Second)
		tries := s.peers[0].saw("/users/u")
		if len(tries) == 0 {
			t.Error("a password that is refused was not tried")
		}
		for i, gap := range gaps(tries) {
			if gap <= time.Second {
				t.Errorf("try %d came %v after the one before", i+1, gap)
			}
		}
	})
}

// What is known about a password is known to every view with it, and goes with the last of them.
func TestLoginsAreSharedAndForgotten(t *testing.T) {
	client := reach(t, Options{}, "http://127.0.0.1:1")
	one := client.As(Credentials{Username: "one", Password: []byte("p")})
	for i := range 5000 {
		client.As(Credentials{Username: "many", Password: []byte{byte(i), byte(i >> 8)}})
	}
	if again := client.As(Credentials{Username: "one", Password: []byte("p")}); again.login != one.login {
		t.Error("two views with the same credentials do not know the same about them")
	}
	known := func() int {
		client.pool.mu.Lock()
		defer client.pool.mu.Unlock()
		return len(client.pool.logins)
	}
	for end := time.Now().Add(10 * time.Second); known() > 2; {
		runtime.GC()
		select {
		case <-time.After(10 * time.Millisecond):
		case <-t.Context().Done():
		}
		if time.Now().After(end) {
			t.Fatalf("%d logins are remembered of views that are gone", known())
		}
	}
	runtime.KeepAlive(one)
}

// A colon would make another user of it, with another password; other names no NetHSM can have.
func TestUserNamesThatCannotBe(t *testing.T) {
	within(t, Options{}, handlers(healthy), func(s *scene) {
		t := s.T
		for _, name := range []string{"", "a:b", "a~b:c", "a b", "a\r\nX: y", "-a", "a~", strings.Repeat("a", 129)} {
			view := s.client.As(Credentials{Username: name, Password: []byte("sesame")})
			for _, send := range []func(context.Context, *Client) error{ask, post, create} {
				if err := send(t.Context(), view); !errors.Is(err, ErrConfig) || errors.Is(err, hsm.ErrUnavailable) || strings.Contains(err.Error(), "sesame") {
					t.Errorf("as %q: %v, want ErrConfig", name, err)
				}
			}
			if _, err := view.State(t.Context()); err != nil {
				t.Errorf("as %q, what is public: %v", name, err)
			}
			if _, err := view.At(view.URLs()[0]); err != nil {
				t.Error(err)
			}
		}
		if n := len(s.peers[0].saw("/keys")); n > 0 {
			t.Errorf("%d requests were sent", n)
		}
	})
}
