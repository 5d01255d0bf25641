package nethsmtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
)

// The content types of the API.
const (
	typeJSON  = "application/json"
	typeBytes = "application/octet-stream"
	typePEM   = "application/x-pem-file"
)

// answer is what a resource says. The machine adds the content type where kind is empty and the resource was reached.
type answer struct {
	status int
	kind   string
	header http.Header
	body   []byte
}

// empty is an answer without a body.
func empty(status int) answer { return answer{status: status} }

// refuse is an answer with the original's error body.
func refuse(status int, message string) answer {
	return answer{status: status, kind: typeJSON, body: encode(struct {
		Message string `json:"message"`
	}{message})}
}

// notAvailable is the answer in a wrong state.
func notAvailable() answer { return refuse(http.StatusPreconditionFailed, "Service not available") }

// jsonAnswer is 200 with a JSON body.
func jsonAnswer(value any) answer {
	return answer{status: http.StatusOK, kind: typeJSON, body: encode(value)}
}

// created is 201 with the place of the new thing, and its id as body where one was made up.
func created(location string, value any) answer {
	a := answer{status: http.StatusCreated, header: http.Header{"Location": {location}}}
	if value != nil {
		a.body = encode(value)
	}
	return a
}

// crash is what the original says where its code threw.
func crash(text string) answer {
	return answer{status: http.StatusServiceUnavailable, kind: "none", body: []byte(text)}
}

// databaseTrouble is the answer where etcd could not be asked; verb is "read from", "write to" or "connect to".
func databaseTrouble(verb string) answer {
	return refuse(http.StatusInternalServerError, "Could not "+verb+" database. Check logs.")
}

// stored is the answer to a change: 204, or 404 for what is gone, or what the caller says of a thing that exists already.
func stored(err error, exists answer) answer {
	switch {
	case err == nil:
		return empty(http.StatusNoContent)
	case errors.Is(err, errGone):
		return empty(http.StatusNotFound)
	case errors.Is(err, errExists):
		return exists
	default: // it could not be written down
		return databaseTrouble("write to")
	}
}

// encode writes JSON as the original does: on one line, with no escapes for HTML.
func encode(value any) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(value); err != nil {
		panic("nethsmtest: encoding an answer: " + err.Error()) // only types of this package come here
	}
	return bytes.TrimRight(b.Bytes(), "\n")
}

// write sends the answer.
func (a answer) write(w http.ResponseWriter, head bool) {
	header := w.Header()
	for name, values := range a.header {
		header[name] = values
	}
	if a.kind == "" || a.kind == "none" {
		header["Content-Type"] = nil // keeps net/http from guessing one
	} else {
		header.Set("Content-Type", a.kind)
	}
	if a.status != http.StatusNoContent && a.status != http.StatusNotModified {
		header.Set("Content-Length", strconv.Itoa(len(a.body)))
	}
	w.WriteHeader(a.status)
	if !head && len(a.body) > 0 {
		_, _ = w.Write(a.body) // a client that left is no concern of ours
	}
}
