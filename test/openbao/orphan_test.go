package openbao_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// hostVariable makes the test binary a host of its own, which can be killed. It holds what the host does.
const hostVariable = "NITROSEAL_TEST_HOST"

// hosting is what such a host does: it starts the plugin and configures a seal.
type hosting struct {
	Binary   vaulttest.Binary
	Args     []string
	Env      []string
	Settings map[string]string
}

// runHost starts the plugin, prints its process id when the seal opens, and waits to be killed.
func runHost() int {
	var does hosting
	if err := json.Unmarshal([]byte(os.Getenv(hostVariable)), &does); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	bao := &openBao{binary: does.Binary, args: does.Args, env: does.Env, log: &lines{}}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer cancel()
	w, err := bao.configure(ctx, does.Settings)
	if err == nil {
		err = w.init(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err, bao.log)
		return 1
	}
	if _, err := fmt.Fprintln(os.Stdout, bao.client.ID()); err != nil {
		return 1
	}
	<-ctx.Done()
	return 0
}

func TestThePluginEndsWithAHostThatWasKilled(t *testing.T) {
	s := withToken(t, pkcs11test.SoftHSM(t))
	does, err := json.Marshal(hosting{s.binary, s.args, append(s.env, "TMPDIR="+forSockets(t)), s.stanza(t, "prod")})
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	host := exec.CommandContext(t.Context(), own)
	host.Env = append(os.Environ(), hostVariable+"="+string(does))
	host.Stderr = os.Stderr
	out, err := host.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = host.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the host did not start the plugin: %v", err)
	}
	var pid int
	if _, err := fmt.Sscan(strings.TrimSpace(line), &pid); err != nil {
		t.Fatal(err)
	}
	all := append(childrenOf(t, pid), pid)
	if len(all) < 2 {
		t.Fatal("there is no module host")
	}
	if err := host.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	gone(t, all...)
}
