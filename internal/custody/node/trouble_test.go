package node_test

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// changing are the calls whose lost answer leaves a doubt.
func changing(path string) bool { return !strings.HasPrefix(path, "GET") }

// TestACutConnectionSeesEachRequestOnce: neither we nor net/http send anything a second time, also where a kept connection
// was at hand.
func TestACutConnectionSeesEachRequestOnce(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	for path, call := range calls(n) {
		t.Run(path, func(t *testing.T) {
			if _, err := n.Status(t.Context()); err != nil {
				t.Fatal(err)
			}
			before := len(played.Requests())
			played.Break("", -1, nodetest.Cut)
			err := call(t.Context())
			played.Mend()
			count := len(played.Requests()) - before
			if changing(path) {
				if count != 1 {
					t.Errorf("it was sent %d times", count)
				}
			} else if count > 2 {
				t.Errorf("a question was sent %d times", count)
			}
			if !errors.Is(err, node.ErrUnavailable) || errors.Is(err, node.ErrMayHaveHappened) != changing(path) {
				t.Error(err)
			}
		})
	}
}

// TestADeadKeptConnectionHarmsNoChange: the node has ended the connection that is kept; a change finds that out before, not
// after.
func TestADeadKeptConnectionHarmsNoChange(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	for range 20 {
		if _, err := n.Status(t.Context()); err != nil {
			t.Fatal(err)
		}
		played.Down()
		played.Up(t)
		if _, err := n.ResetUnseal(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// TestBadAnswers gives every call every bad answer.
func TestBadAnswers(t *testing.T) {
	for name, c := range map[string]struct {
		fault nodetest.Fault
		is    error
		doubt bool // where the call changes something
		words string
	}{
		"503":                            {nodetest.Answer(503, 7, "out of order"), node.ErrUnavailable, true, "503 Service Unavailable: out of order"},
		"500":                            {nodetest.Answer(500, 0, "1 error occurred:\n\t* dial tcp\n\n"), node.ErrUnavailable, true, "1 error occurred: * dial tcp"},
		"502 of something in between":    {page(502), node.ErrUnavailable, true, "502 Bad Gateway"},
		"429":                            {nodetest.Answer(429, 7, "rate limit quota exceeded"), node.ErrUnavailable, false, "ask less often"},
		"sealed":                         {nodetest.Answer(503, 0, "Vault is sealed"), node.ErrSealed, false, "unseal it"},
		"sealed, of OpenBao":             {nodetest.Answer(503, 0, "OpenBao is sealed"), node.ErrSealed, false, "unseal it"},
		"no active node":                 {nodetest.Answer(503, 0, "no active Vault instance found"), node.ErrStandby, false, "active node"},
		"standby":                        {nodetest.Answer(400, 0, "Vault is in standby mode"), node.ErrStandby, false, "active node"},
		"403":                            {nodetest.Answer(403, 0, "permission denied"), node.ErrDenied, false, "token"},
		"404 of something else":          {page(404), node.ErrRefused, false, "check the address"},
		"a redirect":                     {nodetest.Redirect("https://elsewhere.example.com:8200"), node.ErrRedirect, false, "https://elsewhere.example.com:8200"},
		"301":                            {moved(301), node.ErrRedirect, false, "https://elsewhere.example.com"},
		"308":                            {moved(308), node.ErrRedirect, false, "https://elsewhere.example.com"},
		"a redirect to nowhere":          {page(302), node.ErrRedirect, false, "nowhere"},
		"a page of something else":       {nodetest.Page, node.ErrMalformed, true, "none of Vault's"},
		"an empty object":                {nodetest.Body("{}"), node.ErrMalformed, true, "none of Vault's"},
		"no body":                        {nodetest.Body(""), node.ErrMalformed, true, "none of Vault's"},
		"a list":                         {nodetest.Body(`["type"]`), node.ErrMalformed, true, "none of Vault's"},
		"more than one object":           {nodetest.Body(`{} {}`), node.ErrMalformed, true, "none of Vault's"},
		"a huge answer":                  {nodetest.Huge, node.ErrMalformed, true, "longer than"},
		"a torn answer":                  {torn(`{"type":"shamir","initialized":`), node.ErrUnavailable, true, "complete"},
		"a connection that ends":         {nodetest.Cut, node.ErrUnavailable, true, "complete"},
		"an answer too late":             {nodetest.Hang, node.ErrUnavailable, true, "no answer within 1s"},
		"an error that repeats a share":  {nodetest.Answer(400, 0, "bad: "+base64.StdEncoding.EncodeToString(share)), node.ErrRefused, false, "400 Bad Request;"},
		"an error that repeats a part":   {nodetest.Answer(400, 0, "bad: "+hex.EncodeToString(share)[10:30]), node.ErrRefused, false, "400 Bad Request;"},
		"an error that repeats a token":  {nodetest.Answer(400, 0, "bad: "+string(token)), node.ErrRefused, false, "400 Bad Request;"},
		"an error that is not printable": {nodetest.Answer(400, 0, "\x1b[2J"+strings.Repeat("x", 1000)), node.ErrRefused, false, "?[2Jxxx"},
	} {
		t.Run(name, func(t *testing.T) {
			played := nodetest.Start(t, nodetest.Options{})
			config := node.Config{Address: played.Address(), TLS: played.TLS()}
			if name == "an answer too late" { // and no handshake that is
				config.Timeout, config.InitTimeout = time.Second, time.Second
			}
			n, err := node.New(config)
			if err != nil {
				t.Fatal(err)
			}
			defer n.Close()
			for path, call := range calls(n) {
				if name == "an answer too late" && path != "GET sys/seal-status" && path != "PUT sys/init" && path != "PUT sys/unseal" {
					continue // they all wait in one place
				}
				_, tokenOnly := map[string]bool{"GET auth/token/lookup-self": true, "PUT auth/token/revoke-self": true}[path]
				answersNothing := tokenOnly || path == "DELETE sys/rekey/init" || path == "DELETE sys/generate-root/attempt"
				if answersNothing && errors.Is(c.is, node.ErrMalformed) || answersNothing && strings.HasPrefix(name, "a torn") {
					continue // any success will do for them
				}
				if path == "PUT sys/storage/raft/join" && (name == "an empty object") {
					continue // nothing that it must hold
				}
				played.Mend()
				played.Break("", -1, c.fault)
				before := len(played.Requests())
				err := call(t.Context())
				if count := len(played.Requests()) - before; count != 1 && !(path[:3] == "GET" && count == 2) {
					t.Errorf("%s: %d requests", path, count)
				}
				if tokenOnly && strings.Contains(name, "share") || !tokenOnly && strings.Contains(name, "token") ||
					!strings.Contains(path, "update") && path != "PUT sys/unseal" && path != "PUT sys/rekey/verify" && strings.Contains(name, "repeats") {
					continue // it does not know that secret
				}
				if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.words) || !strings.Contains(err.Error(), played.Address()) {
					t.Errorf("%s: %v, want %q with %q", path, err, c.is, c.words)
				}
				doubt := c.doubt && changing(path)
				if path == "PUT sys/init" && strings.HasPrefix(name, "an error that") {
					doubt = true // 400 for reasons unknown may come from the middle of it
				}
				if errors.Is(err, node.ErrMayHaveHappened) != doubt {
					t.Errorf("%s: %v: may have happened is %t", path, err, !doubt)
				}
				if len(err.Error()) > 1000 || strings.ContainsAny(err.Error(), "\n\t\x1b") {
					t.Errorf("%s: %d bytes: %q", path, len(err.Error()), err)
				}
				var detail *node.Error
				if !errors.As(err, &detail) || detail.Op == "" || detail.Node != played.Address() {
					t.Errorf("%s: %#v", path, err)
				}
				if strings.Contains(name, "503") && detail.RetryAfter != 7*time.Second {
					t.Errorf("%s: asked for a pause of %v", path, detail.RetryAfter)
				}
				standby := strings.HasPrefix(name, "a redirect") && !strings.Contains(name, "nowhere") &&
					(strings.Contains(path, "rekey") || strings.Contains(path, "root") || tokenOnly)
				if errors.Is(c.is, node.ErrRedirect) && errors.Is(err, node.ErrStandby) != standby {
					t.Errorf("%s: %v: is a standby: %t", path, err, !standby)
				}
			}
		})
	}
}

// page is an answer of something that is no Vault.
func page(status int) nodetest.Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(status)
		_, _ = w.Write([]byte("<html>nginx</html>"))
	}
}

func moved(status int) nodetest.Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Location", "https://elsewhere.example.com"+r.URL.Path)
		w.WriteHeader(status)
	}
}

// torn is an answer that breaks off.
func torn(body string) nodetest.Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		nodetest.Torn(len(body))(w, r, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			_, _ = w.Write([]byte(body + strings.Repeat(" ", 100)))
		}))
	}
}

// TestARedirectIsNotFollowed, not even to a node that is ours.
func TestARedirectIsNotFollowed(t *testing.T) {
	authority := nodetest.NewAuthority(t)
	first, second := nodetest.Start(t, nodetest.Options{Authority: authority}), nodetest.Start(t, nodetest.Options{Authority: authority})
	first.Break("", -1, nodetest.Redirect(second.Address()))
	n := first.Client(t)
	for path, call := range calls(n) {
		if err := call(t.Context()); !errors.Is(err, node.ErrRedirect) || !strings.Contains(err.Error(), second.Address()) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if got := second.Requests(); len(got) > 0 {
		t.Error("the other one was asked", got)
	}
}

func TestACallEndsWithItsCaller(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	played.Break("", -1, nodetest.Hang)
	for path, call := range calls(n) {
		if path == "PUT sys/init" {
			continue
		}
		ctx, cancel := context.WithCancel(t.Context())
		before := len(played.Requests())
		done := make(chan error, 1)
		go func() { done <- call(ctx) }()
		for len(played.Requests()) == before {
			<-time.After(time.Millisecond)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) || errors.Is(err, node.ErrMayHaveHappened) != changing(path) {
			t.Errorf("%s: %v", path, err)
		}
		before = len(played.Requests())
		if err := call(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, node.ErrMayHaveHappened) {
			t.Errorf("%s, begun too late: %v", path, err)
		}
		if len(played.Requests()) != before {
			t.Errorf("%s was sent for a caller that had gone", path)
		}
	}
}

func TestATimeoutOfOursIsNoEndOfTheCallers(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n, err := node.New(node.Config{Address: played.Address(), TLS: played.TLS(), Timeout: 50 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	played.Break("", -1, nodetest.Hang)
	if _, err := n.Status(t.Context()); !errors.Is(err, node.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
