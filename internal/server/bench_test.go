package server

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/token"
)

// BenchmarkDecrypt is a decryption over TLS by one of 64 clients that cost next to nothing.
func BenchmarkDecrypt(b *testing.B) {
	for _, mode := range []string{ModeLeased, ModeStrict} {
		b.Run(mode, func(b *testing.B) {
			w := newWorld(b)
			if mode == ModeLeased {
				w.lease("prod", time.Hour)
			}
			text := w.token(token.Spec{Limit: &token.Limit{}})
			r := w.start(nil).waitReady()
			sealed := r.encrypt(r.client(), text, "prod", "a secret of 32 bytes, more or less")
			body := fmt.Sprintf(`{"ciphertext":%q}`, sealed.data("ciphertext"))
			request := fmt.Appendf(nil, "PUT /v1/transit/decrypt/prod HTTP/1.1\r\nHost: seal\r\nX-Vault-Request: true\r\n"+
				"X-Vault-Token: %s\r\nContent-Length: %d\r\n\r\n%s", text, len(body), body)
			const clients = 64
			var asked atomic.Int64
			var running sync.WaitGroup
			var conns []*tls.Conn
			for range clients {
				conns = append(conns, r.dialTLS())
			}
			b.ReportAllocs()
			b.ResetTimer()
			for _, conn := range conns {
				running.Go(func() {
					room := make([]byte, 4<<10)
					for asked.Add(1) <= int64(b.N) {
						if _, err := conn.Write(request); err != nil {
							b.Error(err)
							return
						}
						n, err := conn.Read(room) // an answer is one record
						if err != nil || !bytes.HasPrefix(room[:n], []byte("HTTP/1.1 200")) {
							b.Errorf("%q %v", room[:n], err)
							return
						}
					}
				})
			}
			running.Wait()
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
