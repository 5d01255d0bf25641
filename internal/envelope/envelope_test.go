package envelope

import (
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// wrapContext and materialContext are contexts of which a test changes what it is about.
func wrapContext() Context {
	return Context{Use: UseWrap, Key: "prod", Version: 3, Caller: []byte("caller's own\x00context")}
}

func materialContext() Context {
	return Context{Use: UseMaterial, Key: "prod", Version: 3, Cluster: "vault-eu", Name: "unseal-keys", Generation: 7}
}

func TestEveryAlgorithmOpensAloneAndAmongOthers(t *testing.T) {
	for _, algorithm := range []struct {
		key       string
		algorithm Algorithm
	}{
		{rsa2048, RSAOAEP256}, {rsa2048, RSAOAEP}, {rsa3072, RSAOAEP256}, {ecP256, ECDHESA256KW}, {ecP384, ECDHESA256KW},
	} {
		for _, many := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s %s many=%t", algorithm.key, algorithm.algorithm, many), func(t *testing.T) {
				own := load(t, algorithm.key, algorithm.algorithm)
				to := []party{own}
				if many {
					for _, name := range testKeys {
						if name != algorithm.key {
							to = append(to, load(t, name, ""))
						}
					}
				}
				for _, c := range []Context{wrapContext(), materialContext()} {
					raw := mustSeal(t, c, []byte("payload"), to...)
					e, err := Parse(raw)
					if err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(c, e.Context()); diff != "" {
						t.Errorf("context (-sealed +parsed):\n%s", diff)
					}
					var ids []RecipientID
					for _, p := range to {
						ids = append(ids, RecipientID{KID: p.KID, Algorithm: p.Algorithm})
					}
					if diff := cmp.Diff(ids, e.Recipients()); diff != "" {
						t.Errorf("recipients (-sealed +parsed):\n%s", diff)
					}
					before := own.ops.count.Load()
					payload, err := e.Open(t.Context(), c, own.Recipient, own.key, testAuth)
					if err != nil {
						t.Fatal(err)
					}
					if string(payload) != "payload" {
						t.Errorf("opened %q", payload)
					}
					if spent := own.ops.count.Load() - before; spent != 1 {
						t.Errorf("opening took %d HSM operations, want 1", spent)
					}
				}
			})
		}
	}
}

func TestOneParsedEnvelopeOpensInManyGoroutines(t *testing.T) {
	own := load(t, ecP256, "")
	e, err := Parse(mustSeal(t, wrapContext(), []byte("payload"), own))
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			payload, err := e.Open(t.Context(), e.Context(), own.Recipient, own.key, testAuth)
			if err != nil || string(payload) != "payload" {
				t.Errorf("opening gave %q, %v", payload, err)
			}
			clear(payload)
		})
	}
	group.Wait()
}
