package server

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// Health is the answer of /v1/sys/health: what Vault's has, and how the keys fare. Anybody may ask, so it names no HSM, no token
// and no cause.
type Health struct {
	Initialized bool `json:"initialized"`
	// Sealed is true where a key that is fit for use cannot open now; most often encrypting works all the same. A key that tokens name and
	// nobody finished, or made, does not count, unless the configuration names it.
	Sealed                     bool   `json:"sealed"`
	Standby                    bool   `json:"standby"`
	PerformanceStandby         bool   `json:"performance_standby"`
	ReplicationPerformanceMode string `json:"replication_performance_mode"`
	ReplicationDRMode          string `json:"replication_dr_mode"`
	ServerTimeUTC              int64  `json:"server_time_utc"`
	Version                    string `json:"version"`
	Enterprise                 bool   `json:"enterprise"`

	Nitroseal Served `json:"nitroseal"`
}

// Served is what the server itself has to say.
type Served struct {
	Keys []KeyHealth `json:"keys"`
}

// KeyHealth is how a wrapping key fares.
type KeyHealth struct {
	Name string `json:"name"`
	// Mode is "strict" or "leased".
	Mode string `json:"mode"`
	// Version is the one that seals, 0 for none.
	Version int `json:"version"`
	// Recipients are the HSM keys that open what is sealed now; RecipientsUp those whose HSM answers, or was not asked yet.
	Recipients   int `json:"recipients"`
	RecipientsUp int `json:"recipients_up"`
	// LeaseUntil is when the lease ends that is open; missing where none is.
	LeaseUntil *time.Time `json:"lease_until,omitempty"`
	// LeaseLocked is false where the memory of the lease may be written to swap space.
	LeaseLocked *bool `json:"lease_locked,omitempty"`
	// Seals and Opens tell what works now.
	Seals bool `json:"seals"`
	Opens bool `json:"opens"`
	// OperationSeconds is how long an HSM takes for one opening, on average and without waiting; 0 where none was measured yet.
	OperationSeconds float64 `json:"operation_seconds"`
	// Capacity is how many sealed Vaults come up within three minutes by the HSMs that answer, in strict mode; 0 where no
	// opening was measured yet.
	Capacity int `json:"capacity"`
}

// The modes of a key.
const (
	ModeStrict = "strict"
	ModeLeased = "leased"
)

// health answers how the server fares, with Vault's codes and the parameters that change them: sealedcode=200 is for a balancer,
// because a server whose HSM is away still encrypts.
func (s *server) health(w http.ResponseWriter, r *http.Request) {
	answer := Health{
		ReplicationPerformanceMode: "disabled", ReplicationDRMode: "disabled", ServerTimeUTC: time.Now().UTC().Unix(),
		Version: s.options.Version, Nitroseal: Served{Keys: []KeyHealth{}},
	}
	seals := true
	for _, v := range s.views() {
		answer.Nitroseal.Keys = append(answer.Nitroseal.Keys, v.health)
		if v.counts {
			answer.Initialized = true
			answer.Sealed = answer.Sealed || !v.health.Opens
			seals = seals && v.health.Seals
		}
	}
	code := http.StatusOK
	switch {
	case !answer.Initialized:
		answer.Sealed = true
		code = chosen(r, "uninitcode", http.StatusNotImplemented)
	case !seals: // whoever asks with sealedcode would send a Vault here that starts, and it would end
		code = http.StatusServiceUnavailable
	case answer.Sealed:
		code = chosen(r, "sealedcode", http.StatusServiceUnavailable)
	}
	body, err := json.Marshal(answer)
	if err != nil { // nothing in it can fail
		code, body = http.StatusInternalServerError, []byte(`{"errors":["internal error"]}`)
	}
	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Cache-Control", "no-store")
	empty := code == http.StatusNoContent || code == http.StatusNotModified // a length would announce what does not come
	if !empty {
		header.Set("Content-Length", strconv.Itoa(len(body)+1))
	}
	w.WriteHeader(code)
	if r.Method != http.MethodHead && !empty {
		_, _ = w.Write(append(body, '\n')) // whoever went away does not read it
	}
}

// chosen returns the code that a parameter of the request wants instead of the usual one. What is no code is ignored.
func chosen(r *http.Request, parameter string, usual int) int {
	if r.URL.RawQuery == "" {
		return usual
	}
	code, err := strconv.Atoi(r.URL.Query().Get(parameter))
	if err != nil || code < http.StatusOK || code > 599 {
		return usual
	}
	return code
}
