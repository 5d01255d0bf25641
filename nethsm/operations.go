package nethsm

import (
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Mode is how a key is used. Each needs the key's mechanism of that name.
type Mode string

// The modes of [Client.Decrypt] are RAW to AES_CBC, those of [Client.Sign] PKCS1 and PSS_MD5 to BIP340.
const (
	ModeRAW        Mode = "RAW"   // textbook RSA
	ModePKCS1      Mode = "PKCS1" // RSAES-PKCS1-v1_5; to sign, RSASSA-PKCS1-v1_5
	ModeOAEPMD5    Mode = "OAEP_MD5"
	ModeOAEPSHA1   Mode = "OAEP_SHA1"
	ModeOAEPSHA224 Mode = "OAEP_SHA224"
	ModeOAEPSHA256 Mode = "OAEP_SHA256" // one hash for label and MGF1, an empty label
	ModeOAEPSHA384 Mode = "OAEP_SHA384"
	ModeOAEPSHA512 Mode = "OAEP_SHA512"
	ModeAESCBC     Mode = "AES_CBC" // without padding and without authentication
	ModePSSMD5     Mode = "PSS_MD5"
	ModePSSSHA1    Mode = "PSS_SHA1"
	ModePSSSHA224  Mode = "PSS_SHA224"
	ModePSSSHA256  Mode = "PSS_SHA256"
	ModePSSSHA384  Mode = "PSS_SHA384"
	ModePSSSHA512  Mode = "PSS_SHA512"
	ModeEdDSA      Mode = "EdDSA"
	ModeECDSA      Mode = "ECDSA"
	ModeBIP340     Mode = "BIP340"
)

// answerTo is the largest answer to an operation on so much content: it is as long, in base64, and a few words.
func answerTo(content []byte) int64 { return defaultLimit + 2*int64(len(content)) }

// Decrypt decrypts with a private or secret key, as an Operator; iv is for AES_CBC only. A ciphertext that does not decrypt
// is [hsm.ErrCiphertext], a key without the mechanism [hsm.ErrUnsupported]. The caller wipes the result.
func (c *Client) Decrypt(ctx context.Context, id string, mode Mode, ciphertext, iv []byte) ([]byte, error) {
	op := fmt.Sprintf("decrypting with key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return nil, err
	}
	var got struct {
		Decrypted *[]byte `json:"decrypted"`
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPost, path: path("keys", id, "decrypt"), limit: answerTo(ciphertext),
		body: struct {
			Mode      Mode   `json:"mode"`
			Encrypted []byte `json:"encrypted"`
			IV        []byte `json:"iv,omitempty"`
		}{mode, orEmpty(ciphertext), iv},
		into: wanting(&got, func() error { return decoded("decrypted", got.Decrypted) }),
	})
	if err != nil {
		return nil, err
	}
	return *got.Decrypted, nil
}

// Sign signs with a private key, as an Operator. The message is what the mode signs: for PKCS1 the DigestInfo (before 3.1
// the digest alone), for PSS and ECDSA the digest, for EdDSA and BIP340 the message itself. An ECDSA signature is DER.
func (c *Client) Sign(ctx context.Context, id string, mode Mode, message []byte) ([]byte, error) {
	op := fmt.Sprintf("signing with key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return nil, err
	}
	var got struct {
		Signature *[]byte `json:"signature"`
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPost, path: path("keys", id, "sign"),
		body: struct {
			Mode    Mode   `json:"mode"`
			Message []byte `json:"message"`
		}{mode, orEmpty(message)},
		into: wanting(&got, func() error { return decoded("signature", got.Signature) }),
	})
	if err != nil {
		return nil, err
	}
	return *got.Signature, nil
}

// Encrypt encrypts with a secret key by AES-CBC, as an Operator. The message is a multiple of 16 bytes. Without an iv the
// NetHSM chooses one; the one that was used is returned. An RSA key encrypts in software, with its public key.
func (c *Client) Encrypt(ctx context.Context, id string, message, iv []byte) (ciphertext, usedIV []byte, err error) {
	op := fmt.Sprintf("encrypting with key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return nil, nil, err
	}
	var got struct {
		Encrypted *[]byte `json:"encrypted"`
		IV        *[]byte `json:"iv"`
	}
	_, err = c.do(ctx, call{
		op: op, method: http.MethodPost, path: path("keys", id, "encrypt"), limit: answerTo(message),
		body: struct {
			Mode    Mode   `json:"mode"`
			Message []byte `json:"message"`
			IV      []byte `json:"iv,omitempty"`
		}{ModeAESCBC, orEmpty(message), iv},
		into: wanting(&got, func() error {
			return errors.Join(decoded("encrypted", got.Encrypted), decoded("iv", got.IV))
		}),
	})
	if err != nil {
		return nil, nil, err
	}
	return *got.Encrypted, *got.IV, nil
}

// maxRandom is how many bytes a NetHSM makes at a time.
const maxRandom = 1024

// Random returns n bytes of the NetHSM's generator, 1 ≤ n ≤ 1024, to an Operator.
func (c *Client) Random(ctx context.Context, n int) ([]byte, error) {
	const op = "asking for random bytes"
	if n < 1 || n > maxRandom {
		return nil, fmt.Errorf("%s: %w: %d bytes were asked for; a NetHSM makes 1 to %d at a time", op, ErrRequest, n, maxRandom)
	}
	var got struct {
		Random []byte `json:"random"`
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPost, path: "/random",
		body: struct {
			Length int `json:"length"`
		}{n},
		into: wanting(&got, func() error {
			if len(got.Random) != n {
				return fmt.Errorf("%d bytes were asked for, and %d came", n, len(got.Random))
			}
			return nil
		}),
	})
	return got.Random, err
}

// orEmpty keeps an empty value from being JSON's null.
func orEmpty(value []byte) []byte {
	if value == nil {
		return []byte{}
	}
	return value
}

// decoded is the check for a member of base64, which may be empty.
func decoded(name string, value *[]byte) error {
	if value == nil {
		return errors.New("the member " + name + " is missing")
	}
	return nil
}
