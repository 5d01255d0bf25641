package node_test

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// serverVariable makes this test binary a server that answers with a seal status: its memory shall not be counted with the
// client's. It holds the certificate and the key, in DER and base64.
const serverVariable = "NODE_TEST_SERVER"

// serveStatus prints its address and ends when its input ends.
func serveStatus() int {
	certificate, key, _ := strings.Cut(os.Getenv(serverVariable), " ")
	der, _ := base64.StdEncoding.DecodeString(certificate)
	private, _ := base64.StdEncoding.DecodeString(key)
	pair, err := pairOf(der, private)
	if err != nil {
		return 1
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // ends with the process
	if err != nil {
		return 1
	}
	go func() {
		server := &http.Server{ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, `{"type":"shamir","initialized":true,"sealed":false,"t":3,"n":5,"progress":0,"nonce":"","version":"1.21.0",`+
				`"build_date":"2025-11-18T13:04:32Z","migration":false,"cluster_name":"vault-cluster-9c8b7c4c",`+
				`"cluster_id":"b37be192-1fbe-147e-e27d-e3b8d368418d","recovery_seal":false,"storage_type":"raft","removed_from_cluster":false}`)
		})}
		_ = server.Serve(tls.NewListener(listener, &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}}))
	}()
	if _, err := fmt.Fprintln(os.Stdout, listener.Addr()); err != nil {
		return 1
	}
	_, _ = io.Copy(io.Discard, os.Stdin)
	return 0
}

// TestAWatchedNodeIsSmall: hundreds are watched, each over one connection that is kept.
func TestAWatchedNodeIsSmall(t *testing.T) {
	if testing.Short() {
		t.Skip("it opens hundreds of connections")
	}
	const limit = 48 << 10
	nodes := 600
	if raceEnabled { // which measures itself
		nodes = 60
	}
	authority := nodetest.NewAuthority(t)
	address := startServer(t, authority)

	watched := make([]*node.Node, nodes)
	before := inUse()
	for i := range watched {
		n, err := node.New(node.Config{Address: address, TLS: node.TLS{CA: authority.PEM}})
		if err != nil {
			t.Fatal(err)
		}
		watched[i] = n
		defer n.Close()
	}
	fresh := inUse()
	look := func() {
		var all sync.WaitGroup
		few := make(chan struct{}, 20)
		for _, n := range watched {
			all.Go(func() {
				few <- struct{}{}
				defer func() { <-few }()
				if _, err := n.Status(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
	}
	look()
	look()
	after := inUse()
	each := (after - before) / nodes
	t.Logf("a watched node takes %d bytes, %d of them before it is connected; %d goroutines", each, (fresh-before)/nodes, runtime.NumGoroutine())
	if each > limit && !raceEnabled {
		t.Errorf("a watched node takes %d bytes, more than %d", each, limit)
	}
	runtime.KeepAlive(watched)
}

// inUse is the memory of heap and stacks.
func inUse() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

func startServer(t *testing.T, authority *nodetest.Authority) (address string) {
	t.Helper()
	certificate, key := derOf(t, authority.Issue(t))
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), serverVariable+"="+base64.StdEncoding.EncodeToString(certificate)+" "+base64.StdEncoding.EncodeToString(key))
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(output).ReadString('\n')
	t.Cleanup(func() {
		_ = input.Close()
		_ = cmd.Wait() // the test's ctx has ended it, if its input did not
	})
	if err != nil {
		t.Fatal(err)
	}
	return "https://" + strings.TrimSpace(line)
}
