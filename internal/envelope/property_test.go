package envelope

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// drawContext draws any context that an envelope can have.
func drawContext(t *rapid.T) Context {
	name := rapid.StringMatching(`[!#-%(-;=?-\[\]-~]{1,40}`)
	c := Context{
		Use:     rapid.SampledFrom([]Use{UseWrap, UseTransit, UseMaterial, UseKEK, UseSeal}).Draw(t, "use"),
		Key:     name.Draw(t, "key"),
		Version: rapid.IntRange(1, 1<<31-1).Draw(t, "version"),
	}
	if c.Use == UseMaterial {
		c.Cluster = name.Draw(t, "cluster")
		c.Name = name.Draw(t, "name")
		c.Generation = rapid.Uint64Range(1, maxGeneration).Draw(t, "generation")
	}
	if caller := rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "caller"); len(caller) > 0 {
		c.Caller = caller
	}
	return c
}

func TestAnyContextAndPayloadComeBack(t *testing.T) {
	parties := []party{load(t, rsa2048, ""), load(t, ecP256, "")}
	rapid.Check(t, func(rt *rapid.T) {
		c := drawContext(rt)
		payload := rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(rt, "payload")
		to := parties[:rapid.IntRange(1, len(parties)).Draw(rt, "recipients")]
		raw := mustSeal(t, c, payload, to...)
		e, err := Parse(raw)
		if err != nil {
			rt.Fatal(err)
		}
		if diff := cmp.Diff(c, e.Context()); diff != "" {
			rt.Fatalf("context (-sealed +parsed):\n%s", diff)
		}
		for _, p := range to {
			opened, err := e.Open(t.Context(), c, p.Recipient, p.key, testAuth)
			if err != nil {
				rt.Fatal(err)
			}
			if !bytes.Equal(opened, payload) {
				rt.Fatalf("opened %x, sealed %x", opened, payload)
			}
		}
	})
}

func TestTwoContextsNeverShareAMAC(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		a, b := drawContext(rt), drawContext(rt)
		payload := rapid.SliceOfN(rapid.Byte(), 0, 20)
		p, q := payload.Draw(rt, "p"), payload.Draw(rt, "q")
		// The bytes move between neighbouring fields: only their lengths tell the two apart.
		if rapid.Bool().Draw(rt, "move") {
			b = a
			whole := slices.Concat(a.Caller, p)
			n := rapid.IntRange(0, len(whole)).Draw(rt, "cut")
			b.Caller, q = whole[:n], whole[n:]
		}
		same := a.Differs(b) == nil && bytes.Equal(p, q)
		if bytes.Equal(a.mac(testAuth, p), b.mac(testAuth, q)) != same {
			rt.Fatalf("%+v %x and %+v %x", a, p, b, q)
		}
	})
}

// Every single bit, in every byte, of every golden file: it either does not open or opens to the very same.
func TestNoFlippedBitOpensToSomethingElse(t *testing.T) {
	step := 1
	if testing.Short() {
		step = 97
	}
	for _, g := range goldens() {
		if g.name != "rsa-2048" && g.name != "ec-p256" && g.name != "two-ec" && g.name != "use-material" {
			continue
		}
		t.Run(g.name, func(t *testing.T) {
			raw := g.read(t)
			with := g.parties(t)[0]
			opened := 0
			for bit := 0; bit < 8*len(raw); bit += step {
				changed := bytes.Clone(raw)
				changed[bit/8] ^= 1 << (bit % 8)
				e, err := Parse(changed)
				if err != nil {
					if !errors.Is(err, ErrMalformed) {
						t.Fatalf("bit %d: %v", bit, err)
					}
					continue
				}
				// Whatever it claims is wanted: the comparison of contexts shall not be what saves us.
				payload, err := e.Open(t.Context(), e.Context(), with.Recipient, with.key, testAuth)
				if err != nil {
					continue
				}
				opened++
				if string(payload) != g.payload || e.Context().Differs(g.context) != nil {
					t.Fatalf("bit %d: opened %q for %+v", bit, payload, e.Context())
				}
			}
			if len(g.to) == 1 && opened > 0 {
				t.Errorf("%d changed envelopes opened: one with a single recipient has no byte to spare", opened)
			}
		})
	}
}

func TestFieldsSwappedBetweenEnvelopesNeverOpen(t *testing.T) {
	own := load(t, rsa2048, "")
	fields := []string{"protected", "encrypted_key", "iv", "ciphertext", "tag"}
	rapid.Check(t, func(rt *rapid.T) {
		a, b := drawContext(rt), drawContext(rt)
		first := mustSeal(t, a, []byte("payload of the first"), own)
		second := mustSeal(t, b, []byte("payload of the other"), own)
		mixed := first
		taken := 0
		for _, field := range fields {
			if rapid.Bool().Draw(rt, field) {
				mixed = withMember(t, mixed, field, member(t, second, field))
				taken++
			}
		}
		e, err := Parse(mixed)
		if err != nil {
			if errors.Is(err, ErrMalformed) {
				return // an auth envelope's payload has its own size, for example
			}
			rt.Fatal(err)
		}
		payload, err := e.Open(t.Context(), e.Context(), own.Recipient, own.key, testAuth)
		same := bytes.Equal(mixed, first) || bytes.Equal(mixed, second)
		if same != (err == nil) {
			rt.Fatalf("%d fields taken: opened %q, %v", taken, payload, err)
		}
	})
}
