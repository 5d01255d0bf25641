package object_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// trouble is what happens to one request to a NetHSM.
type trouble struct {
	sentence string
	happens  bool // the NetHSM carries it out
	dies     bool // no later request arrives: the process was killed, or the network went away
	status   int  // the answer; 0: none comes
}

var troubles = []trouble{
	{"the process dies before the request", false, true, 0},
	{"the process dies before the answer", true, true, 0},
	{"the request is lost", false, false, 0},
	{"the answer is lost", true, false, 0},
	{"the answer is 500 and nothing happened", false, false, http.StatusInternalServerError},
	{"the answer is 503 and it happened", true, false, http.StatusServiceUnavailable},
}

// troubled is a NetHSM whose at-th request, counted from 1 on, meets trouble.
type troubled struct {
	hsm *nethsmtest.HSM
	trouble

	mu   sync.Mutex
	at   int // 0: none
	seen int
}

func (n *troubled) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	n.seen++
	mine, over := n.at != 0 && n.seen == n.at, n.at != 0 && n.seen > n.at && n.dies
	n.mu.Unlock()
	if over {
		panic(http.ErrAbortHandler)
	}
	if !mine {
		n.hsm.ServeHTTP(w, r)
		return
	}
	if n.happens {
		n.hsm.ServeHTTP(httptest.NewRecorder(), r)
	}
	if n.status == 0 {
		panic(http.ErrAbortHandler)
	}
	w.WriteHeader(n.status)
}

// arm lets the at-th request from now on meet trouble, 0 none.
func (n *troubled) arm(at int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.at, n.seen = at, 0
}

func (n *troubled) struck() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.seen >= n.at
}

// Every request of every kind of work meets every trouble: a fresh process then finds the old value or the new one, and
// nothing keeps it from writing and tidying up.
func TestTroubleAtEveryRequestToANetHSMLeavesOldOrNew(t *testing.T) {
	type netWork struct {
		sentence string
		before   []string // values, one after the other
		do       func(ctx context.Context, s store.Store, revision store.Revision) error
		new      string
	}
	for _, w := range []netWork{
		{"creating", nil, put("new"), "new"},
		{"replacing", []string{"older", "old"}, put("new"), "new"},
		{"deleting", []string{"older", "old"}, remove, ""},
	} {
		for _, trouble := range troubles {
			t.Run(w.sentence+", "+trouble.sentence, func(t *testing.T) {
				t.Parallel() // most of them wait for whoever may have made a carrier
				for at, over := 1, false; !over; at++ {
					t.Run(fmt.Sprintf("request %d", at), func(t *testing.T) {
						h, err := nethsmtest.New(nethsmtest.Options{Provisioned: true})
						if err != nil {
							t.Fatal(err)
						}
						t.Cleanup(h.Close)
						node := &troubled{hsm: h, trouble: trouble}
						server := httptest.NewServer(node)
						t.Cleanup(server.Close)
						stateDir := t.TempDir()
						s := open(t, openAt(t, server.URL), stateDir)
						revision, old := store.NoRevision, ""
						for _, old = range w.before {
							if revision, err = s.Put(t.Context(), "a", []byte(old), revision); err != nil {
								t.Fatal(err)
							}
						}
						node.arm(at)
						err = w.do(t.Context(), open(t, openAt(t, server.URL), stateDir), revision)
						if over = !node.struck(); over && err != nil {
							t.Fatalf("without trouble: %v", err)
						}
						node.arm(0)

						device := openAt(t, server.URL)
						fresh := open(t, device, stateDir)
						entry, getErr := fresh.Get(t.Context(), "a")
						if getErr != nil && !errors.Is(getErr, store.ErrNotFound) {
							t.Fatalf("Get = %v", getErr)
						}
						switch found := string(entry.Value); {
						case found != old && found != w.new:
							t.Fatalf("Get = %q, want %q or %q", found, old, w.new)
						case err == nil && found != w.new:
							t.Fatalf("it was confirmed, and Get = %q, want %q", found, w.new)
						case errors.Is(err, store.ErrConflict):
							t.Fatalf("a writer who is alone meets a conflict: %v", err)
						}
						if _, err := fresh.Put(t.Context(), "a", []byte("next"), entry.Revision); err != nil {
							t.Fatalf("Put = %v", err)
						}
						if entry, err = fresh.Get(t.Context(), "a"); err != nil || string(entry.Value) != "next" {
							t.Fatalf("Get = %q, %v", entry.Value, err)
						}
						if got := labels(t, device); len(got) != 1 {
							t.Errorf("the next write leaves %q, want one object", got)
						}
						if ids := h.KeyIDs(); len(ids) != 1 {
							t.Errorf("the NetHSM holds %q, want one carrier", ids)
						}
					})
				}
			})
		}
	}
}

// openAt opens the NetHSM at a loopback URL with all rights.
func openAt(t *testing.T, url string) *nethsm.Device {
	t.Helper()
	return openNetHSMWith(t, nethsm.Options{URLs: []string{url}})
}
