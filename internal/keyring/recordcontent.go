package keyring

// KeyRecordContent is what a key record tells to who opens envelopes without a keyring.
type KeyRecordContent struct {
	// Name is the wrapping key's.
	Name string
	// SHA256 is the record's, in hexadecimal. Anybody could have made a record: it is the one that was printed when the key was
	// made, or the record proves nothing.
	SHA256 string
	// AuthEnvelopes hold the authentication keys of the versions, by the versions' numbers.
	AuthEnvelopes map[int][]byte
}

// ReadKeyRecord reads a key record strictly; [ErrRecordMalformed] for anything else.
func ReadKeyRecord(raw []byte) (KeyRecordContent, error) {
	r, err := readKeyRecord(raw)
	if err != nil {
		return KeyRecordContent{}, err
	}
	content := KeyRecordContent{Name: r.Name, SHA256: r.canonical().SHA256, AuthEnvelopes: make(map[int][]byte, len(r.Versions))}
	for _, v := range r.Versions {
		content.AuthEnvelopes[v.Number] = v.AuthEnvelope
	}
	return content, nil
}
