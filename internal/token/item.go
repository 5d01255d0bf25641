package token

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"
)

// itemFormat is the version of the form of items.
const itemFormat = 1

// maxItem is the size of the largest item, in bytes: a token with all that it can have is half of it.
const maxItem = 64 << 10

// item is a token as it lies in the store. It holds no secret.
type item struct {
	Format           int      `json:"format"`
	ID               string   `json:"id"`
	Name             string   `json:"name"`
	SHA256           string   `json:"sha256"` // of the token's text, in hexadecimal
	Keys             []string `json:"keys"`
	CertificateNames []string `json:"certificate_names,omitempty"`
	Addresses        []string `json:"addresses,omitempty"`
	Rate             *int     `json:"rate,omitempty"` // with burst, or neither is there
	Burst            *int     `json:"burst,omitempty"`
	Created          string   `json:"created"` // RFC 3339, UTC, seconds
	CreatedBy        string   `json:"created_by"`
}

// encode is the form of a token in the store.
func encode(t *Token) ([]byte, error) {
	i := item{
		Format: itemFormat, ID: t.ID, Name: t.Name, SHA256: hex.EncodeToString(t.Hash[:]), Keys: t.Keys, CertificateNames: t.CertificateNames,
		Created: t.Created.UTC().Format(time.RFC3339), CreatedBy: t.CreatedBy,
	}
	for _, network := range t.Addresses {
		i.Addresses = append(i.Addresses, network.String())
	}
	if t.Limit != nil {
		i.Rate, i.Burst = &t.Limit.Rate, &t.Limit.Burst
	}
	raw, err := json.Marshal(i)
	if err != nil {
		return nil, fmt.Errorf("encoding token %s: %w", t.ID, err)
	}
	return raw, nil
}

// decode reads an item. Only what encode writes is one: so no member is there twice, nothing is there that this version would
// overlook, and what is bound stays bound.
func decode(raw []byte) (Token, error) {
	t, err := read(raw)
	if err != nil {
		return Token{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	again, err := encode(&t)
	if err != nil || !bytes.Equal(raw, again) {
		return Token{}, fmt.Errorf("%w: it is not in the form in which items are written", ErrMalformed)
	}
	return t, nil
}

func read(raw []byte) (Token, error) {
	if len(raw) > maxItem {
		return Token{}, fmt.Errorf("it has more than %d bytes", maxItem)
	}
	var i item
	decoder := json.NewDecoder(bytes.NewReader(raw))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(&i)
	if i.Format > itemFormat {
		return Token{}, fmt.Errorf("it is of format %d, made by a later version, and this one knows %d", i.Format, itemFormat)
	}
	if err != nil {
		return Token{}, err
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return Token{}, errors.New("there is more behind it")
	}
	if i.Format != itemFormat {
		return Token{}, fmt.Errorf("it is of format %d", i.Format)
	}
	t := Token{ID: i.ID, Name: i.Name, Keys: i.Keys, CertificateNames: i.CertificateNames, CreatedBy: i.CreatedBy}
	hash, err := hex.DecodeString(i.SHA256)
	if err != nil || len(hash) != len(t.Hash) {
		return Token{}, errors.New("sha256 is no SHA-256")
	}
	copy(t.Hash[:], hash)
	for _, text := range i.Addresses {
		network, err := netip.ParsePrefix(text)
		if err != nil {
			return Token{}, err
		}
		t.Addresses = append(t.Addresses, network)
	}
	if (i.Rate == nil) != (i.Burst == nil) {
		return Token{}, errors.New("rate and burst belong together")
	}
	if i.Rate != nil {
		t.Limit = &Limit{Rate: *i.Rate, Burst: *i.Burst}
	}
	if t.Created, err = time.Parse(time.RFC3339, i.Created); err != nil {
		return Token{}, errors.New("created is no time")
	}
	return t, t.check()
}
