package test

import (
	"encoding/base64"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// From nothing to a cluster that is unsealed whatever happens to its nodes: three of them on raft, initialised by
// `nitroseal init`, unsealed by `nitroseal run`, killed one by one and all at once; its keys changed, and a root token made of
// them.
func TestCustodyOfARaftClusterFromNothing(t *testing.T) {
	for name, test := range map[string]struct {
		retryJoin bool
		store     string
		token     bool
		with      func(t *testing.T, h *vaulttest.Host)
	}{
		"a token and three members of etcd": {false, "etcd", true, func(t *testing.T, h *vaulttest.Host) {
			t.Helper()
			h.WithEtcd(t, etcdtest.Start(t, 3))
		}},
		"data objects on the token, and nodes that join by themselves": {true, "token", true, func(t *testing.T, h *vaulttest.Host) {
			t.Helper()
			h.Set(t, `store "token"`, "type = \"object\"\n device = \"hsm\"")
		}},
		"a NetHSM of two nodes and etcd": {true, "etcd", false, func(t *testing.T, h *vaulttest.Host) {
			t.Helper()
			h.WithNetHSM(t, startNetHSM(t, 2), netOperator, netPassword, netAdmin, netAdminPassword)
			h.WithEtcd(t, etcdtest.Start(t, 3))
		}},
		"a NetHSM that keeps the envelopes too": {false, "netHSM", false, func(t *testing.T, h *vaulttest.Host) {
			t.Helper()
			h.WithNetHSM(t, startNetHSM(t, 1), netOperator, netPassword, netAdmin, netAdminPassword)
			h.Set(t, `store "netHSM"`, "type = \"object\"\n device = \"hsm\"")
		}},
	} {
		h := vaulttest.NewHost(t)
		if test.token { // before the stories begin: the environment of PKCS#11 tokens belongs to the whole process
			h.WithToken(t, pkcs11test.SoftHSM(t))
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel() // they wait for elections and for the daemon's next look more than they work
			vaults := vaulttest.StartCluster(t, 3, test.retryJoin)
			test.with(t, h)
			h.WithCluster(t, vaults.PEM, vaults.Addresses(), test.store, "")
			h.WithKey(t)
			raftStory(t, h, vaults)
		})
	}
}

func raftStory(t *testing.T, h *vaulttest.Host, vaults *vaulttest.Cluster) {
	t.Helper()
	h.Must(t, "init", "eu")
	d := h.Daemon(t)
	vaults.WaitUnsealed(t, unsealLimit)
	d.Ready(t)

	for i, node := range vaults.Servers {
		node.Restarted(t)
		node.WaitUnsealed(t, unsealLimit)
		t.Logf("node %d is back", i)
	}
	vaults.WaitUnsealed(t, unsealLimit)
	vaults.Kill(t)
	vaults.Up(t)
	vaults.WaitUnsealed(t, unsealLimit)
	voters(t, h, vaults)

	h.Must(t, "rekey", "eu")
	vaults.Kill(t)
	vaults.Up(t)
	vaults.WaitUnsealed(t, unsealLimit)
	voters(t, h, vaults)
	d.Stop(t)

	// And without a daemon, as cron or an init container does it.
	vaults.Kill(t)
	vaults.Up(t)
	vaulttest.Eventually(t, unsealLimit, "all nodes to be unsealed by -once", func() error {
		if got := h.Try(t, "unseal", "-once", "eu"); got.Code != vaulttest.ExitOK {
			return fmt.Errorf("exit code %d: %s%s", got.Code, got.Stdout, got.Stderr)
		}
		return nil
	})
	vaults.WaitUnsealed(t, unsealLimit)
	status := h.Must(t, "status", "-o", "json")
	for _, address := range vaults.Addresses() {
		if !strings.Contains(status, address) {
			t.Errorf("status says nothing of %s:\n%s", address, status)
		}
	}
	neverInTheClear(t, h, vaults, d)
}

// rootToken makes a root token with `nitroseal root`: its own is revoked when the command that it is for ends, so that makes
// another one, which is nobody's child.
func rootToken(t *testing.T, h *vaulttest.Host) string {
	t.Helper()
	script := h.File("keep-token")
	h.Put(t, "keep-token", []byte("#!/bin/sh\nexec curl --silent --show-error --fail --noproxy '*' --cacert \"$VAULT_CACERT\" -H \"X-Vault-Token: $VAULT_TOKEN\" "+
		"-d '{\"policies\":[\"root\"],\"ttl\":\"0\"}' \"$VAULT_ADDR/v1/auth/token/create-orphan\"\n"))
	must(t, os.Chmod(script, 0o700))
	made := vaulttest.Decode[struct {
		Auth struct {
			Token string `json:"client_token"`
		} `json:"auth"`
	}](t, h.Must(t, "root", "eu", "--", script))
	if made.Auth.Token == "" {
		t.Fatal("no token was made")
	}
	return made.Auth.Token
}

// voters waits until raft has three voters, as a new root token sees it.
func voters(t *testing.T, h *vaulttest.Host, vaults *vaulttest.Cluster) {
	t.Helper()
	token := rootToken(t, h)
	vaulttest.Eventually(t, unsealLimit, "three voters", func() error {
		client := vaults.Servers[0].ClientWithToken(t, token)
		state, err := client.Sys().RaftAutopilotState()
		if err != nil {
			return err
		}
		if len(state.Servers) != len(vaults.Servers) {
			return fmt.Errorf("raft has %d servers", len(state.Servers))
		}
		return nil
	})
	client := vaults.Servers[0].ClientWithToken(t, token)
	listed, err := client.Logical().List("auth/token/accessors")
	must(t, err)
	if live := listed.Data["keys"].([]any); len(live) != 1 {
		t.Errorf("%d tokens live, want the one that asks", len(live))
	}
	must(t, client.Auth().Token().RevokeSelf(""))
}

// neverInTheClear opens the shares and searches for them in all that was written: by the host, its daemon, the nodes.
func neverInTheClear(t *testing.T, h *vaulttest.Host, vaults *vaulttest.Cluster, d *vaulttest.Running) {
	t.Helper()
	// A share begins with 32 random bytes; what is sought is what no file has by chance.
	exported := h.Must(t, "material", "open", "eu", "unseal", "--reveal-keys", "-o", "json")
	shares := sharesIn(t, exported)
	if len(shares) != crashShares {
		t.Fatalf("%d shares are in custody", len(shares))
	}
	var never []string
	for _, share := range shares {
		never = append(never, string(share), base64.StdEncoding.EncodeToString(share), fmt.Sprintf("%x", share))
	}
	searched := 0
	search := func(where, content string) {
		searched += len(content)
		for _, secret := range never {
			if strings.Contains(content, secret) {
				t.Errorf("%s holds a share", where)
			}
		}
	}
	search("the daemon's log", d.Log.String())
	folders := []string{h.Dir}
	for _, node := range vaults.Servers {
		folders = append(folders, node.Dir)
	}
	for _, folder := range folders {
		must(t, filepath.WalkDir(folder, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() {
				return err
			}
			content, err := os.ReadFile(path)
			search(path, string(content))
			return err
		}))
	}
	if searched < 100_000 {
		t.Errorf("only %d bytes were searched: where did everything go?", searched)
	}
}

// sharesIn finds the shares in what `material open` prints: values in base64, by the names of their fields.
func sharesIn(t *testing.T, printed string) [][]byte {
	t.Helper()
	opened := vaulttest.Decode[struct {
		Fields map[string]string `json:"fields"`
	}](t, printed)
	var shares [][]byte
	for name, value := range opened.Fields {
		if name == "facts" {
			continue
		}
		share, err := base64.StdEncoding.DecodeString(value)
		must(t, err)
		shares = append(shares, share)
	}
	return shares
}

// Three machines with state directories of their own begin at the same moment: one initialises, the others wait, and all of
// them end well. Then their three daemons find all nodes sealed at once.
func TestThreeHostsBeginAtOnce(t *testing.T) {
	vaults := vaulttest.StartCluster(t, 3, false)
	first := vaulttest.NewHost(t)
	first.WithToken(t, pkcs11test.SoftHSM(t))
	first.WithEtcd(t, etcdtest.Start(t, 3))
	first.WithCluster(t, vaults.PEM, vaults.Addresses(), "etcd", "")
	first.WithKey(t)
	hosts := []*vaulttest.Host{first, first.Another(t), first.Another(t)}

	answers := make([]vaulttest.Answer, len(hosts))
	var all sync.WaitGroup
	for i, h := range hosts {
		all.Go(func() {
			for range 20 { // as systemd would, with Restart=on-failure
				if answers[i] = h.Try(t, "init", "eu"); answers[i].Code != vaulttest.ExitUnavailable {
					break
				}
			}
		})
	}
	all.Wait()
	for i, got := range answers {
		if got.Code != vaulttest.ExitOK {
			t.Errorf("init on host %d: exit code %d\n%s%s", i, got.Code, got.Stdout, got.Stderr)
		}
	}
	vaults.WaitUnsealed(t, unsealLimit)

	var daemons []*vaulttest.Running
	for _, h := range hosts {
		daemons = append(daemons, h.Daemon(t))
	}
	for range 2 {
		vaults.Kill(t)
		vaults.Up(t)
		vaults.WaitUnsealed(t, unsealLimit)
	}
	voters(t, first, vaults)
	// A rekey by one of them: the others notice the newer envelope.
	hosts[1].Must(t, "rekey", "eu")
	daemons[1].Stop(t)
	vaults.Kill(t)
	vaults.Up(t)
	vaults.WaitUnsealed(t, unsealLimit)
	for _, i := range []int{0, 2} {
		daemons[i].Stop(t)
	}
}

// A signal in the middle of sys/init waits until what Vault answers is stored: it is the only copy of the keys.
func TestSIGTERMDuringInitWaitsUntilTheKeysAreStored(t *testing.T) {
	authority := vaulttest.NewAuthority(t)
	vault := vaulttest.Start(t, vaulttest.Options{Bare: true, Authority: authority})
	front := newFront(t, vault, authority)
	h := vaulttest.NewHost(t)
	h.WithToken(t, pkcs11test.SoftHSM(t))
	h.WithEtcd(t, etcdtest.Start(t, 1))
	h.WithCluster(t, authority.PEM, []string{front.URL}, "etcd", "")
	h.WithKey(t)
	begun, goOn := make(chan bool, 1), make(chan bool)
	front.breaks(slowInit(begun, goOn))

	run := h.Start(t, "init", "eu")
	select {
	case <-begun:
	case <-run.Done:
		t.Fatalf("it ended before it asked Vault:\n%s", run.Log)
	}
	run.Signal(t, syscall.SIGTERM)
	run.Signal(t, syscall.SIGTERM) // as an impatient person or systemd may
	select {
	case <-run.Done:
		t.Fatalf("it ended while Vault initialised itself:\n%s", run.Log)
	case <-time.After(time.Second):
	}
	close(goOn)
	select {
	case <-run.Done:
	case <-time.After(limit):
		t.Fatal("it does not end")
	}
	front.breaks(nil)
	h.Must(t, "init", "eu")
	vault.Restarted(t)
	h.Must(t, "unseal", "-once", "eu")
	vault.WaitUnsealed(t, limit)
	if len(sharesIn(t, h.Must(t, "material", "open", "eu", "unseal", "--reveal-keys", "-o", "json"))) != crashShares {
		t.Error("not all shares were stored")
	}
}
