package pkcs11

import (
	"errors"
	"slices"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// BenchmarkHop measures what the module host adds to an operation: a request and an answer of the sizes of a decryption,
// and nothing asked of the module, because the host refuses the request for its size.
func BenchmarkHop(b *testing.B) {
	token := pkcs11test.SoftHSM(b)
	p, err := birth{env: token.Env}.start()
	if err != nil {
		b.Fatal(err)
	}
	h := newHost(p)
	defer h.close()
	if err := h.greet(wire.Hello{Version: wire.Version, Module: token.Module, MaxSessions: 1}, patience); err != nil {
		b.Fatal(err)
	}
	ciphertext := make([]byte, 256)
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		begun := time.Now()
		_, err := h.call(b.Context(), request{
			op: wire.OpDecryptOAEP, meta: wire.DecryptRequest{Slot: 1, Handle: 2, Hash: ckmSHA256, Size: 255}, data: ciphertext, limit: patience,
		})
		took = append(took, time.Since(begun))
		if failed, ok := errors.AsType[*wire.Error](err); !ok || failed.Code != wire.CodeBadRequest {
			b.Fatalf("the hop gives %v", err)
		}
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Nanoseconds()), "p50-ns")
	b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds()), "p99-ns")
}
