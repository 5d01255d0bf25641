package bench

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

const (
	serviceTime   = 5 * time.Millisecond // of a private-key operation of the double
	netHSMClients = 32
	failovers     = 20
)

// netHSM measures our client for the NetHSM against the double, whose private-key operations take a fixed time: what the
// client adds is all that matters here.
func (t *table) netHSM(b *testing.B) {
	progress("a NetHSM double: one request after the other")
	one := newBenchHSM(b, nethsmtest.Options{ServiceTime: serviceTime})
	bare, ours := &part{once: one.bare(b)}, &part{once: one.ours(b)}
	must(b, bare.once()) // connections are made
	must(b, ours.once())
	for range rounds * perPart {
		bare.alone(b)
		ours.alone(b)
	}
	t.add(fmt.Sprintf("NetHSM: one decrypt of %v with a bare http.Client", serviceTime), milliseconds(median(bare.all)), "")
	t.add("NetHSM: the same with our client", milliseconds(median(ours.all)), "≤ 0.5 ms more = "+milliseconds(median(bare.all)+500*time.Microsecond))

	progress("a NetHSM double: %d clients", netHSMClients)
	busy := newBenchHSM(b, nethsmtest.Options{ServiceTime: serviceTime, Parallel: 8})
	busy.throughput(b)
	t.add(fmt.Sprintf("NetHSM: TLS handshakes for %d requests of %d clients", netHSMClients*perPart, netHSMClients),
		fmt.Sprint(busy.hsm.Node(0).Handshakes()), fmt.Sprintf("≤ %d, the pool", netHSMClients))

	progress("a NetHSM double: a node goes away, %d times", failovers)
	usual, failing, refused := failover(b)
	t.add("NetHSM: the slower of two requests, two nodes", milliseconds(usual), "")
	t.add("NetHSM: the same when one finds its node gone", milliseconds(failing), "≤ one refused request of a bare http.Client more = "+milliseconds(usual+refused))

	progress("a NetHSM double: one node and three")
	single := newBenchHSM(b, nethsmtest.Options{ServiceTime: serviceTime, Parallel: 1}).throughput(b)
	triple := newBenchHSM(b, nethsmtest.Options{ServiceTime: serviceTime, Parallel: 1, Nodes: 3}).throughput(b)
	t.add(fmt.Sprintf("NetHSM: %d clients, one node, one operation at a time", netHSMClients), fmt.Sprintf("%.0f/s", single), "")
	t.add("NetHSM: the same with three nodes", fmt.Sprintf("%.0f/s", triple), fmt.Sprintf("≥ 2.7 times one node = %.0f/s", 2.7*single))
}

// benchHSM is a double with one key, and something to decrypt.
type benchHSM struct {
	hsm        *nethsmtest.HSM
	client     *nethsm.Client
	ciphertext []byte
}

func newBenchHSM(b *testing.B, o nethsmtest.Options) *benchHSM {
	o.Provisioned = true
	h := nethsmtest.Start(b, o)
	_, public, err := h.AddKey(nethsmtest.Key{ID: "bench", Type: "RSA", Length: 2048, Mechanisms: []string{"RSA_Decryption_OAEP_SHA256"}})
	must(b, err)
	ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public.(*rsa.PublicKey), make([]byte, 32), nil)
	must(b, err)
	client, err := nethsm.New(nethsm.Options{URLs: h.URLs(), TLS: nethsm.TLS{CA: h.CA()}, Connections: netHSMClients})
	must(b, err)
	b.Cleanup(func() { must(b, client.Close()) })
	return &benchHSM{hsm: h, client: client, ciphertext: ciphertext}
}

// ours is a decrypt through our client.
func (h *benchHSM) ours(*testing.B) func() error {
	client := h.client.As(nethsm.Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
	return func() error {
		_, err := client.Decrypt(context.Background(), "bench", nethsm.ModeOAEPSHA256, h.ciphertext, nil)
		return err
	}
}

// bare is the same request as simply as Go's client can send it.
func (h *benchHSM) bare(b *testing.B) func() error {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(h.hsm.CA())
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}}
	b.Cleanup(client.CloseIdleConnections)
	body, err := json.Marshal(map[string]string{"mode": "OAEP_SHA256", "encrypted": base64.StdEncoding.EncodeToString(h.ciphertext)})
	must(b, err)
	url := h.hsm.Node(0).URL() + "/api/v1/keys/bench/decrypt"
	return func() error {
		request, err := http.NewRequestWithContext(context.Background(), http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			return err
		}
		request.SetBasicAuth(nethsmtest.OperatorUser, nethsmtest.OperatorPassphrase)
		request.Header.Set("Content-Type", "application/json")
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer func() { _ = response.Body.Close() }()
		answer, err := io.ReadAll(response.Body)
		if err != nil || response.StatusCode != http.StatusOK {
			return fmt.Errorf("status %d: %s: %w", response.StatusCode, answer, err)
		}
		return nil
	}
}

// throughput lets all clients decrypt at a time and returns operations per second.
func (h *benchHSM) throughput(b *testing.B) float64 {
	once := h.ours(b)
	must(b, once())
	failures := make(chan error, netHSMClients)
	var group sync.WaitGroup
	began := time.Now()
	for range netHSMClients {
		group.Go(func() {
			for range perPart {
				if err := once(); err != nil {
					failures <- err
					return
				}
			}
		})
	}
	group.Wait()
	took := time.Since(began)
	select {
	case err := <-failures:
		b.Fatal(err)
	default:
	}
	return perPart * netHSMClients / took.Seconds()
}

// failover measures two requests that take turns between two nodes, the slower one of each pair: while both nodes serve,
// and when one of the two first finds its node gone. A bare request to that node is measured beside it. The double takes
// no time of its own.
func failover(b *testing.B) (usual, failing, refused time.Duration) {
	var usually, failed, refusals []time.Duration
	for range failovers {
		h := newBenchHSM(b, nethsmtest.Options{Nodes: 2})
		once := h.ours(b)
		slower := func() (slowest time.Duration) {
			for range 2 {
				began := time.Now()
				must(b, once())
				slowest = max(slowest, time.Since(began))
			}
			return slowest
		}
		slower() // both nodes have a connection now
		for range 5 {
			usually = append(usually, slower())
		}
		gone := h.hsm.Node(0)
		gone.Stop()
		before := h.hsm.Node(1).Decrypts()
		failed = append(failed, slower())
		if h.hsm.Node(1).Decrypts() != before+2 {
			b.Fatal("a node that is gone served a request")
		}
		bare := h.bare(b) // of the node that is gone
		began := time.Now()
		err := bare()
		refusals = append(refusals, time.Since(began))
		if !errors.Is(err, syscall.ECONNREFUSED) {
			b.Fatalf("a node that is gone: %v, want a refused connection", err)
		}
	}
	return median(usually), median(failed), median(refusals)
}
