package cluster

import (
	"bytes"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
)

// Limits of shares that people give us. A share of Vault's is as long as a key of AES-256 and one byte that numbers it; where
// there is one share, it is the key itself.
const (
	MaxSharesFile = 64 << 10 // bytes
	maxShares     = 255
	minShare      = 32
	maxShare      = 33
	maxRootToken  = 512
)

// ErrShares is what cannot be read as shares. Its sentences name lines and numbers, never what stands there.
var ErrShares = errors.New("these are no shares")

// GivenShares are shares as a person gives them, from a file or typed in.
type GivenShares struct {
	Shares, RecoveryShares [][]byte
	RootToken              []byte
	// What the file says of them; 0 where it does not.
	N, T, RecoveryN, RecoveryT int
}

// Wipe overwrites all of it.
func (g *GivenShares) Wipe() {
	if g == nil {
		return
	}
	wipeAll(g.Shares)
	wipeAll(g.RecoveryShares)
	clear(g.RootToken)
}

func wipeAll(secrets [][]byte) {
	for _, secret := range secrets {
		clear(secret)
	}
}

// ParseShares reads what `vault operator init` wrote, as JSON or as text, or one share a line in base64 or hexadecimal. The
// caller wipes raw and the result.
func ParseShares(raw []byte) (*GivenShares, error) {
	if len(raw) > MaxSharesFile {
		return nil, fmt.Errorf("%w: there are more than %d KiB; is it the right file?", ErrShares, MaxSharesFile>>10)
	}
	given := new(GivenShares)
	var err error
	if trimmed := bytes.TrimSpace(raw); bytes.HasPrefix(trimmed, []byte("{")) {
		err = given.parseJSON(trimmed)
	} else {
		err = given.parseLines(raw)
	}
	if err == nil {
		err = given.check()
	}
	if err != nil {
		given.Wipe()
		return nil, err
	}
	return given, nil
}

// ParseShare reads one share, in base64 or hexadecimal. The caller wipes text and the result.
func ParseShare(text []byte) ([]byte, error) {
	text = bytes.TrimSpace(text)
	var share []byte
	n, err := 0, error(nil)
	switch len(text) { // which tells the two from each other
	case hex.EncodedLen(minShare), hex.EncodedLen(maxShare):
		share = make([]byte, hex.DecodedLen(len(text)))
		n, err = hex.Decode(share, text)
	case base64.StdEncoding.EncodedLen(minShare): // as long as that of maxShare
		share = make([]byte, base64.StdEncoding.DecodedLen(len(text)))
		n, err = base64.StdEncoding.Strict().Decode(share, text)
	}
	if err == nil && fits(n) {
		return share[:n:n], nil
	}
	clear(share)
	return nil, fmt.Errorf("%w: it is neither base64 nor hexadecimal of %d to %d bytes", ErrShares, minShare, maxShare)
}

func fits(size int) bool { return minShare <= size && size <= maxShare }

// secretText is a JSON string without escapes, as a slice of its own: encoding/json would make an immutable string of it.
type secretText []byte

// UnmarshalJSON implements json.Unmarshaler.
func (s *secretText) UnmarshalJSON(raw []byte) error {
	if string(raw) == "null" {
		return nil
	}
	if len(raw) < 2 || raw[0] != '"' || bytes.IndexByte(raw, '\\') >= 0 {
		return errors.New("not a plain string")
	}
	*s = bytes.Clone(raw[1 : len(raw)-1])
	return nil
}

// initJSON is what `vault operator init -format=json` writes, and below it what the API itself answers.
type initJSON struct {
	UnsealKeysB64     []secretText `json:"unseal_keys_b64"`
	UnsealKeysHex     []secretText `json:"unseal_keys_hex"`
	UnsealShares      int          `json:"unseal_shares"`
	UnsealThreshold   int          `json:"unseal_threshold"`
	RecoveryKeysB64   []secretText `json:"recovery_keys_b64"`
	RecoveryKeysHex   []secretText `json:"recovery_keys_hex"`
	RecoveryShares    int          `json:"recovery_keys_shares"`
	RecoveryThreshold int          `json:"recovery_keys_threshold"`
	RootToken         secretText   `json:"root_token"`

	Keys               []secretText `json:"keys"`
	KeysBase64         []secretText `json:"keys_base64"`
	RecoveryKeys       []secretText `json:"recovery_keys"`
	RecoveryKeysBase64 []secretText `json:"recovery_keys_base64"`
}

func (j *initJSON) wipe() {
	for _, texts := range [][]secretText{
		j.UnsealKeysB64, j.UnsealKeysHex, j.RecoveryKeysB64, j.RecoveryKeysHex, j.Keys, j.KeysBase64, j.RecoveryKeys, j.RecoveryKeysBase64,
	} {
		for _, text := range texts {
			clear(text)
		}
	}
	clear(j.RootToken)
}

func (g *GivenShares) parseJSON(raw []byte) error {
	var j initJSON
	defer j.wipe()
	if err := json.Unmarshal(raw, &j); err != nil {
		return fmt.Errorf("%w: the JSON cannot be read%s; give it as `vault operator init -format=json` wrote it", ErrShares, jsonPlace(err))
	}
	var err error
	if g.Shares, err = sharesOf("the unseal keys", j.UnsealKeysB64, j.UnsealKeysHex, j.Keys, j.KeysBase64); err != nil {
		return err
	}
	if g.RecoveryShares, err = sharesOf("the recovery keys", j.RecoveryKeysB64, j.RecoveryKeysHex, j.RecoveryKeys, j.RecoveryKeysBase64); err != nil {
		return err
	}
	if len(j.RootToken) > 0 {
		g.RootToken = bytes.Clone(j.RootToken)
	}
	g.N, g.T, g.RecoveryN, g.RecoveryT = j.UnsealShares, j.UnsealThreshold, j.RecoveryShares, j.RecoveryThreshold
	return nil
}

// jsonPlace says where JSON is wrong, and nothing of what stands there.
func jsonPlace(err error) string {
	if syntax := (*json.SyntaxError)(nil); errors.As(err, &syntax) {
		return " at byte " + strconv.FormatInt(syntax.Offset, 10)
	}
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) {
		return " at byte " + strconv.FormatInt(wrong.Offset, 10)
	}
	return ""
}

// sharesOf reads the same shares from as many lists as there are, which must agree.
func sharesOf(what string, lists ...[]secretText) (shares [][]byte, err error) {
	for _, texts := range lists {
		if len(texts) == 0 {
			continue
		}
		read := make([][]byte, 0, len(texts))
		for i, text := range texts {
			share, err := ParseShare(text)
			if err != nil {
				wipeAll(shares)
				wipeAll(read)
				return nil, fmt.Errorf("%s: number %d: %w", what, i+1, err)
			}
			read = append(read, share)
		}
		if shares == nil {
			shares = read
			continue
		}
		same := slices.EqualFunc(shares, read, sameSecret)
		wipeAll(read)
		if !same {
			wipeAll(shares)
			return nil, fmt.Errorf("%w: %s in base64 and in hexadecimal are not the same; somebody changed the file", ErrShares, what)
		}
	}
	return shares, nil
}

func sameSecret(a, b []byte) bool { return subtle.ConstantTimeCompare(a, b) == 1 }

// The lines that `vault operator init` and `vault operator rekey` write.
var (
	unsealKeyLine   = []byte("Unseal Key ")
	recoveryKeyLine = []byte("Recovery Key ")
	rekeyedKeyLine  = []byte("Key ")
	rootTokenLine   = []byte("Initial Root Token:")
)

// parseLines reads the text output, where a line of it is found, else one share a line.
func (g *GivenShares) parseLines(raw []byte) error {
	var bare [][]byte
	var bareLine []int
	titled := false
	number := 0
	for line := range bytes.Lines(raw) {
		number++
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			continue
		}
		found, err := g.parseTitled(line)
		if err != nil {
			return fmt.Errorf("line %d: %w", number, err)
		}
		titled = titled || found
		if !found {
			bare, bareLine = append(bare, line), append(bareLine, number)
		}
	}
	if titled { // the other lines are sentences
		for _, line := range bare {
			g.parseSentence(line)
		}
		return nil
	}
	for i, line := range bare {
		share, err := ParseShare(line)
		if err != nil {
			return fmt.Errorf("line %d: %w", bareLine[i], err)
		}
		if len(g.Shares) == maxShares {
			clear(share)
			return fmt.Errorf("%w: there are more than %d", ErrShares, maxShares)
		}
		g.Shares = append(g.Shares, share)
	}
	return nil
}

// parseTitled reads a line that says what it holds.
func (g *GivenShares) parseTitled(line []byte) (found bool, err error) {
	if token, ok := bytes.CutPrefix(line, rootTokenLine); ok {
		if g.RootToken != nil {
			return true, fmt.Errorf("%w: it is the second root token; give one output of `vault operator init`", ErrShares)
		}
		g.RootToken = bytes.Clone(bytes.TrimSpace(token))
		return true, nil
	}
	for _, kind := range []struct {
		title []byte
		into  *[][]byte
	}{{unsealKeyLine, &g.Shares}, {recoveryKeyLine, &g.RecoveryShares}, {rekeyedKeyLine, &g.Shares}} {
		rest, ok := bytes.CutPrefix(line, kind.title)
		if !ok {
			continue
		}
		number, text, ok := bytes.Cut(rest, []byte(":"))
		if !ok || !allDigits(number) {
			continue
		}
		share, err := ParseShare(text)
		if err != nil {
			return true, err
		}
		if len(*kind.into) == maxShares {
			clear(share)
			return true, fmt.Errorf("%w: there are more than %d", ErrShares, maxShares)
		}
		*kind.into = append(*kind.into, share)
		return true, nil
	}
	return false, nil
}

func allDigits(text []byte) bool {
	for _, c := range text {
		if c < '0' || c > '9' {
			return false
		}
	}
	return len(text) > 0 && len(text) <= 3
}

// parseSentence reads "… initialized with 5 key shares and a key threshold of 3. …".
func (g *GivenShares) parseSentence(line []byte) {
	before, after, ok := bytes.Cut(line, []byte("initialized with "))
	if !ok {
		return
	}
	n, rest := cutNumber(after)
	rest, ok = bytes.CutPrefix(rest, []byte(" key shares and a key threshold of "))
	t, _ := cutNumber(rest)
	switch {
	case !ok || n == 0 || t == 0:
	case bytes.HasPrefix(before, []byte("Recovery")):
		g.RecoveryN, g.RecoveryT = n, t
	default:
		g.N, g.T = n, t
	}
}

// cutNumber cuts a number of up to three digits off the front; 0 where there is none.
func cutNumber(text []byte) (number int, rest []byte) {
	end := 0
	for end < len(text) && end < 3 && '0' <= text[end] && text[end] <= '9' {
		number = number*10 + int(text[end]-'0')
		end++
	}
	return number, text[end:]
}

// check refuses what cannot be the shares of one key.
func (g *GivenShares) check() error {
	if len(g.Shares) == 0 && len(g.RecoveryShares) == 0 {
		return fmt.Errorf("%w: there is none; give what `vault operator init` wrote, or one share a line in base64 or hexadecimal", ErrShares)
	}
	for _, kind := range []struct {
		what   string
		shares [][]byte
		n, t   int
	}{{"unseal key", g.Shares, g.N, g.T}, {"recovery key", g.RecoveryShares, g.RecoveryN, g.RecoveryT}} {
		if err := checkShares(kind.what, kind.shares); err != nil {
			return err
		}
		switch {
		case kind.n < 0 || kind.t < 0 || kind.n > maxShares || kind.t > maxShares:
			return fmt.Errorf("%w: %d %ss with a threshold of %d are impossible", ErrShares, kind.n, kind.what, kind.t)
		case kind.n > 0 && len(kind.shares) > kind.n:
			return fmt.Errorf("%w: there are %d %ss where the output says %d; give one output of `vault operator init`",
				ErrShares, len(kind.shares), kind.what, kind.n)
		}
	}
	if len(g.RootToken) > maxRootToken || bytes.ContainsFunc(g.RootToken, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return fmt.Errorf("%w: the root token is none", ErrShares)
	}
	return nil
}

// checkShares refuses shares that cannot be of one key: of different lengths, or one twice.
func checkShares(what string, shares [][]byte) error {
	if len(shares) > maxShares {
		return fmt.Errorf("%w: %d %ss; Vault makes %d at most", ErrShares, len(shares), what, maxShares)
	}
	for i, share := range shares {
		if !fits(len(share)) {
			return fmt.Errorf("%w: %s %d has %d bytes, which no share of Vault's has", ErrShares, what, i+1, len(share))
		}
		if len(share) != len(shares[0]) {
			return fmt.Errorf("%w: %s %d has another length than the first one; is a character missing?", ErrShares, what, i+1)
		}
		for j, earlier := range shares[:i] {
			if sameSecret(share, earlier) {
				return fmt.Errorf("%w: %s %d is the same as number %d; give each once", ErrShares, what, i+1, j+1)
			}
		}
	}
	return nil
}
