package audit

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// The events of a line, and the results of an outcome.
const (
	EventIntent  = "intent"
	EventOutcome = "outcome"

	ResultOK     = "ok"
	ResultFailed = "failed"
)

// MaxLine is the longest line in bytes, its newline included: with the head of a syslog message it stays under the 8 KiB that
// rsyslog takes by default.
const MaxLine = 7 << 10

// How much of each text a line takes, in bytes as they are written.
const (
	maxText    = 256 // verb, cluster, node, host, program
	maxBy      = 512
	maxError   = 2048
	maxDetails = 12
	maxKey     = 32
	maxDetail  = 128
)

// record is a line as it is encoded, in this order.
type record struct {
	Time    time.Time         `json:"time"`
	ID      string            `json:"id"` // joins intent and outcome
	Event   string            `json:"event"`
	Verb    string            `json:"verb"`
	Cluster string            `json:"cluster,omitempty"`
	Node    string            `json:"node,omitempty"`
	By      string            `json:"by,omitempty"`
	Host    string            `json:"host"`
	Program string            `json:"program"`
	PID     int               `json:"pid"`
	Detail  map[string]string `json:"detail,omitempty"`
	Result  string            `json:"result,omitempty"`  // of an outcome
	Seconds float64           `json:"seconds,omitempty"` // from intent to outcome
	Error   string            `json:"error,omitempty"`
	Missed  *missed           `json:"missed,omitempty"` // by this sink, just before this line
}

// missed tells of the lines that a sink did not take since the last one that it took.
type missed struct {
	Lines uint64    `json:"lines"`
	Since time.Time `json:"since"`
	Error string    `json:"error"` // why the newest of them was not taken
}

// encode returns the line with its newline.
func (r record) encode() ([]byte, error) {
	r.Time = r.Time.UTC().Truncate(time.Microsecond)
	r.Verb, r.Cluster, r.Node = cut(r.Verb, maxText), cut(r.Cluster, maxText), cut(r.Node, maxText)
	r.Host, r.Program, r.By = cut(r.Host, maxText), cut(r.Program, maxText), cut(r.By, maxBy)
	r.Error = cut(r.Error, maxError)
	r.Seconds = float64(int64(r.Seconds*1e6)) / 1e6
	r.Detail = cutDetail(r.Detail)
	if r.Missed != nil {
		told := *r.Missed
		told.Since, told.Error = told.Since.UTC().Truncate(time.Microsecond), cut(told.Error, maxBy)
		r.Missed = &told
	}
	line, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encoding a line of the audit log: %w", err)
	}
	return append(escape(line), '\n'), nil
}

// cutDetail bounds number, names and values of details. Of too many, the first in the order of names are kept.
func cutDetail(detail map[string]string) map[string]string {
	if len(detail) == 0 {
		return nil
	}
	bounded := make(map[string]string, min(len(detail), maxDetails))
	names := make([]string, 0, len(detail))
	for name := range detail {
		names = append(names, name)
	}
	slices.Sort(names)
	for i, name := range names {
		if i == maxDetails-1 && len(names) > maxDetails {
			bounded["more"] = fmt.Sprintf("%d left out", len(names)-i)
			break
		}
		bounded[cut(name, maxKey)] = cut(detail[name], maxDetail)
	}
	return bounded
}

// cut shortens text to what fits into size bytes of a line, and says so by its end.
func cut(text string, size int) string {
	const ellipsis = "..."
	used, fits := 0, 0 // fits is how much of text leaves room for the ellipsis
	for i, r := range text {
		if used+len(ellipsis) <= size {
			fits = i
		}
		if used += encodedSize(r); used > size {
			return text[:fits] + ellipsis
		}
	}
	return text
}

// encodedSize is how many bytes a character takes in a line.
func encodedSize(r rune) int {
	switch {
	case r >= 0x10000:
		return 12 // a surrogate pair
	case r < ' ', r >= 0x7f, r == '<', r == '>', r == '&':
		return 6
	case r == '"', r == '\\':
		return 2
	default:
		return 1
	}
}

// escape makes JSON printable ASCII, so that no line changes the terminal or the order of the characters that somebody reads
// it with. Outside of strings JSON is ASCII already.
func escape(line []byte) []byte {
	if !slices.ContainsFunc(line, func(c byte) bool { return c >= 0x7f }) { // nearly always
		return line
	}
	var b strings.Builder
	b.Grow(len(line))
	for i := 0; i < len(line); {
		r, size := utf8.DecodeRune(line[i:])
		i += size
		switch {
		case r >= 0x10000:
			high, low := (r-0x10000)>>10+0xd800, (r-0x10000)&0x3ff+0xdc00
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		case r >= 0x7f:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	return []byte(b.String())
}
