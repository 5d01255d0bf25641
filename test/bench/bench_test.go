// Package bench measures what the plugin costs, and prints it as the table of docs/benchmarks.md.
//
// Everything runs against one SoftHSM token in one Vault, in rounds that take turns, so that a busy moment of the machine
// hits all of it; the table shows medians. `make bench` runs it. Nothing here fails because something is slow: the table
// says what was wanted beside what was measured.
package bench

import (
	"bufio"
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1" // for OAEP: SoftHSM has nothing better
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

var out = flag.String("out", "", "also write the table into this file, between its markers")

func TestMain(m *testing.M) {
	modhost.RunIfStarted() // the hop is measured with this binary as module host
	os.Exit(vaulttest.Main(m))
}

const (
	rounds  = 5
	perPart = 100 // operations of each kind in a round
	clients = 8
	soak    = 10_000 // operations before memory is looked at
)

// BenchmarkTable measures everything once. Run it with -benchtime 1x.
func BenchmarkTable(b *testing.B) {
	for b.Loop() {
		measureAll(b)
	}
}

// part is one kind of operation.
type part struct {
	name string
	once func() error // one operation, from any goroutine
	all  []time.Duration
	// inARow measures the operation without the others in between.
	inARow bool
	// seconds that 8 clients needed for an operation each, one value for each round; only where together is set.
	together bool
	rates    []float64
}

func measureAll(b *testing.B) {
	site := vaulttest.StartSite(b, vaulttest.SiteOptions{Build: vaulttest.Build{Tags: "bench"}})
	site.AddDevice(b, "hsm")
	site.Write(b, "nitrokey/devices/hsm", vaulttest.Fields{"parallel": clients})
	site.AddKey(b, "bench", "hsm", "rsa-2048")
	must(b, site.Client(b).Sys().Mount("transit", &api.MountInput{Type: "transit"}))
	site.Write(b, "transit/keys/bench", nil)

	write := func(path string, fields vaulttest.Fields) func() error {
		client := site.Client(b)
		return func() error {
			_, err := client.Logical().WriteWithContext(context.Background(), path, fields)
			return err
		}
	}
	plaintext := vaulttest.Base64(strings.Repeat("k", 44)) // an unseal key
	wrapped := site.Wrap(b, "bench", strings.Repeat("k", 44))
	encrypted := site.Write(b, "transit/encrypt/bench", vaulttest.Fields{"plaintext": plaintext})["ciphertext"]

	raw := startRaw(b, site)
	hop, decrypt := openHost(b, site, raw.ciphertext)
	parts := []*part{
		{name: "hop", once: hop, inARow: true},
		{name: "hop between requests", once: hop},
		{name: "decrypt", once: decrypt, together: true},
		{name: "echo", once: write("nitrokey/echo", vaulttest.Fields{"value": plaintext}), together: true},
		{name: "transit encrypt", once: write("transit/encrypt/bench", vaulttest.Fields{"plaintext": plaintext})},
		{name: "transit decrypt", once: write("transit/decrypt/bench", vaulttest.Fields{"ciphertext": encrypted})},
		{name: "wrap", once: write("nitrokey/wrap/bench", vaulttest.Fields{"plaintext": plaintext}), together: true},
		{name: "unwrap", once: write("nitrokey/unwrap/bench", vaulttest.Fields{"ciphertext": wrapped}), together: true},
	}
	rawPart := &part{name: "raw"}
	for round := range rounds {
		progress("round %d of %d", round+1, rounds)
		// One of each in turn: a processor's caches are as cold for the bare call as they are for a request.
		for range perPart {
			rawPart.all = append(rawPart.all, raw.run(b, 1, 1)[1])
			for _, p := range parts {
				if !p.inARow {
					p.alone(b)
				}
			}
		}
		rawPart.rates = append(rawPart.rates, perPart*clients/raw.run(b, perPart, clients)[0].Seconds())
		for _, p := range parts {
			for i := 0; p.inARow && i < perPart; i++ {
				p.alone(b)
			}
			if p.together {
				p.crowd(b)
			}
		}
	}
	table := newTable()
	table.speeds(append([]*part{rawPart}, parts...))

	progress("a new host after the old one was killed")
	table.add("a new module host serves after", newHost(b, site, parts[len(parts)-1]), "≤ 50 ms more than an unwrap")
	progress("start of the plugin")
	table.add("plugin ready after its start", startTime(b), "≤ 300 ms")
	table.seals(b, site.Server, site.Token)
	table.custody(b, site, raw)
	table.sealStorms(b)
	table.netHSM(b)
	table.memory(b, "without mlock", site, "≤ 60 MB")
	table.memory(b, "with mlock, built without cgo", lockedSite(b), "≤ 140 MB")
	table.publish(b)
}

// alone runs one operation while nothing else runs.
func (p *part) alone(b *testing.B) {
	began := time.Now()
	must(b, p.once())
	p.all = append(p.all, time.Since(began))
}

// crowd lets several clients run at a time, and notes operations per second.
func (p *part) crowd(b *testing.B) {
	failures := make(chan error, clients)
	var group sync.WaitGroup
	began := time.Now()
	for range clients {
		group.Go(func() {
			for range perPart {
				if err := p.once(); err != nil {
					failures <- err
					return
				}
			}
		})
	}
	group.Wait()
	p.rates = append(p.rates, perPart*clients/time.Since(began).Seconds())
	select {
	case err := <-failures:
		b.Fatal(err)
	default:
	}
}

// rawLoop is the program rawdecrypt at work.
type rawLoop struct {
	in         io.Writer
	out        *bufio.Reader
	ciphertext []byte
}

// startRaw lets rawdecrypt work on the key of the wrapping key "bench".
func startRaw(b *testing.B, site *vaulttest.Site) *rawLoop {
	version := site.Read(b, "nitrokey/keys/bench")["versions"].([]any)[0].(map[string]any)
	recipient := version["recipients"].([]any)[0].(map[string]any)
	return startRawOn(b, site.Token, recipient["key_id"].(string), recipient["public_key"].(string))
}

// startRawOn builds and starts rawdecrypt on a key of a token, given by its id in hexadecimal and its public key in PEM.
func startRawOn(b *testing.B, token *pkcs11test.Token, keyID, publicKey string) *rawLoop {
	program := filepath.Join(b.TempDir(), "rawdecrypt")
	build := exec.CommandContext(b.Context(), "go", "build", "-o", program, "./rawdecrypt")
	if text, err := build.CombinedOutput(); err != nil {
		b.Fatalf("building rawdecrypt: %v\n%s", err, text)
	}
	id, err := hex.DecodeString(keyID)
	must(b, err)
	block, _ := pem.Decode([]byte(publicKey))
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	must(b, err)
	ciphertext, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, public.(*rsa.PublicKey), make([]byte, 32), nil)
	must(b, err)

	command := exec.CommandContext(b.Context(), program) // ends with the benchmark
	command.Stderr = os.Stderr
	for _, name := range token.Env {
		command.Env = append(command.Env, name+"="+os.Getenv(name))
	}
	in, err := command.StdinPipe()
	must(b, err)
	answers, err := command.StdoutPipe()
	must(b, err)
	must(b, command.Start())
	b.Cleanup(func() { _ = command.Wait() })
	setup, err := json.Marshal(map[string]any{
		"module": token.Module, "slot": token.Slot(b), "pin": token.PIN, "key_id": id, "ciphertext": ciphertext,
	})
	must(b, err)
	_, err = in.Write(append(setup, '\n'))
	must(b, err)
	return &rawLoop{in: in, out: bufio.NewReader(answers), ciphertext: ciphertext}
}

// run returns the duration of the whole, then that of each operation.
func (r *rawLoop) run(b *testing.B, n, clients int) []time.Duration {
	_, err := fmt.Fprintln(r.in, n, clients)
	must(b, err)
	line, err := r.out.ReadString('\n')
	must(b, err)
	var durations []time.Duration
	for _, field := range strings.Fields(line) {
		nanoseconds, err := strconv.ParseInt(field, 10, 64)
		must(b, err)
		durations = append(durations, time.Duration(nanoseconds))
	}
	return durations
}

// openHost returns two operations that go to a module host and back: one that does next to nothing there, it gets one
// random byte, and one C_Decrypt.
func openHost(b *testing.B, site *vaulttest.Site, ciphertext []byte) (hop, decrypt func() error) {
	manager := pkcs11.New(pkcs11.Options{
		Modules: []string{site.Token.Module}, StateDir: b.TempDir(), Env: site.Token.Env,
	})
	b.Cleanup(func() { _ = manager.Close() })
	device, err := manager.Open(b.Context(), pkcs11.Config{
		Module: site.Token.Module, TokenLabel: site.Token.Label, PIN: []byte(site.Token.PIN), Owner: "bench", Parallel: clients,
	})
	must(b, err)
	b.Cleanup(func() { _ = device.Close() })
	var randomer hsm.Randomer = device
	keys, err := device.FindKeys(b.Context(), hsm.KeyQuery{Label: "nitroseal-bench-v1"})
	must(b, err)
	key := keys[0].(hsm.Decrypter)
	hop = func() error {
		_, err := randomer.Random(context.Background(), 1)
		return err
	}
	decrypt = func() error {
		_, err := key.DecryptOAEP(context.Background(), crypto.SHA1, ciphertext)
		return err
	}
	return hop, decrypt
}

// newHost kills the module host and measures the next unwrap, which needs a new one.
func newHost(b *testing.B, site *vaulttest.Site, unwrap *part) string {
	var all []time.Duration
	for range rounds {
		for _, host := range site.Hosts() {
			host.Kill(b)
		}
		began := time.Now()
		for unwrap.once() != nil { // the one that finds the host dead may fail
			if time.Since(began) > 10*time.Second {
				b.Fatal("no new module host within ten seconds")
			}
		}
		all = append(all, time.Since(began))
	}
	return milliseconds(median(all))
}

// startTime measures from the start of the plugin's process to its handshake with Vault.
func startTime(b *testing.B) string {
	plugin := vaulttest.Build{}.Binary(b)
	var all []time.Duration
	for range rounds {
		command := exec.CommandContext(b.Context(), plugin.Path)
		command.Env = []string{
			"VAULT_BACKEND_PLUGIN=6669da05-b1c8-4f49-97d9-c8e5bed98e20", "PLUGIN_PROTOCOL_VERSIONS=5",
			"VAULT_PLUGIN_METADATA_MODE=false", "VAULT_PLUGIN_AUTOMTLS_ENABLED=true", "VAULT_VERSION=1.21.0", "TMPDIR=" + b.TempDir(),
		}
		answers, err := command.StdoutPipe()
		must(b, err)
		began := time.Now()
		must(b, command.Start())
		line, err := bufio.NewReader(answers).ReadString('\n')
		all = append(all, time.Since(began))
		_ = command.Process.Kill()
		_ = command.Wait() // killed, as it should be
		if err != nil || strings.Count(line, "|") < 4 {
			b.Fatalf("the plugin shook hands with %q: %v", line, err)
		}
	}
	return milliseconds(median(all))
}

// lockedSite runs Vault with memory locked and a plugin without cgo, whose module host is another binary.
func lockedSite(b *testing.B) *vaulttest.Site {
	host := vaulttest.Build{}.Binary(b)
	site := vaulttest.StartSite(b, vaulttest.SiteOptions{
		Options: vaulttest.Options{MLock: true},
		Build:   vaulttest.Build{NoCGO: true},
		Args:    []string{"-module-host=" + host.Path, "-module-host-sha256=" + host.SHA256},
	})
	site.AddDevice(b, "hsm")
	site.Write(b, "nitrokey/devices/hsm", vaulttest.Fields{"parallel": clients})
	site.AddKey(b, "bench", "hsm", "rsa-2048")
	return site
}

func median[T cmp.Ordered](all []T) T {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[len(sorted)/2]
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%.2f ms", d.Seconds()*1000) }

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
