package vaulttest

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// Fleet gives a host many clusters of one node each, initialised and unsealed. The nodes are doubles in the test's own
// process, over real TLS. The host has the wrapping key "prod" in the token, and its keys lie in etcd. TestMain calls
// modhost.RunIfStarted first.
func (h *Host) Fleet(t testing.TB, token *pkcs11test.Token, keep *etcdtest.Cluster, size int) []*nodetest.Node {
	t.Helper()
	authority := nodetest.NewAuthority(t)
	h.Put(t, "fleet-ca.pem", authority.PEM)
	var nodes []*nodetest.Node
	var clusters []*cluster.Cluster
	for i := range size {
		n := nodetest.Start(t, nodetest.Options{Kind: nodetest.Alone, Authority: authority})
		c := &cluster.Cluster{
			Name: fmt.Sprintf("c%03d", i), Nodes: []string{n.Address()}, TLS: node.TLS{CA: authority.PEM}, Key: "prod", Store: "etcd",
		}
		h.blocks[fmt.Sprintf("cluster %q", c.Name)] = fmt.Sprintf(
			"nodes = [%q]\n ca_cert_file = \"fleet-ca.pem\"\n key = \"prod\"\n store = \"etcd\"", n.Address())
		nodes, clusters = append(nodes, n), append(clusters, c)
	}
	h.write(t)

	custodian, done := h.custodian(t, token, keep)
	defer done()
	todo := make(chan *cluster.Cluster)
	failures := make(chan error, size)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for c := range todo {
				if _, err := custodian.Init(context.Background(), c, cluster.InitOptions{By: "test"}); err != nil {
					failures <- err
				}
			}
		})
	}
	for _, c := range clusters {
		todo <- c
	}
	close(todo)
	all.Wait()
	close(failures)
	var errs []error
	for err := range failures {
		errs = append(errs, err)
	}
	must(t, errors.Join(errs...))
	return nodes
}

// custodian is what the command makes of the host's configuration, in this process.
func (h *Host) custodian(t testing.TB, token *pkcs11test.Token, keep *etcdtest.Cluster) (_ *cluster.Custodian, done func()) {
	t.Helper()
	folder := func(name string) *file.Store {
		opened, err := file.Open(filepath.Join(h.File("state"), name))
		must(t, err)
		return opened
	}
	tokens := pkcs11.New(pkcs11.Options{Modules: []string{token.Module}, StateDir: h.File("state"), Env: token.Env})
	device, err := tokens.Open(context.Background(), pkcs11.Config{
		Module: token.Module, Serial: token.Serial, PIN: []byte(token.PIN), Owner: "test", Parallel: 4,
	})
	must(t, err)
	remote, err := etcd.Open(etcd.Config{
		Endpoints: keep.Endpoints, Prefix: h.prefix, CACert: keep.CACert, ClientCert: keep.ClientCert, ClientKey: keep.ClientKey,
	})
	must(t, err)
	keys := keyring.New(keyring.Config{Records: folder("keyring"), Devices: oneDevice{device}, SealAuthKeys: true})
	stores := oneStore{remote}
	custodian := cluster.New(cluster.Config{
		Keeper: custody.New(custody.Config{Keys: keys, Stores: stores, Records: folder("material"), Shared: true}),
		Keys:   keys, Stores: stores, Local: folder("custody"),
	})
	return custodian, func() {
		must(t, errors.Join(custodian.Close(), remote.Close(), device.Close(), tokens.Close()))
	}
}

type oneDevice struct{ device hsm.Device }

// Device implements [keyring.Devices].
func (d oneDevice) Device(context.Context, string) (hsm.Device, error) { return d.device, nil }

type oneStore struct{ store store.Store }

// Store implements [custody.Stores].
func (s oneStore) Store(context.Context, string) (store.Store, error) { return s.store, nil }
