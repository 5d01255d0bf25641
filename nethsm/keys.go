package nethsm

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"time"
	"unicode/utf8"
)

// KeyType is a kind of key.
type KeyType string

// The types of keys.
const (
	TypeRSA           KeyType = "RSA"
	TypeCurve25519    KeyType = "Curve25519" // Ed25519
	TypeECP256        KeyType = "EC_P256"
	TypeECP384        KeyType = "EC_P384"
	TypeECP521        KeyType = "EC_P521"
	TypeECP256K1      KeyType = "EC_P256K1"
	TypeBrainpoolP256 KeyType = "BrainpoolP256"
	TypeBrainpoolP384 KeyType = "BrainpoolP384"
	TypeBrainpoolP512 KeyType = "BrainpoolP512"
	TypeGeneric       KeyType = "Generic" // a secret key, for AES
)

// Mechanism is one use of a key. A key has those that it was made with, for ever.
type Mechanism string

// The mechanisms.
const (
	RSADecryptionRAW        Mechanism = "RSA_Decryption_RAW"
	RSADecryptionPKCS1      Mechanism = "RSA_Decryption_PKCS1"
	RSADecryptionOAEPMD5    Mechanism = "RSA_Decryption_OAEP_MD5"
	RSADecryptionOAEPSHA1   Mechanism = "RSA_Decryption_OAEP_SHA1"
	RSADecryptionOAEPSHA224 Mechanism = "RSA_Decryption_OAEP_SHA224"
	RSADecryptionOAEPSHA256 Mechanism = "RSA_Decryption_OAEP_SHA256"
	RSADecryptionOAEPSHA384 Mechanism = "RSA_Decryption_OAEP_SHA384"
	RSADecryptionOAEPSHA512 Mechanism = "RSA_Decryption_OAEP_SHA512"
	RSASignaturePKCS1       Mechanism = "RSA_Signature_PKCS1"
	RSASignaturePSSMD5      Mechanism = "RSA_Signature_PSS_MD5"
	RSASignaturePSSSHA1     Mechanism = "RSA_Signature_PSS_SHA1"
	RSASignaturePSSSHA224   Mechanism = "RSA_Signature_PSS_SHA224"
	RSASignaturePSSSHA256   Mechanism = "RSA_Signature_PSS_SHA256"
	RSASignaturePSSSHA384   Mechanism = "RSA_Signature_PSS_SHA384"
	RSASignaturePSSSHA512   Mechanism = "RSA_Signature_PSS_SHA512"
	EdDSASignature          Mechanism = "EdDSA_Signature"
	ECDSASignature          Mechanism = "ECDSA_Signature"
	BIP340Signature         Mechanism = "BIP340_Signature"
	AESEncryptionCBC        Mechanism = "AES_Encryption_CBC"
	AESDecryptionCBC        Mechanism = "AES_Decryption_CBC"
)

// maxLabel is the longest label in bytes.
const maxLabel = 32

// generating is the deadline of making an RSA key: an appliance looks for long primes for a while.
const generating = 5 * time.Minute

// Key describes a key.
type Key struct {
	ID         string
	Label      string // empty: none
	Type       KeyType
	Mechanisms []Mechanism
	// Tags restrict the key to Operators who have one of them; with none every Operator of the namespace may use it.
	Tags []string
	// Public is an *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey. It is nil for a Generic key, which has none, and
	// for curves that Go does not know; [Client.PublicPEM] has those.
	Public crypto.PublicKey
	// Operations counts uses of the key, roughly: a node writes it down once an hour.
	Operations int64
}

// UnmarshalJSON implements json.Unmarshaler for a key as a NetHSM describes it, which is without its id.
func (k *Key) UnmarshalJSON(text []byte) error {
	var got struct {
		Type         KeyType     `json:"type"`
		Mechanisms   []Mechanism `json:"mechanisms"`
		Operations   int64       `json:"operations"`
		Label        string      `json:"label"`
		Public       *publicKey  `json:"public"`
		Restrictions struct {
			Tags []string `json:"tags"`
		} `json:"restrictions"`
	}
	if err := json.Unmarshal(text, &got); err != nil {
		return err
	}
	if err := present("type", got.Type); err != nil {
		return err
	}
	if len(got.Mechanisms) == 0 {
		return errors.New("the member mechanisms is missing or empty")
	}
	public, err := got.Public.parse(got.Type)
	if err != nil {
		return err
	}
	*k = Key{
		Label: got.Label, Type: got.Type, Mechanisms: got.Mechanisms, Tags: got.Restrictions.Tags, Public: public,
		Operations: got.Operations,
	}
	return nil
}

// KeyFilter selects keys. The zero value selects all of the caller's namespace.
type KeyFilter struct {
	Prefix string // of the id
	// Label is the whole label. A NetHSM before 5.0 knows no labels and passes over this.
	Label  string
	Usable bool // only those whose tags the caller meets
}

// Keys lists the ids of keys, to an Administrator or an Operator.
func (c *Client) Keys(ctx context.Context, filter KeyFilter) ([]string, error) {
	const op = "listing keys"
	in := call{op: op, method: http.MethodGet, path: "/keys", query: url.Values{}, limit: maxList}
	if filter.Prefix != "" {
		if err := checkID(op, "the prefix", filter.Prefix); err != nil {
			return nil, err
		}
		in.path += "/" + url.PathEscape(filter.Prefix) + "*"
	}
	if filter.Label != "" {
		in.query.Set("label", filter.Label)
	}
	if filter.Usable {
		in.query.Set("filter", "1")
	}
	var (
		got  ids
		keys []string
	)
	in.into = wanting(&got, func() error { return got.take(&keys) })
	_, err := c.do(ctx, in)
	return keys, err
}

// Key reads a key, to an Administrator or an Operator. A public key that cannot be one is an error.
func (c *Client) Key(ctx context.Context, id string) (Key, error) {
	op := fmt.Sprintf("reading key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return Key{}, err
	}
	var got Key
	if _, err := c.do(ctx, call{op: op, method: http.MethodGet, path: path("keys", id), into: &got}); err != nil {
		return Key{}, err
	}
	got.ID = id
	return got, nil
}

// NewKey is a key to be generated.
type NewKey struct {
	ID         string // empty: the NetHSM chooses
	Label      string // up to 32 bytes of UTF-8, since 5.0; empty: none
	Type       KeyType
	Length     int // in bits: RSA 1024 to 8192, Generic 128 to 8192; of no meaning for curves
	Mechanisms []Mechanism
	Tags       []string
}

// GenerateKey makes a key, as an Administrator, and returns its id. An id that exists is [hsm.ErrExists].
func (c *Client) GenerateKey(ctx context.Context, key NewKey) (string, error) {
	op := "generating a key"
	if key.ID != "" {
		op = fmt.Sprintf("generating key %q", key.ID)
	}
	if err := checkNewKey(op, key.ID, key.Label, key.Mechanisms, key.Tags); err != nil {
		return "", err
	}
	var timeout time.Duration // that of other calls
	if key.Type == TypeRSA {
		timeout = generating
	}
	return c.create(ctx, call{
		op: op, method: http.MethodPost, path: "/keys/generate", timeout: timeout,
		body: struct {
			Mechanisms   []Mechanism   `json:"mechanisms"`
			Type         KeyType       `json:"type"`
			Length       int           `json:"length,omitempty"`
			ID           string        `json:"id,omitempty"`
			Restrictions *restrictions `json:"restrictions,omitempty"`
			Label        string        `json:"label,omitempty"`
		}{key.Mechanisms, key.Type, key.Length, key.ID, restrictedTo(key.Tags), key.Label},
	})
}

// restrictions are part of a key's JSON. A NetHSM takes no empty member that it does not need.
type restrictions struct {
	Tags []string `json:"tags"`
}

func restrictedTo(tags []string) *restrictions {
	if len(tags) == 0 {
		return nil
	}
	return &restrictions{slices.Clone(tags)}
}

// checkNewKey refuses what a NetHSM would refuse of any new key.
func checkNewKey(op, id, label string, mechanisms []Mechanism, tags []string) error {
	if id != "" {
		if err := checkID(op, "the key", id); err != nil {
			return err
		}
	}
	if label != "" {
		if err := checkLabel(op, label); err != nil {
			return err
		}
	}
	if len(mechanisms) == 0 {
		return fmt.Errorf("%s: %w: it has no mechanism, and none can be added later", op, ErrRequest)
	}
	return checkTags(op, tags)
}

func checkLabel(op, label string) error {
	switch {
	case label == "":
		return fmt.Errorf("%s: %w: the label is empty; delete it instead", op, ErrRequest)
	case len(label) > maxLabel:
		return fmt.Errorf("%s: %w: the label has %d bytes; a NetHSM takes up to %d", op, ErrRequest, len(label), maxLabel)
	case !utf8.ValidString(label):
		return fmt.Errorf("%s: %w: the label is not UTF-8", op, ErrRequest)
	default:
		return nil
	}
}

// MoveKey gives a key another id, as an Administrator (since 3.0). An id that exists is [hsm.ErrExists].
func (c *Client) MoveKey(ctx context.Context, id, newID string) error {
	op := fmt.Sprintf("moving key %q to %q", id, newID)
	if err := errors.Join(checkID(op, "the key", id), checkID(op, "the new id", newID)); err != nil {
		return err
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPost, path: path("keys", id, "move"), creates: true,
		body: struct {
			NewID string `json:"newId"`
		}{newID},
	})
	return err
}

// DeleteKey destroys a key, as an Administrator.
func (c *Client) DeleteKey(ctx context.Context, id string) error {
	return c.changeKey(ctx, http.MethodDelete, fmt.Sprintf("deleting key %q", id), id, nil)
}

// SetKeyLabel labels a key, as an Administrator (since 5.0). Labels need not be unique; they have up to 32 bytes.
func (c *Client) SetKeyLabel(ctx context.Context, id, label string) error {
	op := fmt.Sprintf("labelling key %q", id)
	if err := checkLabel(op, label); err != nil {
		return err
	}
	return c.changeKey(ctx, http.MethodPut, op, id, struct {
		Label string `json:"label"`
	}{label}, "label")
}

// DeleteKeyLabel takes the label off a key, as an Administrator (since 5.0).
func (c *Client) DeleteKeyLabel(ctx context.Context, id string) error {
	return c.changeKey(ctx, http.MethodDelete, fmt.Sprintf("deleting the label of key %q", id), id, nil, "label")
}

// AddKeyTag restricts a key to Operators with this tag or another of the key's, as an Administrator. A tag that it has
// already is no error.
func (c *Client) AddKeyTag(ctx context.Context, id, tag string) error {
	op := fmt.Sprintf("restricting key %q to tag %q", id, tag)
	if err := checkID(op, "the tag", tag); err != nil {
		return err
	}
	return c.changeKey(ctx, http.MethodPut, op, id, nil, "restrictions", "tags", tag)
}

// DeleteKeyTag takes a tag off a key, as an Administrator. A key without its last tag is every Operator's to use.
func (c *Client) DeleteKeyTag(ctx context.Context, id, tag string) error {
	op := fmt.Sprintf("taking tag %q off key %q", tag, id)
	if err := checkID(op, "the tag", tag); err != nil {
		return err
	}
	return c.changeKey(ctx, http.MethodDelete, op, id, nil, "restrictions", "tags", tag)
}

func (c *Client) changeKey(ctx context.Context, method, op, id string, body any, below ...string) error {
	if err := checkID(op, "the key", id); err != nil {
		return err
	}
	segments := append([]string{"keys", id}, below...)
	_, err := c.do(ctx, call{op: op, method: method, path: path(segments...), body: body, ok: unchanged, creates: true})
	return err
}

// PublicPEM reads the public key of a key as PEM, to an Administrator or an Operator. A Generic key has none:
// [hsm.ErrUnsupported].
func (c *Client) PublicPEM(ctx context.Context, id string) ([]byte, error) {
	op := fmt.Sprintf("reading the public key of key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return nil, err
	}
	return c.pem(ctx, pemPublicKey, call{op: op, method: http.MethodGet, path: path("keys", id, "public.pem")})
}

// DistinguishedName is the subject of a certificate signing request. Only CommonName is needed.
type DistinguishedName struct {
	CommonName         string `json:"commonName"`
	Country            string `json:"countryName,omitempty"` // two letters
	Locality           string `json:"localityName,omitempty"`
	State              string `json:"stateOrProvinceName,omitempty"`
	Organization       string `json:"organizationName,omitempty"`
	OrganizationalUnit string `json:"organizationalUnitName,omitempty"`
	Email              string `json:"emailAddress,omitempty"`
	// AltNames are the subject's DNS names and IP addresses. None means CommonName.
	AltNames []string `json:"subjectAltNames,omitempty"`
}

// CSR returns a certificate signing request for a key, as PEM, to an Administrator or an Operator.
func (c *Client) CSR(ctx context.Context, id string, subject DistinguishedName) ([]byte, error) {
	op := fmt.Sprintf("making a certificate signing request for key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return nil, err
	}
	return c.csr(ctx, subject, call{op: op, path: path("keys", id, "csr.pem")})
}
