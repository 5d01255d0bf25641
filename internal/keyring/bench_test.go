package keyring

import (
	"testing"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

// What the keyring adds to the envelope and the HSM, both of which are software here.
func BenchmarkKeyring(b *testing.B) {
	for _, label := range []string{"rsa", "ec"} {
		f := newFixture(b)
		f.Keyring = New(Config{Records: f.store, Devices: f.devices, CacheRecords: true})
		if _, err := f.Adopt(b.Context(), "prod", AdoptRequest{Device: "one", Label: label}); err != nil {
			b.Fatal(err)
		}
		raw := f.wrap("secret")
		b.Run(label+" wrap", func(b *testing.B) {
			for b.Loop() {
				if _, err := f.Wrap(b.Context(), "prod", envelope.UseWrap, []byte("secret"), nil); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(label+" unwrap", func(b *testing.B) {
			for b.Loop() {
				if _, err := f.Unwrap(b.Context(), "prod", envelope.UseWrap, raw, []byte("ctx")); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
