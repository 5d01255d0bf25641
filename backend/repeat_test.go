package backend

import (
	"net/http"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Official clients repeat what was answered with 5xx by themselves, with the same body: also where the first was done.
func TestMaterialThatIsWrittenAgainByTheSameRequestIsNoConflict(t *testing.T) {
	m, _ := newKeeping(t)
	for _, store := range []string{"own", "files", "objects"} {
		item := "material/" + store + "/item"
		body := fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": store, "cas": 0, "request_id": "r-1"}
		first := m.write(item, body).want(t, http.StatusOK)
		again := m.write(item, body).want(t, http.StatusOK)
		for field, value := range first.data {
			if again.text(field) != first.text(field) {
				t.Errorf("%s: %s is %v at first and %v in the repetition", store, field, value, again.data[field])
			}
		}
		body["request_id"] = "r-2"
		m.write(item, body).want(t, http.StatusBadRequest).says(t, "at generation 1")
		delete(body, "request_id")
		m.write(item, body).want(t, http.StatusBadRequest).says(t, "at generation 1")
		body["request_id"] = strings.Repeat("r", maxRequestID+1)
		m.write(item, body).want(t, http.StatusBadRequest).says(t, "request_id")
	}
}

func TestMaterialWithAGenerationAndNoAnswerSaysHowToGoOn(t *testing.T) {
	m, token := newKeeping(t)
	body := fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": "objects", "cas": 0}
	m.write("material/c/item", body).ok(t)
	token.SetError(hsm.ErrUnavailable)
	body["cas"] = 1
	m.write("material/c/item", body).want(t, http.StatusServiceUnavailable).says(t, "read the item before you repeat with cas", "request_id")
	body["request_id"] = "r-1" // which makes a blind repetition right
	if got := m.write("material/c/item", body).want(t, http.StatusServiceUnavailable); strings.Contains(got.message, "before you repeat") {
		t.Errorf("with a request id it still says %q", got.message)
	}
	token.SetError(nil)
	m.write("material/c/item", body).want(t, http.StatusOK)
}

func TestMaterialThatIsDeletedAgainIsNoConflict(t *testing.T) {
	m, _ := newKeeping(t)
	for _, store := range []string{"own", "files", "objects"} {
		item := "material/" + store + "/item"
		m.write(item, fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": store}).ok(t)
		for range 3 {
			m.delete(item, fields{"cas": 1, "store": store}).want(t, http.StatusNoContent)
		}
		m.write(item, fields{"fields": fields{"x": "YQ=="}, "key": "prod", "store": store}).ok(t)
		m.delete(item, fields{"cas": 1}).want(t, http.StatusBadRequest).says(t, "at generation 2")
	}
}
