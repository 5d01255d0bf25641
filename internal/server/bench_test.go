package server

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/token"
)

// BenchmarkDecrypt is a decryption over TLS, client included.
func BenchmarkDecrypt(b *testing.B) {
	for _, mode := range []string{ModeLeased, ModeStrict} {
		b.Run(mode, func(b *testing.B) {
			w := newWorld(b)
			if mode == ModeLeased {
				w.lease("prod", time.Hour)
			}
			text := w.token(token.Spec{Limit: &token.Limit{}})
			r := w.start(nil).waitReady()
			client := r.client()
			transport, _ := client.Transport.(*http.Transport)
			transport.ForceAttemptHTTP2 = false
			transport.MaxIdleConnsPerHost = 64
			var sealed answer
			eventually(b, "it is sealed as wanted", func() bool {
				sealed = r.encrypt(client, text, "prod", "a secret of 32 bytes, more or less")
				return true
			})
			body := fmt.Sprintf(`{"ciphertext":%q}`, sealed.data("ciphertext"))
			b.ReportAllocs()
			b.SetParallelism(32)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					request, err := http.NewRequestWithContext(b.Context(), http.MethodPut, "https://"+r.at+"/v1/transit/decrypt/prod", strings.NewReader(body))
					if err != nil {
						b.Error(err)
						return
					}
					request.Header.Set("X-Vault-Token", text)
					response, err := client.Do(request)
					if err != nil {
						b.Error(err)
						return
					}
					_, _ = io.Copy(io.Discard, response.Body)
					_ = response.Body.Close()
					if response.StatusCode != http.StatusOK {
						b.Errorf("%d", response.StatusCode)
						return
					}
				}
			})
		})
	}
}

// BenchmarkHandler is a leased decryption without network and client: what the server itself spends.
func BenchmarkHandler(b *testing.B) {
	w := newWorld(b)
	w.lease("prod", time.Hour)
	text := w.token(token.Spec{Limit: &token.Limit{}})
	r := w.start(nil).waitReady()
	sealed := r.encrypt(r.client(), text, "prod", "a secret of 32 bytes, more or less")
	body := fmt.Sprintf(`{"ciphertext":%q}`, sealed.data("ciphertext"))
	b.Logf("%d bytes", len(body))
	b.ReportAllocs()
	for b.Loop() {
		request := httptest.NewRequestWithContext(b.Context(), http.MethodPut, "/v1/transit/decrypt/prod", strings.NewReader(body))
		request.RemoteAddr = "127.0.0.1:1"
		request.Header.Set("X-Vault-Token", text)
		recorder := httptest.NewRecorder()
		r.server.ServeHTTP(recorder, request)
		if recorder.Code != http.StatusOK {
			b.Fatal(recorder.Body)
		}
	}
}
