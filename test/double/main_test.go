package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// asDouble makes the test's own binary behave as the command.
const asDouble = "NITROSEAL_TEST_DOUBLE"

func TestMain(m *testing.M) {
	if os.Getenv(asDouble) != "" {
		main()
		return
	}
	m.Run()
}

// double is a running command, and a client of it.
type double struct {
	process *exec.Cmd
	url     string
	client  *http.Client
}

// start runs the command until it says that it is ready.
func start(t *testing.T, dir string) *double {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d := &double{process: exec.CommandContext(t.Context(), self, "-dir", dir, "-unattended-boot")}
	d.process.Env = append(os.Environ(), asDouble+"=yes")
	d.process.Stderr = os.Stderr
	out, err := d.process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.process.Start(); err != nil {
		t.Fatal(err)
	}
	said := map[string]string{}
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "ready"; {
		name, value, _ := strings.Cut(lines.Text(), " ")
		said[name] = value
	}
	ca, err := os.ReadFile(said["ca"])
	if err != nil {
		t.Fatalf("it said %v: %v", said, err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
	t.Cleanup(transport.CloseIdleConnections)
	d.url, d.client = said["url"]+"/api/v1/", &http.Client{Transport: transport, Timeout: time.Minute}
	return d
}

// ask sends a request as an administrator.
func (d *double) ask(ctx context.Context, method, path, body string) (int, []byte, error) {
	r, err := http.NewRequestWithContext(ctx, method, d.url+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	r.SetBasicAuth(nethsmtest.AdminUser, nethsmtest.AdminPassphrase)
	r.Header.Set("Content-Type", "application/json")
	answer, err := d.client.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = answer.Body.Close() }()
	data, err := io.ReadAll(answer.Body)
	return answer.StatusCode, data, err
}

// A double that is killed while it writes comes back with all that it had promised, and leaves nothing lying about.
func TestItSurvivesBeingKilledAtAnyMoment(t *testing.T) {
	dir := t.TempDir()
	var promised []string
	for round := range 20 {
		d := start(t, dir)
		status, list, err := d.ask(t.Context(), http.MethodGet, "keys", "")
		if err != nil || status != http.StatusOK {
			t.Fatalf("round %d: after being killed it answers %d %s (%v)", round, status, list, err)
		}
		var found []struct{ ID string }
		if err := json.Unmarshal(list, &found); err != nil {
			t.Fatal(err)
		}
		for _, id := range promised {
			if !slices.ContainsFunc(found, func(k struct{ ID string }) bool { return k.ID == id }) {
				t.Errorf("round %d: key %s was made and is gone", round, id)
			}
		}
		killed := make(chan struct{})
		for i := 0; ; i++ {
			if i == 1 { // a key of each round is promised, however slow the machine is
				time.AfterFunc(rand.N(40*time.Millisecond), func() {
					defer close(killed)
					_ = d.process.Process.Kill()
				})
			}
			id := fmt.Sprintf("r%d-%d", round, i)
			status, _, err := d.ask(t.Context(), http.MethodPost, "keys/generate",
				`{"mechanisms":["AES_Encryption_CBC"],"type":"Generic","length":8192,"id":"`+id+`"}`)
			if err != nil && i > 0 {
				break
			}
			if err != nil || status != http.StatusCreated {
				t.Fatalf("making key %s: %d, %v", id, status, err)
			}
			promised = append(promised, id)
		}
		<-killed
		_ = d.process.Wait() // killed
	}
	d := start(t, dir)
	if err := d.process.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := d.process.Wait(); err != nil {
		t.Errorf("told to stop it says %v", err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if want := []string{filepath.Join(dir, "ca.pem"), filepath.Join(dir, "database.json")}; err != nil || !slices.Equal(files, want) {
		t.Errorf("the directory holds %v (%v)", files, err)
	}
	if data, err := os.ReadFile(filepath.Join(dir, "database.json")); err != nil || bytes.Contains(data, []byte(nethsmtest.OperatorPassphrase)) {
		t.Errorf("reading the database: %v, or it holds a passphrase", err)
	}
}

func TestWrongArgumentsAreRefused(t *testing.T) {
	for _, args := range [][]string{{"surprise"}, {"-nodes", "-1"}, {"-listen", "nowhere"}, {"-dir", "/dev/null/x"}} {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := run(ctx, args); err == nil {
			t.Errorf("%q were taken", args)
		}
	}
}
