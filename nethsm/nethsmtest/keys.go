package nethsmtest

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/md5" // the shape of the original's ETags; nothing is guarded by it
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
)

// keyRecord is a key, as it is written.
type keyRecord struct {
	Type       string   `json:"type"`
	Mechanisms []string `json:"mechanisms"`
	// Private is PKCS#8, or the secret itself of a Generic key.
	Private        []byte   `json:"private"`
	Tags           []string `json:"tags,omitempty"`
	Label          string   `json:"label,omitempty"`
	Certificate    []byte   `json:"certificate,omitempty"`
	HasCertificate bool     `json:"hasCertificate,omitempty"`
	Operations     int64    `json:"operations"`
	Revision       int64    `json:"revision"`

	signer crypto.Signer // nil for Generic
	used   atomic.Int64  // operations since the record was read
}

// parse makes the private key usable.
func (k *keyRecord) parse() error {
	if k.Type == typeGeneric {
		return nil
	}
	key, err := x509.ParsePKCS8PrivateKey(k.Private)
	if err != nil {
		return err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return fmt.Errorf("a key of type %T", key)
	}
	k.signer = signer
	return nil
}

// with is a copy that change was applied to: readers keep the one that they have.
func (k *keyRecord) with(revision int64, change func(*keyRecord)) *keyRecord {
	copied := &keyRecord{
		Type: k.Type, Mechanisms: k.Mechanisms, Private: k.Private, Tags: slices.Clone(k.Tags), Label: k.Label,
		Certificate: k.Certificate, HasCertificate: k.HasCertificate, Operations: k.Operations + k.used.Load(),
		Revision: revision, signer: k.signer,
	}
	change(copied)
	return copied
}

// keyName is the name of a key in the database.
func keyName(namespace, id string) string {
	if namespace == "" {
		return id
	}
	return namespace + "~" + id
}

// id is a checked {name} of the path; the answer says what is wrong with it.
func (x *exchange) id(name string) (string, *answer) {
	id := x.path[name]
	if complaint := validID(id); complaint != "" {
		a := refuse(http.StatusBadRequest, complaint)
		return "", &a
	}
	return id, nil
}

// validID says what is wrong with an id; empty: nothing.
func validID(id string) string {
	switch {
	case id == "":
		return "ID cannot be shorter than 1 character."
	case len(id) > 128:
		return "ID cannot be longer than 128 characters."
	}
	for _, c := range []byte(id) {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("_-.", c) >= 0) {
			return "ID may only contain alphanumeric characters, underscores, dashes, and dots."
		}
	}
	if strings.IndexByte("_-.", id[0]) >= 0 {
		return "ID cannot start with underscore, dash, or dot."
	}
	return ""
}

// key is the key of the path in the caller's namespace; nil for none. A request sees one version of it, even when another
// deletes it meanwhile.
func (x *exchange) key() *keyRecord {
	if x.k == nil {
		x.hsm.store.read(func(r *record) { x.k = r.Keys[x.keyName()] })
	}
	return x.k
}

func (x *exchange) keyName() string { return keyName(x.user.namespace, x.path["id"]) }

func keyExists(x *exchange) (bool, *answer) {
	if _, refused := x.id("id"); refused != nil {
		return false, refused
	}
	return x.key() != nil, nil
}

func keyTag(x *exchange) string { return keyETag(x.keyName(), x.key()) }

func keyETag(name string, k *keyRecord) string {
	return etag(fmt.Sprintf("key %s %d", name, k.Revision))
}

func etag(version string) string {
	sum := md5.Sum([]byte(version))
	return hex.EncodeToString(sum[:])
}

// changeKey replaces the key of the path: 204, or 404 where it is gone.
func (x *exchange) changeKey(change func(*keyRecord)) answer {
	return stored(x.hsm.store.update(func(r *record) error {
		k := r.Keys[x.keyName()]
		if k == nil {
			return errGone
		}
		r.Keys[x.keyName()] = k.with(r.Revision+1, change)
		return nil
	}), answer{})
}

// ---- lists --------------------------------------------------------------------------------------------------------

// idItem is an entry of a list.
type idItem struct {
	ID string `json:"id"`
}

// idsIn are the ids of one namespace, sorted.
func idsIn[V any](all map[string]V, namespace string) []string {
	var ids []string
	for name := range all {
		if ns, id := splitName(name); ns == namespace {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

func listKeys(x *exchange) answer {
	prefix, cut := strings.CutSuffix(x.path["id"], "*")
	if cut {
		if complaint := validID(prefix); complaint != "" {
			return refuse(http.StatusBadRequest, complaint)
		}
	}
	query := x.r.URL.Query()
	items := []idItem{}
	x.hsm.store.read(func(r *record) {
		for _, id := range idsIn(r.Keys, x.user.namespace) {
			k := r.Keys[keyName(x.user.namespace, id)]
			switch {
			case !strings.HasPrefix(id, prefix):
			case query.Has("label") && query.Get("label") != k.Label:
			case query.Has("filter") && x.user.Role == roleOperator && !x.user.meets(k):
			default:
				items = append(items, idItem{id})
			}
		}
	})
	return jsonAnswer(items)
}

// keyListTag is the version of the whole list; a filtered list has none.
func keyListTag(x *exchange) string {
	if x.r.URL.RawQuery != "" {
		return ""
	}
	version := "keys"
	x.hsm.store.read(func(r *record) {
		for _, id := range idsIn(r.Keys, x.user.namespace) {
			name := keyName(x.user.namespace, id)
			version += " " + keyETag(name, r.Keys[name])
		}
	})
	return etag(version)
}

// meets says whether the user's tags open a key.
func (u *user) meets(k *keyRecord) bool {
	return len(k.Tags) == 0 || slices.ContainsFunc(k.Tags, func(t string) bool { return slices.Contains(u.Tags, t) })
}

// ---- making keys --------------------------------------------------------------------------------------------------

// keyRequest is what generating and importing have in common.
type keyRequest struct {
	id         string
	kind       string
	mechanisms []string
	tags       []string
	label      string
	length     int
	private    privateParts
}

// privateParts is an imported key: two primes and an exponent, or the key itself, all base64.
type privateParts struct{ primeP, primeQ, exponent, data string }

func (q *keyRequest) restrictions() field {
	return optional(object("restrictions", "restrictions", optional(list("tags", "tag_set", &q.tags, nil))))
}

// check judges what the JSON's shape does not show.
func (q *keyRequest) check() *answer {
	complaint := ""
	for _, tag := range q.tags {
		complaint = cmp.Or(complaint, validID(tag))
	}
	if len(q.label) > 32 {
		complaint = cmp.Or(complaint, "Label cannot be longer than 32 bytes.")
	}
	if complaint == "" {
		return nil
	}
	a := refuse(http.StatusBadRequest, complaint)
	return &a
}

func generateKey(x *exchange) answer {
	var q keyRequest
	err := decode("generate_key_req", x.body(),
		list("mechanisms", "mechanism", &q.mechanisms, mechanismNames),
		choice("type", "key_type", &q.kind, keyTypes),
		optional(integer("length", &q.length)),
		optional(text("id", &q.id)),
		q.restrictions(),
		optional(text("label", &q.label)))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if a := q.checkGenerate(); a != nil {
		return *a
	}
	if q.id == "" {
		q.id = newID()
	}
	var taken bool
	name := keyName(x.user.namespace, q.id)
	x.hsm.store.read(func(r *record) { taken = r.Keys[name] != nil })
	if taken { // the original makes the key first and then finds that out
		return refuse(http.StatusBadRequest, "Key with id "+q.id+" already exists")
	}
	k, err := x.hsm.generate(q.kind, q.length)
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	x.node.generated.Add(1)
	if a := x.addKey(name, &q, k); a != nil {
		return *a
	}
	return created(strings.TrimSuffix(x.r.URL.EscapedPath(), "/generate")+"/"+q.id, idItem{q.id})
}

func (q *keyRequest) checkGenerate() *answer {
	complaint := ""
	switch {
	case q.kind == typeRSA && (q.length < 1024 || q.length > 8192):
		complaint = "RSA key length must be between 1024 and 8192."
	case q.kind == typeGeneric && (q.length < 128 || q.length > 8192):
		complaint = "Generic key length must be between 128 and 8192."
	case slices.ContainsFunc(q.mechanisms, func(m string) bool { return !slices.Contains(mechanismsOf(q.kind), m) }):
		complaint = "Mechanism does not match key type"
	case len(q.mechanisms) == 0:
		complaint = "Empty set of mechanisms"
	case q.id != "":
		complaint = validID(q.id)
	}
	if complaint != "" {
		a := refuse(http.StatusBadRequest, complaint)
		return &a
	}
	return q.check()
}

// addKey stores a key that was generated or imported.
func (x *exchange) addKey(name string, q *keyRequest, k *keyRecord) *answer {
	k.Mechanisms = inOrder(q.mechanisms)
	k.Tags = sortedSet(q.tags)
	k.Label = q.label
	err := x.hsm.store.update(func(r *record) error {
		if r.Keys[name] != nil {
			return errExists
		}
		k.Revision = r.Revision + 1
		r.Keys[name] = k
		return nil
	})
	if err != nil {
		a := stored(err, refuse(http.StatusBadRequest, "Key with id "+q.id+" already exists"))
		return &a
	}
	return nil
}

// inOrder sorts mechanisms as the original shows them, each once.
func inOrder(mechanisms []string) []string {
	var sorted []string
	for _, m := range mechanismNames {
		if slices.Contains(mechanisms, m) {
			sorted = append(sorted, m)
		}
	}
	return sorted
}

func sortedSet(items []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(items)))
}

func newID() string { return hex.EncodeToString(random(10)) }

// importKey is POST /keys; putKey is PUT /keys/{id}.
func importKey(x *exchange) answer {
	id := newID()
	if a := x.importAs(id); a != nil {
		return *a
	}
	return created(x.location(id), idItem{id})
}

func putKey(x *exchange) answer {
	if a := x.importAs(x.path["id"]); a != nil {
		return *a
	}
	return empty(http.StatusNoContent)
}

func (x *exchange) importAs(id string) *answer {
	q := keyRequest{id: id}
	k, refused := x.imported(&q)
	if refused != nil {
		return refused
	}
	if a := q.check(); a != nil {
		return a
	}
	return x.addKey(keyName(x.user.namespace, id), &q, k)
}

func (x *exchange) imported(q *keyRequest) (*keyRecord, *answer) {
	var k *keyRecord
	var err error
	if strings.HasPrefix(strings.ToLower(x.r.Header.Get("Content-Type")), typeMultipart) {
		k, err = x.importForm(q)
	} else {
		k, err = q.importJSON(x.body())
	}
	if err != nil {
		a := refuse(http.StatusBadRequest, err.Error())
		return nil, &a
	}
	return k, nil
}

func (q *keyRequest) importJSON(body []byte) (*keyRecord, error) {
	err := decode("private_key_req", body,
		list("mechanisms", "mechanism", &q.mechanisms, mechanismNames),
		choice("type", "key_type", &q.kind, keyTypes),
		object("private", "private_key",
			optional(text("primeP", &q.private.primeP)),
			optional(text("primeQ", &q.private.primeQ)),
			optional(text("publicExponent", &q.private.exponent)),
			optional(text("data", &q.private.data))),
		q.restrictions(),
		optional(text("label", &q.label)))
	if err != nil {
		return nil, err
	}
	return importParts(q.kind, q.private)
}

// importForm reads the parts "arguments" (JSON) and "key_file" (PEM).
func (x *exchange) importForm(q *keyRequest) (*keyRecord, error) {
	parts, err := x.form()
	if err != nil {
		return nil, err
	}
	err = decode("private_key_args", parts["arguments"],
		list("mechanisms", "mechanism", &q.mechanisms, mechanismNames),
		q.restrictions(),
		optional(text("label", &q.label)))
	if err != nil {
		return nil, err
	}
	return importPEM(parts["key_file"])
}

// ---- one key ------------------------------------------------------------------------------------------------------

// publicKey is GET /keys/{id}.
type publicKey struct {
	Mechanisms   []string     `json:"mechanisms"`
	Type         string       `json:"type"`
	Operations   int64        `json:"operations"`
	Public       any          `json:"public"`
	Restrictions restrictions `json:"restrictions"`
	Label        string       `json:"label,omitempty"`
}

type restrictions struct {
	Tags []string `json:"tags,omitempty"`
}

type rsaPublic struct {
	Modulus        []byte `json:"modulus"`
	PublicExponent []byte `json:"publicExponent"`
}

type dataPublic struct {
	Data []byte `json:"data"`
}

func getKey(x *exchange) answer {
	k := x.key()
	return jsonAnswer(publicKey{
		Mechanisms: k.Mechanisms, Type: k.Type, Operations: k.Operations + k.used.Load(), Public: k.public(),
		Restrictions: restrictions{k.Tags}, Label: k.Label,
	})
}

func (k *keyRecord) public() any {
	if k.signer == nil {
		return nil
	}
	switch public := k.signer.Public().(type) {
	case *rsa.PublicKey:
		return rsaPublic{public.N.Bytes(), big.NewInt(int64(public.E)).Bytes()}
	case *ecdsa.PublicKey:
		point, err := public.ECDH()
		if err != nil {
			return nil
		}
		return dataPublic{point.Bytes()}
	case ed25519.PublicKey:
		return dataPublic{public}
	default:
		return nil
	}
}

func deleteKey(x *exchange) answer {
	return stored(x.hsm.store.update(func(r *record) error {
		if r.Keys[x.keyName()] == nil {
			return errGone
		}
		delete(r.Keys, x.keyName())
		return nil
	}), answer{})
}

func publicPEM(x *exchange) answer {
	k := x.key()
	if k.signer == nil {
		return refuse(http.StatusBadRequest, "Generic keys have no public key")
	}
	return pemOf(k.signer.Public())
}

// pemOf is a public key as the original writes it: without a newline at the end.
func pemOf(public crypto.PublicKey) answer {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return crash(err.Error())
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
	return answer{status: http.StatusOK, kind: typePEM, body: bytes.TrimSuffix(block, []byte("\n"))}
}

func moveKey(x *exchange) answer {
	var to string
	if err := decode("move_key_req", x.body(), text("newId", &to)); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if complaint := validID(to); complaint != "" {
		return refuse(http.StatusBadRequest, complaint)
	}
	target := keyName(x.user.namespace, to)
	err := x.hsm.store.update(func(r *record) error {
		k := r.Keys[x.keyName()]
		if k == nil {
			return errGone
		}
		if r.Keys[target] != nil {
			return errExists
		}
		r.Keys[target] = k.with(r.Revision+1, func(*keyRecord) {})
		delete(r.Keys, x.keyName())
		return nil
	})
	if err != nil {
		return stored(err, refuse(http.StatusConflict, fmt.Sprintf("Key '%s' already exists", to)))
	}
	return jsonAnswer(idItem{to})
}

func putLabel(x *exchange) answer {
	var label string
	if err := decode("label_req", x.body(), text("label", &label)); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if len(label) > 32 {
		return refuse(http.StatusBadRequest, "Label cannot be longer than 32 bytes.")
	}
	if k := x.key(); k != nil && k.Label == label {
		return empty(http.StatusNotModified)
	}
	return x.changeKey(func(k *keyRecord) { k.Label = label })
}

func deleteLabel(x *exchange) answer {
	return x.changeKey(func(k *keyRecord) { k.Label = "" })
}

func keyTagExists(x *exchange) (bool, *answer) {
	found, refused := keyExists(x)
	if refused != nil || !found {
		return found, refused
	}
	tag, refused := x.id("tag")
	if refused != nil {
		return false, refused
	}
	return slices.Contains(x.key().Tags, tag), nil
}

func putKeyTag(x *exchange) answer {
	k := x.key()
	if k == nil {
		return answer{status: http.StatusNotFound, kind: typeJSON}
	}
	tag := x.path["tag"]
	if slices.Contains(k.Tags, tag) {
		return empty(http.StatusNotModified)
	}
	return x.changeKey(func(k *keyRecord) { k.Tags = sortedSet(append(k.Tags, tag)) })
}

func deleteKeyTag(x *exchange) answer {
	tag := x.path["tag"]
	return x.changeKey(func(k *keyRecord) {
		k.Tags = slices.DeleteFunc(k.Tags, func(t string) bool { return t == tag })
	})
}

// ---- shortcuts for tests ------------------------------------------------------------------------------------------

// Key describes a key that a test wants without asking for it over the API.
type Key struct {
	ID         string // "namespace~id" for a namespace; empty: one is made up
	Type       string // empty: RSA
	Length     int    // 0: 2048 for RSA, 256 for Generic
	Mechanisms []string
	Tags       []string
	Label      string
}

// AddKey generates a key; without Mechanisms an RSA key gets RSA_Decryption_OAEP_SHA256 alone. It returns the id and the
// public key, nil for Generic.
func (h *HSM) AddKey(k Key) (string, crypto.PublicKey, error) {
	k.ID, k.Type = cmp.Or(k.ID, newID()), cmp.Or(k.Type, typeRSA)
	if k.Length == 0 {
		k.Length = map[string]int{typeRSA: 2048, typeGeneric: 256}[k.Type]
	}
	if k.Mechanisms == nil {
		k.Mechanisms = map[string][]string{typeRSA: {"RSA_Decryption_OAEP_SHA256"}}[k.Type]
	}
	if k.Mechanisms == nil {
		k.Mechanisms = mechanismsOf(k.Type)
	}
	made, err := h.generate(k.Type, k.Length)
	if err != nil {
		return "", nil, fmt.Errorf("adding key %q to a NetHSM double: %w", k.ID, err)
	}
	x := &exchange{hsm: h}
	if a := x.addKey(k.ID, &keyRequest{id: k.ID, mechanisms: k.Mechanisms, tags: k.Tags, label: k.Label}, made); a != nil {
		return "", nil, fmt.Errorf("adding key %q to a NetHSM double: %s", k.ID, a.body)
	}
	if made.signer == nil {
		return k.ID, nil, nil
	}
	return k.ID, made.signer.Public(), nil
}

// DeleteKey removes a key as an administrator elsewhere would.
func (h *HSM) DeleteKey(id string) error {
	return h.store.update(func(r *record) error {
		if r.Keys[id] == nil {
			return fmt.Errorf("deleting key %q of a NetHSM double: %w", id, errGone)
		}
		delete(r.Keys, id)
		return nil
	})
}

// KeyIDs are all keys, of every namespace ("namespace~id").
func (h *HSM) KeyIDs() []string {
	var ids []string
	h.store.read(func(r *record) { ids = slices.Sorted(maps.Keys(r.Keys)) })
	return ids
}

func b64(data []byte) string { return base64.StdEncoding.EncodeToString(data) }
