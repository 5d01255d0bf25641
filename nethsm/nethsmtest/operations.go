package nethsmtest

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdsa"
	"crypto/ed25519"
	_ "crypto/md5"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1"
	_ "crypto/sha256"
	_ "crypto/sha512"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"slices"
	"strings"
)

// usable judges the mode and the tags, and decodes the data, in the original's order.
func (x *exchange) usable(mechanism, encoded, purpose string) (*keyRecord, []byte, *answer) {
	k := x.key()
	var a answer
	if k == nil {
		a = empty(http.StatusNotFound)
		return nil, nil, &a
	}
	if !x.user.meets(k) {
		a = refuse(http.StatusForbidden, "tags restriction not met")
		return nil, nil, &a
	}
	data, err := base64.StdEncoding.DecodeString(encoded) // which skips newlines, as the original does
	if err != nil || strings.Contains(encoded, "\r") {    // and carriage returns, which the original does not

		a = refuse(http.StatusBadRequest, "Couldn't decode data from base64: Wrong padding.")
		return nil, nil, &a
	}
	if !slices.Contains(k.Mechanisms, mechanism) {
		a = refuse(http.StatusBadRequest, "Key mechanisms do not allow requested "+purpose+".")
		return nil, nil, &a
	}
	return k, data, nil
}

// complaint is a 400 of an operation.
type complaint string

func (c complaint) Error() string { return string(c) }

// errCrash is where the original's code throws.
var errCrash = errors.New("Invalid_argument(\"Mirage_crypto: RSA: cannot decrypt 0\")")

// finish answers an operation that was carried out.
func (x *exchange) finish(k *keyRecord, err error, result any) answer {
	var c complaint
	switch {
	case errors.As(err, &c):
		return refuse(http.StatusBadRequest, string(c))
	case errors.Is(err, errCrash):
		return crash(errCrash.Error())
	case err != nil:
		return refuse(http.StatusBadRequest, err.Error())
	}
	k.used.Add(1)
	return jsonAnswer(result)
}

// private runs a private-key operation in the node's engine and counts it, failed or not, once it has begun.
func (x *exchange) private(work func()) {
	x.engine(func() {
		x.node.operations.Add(1)
		work()
	})
}

// engine runs work in the node's engine; the exchange ends where the client leaves before that is done.
func (x *exchange) engine(work func()) {
	if !x.node.operate(x.r.Context(), work) {
		panic(http.ErrAbortHandler)
	}
}

func decryptKey(x *exchange) answer {
	var mode, encrypted string
	var iv *string
	err := decode("decrypt_req", x.body(),
		choice("mode", "decrypt_mode", &mode, names(decryptModes)),
		text("encrypted", &encrypted),
		optionalText("iv", &iv))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	k, data, refused := x.usable(decryptModes[mode], encrypted, "decryption")
	if refused != nil {
		return *refused
	}
	var plain []byte
	x.private(func() {
		x.node.decrypts.Add(1)
		plain, err = k.decrypt(mode, data, iv)
	})
	return x.finish(k, err, struct {
		Decrypted string `json:"decrypted"`
	}{b64(plain)})
}

// optionalText is a text that may be missing or null.
func optionalText(name string, into **string) field {
	return optional(field{name: name, set: func(v any) string {
		s, ok := v.(string)
		switch {
		case v == nil:
			*into = nil
		case !ok:
			return "."
		default:
			*into = &s
		}
		return ""
	}})
}

const errDecryption complaint = "Decryption failure"

func (k *keyRecord) decrypt(mode string, data []byte, iv *string) ([]byte, error) {
	if k.Type == typeGeneric {
		if mode != "AES_CBC" {
			return nil, complaint("decrypt mode not supported by Generic key")
		}
		if iv == nil {
			return nil, complaint("AES-CBC decrypt requires IV")
		}
		plain, _, err := k.cbc(data, iv, "Decryption")
		return plain, err
	}
	key, ok := k.signer.(*rsa.PrivateKey)
	if !ok {
		return nil, complaint("Decryption only supported for RSA and Generic keys.")
	}
	return decryptRSA(key, mode, data)
}

func decryptRSA(key *rsa.PrivateKey, mode string, data []byte) ([]byte, error) {
	var plain []byte
	var err error
	switch {
	case mode == "RAW":
		c := new(big.Int).SetBytes(data)
		switch {
		case c.Sign() == 0:
			return nil, errCrash
		case c.Cmp(key.N) >= 0:
			return nil, errDecryption
		}
		return rawDecrypt(key, c), nil
	case mode == "PKCS1":
		plain, err = rsa.DecryptPKCS1v15(nil, key, data) //nolint:staticcheck // a mechanism of the original
	case strings.HasPrefix(mode, "OAEP_"):
		plain, err = rsa.DecryptOAEP(hashes[strings.TrimPrefix(mode, "OAEP_")].New(), nil, key, data, nil)
	default:
		return nil, errDecryption
	}
	if err != nil {
		return nil, errDecryption
	}
	return plain, nil
}

// cbc runs AES-CBC without padding; purpose is Encryption or Decryption. It returns the iv used as well.
func (k *keyRecord) cbc(data []byte, iv *string, purpose string) (result, usedIV []byte, err error) {
	fail := func(text string) error { return complaint(purpose + " failed: Mirage_crypto: " + text) }
	usedIV = random(aes.BlockSize)
	if iv != nil {
		if usedIV, err = base64.StdEncoding.DecodeString(*iv); err != nil {
			return nil, nil, complaint(purpose + " failed: Base64: Wrong padding")
		}
	}
	block, err := aes.NewCipher(k.Private)
	switch {
	case err != nil:
		return nil, nil, fail(fmt.Sprintf("AES: key length %d", len(k.Private)))
	case len(usedIV) != aes.BlockSize:
		return nil, nil, fail(fmt.Sprintf("CBC: IV length %d not of block size", len(usedIV)))
	case len(data)%aes.BlockSize != 0:
		return nil, nil, fail(fmt.Sprintf("CBC: argument length %d not of block size", len(data)))
	}
	result = make([]byte, len(data))
	if purpose == "Encryption" {
		cipher.NewCBCEncrypter(block, usedIV).CryptBlocks(result, data)
	} else {
		cipher.NewCBCDecrypter(block, usedIV).CryptBlocks(result, data)
	}
	return result, usedIV, nil
}

func encryptKey(x *exchange) answer {
	var mode, message string
	var iv *string
	err := decode("encrypt_req", x.body(),
		choice("mode", "encrypt_mode", &mode, []string{"AES_CBC"}),
		text("message", &message),
		optionalText("iv", &iv))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	k, data, refused := x.usable("AES_Encryption_CBC", message, "encryption")
	if refused != nil {
		return *refused
	}
	if k.Type != typeGeneric {
		return refuse(http.StatusBadRequest, "Encryption only supported for Generic keys.")
	}
	var encrypted, used []byte
	x.engine(func() { encrypted, used, err = k.cbc(data, iv, "Encryption") })
	return x.finish(k, err, struct {
		Encrypted string `json:"encrypted"`
		IV        string `json:"iv"`
	}{b64(encrypted), b64(used)})
}

func signKey(x *exchange) answer {
	var mode, message string
	err := decode("sign_req", x.body(),
		choice("mode", "sign_mode", &mode, names(signModes)),
		text("message", &message))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	k, data, refused := x.usable(signModes[mode], message, "signing")
	if refused != nil {
		return *refused
	}
	var signature []byte
	x.private(func() { signature, err = k.sign(mode, data) })
	return x.finish(k, err, struct {
		Signature string `json:"signature"`
	}{b64(signature)})
}

func (k *keyRecord) sign(mode string, data []byte) ([]byte, error) {
	switch key := k.signer.(type) {
	case nil:
		return nil, complaint("Generic keys can't sign.")
	case *rsa.PrivateKey:
		return signRSA(key, mode, data)
	case ed25519.PrivateKey:
		if mode == "EdDSA" {
			return key.Sign(rand.Reader, data, crypto.Hash(0))
		}
	case *ecdsa.PrivateKey:
		if mode == "ECDSA" {
			return ecdsa.SignASN1(rand.Reader, key, data)
		}
	}
	return nil, complaint("invalid sign mode")
}

func signRSA(key *rsa.PrivateKey, mode string, data []byte) ([]byte, error) {
	if mode == "PKCS1" {
		// The message is a DigestInfo already: no hash is named, and nothing is prepended.
		signature, err := rsa.SignPKCS1v15(nil, key, 0, data)
		if err != nil {
			return nil, complaint("Signing failure: RSA key too short.")
		}
		return signature, nil
	}
	name, ok := strings.CutPrefix(mode, "PSS_")
	if !ok {
		return nil, complaint("invalid sign mode")
	}
	hash := hashes[name]
	if len(data) != hash.Size() {
		return nil, complaint("Signing failure: digest of wrong length")
	}
	signature, err := rsa.SignPSS(rand.Reader, key, hash, data, &rsa.PSSOptions{SaltLength: hash.Size()})
	if err != nil {
		return nil, complaint("Signing failure: RSA key too short.")
	}
	return signature, nil
}

func randomBytes(x *exchange) answer {
	var length int
	if err := decode("random_req", x.body(), integer("length", &length)); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if length < 1 || length > 1024 {
		return refuse(http.StatusBadRequest, "Invalid data for JSON schema: length must be between 1 and 1024.")
	}
	var bytes []byte
	x.engine(func() { bytes = random(length) })
	return jsonAnswer(struct {
		Random string `json:"random"`
	}{b64(bytes)})
}
