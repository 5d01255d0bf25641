package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// ---- certificates ------------------------------------------------------------------------------------------------------

func TestThePKIIsWhatEtcdAndANetHSMNeed(t *testing.T) {
	dir := makePKI(t, "etcd.example.org", "10.0.0.7", "fd00::7")
	ca := readCertificate(t, dir, "ca")
	server, client := readCertificate(t, dir, "server"), readCertificate(t, dir, "client")

	if !ca.IsCA || !ca.MaxPathLenZero || ca.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("the CA may do %b, IsCA %v, path length %d", ca.KeyUsage, ca.IsCA, ca.MaxPathLen)
	}
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if !slices.Equal(server.ExtKeyUsage, both) {
		t.Errorf("etcd's certificate is for %v; etcd calls itself with it, so it needs both uses", server.ExtKeyUsage)
	}
	if !slices.Equal(client.ExtKeyUsage, both[1:]) {
		t.Errorf("the client's certificate is for %v", client.ExtKeyUsage)
	}
	if want := []string{"etcd", "localhost", "etcd.example.org"}; !slices.Equal(server.DNSNames, want) {
		t.Errorf("etcd is called %q, want %q", server.DNSNames, want)
	}
	if got := fmt.Sprint(server.IPAddresses); got != "[127.0.0.1 10.0.0.7 fd00::7]" {
		t.Errorf("etcd's addresses are %v", got)
	}
	for _, name := range []string{"127.0.0.1", "etcd", "localhost"} {
		options := x509.VerifyOptions{Roots: pool(ca), DNSName: name, KeyUsages: both[:1]}
		if _, err := server.Verify(options); err != nil {
			t.Errorf("as %q: %v", name, err)
		}
	}
	for _, certificate := range []*x509.Certificate{server, client} {
		if certificate.IsCA || time.Until(certificate.NotAfter) < 729*24*time.Hour || certificate.SerialNumber.BitLen() != 127 {
			t.Errorf("%s: IsCA %v, until %v, serial number of %d bits", certificate.Subject, certificate.IsCA, certificate.NotAfter,
				certificate.SerialNumber.BitLen())
		}
	}

	key, err := base64.StdEncoding.DecodeString(strings.TrimSuffix(readFile(t, dir, "device_key"), "\n"))
	if err != nil || len(key) != 32 || bytes.Equal(key, make([]byte, 32)) {
		t.Errorf("the device key is of %d bytes, %v", len(key), err)
	}
	if again := readFile(t, makePKI(t), "device_key"); again == readFile(t, dir, "device_key") {
		t.Error("two device keys are the same")
	}
}

func TestTheFilesOfThePKIAreForTheirOwnerOnly(t *testing.T) {
	dir := makePKI(t)
	runPKI(t, "client", dir, "nitroseal")
	runPKI(t, "renew", dir, "server", "etcd-2")
	names := []string{}
	must(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		must(t, err)
		info, err := entry.Info()
		must(t, err)
		want := fs.FileMode(0o600)
		if entry.IsDir() {
			want = fs.ModeDir | 0o700
		} else {
			names = append(names, entry.Name())
		}
		if info.Mode() != want {
			t.Errorf("%s has mode %v, want %v", path, info.Mode(), want)
		}
		return nil
	}))
	want := []string{
		"ca.crt", "ca.key", "client.crt", "client.key", "device_key", "nitroseal.crt", "nitroseal.key", "server.crt", "server.key",
	}
	if !slices.Equal(names, want) {
		t.Errorf("there are %q, want %q", names, want)
	}
}

func TestThePKIIsNeverOverwritten(t *testing.T) {
	dir := makePKI(t)
	runPKI(t, "client", dir, "nitroseal")
	before := contents(t, dir)
	for _, arguments := range [][]string{
		{"make", dir},
		{"client", dir, "nitroseal"},
		{"client", dir, "server"},
		{"client", dir, "ca"},
		{"client", dir, "../x"},
		{"renew", dir, "ca"},
		{"renew", dir, "nobody"},
		{"renew", dir, "client", "with-a-name"},
		{"renew", dir, "server", "a,DNS:evil"},
		{"-d", "0", "renew", dir, "server"},
		{"-d", "4000", "renew", dir, "server"}, // the CA ends before
		{"renew", "-d", "10", dir, "server"},
		{"renew", filepath.Dir(dir), "server"},
	} {
		if out, err := pki(arguments...); err == nil {
			t.Errorf("pki.sh %q succeeded: %s", arguments, out)
		}
	}
	if !maps.Equal(contents(t, dir), before) {
		t.Error("a run that was refused has changed something")
	}
	other := filepath.Join(filepath.Dir(dir), "other")
	if out, err := pki("make", other, "bad name"); err == nil {
		t.Errorf("a bad name was taken: %s", out)
	}
	if out, err := pki("-D", "700", "make", other); err == nil || !strings.Contains(out, "the CA ends before 730 days") {
		t.Errorf("certificates that outlive their CA: %v, %s", err, out)
	}
	if left := list(t, filepath.Dir(dir)); !slices.Equal(left, []string{filepath.Base(dir)}) {
		t.Errorf("refused runs left %q", left)
	}
}

func TestOfManyThatMakeTheSamePKIOneWins(t *testing.T) {
	const runs = 4
	dir := filepath.Join(t.TempDir(), "certs")
	results := make(chan error, runs)
	for range runs {
		go func() {
			_, err := pki("make", dir)
			results <- err
		}()
	}
	won := 0
	for range runs {
		if <-results == nil {
			won++
		}
	}
	if won != 1 {
		t.Errorf("%d of %d runs think that they made it", won, runs)
	}
	if _, err := tls.LoadX509KeyPair(filepath.Join(dir, "server.crt"), filepath.Join(dir, "server.key")); err != nil {
		t.Error(err)
	}
	if left := list(t, filepath.Dir(dir)); !slices.Equal(left, []string{"certs"}) {
		t.Errorf("there are %q", left)
	}
}

func TestARenewedCertificateKeepsKeyAndNames(t *testing.T) {
	dir := makePKI(t, "etcd.example.org")
	before, key := readCertificate(t, dir, "server"), readFile(t, dir, "server.key")
	runPKI(t, "-d", "1000", "renew", dir, "server", "10.0.0.8", "etcd.example.org")
	after := readCertificate(t, dir, "server")
	if readFile(t, dir, "server.key") != key || after.SerialNumber.Cmp(before.SerialNumber) == 0 || !after.NotAfter.After(before.NotAfter) {
		t.Errorf("renewed until %v, before %v", after.NotAfter, before.NotAfter)
	}
	if got := fmt.Sprint(after.DNSNames, after.IPAddresses); got != "[etcd localhost etcd.example.org] [127.0.0.1 10.0.0.8]" {
		t.Errorf("it is for %s", got)
	}
	if after.Subject.String() != before.Subject.String() || !slices.Equal(after.ExtKeyUsage, before.ExtKeyUsage) {
		t.Errorf("it is %s, for %v", after.Subject, after.ExtKeyUsage)
	}

	must(t, os.Rename(filepath.Join(dir, "ca.key"), filepath.Join(t.TempDir(), "ca.key"))) // as its owner should
	if out, err := pki("renew", dir, "server"); err == nil || !strings.Contains(out, "ca.key") {
		t.Errorf("without the CA's key: %v, %s", err, out)
	}
	runPKI(t, "show", dir)
}

// ---- etcd --------------------------------------------------------------------------------------------------------------

// TestEtcdAsComposedServesOnlyItsOwn starts a real etcd with the very flags of the compose file, but for addresses and paths.
func TestEtcdAsComposedServesOnlyItsOwn(t *testing.T) {
	dir := makePKI(t)
	runPKI(t, "client", dir, "nitroseal")
	endpoint := startComposedEtcd(t, dir)
	foreign := makePKI(t)

	config := func(certs, name string) etcd.Config {
		config := etcd.Config{
			Endpoints: []string{endpoint}, Prefix: "nitroseal/test", CACert: []byte(readFile(t, dir, "ca.crt")), RequestTimeout: 10 * time.Second,
		}
		if name != "" {
			config.ClientCert, config.ClientKey = []byte(readFile(t, certs, name+".crt")), []byte(readFile(t, certs, name+".key"))
		}
		return config
	}

	// The server's own certificate is what the health check calls with, and etcd itself.
	for _, name := range []string{"client", "nitroseal", "server"} {
		if err := writeReadDelete(config(dir, name)); err != nil {
			t.Errorf("with the certificate %s: %v", name, err)
		}
	}
	tlsproxy := config(dir, "client")
	tlsproxy.ServerName = "etcd" // the name that a NetHSM's proxy calls and verifies, by ETCD_HOST
	if err := writeReadDelete(tlsproxy); err != nil {
		t.Errorf("under the name etcd: %v", err)
	}

	elsewhere := config(dir, "client")
	elsewhere.CACert = []byte(readFile(t, foreign, "ca.crt"))
	for what, config := range map[string]etcd.Config{
		"a client without a certificate":            config(dir, ""),
		"a client with a certificate of another CA": config(foreign, "client"),
		"a client that trusts another CA":           elsewhere,
	} {
		if err := writeReadDelete(config); !errors.Is(err, store.ErrDenied) {
			t.Errorf("%s: %v, want it to be refused", what, err)
		}
	}
	plain := config(dir, "")
	plain.Endpoints, plain.CACert = []string{strings.Replace(endpoint, "https", "http", 1)}, nil
	if err := writeReadDelete(plain); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("without TLS: %v", err)
	}

	// etcd reads its certificate for every connection: a renewed one needs no restart but a container's, which holds the old file.
	before := readCertificate(t, dir, "server").SerialNumber
	runPKI(t, "renew", dir, "server")
	if err := writeReadDelete(config(dir, "client")); err != nil {
		t.Errorf("after the certificate was renewed: %v", err)
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"))
	must(t, err)
	dialer := &tls.Dialer{Config: &tls.Config{
		RootCAs: pool(readCertificate(t, dir, "ca")), Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12,
	}}
	conn, err := dialer.DialContext(t.Context(), "tcp", strings.TrimPrefix(endpoint, "https://"))
	must(t, err)
	defer conn.Close()
	if shown := conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber; shown.Cmp(before) == 0 {
		t.Error("etcd still shows the old certificate")
	}
}

// writeReadDelete is the round trip of our own store.
func writeReadDelete(config etcd.Config) (err error) {
	opened, err := etcd.Open(config)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, opened.Close()) }()
	ctx := context.Background() // the configuration has a limit
	revision, err := opened.Put(ctx, "round/trip", []byte("value"), store.NoRevision)
	if err != nil {
		return err
	}
	entry, err := opened.Get(ctx, "round/trip")
	if err != nil {
		return err
	}
	if string(entry.Value) != "value" {
		return fmt.Errorf("it read %q", entry.Value)
	}
	return opened.Delete(ctx, "round/trip", revision)
}

// startComposedEtcd runs etcd as compose.unix.yaml does until the test ends, and returns its endpoint.
func startComposedEtcd(t *testing.T, certs string) string {
	t.Helper()
	composed := readCompose(t, "unix")
	arguments := composed.Services["etcd"].Command
	if len(arguments) < 10 || arguments[0] != "/usr/local/bin/etcd" {
		t.Fatalf("the command is %q", arguments)
	}
	for attempt := range 5 { // somebody else may take a port in between
		client, peer := freeAddress(t), freeAddress(t)
		replacements := []string{
			"0.0.0.0:2379", client, "etcd:2379", client, "127.0.0.1:2380", peer,
			"/etcd-data", filepath.Join(t.TempDir(), "data"),
		}
		for name, secret := range composed.Secrets {
			replacements = append(replacements, "/run/secrets/"+name, strings.Replace(secret.File, "${NETHSM_CERTS:-./certs}", certs, 1))
		}
		command := exec.Command(vaulttest.Tool(t, "etcd"), replaced(arguments[1:], replacements)...) //nolint:noctx // ended below
		var log output
		command.Env, command.Stdout, command.Stderr = []string{}, &log, &log
		command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		must(t, command.Start())
		ended := make(chan struct{})
		go func() { // ends with the process
			defer close(ended)
			_ = command.Wait() // its log tells how it ended
		}()
		t.Cleanup(func() {
			_ = command.Process.Kill()
			<-ended
			if t.Failed() {
				t.Logf("etcd said:\n%s", log.String())
			}
		})
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
			if strings.Contains(log.String(), "ready to serve client requests") {
				return "https://" + client
			}
			select {
			case <-ended:
				deadline = time.Time{}
			case <-time.After(50 * time.Millisecond):
			}
		}
		t.Logf("attempt %d: etcd is not ready", attempt+1)
	}
	t.Fatal("etcd does not start with the flags of compose.unix.yaml")
	return ""
}

func replaced(arguments, replacements []string) []string {
	replacer := strings.NewReplacer(replacements...)
	var done []string
	for _, argument := range arguments {
		done = append(done, replacer.Replace(argument))
	}
	return done
}

func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	return listener.Addr().String()
}

// ---- compose files -----------------------------------------------------------------------------------------------------

// compose is what the tests read of a compose file.
type compose struct {
	Name     string `yaml:"name"`
	Services map[string]struct {
		Image       string            `yaml:"image"`
		Command     []string          `yaml:"command"`
		Environment map[string]string `yaml:"environment"`
		Secrets     []string          `yaml:"secrets"`
		Ports       []string          `yaml:"ports"`
		Restart     string            `yaml:"restart"`
		Devices     []string          `yaml:"devices"`
		CapAdd      []string          `yaml:"cap_add"`
		CapDrop     []string          `yaml:"cap_drop"`
		Privileged  bool              `yaml:"privileged"`
		Healthcheck struct {
			Test []string `yaml:"test"`
		} `yaml:"healthcheck"`
		DependsOn map[string]struct {
			Condition string `yaml:"condition"`
		} `yaml:"depends_on"`
	} `yaml:"services"`
	Secrets map[string]struct {
		File string `yaml:"file"`
	} `yaml:"secrets"`
	Volumes  map[string]any `yaml:"volumes"`
	Networks map[string]any `yaml:"networks"`
}

func TestTheComposeFilesSayWhatTheyShould(t *testing.T) {
	secrets := []string{"ca_cert", "client_cert", "client_key", "device_key", "server_cert", "server_key"}
	variables := []string{"DEBUG_LOG", "ETCD_CA_CERT", "ETCD_CLIENT_CERT", "ETCD_CLIENT_KEY", "ETCD_HOST", "ETCD_PORT", "MODE"}
	for _, mode := range []string{"unix", "unikernel"} {
		t.Run(mode, func(t *testing.T) {
			composed, text := readCompose(t, mode), readFile(t, deployed(), "compose."+mode+".yaml")
			etcd, nethsm := composed.Services["etcd"], composed.Services["nethsm"]

			if got := slices.Sorted(maps.Keys(nethsm.Environment)); !slices.Equal(got, variables) {
				t.Errorf("the NetHSM is given %q, want %q", got, variables)
			}
			if nethsm.Environment["MODE"] != mode || nethsm.Environment["ETCD_HOST"] != "etcd" {
				t.Errorf("the environment is %v", nethsm.Environment)
			}
			if !strings.Contains(text, "# UNLOCKPW: ") {
				t.Error("nothing is said of UNLOCKPW")
			}
			if got := slices.Sorted(maps.Keys(composed.Secrets)); !slices.Equal(got, secrets) {
				t.Errorf("the secrets are %q, want %q", got, secrets)
			}
			used := slices.Compact(slices.Sorted(slices.Values(slices.Concat(etcd.Secrets, nethsm.Secrets))))
			if !slices.Equal(used, secrets) {
				t.Errorf("the services use %q", used)
			}
			for _, needed := range []string{"ca_cert", "client_cert", "client_key", "device_key"} {
				if !slices.Contains(nethsm.Secrets, needed) {
					t.Errorf("the NetHSM gets no %s", needed)
				}
			}
			if slices.Contains(etcd.Secrets, "device_key") || slices.Contains(nethsm.Secrets, "server_key") {
				t.Error("a secret is given to who needs it not")
			}
			// pki.sh makes every file that is named.
			dir := makePKI(t)
			for name, secret := range composed.Secrets {
				if _, err := os.Stat(strings.Replace(secret.File, "${NETHSM_CERTS:-./certs}", dir, 1)); err != nil {
					t.Errorf("secret %s: %v", name, err)
				}
			}

			if len(etcd.Ports) > 0 {
				t.Errorf("etcd is published: %q", etcd.Ports)
			}
			if !slices.Contains(etcd.Command, "--client-cert-auth") || !slices.Contains(etcd.Command, "--max-txn-ops=512") {
				t.Errorf("etcd runs with %q", etcd.Command)
			}
			if nethsm.DependsOn["etcd"].Condition != "service_healthy" {
				t.Errorf("the NetHSM depends on %v", nethsm.DependsOn)
			}
			for name, service := range composed.Services {
				if !slices.Equal(service.CapDrop, []string{"ALL"}) || service.Privileged {
					t.Errorf("%s drops %q, privileged %v", name, service.CapDrop, service.Privileged)
				}
			}
			virtual := slices.Equal(nethsm.Devices, []string{"/dev/kvm", "/dev/net/tun"}) && slices.Contains(nethsm.CapAdd, "NET_ADMIN")
			if virtual != (mode == "unikernel") {
				t.Errorf("devices %q, capabilities %q", nethsm.Devices, nethsm.CapAdd)
			}
		})
	}

	unix, unikernel := readCompose(t, "unix"), readCompose(t, "unikernel")
	if !slices.Equal(unix.Services["etcd"].Command, unikernel.Services["etcd"].Command) || unix.Name != unikernel.Name {
		t.Error("the two modes run different etcds: changing the mode would lose the data")
	}
}

// pinned is an image with a default that does not move, which an owner can replace by one with a digest.
var pinned = regexp.MustCompile(`^\$\{[A-Z_]+:-[a-z0-9./-]+/[a-z0-9./-]+:(v?[0-9]+(\.[0-9]+)+|[0-9a-f]{8})\}$`)

func TestEveryServiceIsPinnedCheckedAndStartedAgain(t *testing.T) {
	for _, name := range []string{"unix", "unikernel", "testing"} {
		composed := readCompose(t, name)
		if len(composed.Services) == 0 || len(composed.Volumes) != 1 {
			t.Errorf("compose.%s.yaml has %d services and %d volumes", name, len(composed.Services), len(composed.Volumes))
		}
		for service, is := range composed.Services {
			if !pinned.MatchString(is.Image) {
				t.Errorf("compose.%s.yaml: the image of %s is %q", name, service, is.Image)
			}
			if len(is.Healthcheck.Test) < 2 || is.Restart != "unless-stopped" {
				t.Errorf("compose.%s.yaml: %s has health check %q and restart policy %q", name, service, is.Healthcheck.Test, is.Restart)
			}
			for _, port := range is.Ports {
				if !strings.HasPrefix(port, "${NETHSM_LISTEN:-127.0.0.1}:") {
					t.Errorf("compose.%s.yaml: %s listens on %q, beyond this machine unless told otherwise", name, service, port)
				}
			}
		}
	}
}

// deployed is the folder that the tests are about.
var deployed = sync.OnceValue(func() string { return filepath.Join(vaulttest.Root(), "deploy", "nethsm") })

// readCompose reads a compose file, and refuses what the Compose Specification does not know of a service.
func readCompose(t *testing.T, name string) compose {
	t.Helper()
	content := []byte(readFile(t, deployed(), "compose."+name+".yaml"))
	var composed compose
	must(t, yaml.Unmarshal(content, &composed))
	var all struct {
		Services map[string]map[string]any `yaml:"services"`
	}
	must(t, yaml.Unmarshal(content, &all))
	known := []string{
		"cap_add", "cap_drop", "command", "depends_on", "devices", "environment", "healthcheck", "image", "logging", "mem_limit",
		"networks", "pids_limit", "platform", "ports", "read_only", "restart", "secrets", "security_opt", "sysctls", "tmpfs", "volumes",
	}
	for service, keys := range all.Services {
		for key := range keys {
			if !slices.Contains(known, key) {
				t.Errorf("compose.%s.yaml: %s has %q", name, service, key)
			}
		}
	}
	return composed
}

// ---- small things ------------------------------------------------------------------------------------------------------

// makePKI runs pki.sh for a new folder.
func makePKI(t *testing.T, names ...string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "certs")
	runPKI(t, append([]string{"make", dir}, names...)...)
	return dir
}

func runPKI(t *testing.T, arguments ...string) {
	t.Helper()
	if out, err := pki(arguments...); err != nil {
		t.Fatalf("pki.sh %q: %v\n%s", arguments, err, out)
	}
}

// pki runs pki.sh under the umask that most people have, so that the modes of its files are its own doing.
func pki(arguments ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	script := filepath.Join(deployed(), "pki.sh")
	command := exec.CommandContext(ctx, "sh", append([]string{"-c", `umask 022; exec "$0" "$@"`, script}, arguments...)...)
	out, err := command.CombinedOutput()
	return string(out), err
}

func readFile(t *testing.T, dir, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(dir, name))
	must(t, err)
	return string(content)
}

func readCertificate(t *testing.T, dir, name string) *x509.Certificate {
	t.Helper()
	block, rest := pem.Decode([]byte(readFile(t, dir, name+".crt")))
	if block == nil || len(bytes.TrimSpace(rest)) > 0 {
		t.Fatalf("%s.crt is not one certificate", name)
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	must(t, err)
	return certificate
}

func pool(ca *x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	return pool
}

// contents are the files of a folder.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, name := range list(t, dir) {
		found[name] = readFile(t, dir, name)
	}
	return found
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	var names []string
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}
