package keyring

import (
	"syscall"
	"testing"
	"time"

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

// BenchmarkTransit is what a server asks for while a lease is open, by 64 clients at once.
func BenchmarkTransit(b *testing.B) {
	f := newLeased(b)
	f.server()
	f.openLease()
	payload := make([]byte, 32)
	leased := f.encrypt(string(payload)).Envelope
	want := envelope.Context{Use: envelope.UseTransit}
	for _, bm := range []struct {
		name string
		do   func() error
	}{
		{"seal leased", func() error {
			_, err := f.Wrap(b.Context(), "prod", envelope.UseTransit, payload, nil)
			return err
		}},
		{"open leased", func() error {
			_, err := f.Unwrap(b.Context(), "prod", envelope.UseTransit, leased, nil)
			return err
		}},
		{"open leased without ctx", func() error {
			_, ok, err := f.OpenLeased("prod", leased, want)
			if err == nil && !ok {
				err = ErrNotReady
			}
			return err
		}},
	} {
		b.Run(bm.name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetParallelism(32) // on two cores: 64
			begun := cpuTime(b)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := bm.do(); err != nil {
						b.Error(err)
						return
					}
				}
			})
			b.ReportMetric(float64(cpuTime(b)-begun)/float64(b.N), "cpu-ns/op")
		})
	}
}

// cpuTime is what the process has had of all processors: unlike the time on the clock, others on the machine do not change it
// much.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
