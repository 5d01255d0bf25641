package envelope

import (
	"bytes"
	"errors"
	"testing"
)

// FuzzParse: Parse never panics, refuses with ErrMalformed alone, and what opens says again what it said.
func FuzzParse(f *testing.F) {
	for _, g := range goldens() {
		raw := g.read(f)
		f.Add(raw)
		f.Add(bytes.Replace(raw, []byte(`,"iv"`), []byte(`,"aad":"QQ","iv"`), 1))
		f.Add(raw[:len(raw)/2])
	}
	f.Add([]byte(`{"protected":"e30","recipients":[`))
	parties := []party{load(f, ecP256, ""), load(f, rsa2048, "")}
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := Parse(raw)
		if err != nil {
			if !errors.Is(err, ErrMalformed) || e != nil {
				t.Fatalf("parsing gave %v, %v", e, err)
			}
			return
		}
		if err := e.Context().check(); err != nil {
			t.Fatalf("it parses to a context that cannot be: %v", err)
		}
		if n := len(e.Recipients()); n < 1 || n > MaxRecipients {
			t.Fatalf("%d recipients", n)
		}
		for _, p := range parties {
			payload, err := e.Open(t.Context(), e.Context(), p.Recipient, p.key, testAuth)
			if err != nil {
				continue
			}
			again, err := Parse(mustSeal(t, e.Context(), payload, p))
			if err != nil {
				t.Fatalf("sealing what opened: %v", err)
			}
			if err := again.Context().Differs(e.Context()); err != nil {
				t.Fatalf("sealed anew it says something else: %v", err)
			}
		}
	})
}
