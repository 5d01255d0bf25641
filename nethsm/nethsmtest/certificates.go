package nethsmtest

import (
	"net/http"
	"strings"
)

// A key's certificate is a slot for bytes that nobody looks at. The original keeps them as escaped JSON within one etcd
// value, encrypted; what fits therefore depends on the bytes.
const (
	// chunkedLimit is the size from which a chunked upload, which passes the size check, was seen to hang.
	chunkedLimit = 2_000_000
	// etcdLimit is etcd's default limit of one request.
	etcdLimit = 1_572_864
	// recordSize is about what the rest of an RSA-2048 key takes there.
	recordSize = 2_900
)

// choke is what a huge chunked upload does to the original: until a restart every write hangs, and reads go on.
func (n *Node) choke() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.choked = true
}

// chokes says whether a request is a write that will hang.
func (x *exchange) chokes(res *resource) bool {
	x.node.mu.Lock()
	defer x.node.mu.Unlock()
	writes := x.r.Method == http.MethodPut || x.r.Method == http.MethodDelete || (x.r.Method == http.MethodPost && res.creates)
	return x.node.choked && writes
}

func getCertificate(x *exchange) answer {
	k := x.key()
	if !k.HasCertificate {
		return empty(http.StatusNotFound)
	}
	return answer{status: http.StatusOK, kind: typeBytes, body: k.Certificate}
}

func putCertificate(x *exchange) answer {
	if x.r.Header.Get("Content-Type") != typeBytes { // in another case it passes the check of types, but not this one
		return refuse(http.StatusBadRequest, "Content-Type must be application/octet-stream.")
	}
	k := x.key()
	if k == nil {
		return refuse(http.StatusNotFound, "keyID not found")
	}
	body := x.body()
	if x.r.ContentLength < 0 && len(body) >= chunkedLimit {
		x.node.choke()
		x.hangUp()
		panic(http.ErrAbortHandler)
	}
	// Whether the original looks and writes in one step nobody knows. The double does not: nobody should rely on it.
	if k.HasCertificate {
		return refuse(http.StatusConflict, "Key already contains a certificate")
	}
	if escapedSize(body)+recordSize > etcdLimit {
		return databaseTrouble("write to")
	}
	a := x.changeKey(func(k *keyRecord) { k.Certificate, k.HasCertificate = body, true })
	if a.status == http.StatusNoContent {
		a.status = http.StatusCreated
	}
	return a
}

func deleteCertificate(x *exchange) answer {
	if !x.key().HasCertificate {
		return refuse(http.StatusNotFound, "There is no certificate for this KeyID.")
	}
	return x.changeKey(func(k *keyRecord) { k.Certificate, k.HasCertificate = nil, false })
}

// escapedSize is how many bytes a value takes as a JSON string: control characters six, quotes and backslashes two.
func escapedSize(body []byte) int {
	size := 0
	for _, b := range body {
		switch {
		case strings.IndexByte("\b\t\n\f\r\"\\", b) >= 0:
			size += 2
		case b < 0x20 || b == 0x7f:
			size += 6
		default:
			size++
		}
	}
	return size
}
