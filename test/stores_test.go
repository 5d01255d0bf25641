package test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

const etcdPrefix = "nitroseal/test"

func etcdFields(cluster *etcdtest.Cluster) vaulttest.Fields {
	return vaulttest.Fields{
		"type": "etcd", "endpoints": strings.Join(cluster.Endpoints, ","), "prefix": etcdPrefix,
		"ca_cert": string(cluster.CACert), "client_cert": string(cluster.ClientCert), "client_key": string(cluster.ClientKey),
		"request_timeout": "3s",
	}
}

func addEtcd(t *testing.T, site *vaulttest.Site, name string, cluster *etcdtest.Cluster) {
	t.Helper()
	site.Write(t, "nitrokey/stores/"+name, etcdFields(cluster))
}

// openEtcd is another client of the same etcd: an attacker, or a restored backup.
func openEtcd(t *testing.T, cluster *etcdtest.Cluster) store.Store {
	t.Helper()
	opened, err := etcd.Open(etcd.Config{
		Endpoints: cluster.Endpoints, Prefix: etcdPrefix,
		CACert: cluster.CACert, ClientCert: cluster.ClientCert, ClientKey: cluster.ClientKey,
	})
	must(t, err)
	t.Cleanup(func() { _ = opened.Close() })
	return opened
}

const longPIN = "pin-of-main-job"

// TestMainJob is the demo's path: wrap, unwrap, keep in etcd, keep on the token, restart, open.
func TestMainJob(t *testing.T) {
	cluster := etcdtest.Start(t, 3)
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	// Six digits may stand in any log; these letters stand nowhere by chance.
	site.Write(t, "nitrokey/devices/hsm/pin", vaulttest.Fields{"new_pin": longPIN})
	site.Token.PIN = longPIN
	addEtcd(t, site, "etcd", cluster)
	site.Write(t, "nitrokey/stores/token", vaulttest.Fields{"type": "object", "device": "hsm"})

	stores := map[string]string{"etcd": "in-etcd", "token": "on-token"}
	for name, item := range stores {
		putMaterial(t, site, name, "eu", item)
		openMaterial(t, site, "eu", item)
	}
	if names := site.List(t, "nitrokey/material/eu"); len(names) != 2 {
		t.Errorf("the cluster lists %v", names)
	}
	if objects := site.Token.Tool(t, "--list-objects", "--type", "data"); strings.Count(objects, "Data object") != 1 {
		t.Errorf("the token holds\n%s", objects)
	}
	if held := everything(t, openEtcd(t, cluster)); strings.Contains(held, vaulttest.Base64(materialFields["key_1"])) ||
		strings.Contains(held, materialFields["key_2"]) || !strings.Contains(held, "nitroseal+jwe") && !strings.Contains(held, "protected") {
		t.Errorf("etcd holds\n%s", held)
	}

	site.Restart(t)
	site.MustUnwrap(t, "prod", wrapped, secret)
	for _, item := range stores {
		openMaterial(t, site, "eu", item)
	}
	nothingInTheClear(t, site)

	// Stores of type file live in the state directory, nothing else that is needed to open an envelope.
	site.Stop(t)
	must(t, os.RemoveAll(site.StateDir))
	must(t, os.Mkdir(site.StateDir, 0o700))
	site.Resume(t)
	site.MustUnwrap(t, "prod", wrapped, secret)
	for name, item := range stores {
		openMaterial(t, site, "eu", item)
		putMaterial(t, site, name, "eu", item)
	}
}

// nothingInTheClear searches what the site has left on disk for the PIN and what was sealed.
func nothingInTheClear(t *testing.T, site *vaulttest.Site) {
	t.Helper()
	nowhereOnDisk(t, site, site.Token.PIN)
}

// nowhereOnDisk searches it for these values and what was sealed.
func nowhereOnDisk(t *testing.T, site *vaulttest.Site, values ...string) {
	t.Helper()
	values = slices.AppendSeq(append(values, secret), maps.Values(materialFields))
	var never []string
	for _, value := range values {
		never = append(never, value, vaulttest.Base64(value))
	}
	searched := 0
	for _, dir := range []string{site.Dir, site.StateDir, site.SecretsDir} { // the first holds Vault's log, raft and TMPDIR
		must(t, filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || !entry.Type().IsRegular() || strings.HasPrefix(path, site.PluginDir) {
				return err
			}
			content, err := os.ReadFile(path)
			searched += len(content)
			for _, value := range never {
				if bytes.Contains(content, []byte(value)) {
					t.Errorf("%s holds %q", path, value)
				}
			}
			return err
		}))
	}
	if searched < 100_000 || !strings.Contains(site.Log(t), "HSM key made") {
		t.Errorf("only %d bytes were searched: where did everything go?", searched)
	}
}

// everything is all that the store holds.
func everything(t *testing.T, held store.Store) string {
	t.Helper()
	names, err := held.List(context.Background(), "")
	must(t, err)
	var all strings.Builder
	for _, name := range names {
		entry, err := held.Get(context.Background(), name)
		must(t, err)
		all.WriteString(name + "=" + string(entry.Value) + "\n")
	}
	return all.String()
}

func TestEtcdOnABadDay(t *testing.T) {
	cluster := etcdtest.Start(t, 3)
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	addEtcd(t, site, "etcd", cluster)
	putMaterial(t, site, "etcd", "eu", "shares")

	t.Run("a certificate that the members refuse", func(t *testing.T) {
		fields := etcdFields(cluster)
		fields["client_cert"], fields["client_key"] = string(cluster.ForeignCert), string(cluster.ForeignKey)
		site.Write(t, "nitrokey/stores/foreign", fields)
		encoded := map[string]string{"a": "Yg=="}
		site.Refused(t, "nitrokey/material/eu/other", vaulttest.Fields{"key": "prod", "store": "foreign", "fields": encoded},
			http.StatusServiceUnavailable)
	})
	t.Run("members that our CA did not sign", func(t *testing.T) {
		fields := etcdFields(cluster)
		fields["ca_cert"] = string(cluster.ForeignCACert)
		fields["check"] = true
		if _, err := site.Try(t, "nitrokey/stores/impostor", fields); err == nil {
			t.Error("a store of impostors passed its check")
		}
	})
	t.Run("the leader killed in the middle of writes", func(t *testing.T) {
		const writes = 30
		type result struct {
			path string
			err  error
		}
		results := make(chan result)
		client := site.Client(t)
		go func() { // ends with the last write
			defer close(results)
			for i := range writes {
				path := fmt.Sprintf("nitrokey/material/eu/item-%d", i)
				fields := map[string]string{"n": vaulttest.Base64(path)}
				_, err := client.Logical().Write(path, vaulttest.Fields{"key": "prod", "store": "etcd", "fields": fields})
				results <- result{path, err}
			}
		}()
		var acknowledged, unknown []string
		seen, leader := 0, cluster.Leader(t)
		for r := range results {
			if seen++; seen == writes/3 {
				cluster.Kill(t, leader) // the next write is under way
			}
			if r.err == nil {
				acknowledged = append(acknowledged, r.path)
			} else {
				unknown = append(unknown, r.path)
			}
		}
		for _, path := range acknowledged {
			answer := site.Write(t, path+"/open", nil)
			if got := answer["fields"].(map[string]any)["n"]; got != vaulttest.Base64(path) {
				t.Errorf("%s opened as %v", path, got)
			}
		}
		cluster.Restart(t, leader)
		for _, path := range unknown {
			doneOrNotDone(t, site, path)
		}
		if len(acknowledged) < writes/2 {
			t.Errorf("only %d of %d writes succeeded", len(acknowledged), writes)
		}
	})
	t.Run("writes that the leader has and that nobody acknowledged", func(t *testing.T) {
		leader := cluster.Leader(t)
		client := site.Client(t)
		const writers = 4
		wrote, failed := make(chan bool), make(chan string)
		for writer := range writers {
			go func() { // ends with its first write that fails
				for i := 0; ; i++ {
					path := fmt.Sprintf("nitrokey/material/eu/late-%d-%d", writer, i)
					fields := map[string]string{"n": vaulttest.Base64(path)}
					if _, err := client.Logical().Write(path, vaulttest.Fields{"key": "prod", "store": "etcd", "fields": fields}); err != nil {
						failed <- path
						return
					}
					wrote <- true
				}
			}()
		}
		var unknown []string
		for acknowledged := 0; len(unknown) < writers; {
			select {
			case <-wrote:
				if acknowledged++; acknowledged != 3*writers {
					continue
				}
				for member := range 3 {
					if member != leader { // the next writes are under way
						cluster.Freeze(t, member)
					}
				}
			case path := <-failed:
				unknown = append(unknown, path)
			}
		}
		for member := range 3 {
			if member != leader {
				cluster.Thaw(t, member)
			}
		}
		cluster.WaitReady(t)
		for _, path := range unknown {
			doneOrNotDone(t, site, path)
		}
	})
	t.Run("all members down: 503, and what needs no store goes on", func(t *testing.T) {
		for member := range 3 {
			cluster.Kill(t, member)
		}
		site.Refused(t, "nitrokey/material/eu/shares/open", nil, http.StatusServiceUnavailable)
		site.MustUnwrap(t, "prod", wrapped, secret)
		for member := range 3 {
			cluster.RestartWithoutWaiting(t, member)
		}
		cluster.WaitReady(t)
		vaulttest.Eventually(t, limit, "the store to be back", func() error {
			_, err := site.Try(t, "nitrokey/material/eu/shares/open", nil)
			return err
		})
	})
}

// doneOrNotDone checks an item of which one write was not acknowledged: it holds its path or is not there, and can be written
// again. Nothing lies in between.
func doneOrNotDone(t *testing.T, site *vaulttest.Site, path string) {
	t.Helper()
	answer, err := site.Try(t, path+"/open", vaulttest.Fields{"store": "etcd"})
	var refused *api.ResponseError
	switch {
	case err == nil:
		if got := answer["fields"].(map[string]any)["n"]; got != vaulttest.Base64(path) {
			t.Errorf("%s, not acknowledged, opened as %v", path, got)
		}
	case !errors.As(err, &refused) || refused.StatusCode != http.StatusNotFound:
		t.Errorf("%s, not acknowledged: %v", path, err)
	}
	t.Logf("%s, not acknowledged, was done: %t", path, err == nil)
	again := map[string]string{"n": vaulttest.Base64("again")}
	site.Write(t, path, vaulttest.Fields{"key": "prod", "store": "etcd", "fields": again})
	if got := site.Write(t, path+"/open", nil)["fields"].(map[string]any)["n"]; got != again["n"] {
		t.Errorf("%s, written again, opened as %v", path, got)
	}
}

// Whoever can write the store knows the public keys as well. It helps them nothing.
func TestWhoeverCanWriteEtcdCannotMakeUsOpenSomethingElse(t *testing.T) {
	ctx := context.Background()
	cluster := etcdtest.Start(t, 1)
	site, _ := newSite(t, vaulttest.SiteOptions{})
	addEtcd(t, site, "etcd", cluster)
	putMaterial(t, site, "etcd", "eu", "shares")
	putMaterial(t, site, "etcd", "eu", "other")
	attacker := openEtcd(t, cluster)

	names, err := attacker.List(ctx, "")
	must(t, err)
	var shares, other string
	for _, name := range names {
		switch {
		case strings.Contains(name, "eu/shares"):
			shares = name
		case strings.Contains(name, "eu/other"):
			other = name
		}
	}
	if shares == "" || other == "" {
		t.Fatalf("etcd holds %v", names)
	}

	t.Run("an envelope moved to another name", func(t *testing.T) {
		from, err := attacker.Get(ctx, shares)
		must(t, err)
		to, err := attacker.Get(ctx, other)
		must(t, err)
		moved, err := attacker.Put(ctx, other, from.Value, to.Revision)
		must(t, err)
		site.Refused(t, "nitrokey/material/eu/other/open", nil, http.StatusBadRequest, "other")
		_, err = attacker.Put(ctx, other, to.Value, moved)
		must(t, err)
		openMaterial(t, site, "eu", "other")
	})
	t.Run("an older generation put back", func(t *testing.T) {
		old, err := attacker.Get(ctx, shares)
		must(t, err)
		putMaterial(t, site, "etcd", "eu", "shares")
		now, err := attacker.Get(ctx, shares)
		must(t, err)
		_, err = attacker.Put(ctx, shares, old.Value, now.Revision)
		must(t, err)
		site.Refused(t, "nitrokey/material/eu/shares/open", nil, http.StatusBadRequest, "accept-generation")
		site.Write(t, "nitrokey/material/eu/shares/accept-generation", vaulttest.Fields{"generation": 1})
		openMaterial(t, site, "eu", "shares")
	})
}
