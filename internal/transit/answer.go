package transit

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"time"

	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/token"
)

// leaseSeconds is what renewing a token answers. Tokens do not end by themselves; a number of seconds is what keeps the client
// asking now and then, every three weeks with this one, which is Vault's default.
const leaseSeconds = "2764800"

// What all answers say of themselves. The slices are shared by all of them, and nobody changes them.
var (
	contentJSON = []string{"application/json"}
	noStore     = []string{"no-store"}
)

// write answers with a body. Its error is always nil: whoever went away does not read it.
func (c *call) write(code int, body []byte) error {
	header := c.w.Header()
	header["Content-Type"] = contentJSON
	header["Cache-Control"] = noStore
	header["Content-Length"] = []string{strconv.Itoa(len(body))}
	c.code = code
	c.w.WriteHeader(code)
	_, err := c.w.Write(body)
	c.lost = err != nil
	return nil
}

// send answers with what lies in a buffer, and frees it. Where the answer was not taken the buffer goes to the garbage collector:
// Go's HTTP/2 gives up on a client that went away while a goroutine of its own may still read the bytes, which are another request's
// soon.
func (c *call) send(out *buffer) error {
	err := c.write(http.StatusOK, out.bytes)
	if !c.lost {
		out.free()
	}
	return err
}

// refuse answers with errors, in Vault's shape.
func (c *call) refuse(code int, after time.Duration, texts ...string) {
	if after > 0 {
		c.w.Header()["Retry-After"] = []string{strconv.Itoa(int(math.Ceil(after.Seconds())))}
	}
	_ = c.write(code, errorBody(texts)) // always nil
}

// method answers that the path has no such method.
func (c *call) method(allowed string) error {
	c.w.Header()["Allow"] = []string{allowed}
	c.refuse(http.StatusMethodNotAllowed, 0, "unsupported operation")
	return nil
}

func errorBody(texts []string) []byte {
	if texts == nil {
		texts = []string{}
	}
	body, err := json.Marshal(struct {
		Errors []string `json:"errors"`
	}{texts})
	if err != nil { // strings do not fail
		return []byte(`{"errors":[]}` + "\n")
	}
	return append(body, '\n')
}

// appendSealed appends the answer to encrypt/. Nothing in it can need escaping.
func appendSealed(to []byte, sealed keyring.Sealed) []byte {
	to = appendHead(to)
	to = append(to, `{"ciphertext":"`...)
	to = appendCiphertext(to, sealed.Version, sealed.Envelope)
	to = append(to, `","key_version":`...)
	to = strconv.AppendInt(to, int64(sealed.Version), 10)
	to = append(to, '}')
	return appendTail(to)
}

// appendOpened appends the answer to decrypt/.
func appendOpened(to, payload []byte) []byte {
	to = appendHead(to)
	to = append(to, `{"plaintext":"`...)
	to = base64.StdEncoding.AppendEncode(to, payload)
	to = append(to, `"}`...)
	return appendTail(to)
}

// appendHead begins an answer as Vault does, with everything before the data.
func appendHead(to []byte) []byte {
	to = append(to, `{"request_id":"`...)
	to = appendRequestID(to)
	return append(to, `","lease_id":"","renewable":false,"lease_duration":0,"data":`...)
}

// appendTail ends an answer with everything after the data.
func appendTail(to []byte) []byte {
	return append(to, `,"wrap_info":null,"warnings":null,"auth":null,"mount_type":"transit"}`+"\n"...)
}

// appendRequestID appends a random UUID.
func appendRequestID(to []byte) []byte {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails: crypto/rand
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	for i, group := range [][]byte{id[:4], id[4:6], id[6:8], id[8:10], id[10:]} {
		if i > 0 {
			to = append(to, '-')
		}
		to = hex.AppendEncode(to, group)
	}
	return to
}

// appendRenewal appends the answer to renew-self.
func appendRenewal(to []byte, text string, grant *token.Grant) []byte {
	to = append(to, `{"request_id":"`...)
	to = appendRequestID(to)
	to = append(to, `","lease_id":"","renewable":false,"lease_duration":0,"data":null,"wrap_info":null,"warnings":null,"auth":{"client_token":`...)
	to = appendString(to, text)
	to = append(to, `,"accessor":`...)
	to = appendString(to, grant.ID)
	to = append(to, `,"policies":["seal"],"token_policies":["seal"],"metadata":null,"lease_duration":`+leaseSeconds+
		`,"renewable":true,"entity_id":"","token_type":"service","orphan":true,"mfa_requirement":null,"num_uses":0},"mount_type":"token"}`+"\n"...)
	return to
}

// appendLookup appends the answer to lookup-self. It does not repeat the token.
func appendLookup(to []byte, grant *token.Grant) []byte {
	keys, err := json.Marshal(grant.Keys)
	if err != nil || grant.Keys == nil {
		keys = []byte("[]")
	}
	to = append(to, `{"request_id":"`...)
	to = appendRequestID(to)
	to = append(to, `","lease_id":"","renewable":false,"lease_duration":0,"data":{"accessor":`...)
	to = appendString(to, grant.ID)
	to = append(to, `,"display_name":`...)
	to = appendString(to, grant.Name)
	to = append(to, `,"entity_id":"","expire_time":null,"explicit_max_ttl":0,"keys":`...)
	to = append(to, keys...)
	to = append(to, `,"meta":null,"num_uses":0,"orphan":true,"path":"auth/token/create","policies":["seal"],"renewable":true,"ttl":0,`+
		`"type":"service"},"wrap_info":null,"warnings":null,"auth":null,"mount_type":"token"}`+"\n"...)
	return to
}

// appendString appends a JSON string.
func appendString(to []byte, text string) []byte {
	quoted, err := json.Marshal(text)
	if err != nil { // a string does not fail
		return append(to, `""`...)
	}
	return append(to, quoted...)
}

// codeWriter remembers the code of an answer that somebody else writes.
type codeWriter struct {
	http.ResponseWriter

	code int
}

// WriteHeader implements [http.ResponseWriter].
func (w *codeWriter) WriteHeader(code int) {
	w.code = code
	w.ResponseWriter.WriteHeader(code)
}
