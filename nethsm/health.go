package nethsm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"vault-plugin-secrets-nitrokey/hsm"
)

// State is the state of a node.
type State string

// The states of a node. It serves keys when it is Operational only.
const (
	// StateUnprovisioned: new, or reset; it waits for [Client.Provision] or [Client.Restore].
	StateUnprovisioned State = "Unprovisioned"
	// StateLocked: it waits for its unlock passphrase, after every start unless unattended boot is on.
	StateLocked      State = "Locked"
	StateOperational State = "Operational"
	// StateFailed: its database, or the majority of its cluster, is away. It recovers by itself.
	StateFailed State = "Failed"
)

// HSM is the state in the words of package hsm. One that this client does not know is a failed one.
func (s State) HSM() hsm.State {
	switch s {
	case StateUnprovisioned:
		return hsm.StateUnprovisioned
	case StateLocked:
		return hsm.StateLocked
	case StateOperational:
		return hsm.StateOperational
	default:
		return hsm.StateFailed
	}
}

// State asks a node for its state. It needs no credentials and works in every state.
func (c *Client) State(ctx context.Context) (State, error) {
	var got struct {
		State State `json:"state"`
	}
	err := c.doAlone(ctx, call{
		op: "asking for the state", method: http.MethodGet, path: "/health/state", public: true,
		into: wanting(&got, func() error { return present("state", got.State) }),
	})
	return got.State, err
}

// Alive is nil where a node has started and waits to be unlocked or provisioned. Operational it is not alive but ready:
// that is [ErrState], as every other state is.
func (c *Client) Alive(ctx context.Context) error {
	return c.doAlone(ctx, call{
		op: "asking whether it waits to be unlocked", method: http.MethodGet, path: "/health/alive", public: true,
	})
}

// Ready is nil where a node is Operational, and [ErrState] otherwise. For about a minute after losing its database a node
// still says that it is ready.
func (c *Client) Ready(ctx context.Context) error {
	return c.doAlone(ctx, call{op: "asking whether it is ready", method: http.MethodGet, path: "/health/ready", public: true})
}

// Diagnosis is what a node tells about its database.
type Diagnosis struct {
	Logs     []LogLine        // the database's last words
	Database DatabaseState    // of its process
	Snapshot DatabaseSnapshot // zero where there is none
}

// LogLine is a line of a log.
type LogLine struct{ Level, Message string }

// DatabaseState is the state of the database's process. How it ended is in the NetHSM's own words.
type DatabaseState struct {
	Running                   bool
	Exited, Signaled, Stopped string
}

// DatabaseSnapshot describes the database.
type DatabaseSnapshot struct {
	Hash     string
	Revision int64
	Keys     int64
	Size     int64 // bytes
	Version  string
}

// Diagnose asks a node for the health of its database (since 5.0). An Operational node answers an Administrator only; in
// other states nobody needs credentials.
func (c *Client) Diagnose(ctx context.Context) (Diagnosis, error) {
	var got struct {
		Logs []struct {
			Level   loose `json:"level"`
			Message loose `json:"msg"`
		} `json:"clusterLogs"`
		State *struct {
			Running  bool  `json:"running"`
			Exited   loose `json:"exited"`
			Signaled loose `json:"signaled"`
			Stopped  loose `json:"stopped"`
		} `json:"clusterState"`
		Snapshot struct {
			Hash     loose `json:"hash"`
			Revision int64 `json:"revision"`
			Keys     int64 `json:"totalKey"`
			Size     int64 `json:"totalSize"`
			Version  loose `json:"version"`
		} `json:"clusterSnapshot"`
	}
	err := c.doAlone(ctx, call{
		op: "asking for a diagnosis", method: http.MethodGet, path: "/health/diagnose",
		into: wanting(&got, func() error {
			if got.State == nil {
				return errors.New("the member clusterState is missing")
			}
			return nil
		}),
	})
	if err != nil {
		return Diagnosis{}, err
	}
	out := Diagnosis{
		Database: DatabaseState{
			got.State.Running, string(got.State.Exited), string(got.State.Signaled), string(got.State.Stopped),
		},
		Snapshot: DatabaseSnapshot{
			string(got.Snapshot.Hash), got.Snapshot.Revision, got.Snapshot.Keys, got.Snapshot.Size, string(got.Snapshot.Version),
		},
	}
	for _, line := range got.Logs {
		out.Logs = append(out.Logs, LogLine{string(line.Level), string(line.Message)})
	}
	return out, nil
}

// doAlone sends a call that concerns one node.
func (c *Client) doAlone(ctx context.Context, in call) error {
	one, err := c.alone(in.op)
	if err != nil {
		return err
	}
	_, err = one.do(ctx, in)
	return err
}

// alone is the view of the one node of a client, which is asked whatever is known about it. Several are [ErrManyNodes].
func (c *Client) alone(op string) (*Client, error) {
	if len(c.nodes()) != 1 {
		return nil, fmt.Errorf("%s: %w", op, ErrManyNodes)
	}
	return &Client{pool: c.pool, login: c.login, only: c.nodes()[0]}, nil
}

// wanting decodes an answer into a value and then asks check whether what is needed is there. Members that nobody asked
// for are passed over: a newer NetHSM has more to tell.
func wanting(value any, check func() error) *checked { return &checked{value, check} }

type checked struct {
	value any
	check func() error
}

// UnmarshalJSON implements json.Unmarshaler.
func (c *checked) UnmarshalJSON(text []byte) error {
	if err := json.Unmarshal(text, c.value); err != nil {
		return err
	}
	return c.check()
}

// present is the check for one member.
func present[T ~string](name string, value T) error {
	if value == "" {
		return errors.New("the member " + name + " is missing")
	}
	return nil
}

// errNoList is the check's complaint about a null where a list should be, even an empty one.
var errNoList = errors.New("it is not a list")

// loose is a JSON value of which only people want to know: a string as it is, anything else as its JSON text.
type loose string

// UnmarshalJSON implements json.Unmarshaler.
func (l *loose) UnmarshalJSON(text []byte) error {
	switch {
	case bytes.HasPrefix(text, []byte(`"`)):
		return json.Unmarshal(text, (*string)(l))
	case !bytes.Equal(text, []byte("null")):
		*l = loose(text)
	}
	return nil
}
