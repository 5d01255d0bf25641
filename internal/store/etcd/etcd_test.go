package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/internal/store/storetest"
)

func TestMain(m *testing.M) {
	code := etcdtest.Main(m)
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

var prefixes atomic.Int64

// config is the configuration of a store over a cluster, with a prefix that no other test uses, nor another run of this one.
func config(t *testing.T, c *etcdtest.Cluster) etcd.Config {
	t.Helper()
	return etcd.Config{
		Endpoints:  c.Endpoints,
		Prefix:     fmt.Sprintf("test%d/%s", prefixes.Add(1), strings.NewReplacer("/", ".", "'", "", ",", "").Replace(t.Name())),
		CACert:     c.CACert,
		ClientCert: c.ClientCert,
		ClientKey:  c.ClientKey,
	}
}

func open(t *testing.T, config etcd.Config) *etcd.Store {
	t.Helper()
	s, err := etcd.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close = %v", err)
		}
	})
	return s
}

func TestStore(t *testing.T) {
	cluster := etcdtest.Shared(t)
	storetest.TestStore(t, func(t *testing.T) storetest.Place {
		t.Helper()
		config := config(t, cluster)
		config.Prefix = fmt.Sprintf("conformance/%d", prefixes.Add(1))
		return func() store.Store {
			s, err := etcd.Open(config)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
	}, storetest.Capabilities{})
}

func TestKeysLieUnderThePrefixOnly(t *testing.T) {
	cluster := etcdtest.Shared(t)
	config := config(t, cluster)
	s := open(t, config)
	if _, err := s.Put(t.Context(), "material/prod", []byte("x"), store.NoRevision); err != nil {
		t.Fatal(err)
	}
	for _, neighbour := range []string{config.Prefix + "2/a", config.Prefix, config.Prefix + "a"} {
		if _, err := cluster.Client().Put(t.Context(), neighbour, "foreign"); err != nil {
			t.Fatal(err)
		}
	}
	found, err := cluster.Client().Get(t.Context(), config.Prefix+"/material/prod")
	if err != nil || len(found.Kvs) != 1 || string(found.Kvs[0].Value) != "x" {
		t.Errorf("etcd holds %v, %v", found, err)
	}
	names, err := s.List(t.Context(), "")
	if err != nil || len(names) != 1 || names[0] != "material/prod" {
		t.Errorf("List = %q, %v", names, err)
	}
}

func TestAListOfManyNamesIsWholeAndHasAnEnd(t *testing.T) {
	cluster := etcdtest.Shared(t)
	config := config(t, cluster)
	s := open(t, config)
	made := 0
	grow := func(n int) {
		t.Helper()
		const most = 100 // operations in one transaction; etcd takes 128
		for made < n {
			var puts []clientv3.Op
			for range min(most, n-made) {
				puts = append(puts, clientv3.OpPut(fmt.Sprintf("%s/many/%05d", config.Prefix, made), "x"))
				made++
			}
			if _, err := cluster.Client().Txn(t.Context()).Then(puts...).Commit(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, n := range []int{999, 1000, 1001, 2500, etcd.MaxNames} {
		grow(n)
		for _, prefix := range []string{"", "many/"} {
			names, err := s.List(t.Context(), prefix)
			if err != nil || len(names) != n || names[0] != "many/00000" || names[n-1] != fmt.Sprintf("many/%05d", n-1) {
				t.Fatalf("of %d names List(%q) gives %d, %v", n, prefix, len(names), err)
			}
			if !slices.IsSorted(names) || len(slices.Compact(names)) != n {
				t.Errorf("the %d names are not sorted, or not different", n)
			}
		}
	}
	grow(etcd.MaxNames + 1)
	if names, err := s.List(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "10000 are listed at most") {
		t.Errorf("of more List gives %d names and %v", len(names), err)
	}
	if names, err := s.List(t.Context(), "other/"); err != nil || len(names) != 0 {
		t.Errorf("beside them List gives %q, %v", names, err)
	}
}

func TestEndpointsWithoutTLSAreAcceptedOnThisMachineOrByASetting(t *testing.T) {
	for _, config := range []etcd.Config{
		{Endpoints: []string{"http://127.0.0.1:1", "http://[::1]:1", "http://localhost:1"}, Prefix: "p"},
		{Endpoints: []string{"http://etcd.example:2379"}, Prefix: "p", Insecure: true},
	} {
		s, err := etcd.Open(config)
		if err != nil {
			t.Fatalf("%v: %v", config.Endpoints, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestConfiguration(t *testing.T) {
	cluster := etcdtest.Shared(t)
	good := config(t, cluster)
	tests := map[string]func(c *etcd.Config){
		"no endpoint":                           func(c *etcd.Config) { c.Endpoints = nil },
		"endpoint without a scheme":             func(c *etcd.Config) { c.Endpoints = []string{"127.0.0.1:2379"} },
		"endpoint with another scheme":          func(c *etcd.Config) { c.Endpoints = []string{"unix:///etcd"} },
		"endpoint without a port":               func(c *etcd.Config) { c.Endpoints = []string{"https://etcd"} },
		"endpoint with a password":              func(c *etcd.Config) { c.Endpoints = []string{"https://u:pass@etcd:2379"} },
		"endpoint with a path":                  func(c *etcd.Config) { c.Endpoints = []string{"https://etcd:2379/v3"} },
		"endpoints with and without TLS":        func(c *etcd.Config) { c.Endpoints = append(c.Endpoints, "http://127.0.0.1:2379") },
		"certificates without TLS":              func(c *etcd.Config) { c.Endpoints = []string{"http://127.0.0.1:2379"} },
		"no prefix":                             func(c *etcd.Config) { c.Prefix = "" },
		"prefix in the range of a NetHSM":       func(c *etcd.Config) { c.Prefix = "/nitroseal" },
		"prefix that ends in a slash":           func(c *etcd.Config) { c.Prefix = "nitroseal/" },
		"client certificate without its key":    func(c *etcd.Config) { c.ClientKey = nil },
		"key of another certificate":            func(c *etcd.Config) { c.ClientKey = cluster.ForeignKey },
		"CA certificate that is no certificate": func(c *etcd.Config) { c.CACert = []byte("text") },
		"user name without a password":          func(c *etcd.Config) { c.Username = "u" },
		"password in the clear": func(c *etcd.Config) {
			*c = etcd.Config{Endpoints: []string{"http://etcd.example:2379"}, Prefix: "p", Username: "u", Password: "pass"}
		},
		"password in the clear, although insecure": func(c *etcd.Config) {
			*c = etcd.Config{Endpoints: []string{"http://etcd.example:2379"}, Prefix: "p", Username: "u", Password: "pass", Insecure: true}
		},
		"no TLS beyond this machine": func(c *etcd.Config) {
			*c = etcd.Config{Endpoints: []string{"http://127.0.0.1:2379", "http://etcd.example:2379"}, Prefix: "p"}
		},
		"insecure with TLS": func(c *etcd.Config) { c.Insecure = true },
	}
	for sentence, change := range tests {
		t.Run(sentence, func(t *testing.T) {
			config := good
			change(&config)
			s, err := etcd.Open(config)
			if err == nil {
				_ = s.Close()
				t.Fatal("Open = nil")
			}
			if strings.Contains(err.Error(), "pass@") {
				t.Errorf("the error shows the password: %v", err)
			}
		})
	}
}

func TestOpenConnectsToNothing(t *testing.T) {
	s, err := etcd.Open(etcd.Config{Endpoints: []string{"http://127.0.0.1:1"}, Prefix: "p", Username: "u", Password: "p"})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Get(t.Context(), "a"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Get of a closed store = %v", err)
	}
}

func TestWrongCertificatesAreSaidToBeThat(t *testing.T) {
	cluster := etcdtest.Shared(t)
	tests := map[string]func(c *etcd.Config){
		"a client certificate of another CA": func(c *etcd.Config) { c.ClientCert, c.ClientKey = cluster.ForeignCert, cluster.ForeignKey },
		"no client certificate":              func(c *etcd.Config) { c.ClientCert, c.ClientKey = nil, nil },
		"another CA for the members":         func(c *etcd.Config) { c.CACert = cluster.ForeignCACert },
		"another server name":                func(c *etcd.Config) { c.ServerName = "etcd.example" },
		"the system's roots":                 func(c *etcd.Config) { c.CACert = nil },
	}
	for sentence, change := range tests {
		t.Run(sentence, func(t *testing.T) {
			config := config(t, cluster)
			config.Prefix = "certificates"
			change(&config)
			s := open(t, config)
			begin := time.Now()
			_, err := s.Get(t.Context(), "a")
			if !errors.Is(err, store.ErrDenied) || errors.Is(err, store.ErrUnavailable) {
				t.Errorf("Get = %v, want ErrDenied", err)
			}
			if _, err := s.Put(t.Context(), "a", nil, store.NoRevision); !errors.Is(err, store.ErrDenied) {
				t.Errorf("Put = %v, want ErrDenied", err)
			}
			if took := time.Since(begin); took > 4*time.Second {
				t.Errorf("that took %v", took)
			}
		})
	}
}

func TestEtcdThatIsDownIsUnavailable(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	config := config(t, cluster)
	config.RequestTimeout = 2 * time.Second
	s := open(t, config)
	revision, err := s.Put(t.Context(), "a", []byte("x"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	cluster.Kill(t, 0)
	var all sync.WaitGroup
	for sentence, ask := range map[string]func() error{
		"Get":    func() error { _, err := s.Get(t.Context(), "a"); return err },
		"Put":    func() error { _, err := s.Put(t.Context(), "a", nil, revision); return err },
		"Delete": func() error { return s.Delete(t.Context(), "a", revision) },
	} {
		all.Go(func() {
			if err := ask(); !errors.Is(err, store.ErrUnavailable) {
				t.Errorf("%s = %v, want ErrUnavailable", sentence, err)
			}
		})
	}
	all.Wait()
	cluster.Restart(t, 0)
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	config.RequestTimeout = 0 // the default
	s = open(t, config)
	entry, err := s.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "x" || entry.Revision != revision {
		t.Errorf("Get from the returned etcd = %q, %v", entry.Value, err)
	}
}

func TestDeadlineIsKeptWhileEtcdIsFrozen(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	s := open(t, config(t, cluster))
	if _, err := s.Put(t.Context(), "a", nil, store.NoRevision); err != nil {
		t.Fatal(err)
	}
	cluster.Freeze(t, 0)
	defer cluster.Thaw(t, 0)
	for sentence, ask := range map[string]func(ctx context.Context) error{
		"Get":    func(ctx context.Context) error { _, err := s.Get(ctx, "a"); return err },
		"Put":    func(ctx context.Context) error { _, err := s.Put(ctx, "b", nil, store.NoRevision); return err },
		"List":   func(ctx context.Context) error { _, err := s.List(ctx, ""); return err },
		"Delete": func(ctx context.Context) error { return s.Delete(ctx, "b", "1") },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		begin := time.Now()
		err := ask(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("%s = %v, want ErrUnavailable and DeadlineExceeded", sentence, err)
		}
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("%s returned after %v", sentence, took)
		}
	}
}

func TestFullEtcdIsFull(t *testing.T) {
	cluster := etcdtest.Start(t, 1, etcdtest.WithQuota(1<<20))
	s := open(t, config(t, cluster))
	revision, err := s.Put(t.Context(), "kept", []byte("old"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	value := make([]byte, store.MaxValueSize)
	for i := 0; err == nil && i < 100; i++ {
		_, err = s.Put(t.Context(), fmt.Sprintf("fill/%d", i), value, store.NoRevision)
	}
	if !errors.Is(err, store.ErrFull) {
		t.Fatalf("filling etcd: %v, want ErrFull", err)
	}
	if _, err := s.Put(t.Context(), "kept", value, revision); !errors.Is(err, store.ErrFull) {
		t.Errorf("replacing in a full etcd: %v, want ErrFull", err)
	}
	entry, err := s.Get(t.Context(), "kept")
	if err != nil || string(entry.Value) != "old" {
		t.Errorf("Get = %q, %v, want the old value", entry.Value, err)
	}
	if err := s.Delete(t.Context(), "kept", revision); err != nil {
		t.Errorf("Delete in a full etcd = %v: nobody could make room", err)
	}
}

func TestUserAndPassword(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	c := config(t, cluster)
	c.Prefix = "allowed"
	ctx, client := t.Context(), cluster.Client()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(client.UserAdd(ctx, "root", "root-password"))
	must(client.UserGrantRole(ctx, "root", "root"))
	must(client.UserAdd(ctx, "seal", "right"))
	must(client.RoleAdd(ctx, "seal"))
	must(client.RoleGrantPermission(ctx, "seal", "allowed/", "allowed0", clientv3.PermissionType(clientv3.PermReadWrite)))
	must(client.UserGrantRole(ctx, "seal", "seal"))
	must(client.AuthEnable(ctx))

	with := func(username, password, prefix string) error {
		c.Username, c.Password, c.Prefix = username, password, prefix
		_, err := open(t, c).Put(ctx, "a", []byte("x"), store.NoRevision)
		return err
	}
	if err := with("seal", "right", "allowed"); err != nil {
		t.Errorf("the right password: %v", err)
	}
	if err := with("seal", "wrong", "allowed"); !errors.Is(err, store.ErrDenied) {
		t.Errorf("a wrong password: %v, want ErrDenied", err)
	}
	if err := with("nobody", "right", "allowed"); !errors.Is(err, store.ErrDenied) {
		t.Errorf("an unknown user: %v, want ErrDenied", err)
	}
	if err := with("seal", "right", "forbidden"); !errors.Is(err, store.ErrDenied) {
		t.Errorf("a prefix without permission: %v, want ErrDenied", err)
	}
	if err := with("", "", "allowed"); !errors.Is(err, store.ErrDenied) {
		t.Errorf("no user: %v, want ErrDenied", err)
	}

	// A running store goes on when etcd restarts: simple tokens live in a member's memory and are gone then.
	c.Username, c.Password, c.Prefix = "seal", "right", "allowed"
	s := open(t, c)
	revision, err := s.Put(ctx, "b", []byte("1"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	cluster.Kill(t, 0)
	cluster.RestartWithoutWaiting(t, 0) // the cluster's own client has no user
	_, err = s.Get(ctx, "b")
	for deadline := time.Now().Add(time.Minute); errors.Is(err, store.ErrUnavailable) && time.Now().Before(deadline); {
		_, err = s.Get(ctx, "b") // it is starting
	}
	if err != nil {
		t.Errorf("Get after a restart = %v", err)
	}
	if _, err := s.Put(ctx, "b", []byte("2"), revision); err != nil {
		t.Errorf("Put after a restart = %v", err)
	}
}
