package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// maxRecovered is the largest text that an envelope comes in, in bytes: among others that are held on the local disk.
const maxRecovered = 4 * envelope.MaxSize

// cutEnvelope takes an envelope out of what it came in: the frame of a file or data object, the transit wire, the line end
// that tools add, the keys that custody holds on the local disk, of which item names one.
func cutEnvelope(text []byte, item string) ([]byte, error) {
	if bytes.HasPrefix(text, []byte("nitroseal1 ")) { // files and data objects begin with a line of their own
		_, rest, found := bytes.Cut(text, []byte("\n"))
		if !found {
			return nil, usage("the file is cut off: it has the first line of a store's file and nothing behind it")
		}
		text = rest
	}
	text = bytes.TrimSpace(text)
	if bytes.HasPrefix(text, []byte("vault:v")) {
		_, raw, err := transit.Parse(string(text))
		if err != nil {
			return nil, fmt.Errorf("reading the envelope: %w", err)
		}
		text = bytes.TrimSpace(raw)
	}
	if bytes.HasPrefix(text, []byte(`{"format":`)) {
		return cutHeld(text, item)
	}
	if item != "" {
		return nil, usage("it is one envelope; leave --item away")
	}
	return text, nil
}

// heldEnvelopes is what custody holds on the local disk until a store takes it, of an initialisation or an import.
type heldEnvelopes struct {
	Items []struct {
		Item     string          `json:"item"`
		Envelope json.RawMessage `json:"envelope"`
	} `json:"items"`
}

// cutHeld takes one of several envelopes.
func cutHeld(text []byte, item string) ([]byte, error) {
	var held heldEnvelopes
	if err := json.Unmarshal(text, &held); err != nil || len(held.Items) == 0 {
		return nil, errors.New("reading the envelope: it is neither an envelope nor keys that custody holds on the local disk")
	}
	items := make([]string, len(held.Items))
	for i, found := range held.Items {
		if items[i] = found.Item; found.Item == item || item == "" && len(held.Items) == 1 {
			return found.Envelope, nil
		}
	}
	return nil, usage("it holds the envelopes of several items: %s; name one with --item", strings.Join(items, ", "))
}

// describeContext says what an envelope claims to be.
func describeContext(c envelope.Context) string {
	what := string(c.Use)
	if c.Use == envelope.UseMaterial {
		what = fmt.Sprintf("%q of cluster %q, generation %d", c.Name, c.Cluster, c.Generation)
	}
	return fmt.Sprintf("%s, sealed with version %d of the wrapping key %q", what, c.Version, c.Key)
}

func equalHex(a, b string) bool { return strings.EqualFold(strings.TrimSpace(a), b) }
