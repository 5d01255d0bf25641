package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/rogpeppe/go-internal/testscript"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// custodyConfig adds a cluster of the stage's Vaults to the configuration, with its store and a free port for the daemon.
func (s *stage) custodyConfig(env *testscript.Env, config *strings.Builder, files map[string]string) error {
	if s.vaults == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Join(env.WorkDir, "store"), 0o700); err != nil {
		return err
	}
	files["vault-ca.pem"] = string(s.vaults.PEM)
	files["alice.asc"] = string(s.newPerson())
	port := vaulttest.FreePorts(s.t, 1)[0]
	fmt.Fprintf(config, `
store "here" {
  type = "file"
  dir  = "store"
}

cluster "prod" {
  nodes        = ["%s"]
  ca_cert_file = "vault-ca.pem"
  key          = "prod"
  store        = "here"
}

run {
  listen   = %q
  interval = "1s"
}
`, strings.Join(s.vaults.Addresses(), `", "`), port)
	env.Setenv("LISTEN", port)
	env.Setenv("NODE", s.vaults.Addresses()[0])
	return nil
}

// vaultCommand does something with the Vaults of the stage, all or the one of that number from 0.
func (s *stage) vaultCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: vault kill|up|restart|anew|freeze|thaw|unsealed|is NODE")
	}
	servers := s.vaults.Servers
	if len(args) == 2 {
		i, err := strconv.Atoi(args[1])
		ts.Check(err)
		servers = servers[i : i+1]
	}
	if args[0] == "kill" && len(servers) > 1 {
		s.vaults.Kill(s.t)
		return
	}
	for _, server := range servers {
		switch args[0] {
		case "kill":
			server.Kill(s.t)
		case "up":
			server.Up(s.t)
		case "restart":
			server.Restarted(s.t)
		case "anew":
			server.Anew(s.t)
		case "freeze":
			server.Freeze(s.t)
		case "thaw":
			server.Thaw(s.t)
		case "unsealed":
			server.WaitUnsealed(s.t, time.Minute)
		case "sealed", "new", "open":
			status, err := server.Anonymous(s.t).Sys().SealStatus()
			ts.Check(err)
			is := map[bool]string{true: "sealed", false: "open"}[status.Sealed]
			if !status.Initialized {
				is = "new"
			}
			if is != args[0] {
				ts.Fatalf("node %s is %s, want %s", server.Address, is, args[0])
			}
		default:
			ts.Fatalf("vault %s is not known", args[0])
		}
	}
}

// newPerson makes the OpenPGP key of Alice and returns its public half, armored.
func (s *stage) newPerson() []byte {
	s.t.Helper()
	var err error
	if s.alice, err = openpgp.NewEntity("Alice", "", "alice@example.org", nil); err != nil {
		s.t.Fatal(err)
	}
	var public bytes.Buffer
	armored, err := armor.Encode(&public, openpgp.PublicKeyType, nil)
	if err == nil {
		err = errors.Join(s.alice.Serialize(armored), armored.Close())
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return public.Bytes()
}

// aliceReads checks that a message in a file opens with Alice's key, and that no output shows what is in it from here on.
func (s *stage) aliceReads(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: alice FILE")
	}
	block, err := armor.Decode(strings.NewReader(ts.ReadFile(args[0])))
	ts.Check(err)
	message, err := openpgp.ReadMessage(block.Body, openpgp.EntityList{s.alice}, nil, nil)
	ts.Check(err)
	content, err := io.ReadAll(message.UnverifiedBody)
	ts.Check(err)
	if len(content) < 32 {
		ts.Fatalf("%s holds %d bytes", args[0], len(content))
	}
	s.secrets = append(s.secrets, string(content))
}
