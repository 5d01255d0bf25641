package nodetest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// parsePGP reads the base64 of a binary OpenPGP key.
func parsePGP(text string) (*openpgp.Entity, error) {
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, err
	}
	return openpgp.ReadEntity(packet.NewReader(bytes.NewReader(raw)))
}

// encrypt encrypts a text to a key that parsePGP took, as Vault does: a binary message.
func encrypt(key, text string) []byte {
	entity, err := parsePGP(key)
	var out bytes.Buffer
	if err == nil {
		plain, failed := openpgp.Encrypt(&out, []*openpgp.Entity{entity}, nil, nil, nil)
		if err = failed; err == nil {
			_, err = plain.Write([]byte(text))
			err = errors.Join(err, plain.Close())
		}
	}
	if err != nil {
		panic(err) // a key of a test that cannot encrypt
	}
	return out.Bytes()
}

func fingerprint(key string) string {
	entity, err := parsePGP(key)
	if err != nil {
		return ""
	}
	return hex.EncodeToString(entity.PrimaryKey.Fingerprint)
}

// told is how an answer tells shares: in hex and in base64, as they are, or the hex of them encrypted.
func told(k *keys, pgp []string) (inHex, inBase64 []string) {
	inHex, inBase64 = []string{}, []string{}
	for i, share := range k.shares {
		if len(pgp) > 0 {
			share = encrypt(pgp[i], hex.EncodeToString(share))
		}
		inHex = append(inHex, hex.EncodeToString(share))
		inBase64 = append(inBase64, base64.StdEncoding.EncodeToString(share))
	}
	return inHex, inBase64
}
