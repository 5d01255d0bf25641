package bench

import (
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/sealtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// sealServer is a machine that runs `nitroseal serve`, with two wrapping keys of one kind: "strict" asks the HSM each time,
// "leased" has a lease that outlives the benchmark.
type sealServer struct {
	host    *vaulttest.Host
	running *vaulttest.Running
	trust   *tls.Config
	hsm     *pkcs11test.Token

	target
}

const benchLease = "1h"

// newSealServer makes one that is ready to be started. more is more of its block.
func newSealServer(b *testing.B, token *pkcs11test.Token, parallel int, more string) *sealServer {
	host := vaulttest.NewHost(b)
	host.WithToken(b, token)
	host.Set(b, `device "hsm"`, "type = \"pkcs11\"\n serial = %q\n pin_file = \"pin\"\n parallel = %d", token.Serial, parallel)
	for _, key := range []string{"strict", "leased"} {
		host.Must(b, "key", "generate", key, "--device", "hsm", "--algorithm", "rsa-2048")
		host.Must(b, "key", "backup", key, "--out", host.File(key+".record"))
		host.Must(b, "key", "configure", key, "--accept-single-hsm")
	}
	host.Must(b, "key", "configure", "leased", "--lease", benchLease)

	host.Set(b, `audit "syslog"`, "address = %q", syslogSocket(b))

	authority := vaulttest.NewAuthority(b)
	certificate, key := authority.Issue(b)
	host.Put(b, "ca.pem", authority.PEM)
	host.Put(b, "serve.pem", certificate)
	host.Put(b, "serve.key", key)
	ports := vaulttest.FreePorts(b, 2)
	host.Set(b, "serve", "listen = %q\n tls_cert_file = \"serve.pem\"\n tls_key_file = \"serve.key\"\n metrics_listen = %q\n %s", ports[0], ports[1], more)
	return &sealServer{
		host: host, hsm: token, trust: &tls.Config{RootCAs: authority.Roots(), MinVersion: tls.VersionTLS12},
		target: target{
			address: "https://" + ports[0], caFile: host.File("ca.pem"),
			token: strings.TrimSpace(host.Must(b, "serve", "token", "create", "bench", "--key", "strict", "--key", "leased", "--rate", "0")),
		},
	}
}

// syslogSocket stands for the syslog server of this machine, which takes lines from a socket as journald does: that is where lines
// of the audit log go where systemd is. A file costs two fsync each opening, which is a matter of the disk.
func syslogSocket(b *testing.B) string {
	dir, err := os.MkdirTemp("", "ns-") //nolint:usetesting // a socket's path has 107 characters at most, and b.TempDir is long
	must(b, err)
	socket := filepath.Join(dir, "log")
	listener, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	must(b, err)
	var reading sync.WaitGroup
	reading.Go(func() {
		for line := make([]byte, 64<<10); ; {
			if _, err := listener.Read(line); err != nil {
				return // closed
			}
		}
	})
	b.Cleanup(func() {
		_ = listener.Close()
		reading.Wait()
		_ = os.RemoveAll(dir)
	})
	return socket
}

// start runs the server until it opens both keys.
func (s *sealServer) start(b *testing.B) {
	s.running = s.host.Start(b, "serve")
	for _, key := range []string{"strict", "leased"} {
		seal := s.seal(key, nil)
		vaulttest.Eventually(b, vaulttest.Patience, "serve to open "+key, func() error {
			ciphertext, err := seal.Encrypt(b.Context(), []byte(sealed))
			if err == nil && isLeased(ciphertext) != (key == "leased") {
				err = errors.New("no lease is open")
			}
			if err == nil {
				_, err = seal.Decrypt(b.Context(), ciphertext)
			}
			return err
		})
		seal.Close()
	}
}

// seal is a Vault that is played, with a wrapping key of the server.
func (s *sealServer) seal(key string, tally *sealtest.Tally) *sealtest.Seal {
	config := sealtest.Config{Address: s.address, Key: key, Token: s.token, TLS: s.trust}
	if tally != nil {
		config.Observe = tally.Add
	}
	return sealtest.New(config)
}

// decrypt is the load of decryptions of what a wrapping key has sealed.
func (s *sealServer) decrypt(b *testing.B, key string, clients int) *load {
	seal := s.seal(key, nil)
	defer seal.Close()
	ciphertext, err := seal.Encrypt(b.Context(), []byte(sealed))
	must(b, err)
	return newLoad(b, key, s.target, "transit/decrypt/"+key, vaulttest.Fields{"ciphertext": ciphertext}, vaulttest.Base64(sealed), clients)
}

// isLeased tells whether a ciphertext opens with a key encryption key.
func isLeased(ciphertext string) bool {
	envelope, err := base64.StdEncoding.DecodeString(ciphertext[strings.LastIndexByte(ciphertext, ':')+1:])
	if err != nil {
		return false
	}
	_, protected, _ := strings.Cut(string(envelope), `{"protected":"`)
	protected, _, _ = strings.Cut(protected, `"`)
	header, err := base64.RawURLEncoding.DecodeString(protected)
	return err == nil && strings.Contains(string(header), `"alg":"A256KW"`)
}

// raw is the bare call with the HSM key of "strict".
func (s *sealServer) raw(b *testing.B) *rawLoop {
	type recipient struct {
		ID  string `json:"key_id"`
		Key string `json:"public_key"`
	}
	shown := vaulttest.Decode[struct {
		Versions []struct {
			Recipients []recipient `json:"recipients"`
		} `json:"versions"`
	}](b, s.host.Must(b, "key", "show", "strict", "-o", "json"))
	r := shown.Versions[0].Recipients[0]
	return startRawOn(b, s.hsm, r.ID, r.Key)
}

// memory of the server and its module host, in KiB: what is resident now, and the most that was since [sealServer.forget].
func (s *sealServer) memory(b *testing.B) (now, most, host int) {
	process := s.running.Process(b)
	for _, child := range s.running.Children() {
		host += child.ResidentKiB(b)
	}
	return process.ResidentKiB(b), peakKiB(b, process), host
}

// forget lets the most memory of the server be counted anew.
func (s *sealServer) forget(b *testing.B) {
	const peak = "5" // proc_pid_clear_refs(5)
	must(b, os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", s.running.Process(b).PID), []byte(peak), 0o600))
}

func peakKiB(b *testing.B, p vaulttest.Process) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	must(b, err)
	_, rest, found := strings.Cut(string(status), "VmHWM:")
	value, _, complete := strings.Cut(rest, "kB")
	kib, err := strconv.Atoi(strings.TrimSpace(value))
	if !found || !complete || err != nil {
		b.Fatalf("process %d shows no VmHWM: %v", p.PID, err)
	}
	return kib
}

// rest is how long a server has nothing to do before its memory at rest is looked at.
const rest = 5 * time.Second
