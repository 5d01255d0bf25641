package main

import (
	"bytes"
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// maxRecovered is the largest text that an envelope comes in: on the transit wire, in base64.
const maxRecovered = envelope.MaxSize*4/3 + 1024

// cutEnvelope takes an envelope out of what it came in: the frame of a file or data object, the transit wire, the line end
// that tools add.
func cutEnvelope(text []byte) ([]byte, error) {
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
		return bytes.TrimSpace(raw), nil
	}
	return text, nil
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
