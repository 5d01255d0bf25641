package nethsm

import (
	"net/http"
	"strings"
	"testing"
	"time"
)

// Clients that a NetHSM told to slow down at one moment do not come back at one moment: each waits a while of its own.
func TestClientsThatWereToldToWaitDoNotReturnTogether(t *testing.T) {
	requests := 0 // one at a time
	everySecond := func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/health/") {
			healthy(w, r)
			return
		}
		if requests++; requests%2 == 1 {
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		healthy(w, r)
	}
	within(t, Options{}, handlers(everySecond), func(s *scene) {
		t := s.T
		waits := map[time.Duration]bool{}
		for range 8 {
			began := time.Now()
			if err := ask(t.Context(), s.client.As(Credentials{Username: "u", Password: []byte("p")})); err != nil {
				t.Fatal(err)
			}
			waits[time.Since(began)] = true
		}
		if len(waits) < 4 {
			t.Errorf("8 clients waited %v", waits)
		}
	})
}
