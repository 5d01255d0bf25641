package node

import (
	"encoding/base64"
	"encoding/hex"
	"errors"
)

// shareList collects shares. Vault tells each set twice, in hex and in base64; the longer list is kept, should one of them be
// incomplete.
type shareList struct{ raw [][]byte }

// encoding is how a share is written.
type encoding struct {
	size   func(int) int
	decode func(to, from []byte) (int, error)
}

var (
	inHex    = encoding{hex.DecodedLen, hex.Decode}
	inBase64 = encoding{base64.StdEncoding.DecodedLen, base64.StdEncoding.Decode}
)

func (l *shareList) read(s *scanner, as encoding) error {
	var raw [][]byte
	err := s.texts(func(text []byte) error {
		share, err := as.raw(text)
		if err != nil {
			return err
		}
		raw = append(raw, share)
		return nil
	})
	if len(raw) > len(l.raw) {
		l.raw, raw = raw, l.raw
	}
	wipe(raw)
	return err
}

// raw undoes the encoding into memory of its own.
func (as encoding) raw(text []byte) ([]byte, error) {
	raw := make([]byte, as.size(len(text)))
	size, err := as.decode(raw, text)
	if err != nil || size == 0 {
		clear(raw)
		return nil, errors.New("it holds something that is no share")
	}
	return raw[:size], nil
}
