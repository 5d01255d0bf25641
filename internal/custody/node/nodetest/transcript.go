package nodetest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// transcript notes what goes over the wire in a form in which two servers can be compared: what is random or theirs alone is
// replaced by what kind of thing it is.
type transcript struct {
	mu     sync.Mutex
	lines  []string
	paused bool
}

// comment adds a line of our own.
func (t *transcript) comment(text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.lines = append(t.lines, "", "# "+text)
}

// pause stops noting until the function returned is called: how often one looks is chance.
func (t *transcript) pause() (resume func()) {
	set := func(paused bool) {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.paused = paused
	}
	set(true)
	return func() { set(false) }
}

func (t *transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.TrimSpace(strings.Join(t.lines, "\n")) + "\n"
}

// wrap is a node.Config.Transport.
func (t *transcript) wrap(inner http.RoundTripper) http.RoundTripper {
	return trip(func(r *http.Request) (*http.Response, error) {
		response, err := inner.RoundTrip(r)
		if err != nil {
			return nil, err
		}
		body, err := io.ReadAll(response.Body)
		_ = response.Body.Close()
		response.Body = io.NopCloser(bytes.NewReader(body))
		t.mu.Lock()
		defer t.mu.Unlock()
		if !t.paused {
			t.lines = append(t.lines, fmt.Sprintf("%s %s → %d %s",
				r.Method, strings.TrimPrefix(r.URL.Path, "/v1/"), response.StatusCode, plain(r.URL.Path, body)))
		}
		return response, err
	})
}

type trip func(*http.Request) (*http.Response, error)

func (f trip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

var uuids = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// plain writes the members of an answer in order, without what is random.
func plain(path string, body []byte) string {
	if len(bytes.TrimSpace(body)) == 0 {
		return "nothing"
	}
	var members map[string]any
	if json.Unmarshal(body, &members) != nil {
		return "no JSON"
	}
	if strings.HasPrefix(path, "/v1/auth/") && members["errors"] == nil {
		return "a token" // of many members that custody does not look at
	}
	var out []string
	for name, value := range members {
		out = append(out, name+"="+kindOf(name, value))
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// kindOf is the value itself where it is the same of every server, and what it is otherwise.
func kindOf(name string, value any) string {
	if text, is := value.(string); is && text != "" {
		switch name {
		case "type", "storage_type", "recovery_seal_type", "version":
			return text
		}
		if uuids.MatchString(text) {
			return "<uuid>"
		}
		return "<text>"
	}
	switch list, _ := value.([]any); {
	case name == "errors":
		out, _ := json.Marshal(value)
		return uuids.ReplaceAllString(string(out), "<uuid>")
	case len(list) > 0:
		return fmt.Sprintf("<%d texts>", len(list))
	case strings.HasPrefix(name, "raft_"):
		return "<number>"
	}
	out, _ := json.Marshal(value)
	return string(out)
}
