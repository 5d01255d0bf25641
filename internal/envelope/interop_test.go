package envelope

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// job is what testdata/jwcrypto_peer.py is asked, and result is its answer.
type job struct {
	Do         string      `json:"do"`
	JWE        string      `json:"jwe,omitempty"`
	Key        string      `json:"key,omitempty"`
	Plaintext  string      `json:"plaintext,omitempty"`
	Protected  string      `json:"protected,omitempty"`
	Recipients []recipient `json:"recipients,omitempty"`
}

type recipient struct {
	Key    string            `json:"key"`
	Header map[string]string `json:"header"`
}

type result struct {
	Plaintext, Protected, Thumbprint string
	Own, Canonical                   string
}

// jwcrypto lets Debian's python3-jwcrypto do the jobs.
func jwcrypto(t *testing.T, jobs []job) []result {
	t.Helper()
	input, err := json.Marshal(jobs)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/usr/bin/python3", filepath.Join("testdata", "jwcrypto_peer.py"))
	cmd.Stdin = bytes.NewReader(input)
	output, err := cmd.Output()
	const missing = 3 // jwcrypto_peer.py's exit code
	var exit *exec.ExitError
	switch {
	case errors.Is(err, os.ErrNotExist), errors.As(err, &exit) && exit.ExitCode() == missing:
		t.Fatalf("this test needs Debian's JOSE library: apt-get install python3-jwcrypto (%v)", err)
	case errors.As(err, &exit):
		t.Fatalf("jwcrypto: %v\n%s", err, exit.Stderr)
	case err != nil:
		t.Fatal(err)
	}
	var results []result
	if err := json.Unmarshal(output, &results); err != nil || len(results) != len(jobs) {
		t.Fatalf("jwcrypto answered %d of %d jobs: %v", len(results), len(jobs), err)
	}
	return results
}

func TestAnotherJOSELibraryOpensOurEnvelopes(t *testing.T) {
	var jobs []job
	var of []golden // with the one key that opens it
	for _, g := range goldens() {
		for i, key := range g.to {
			opens := g
			opens.to = g.to[i : i+1]
			jobs = append(jobs, job{Do: "open", JWE: string(g.read(t)), Key: pemOf(t, key)})
			of = append(of, opens)
			if g.context.Use != UseWrap {
				break // another use changes nothing about the keys
			}
			opens.name += " sealed now"
			fresh := mustSeal(t, g.context, []byte(g.payload), g.parties(t)...)
			jobs = append(jobs, job{Do: "open", JWE: string(fresh), Key: pemOf(t, key)})
			of = append(of, opens)
		}
	}
	for i, r := range jwcrypto(t, jobs) {
		g := of[i]
		t.Run(g.name+" with "+g.to[0], func(t *testing.T) {
			plaintext, err := hex.DecodeString(r.Plaintext)
			if err != nil {
				t.Fatal(err)
			}
			want := append(referenceMAC(testAuth, g.context, []byte(g.payload)), g.payload...)
			if !bytes.Equal(plaintext, want) {
				t.Errorf("it decrypts to %x, want %x", plaintext, want)
			}
			if kid := g.parties(t)[0].KID; r.Thumbprint != kid {
				t.Errorf("its thumbprint of the key is %s, ours %s", r.Thumbprint, kid)
			}
		})
	}
}

// A foreign library writes JSON its own way, which Parse refuses; put into the documented form, it opens.
func TestWhatAnotherJOSELibrarySealsOpensInTheDocumentedForm(t *testing.T) {
	c := plainContext()
	plaintext := hex.EncodeToString(append(referenceMAC(testAuth, c, []byte("payload")), "payload"...))
	one, two, ec := load(t, rsa2048, ""), load(t, rsa3072, RSAOAEP), load(t, ecP256, "")
	header := func(p party) map[string]string { return map[string]string{"alg": string(p.Algorithm), "kid": p.KID} }
	const shared = `"enc":"A256GCM","key":"prod",%s"kver":3,"typ":"nitroseal+jwe","use":"wrap","v":1}`
	flattened := func(p party) string {
		return fmt.Sprintf(`{"alg":%q,`+shared, p.Algorithm, fmt.Sprintf(`"kid":%q,`, p.KID))
	}
	general := fmt.Sprintf(`{`+shared, "")

	results := jwcrypto(t, []job{
		{Do: "seal", Plaintext: plaintext, Protected: flattened(one), Recipients: []recipient{{Key: pemOf(t, rsa2048)}}},
		{Do: "seal", Plaintext: plaintext, Protected: flattened(two), Recipients: []recipient{{Key: pemOf(t, rsa3072)}}},
		{Do: "seal", Plaintext: plaintext, Protected: general, Recipients: []recipient{
			{pemOf(t, rsa2048), header(one)}, {pemOf(t, rsa3072), header(two)}, {pemOf(t, ecP256), header(ec)},
		}},
		{Do: "seal", Plaintext: plaintext, Protected: flattened(ec), Recipients: []recipient{{Key: pemOf(t, ecP256)}}},
	})
	for i, parties := range [][]party{{one}, {two}, {one, two, ec}} {
		t.Run(fmt.Sprintf("%d recipients, %s", len(parties), parties[0].Algorithm), func(t *testing.T) {
			refuse(t, []byte(results[i].Own), c, parties[0], testAuth, ErrMalformed, 0)
			for _, p := range parties {
				payload, err := open(t, []byte(results[i].Canonical), c, p)
				if err != nil || string(payload) != "payload" {
					t.Errorf("opening with %s gave %q, %v", p.Algorithm, payload, err)
				}
			}
		})
	}
	t.Run("one recipient whose epk it leaves unprotected", func(t *testing.T) {
		if own := results[3].Own; !strings.Contains(own, `"header":{"epk":`) {
			t.Errorf("it protects epk now: docs/envelope.md says that it does not: %s", own)
		}
		refuse(t, []byte(results[3].Own), c, ec, testAuth, ErrMalformed, 0)
		refuse(t, []byte(results[3].Canonical), c, ec, testAuth, ErrMalformed, 0)
	})
}

func pemOf(t *testing.T, name string) string {
	t.Helper()
	if !slices.Contains(testKeys, name) {
		t.Fatalf("no test key %q", name)
	}
	text, err := os.ReadFile(filepath.Join("testdata", "keys", name+".pem"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
