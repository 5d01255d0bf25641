package doctor

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// stores examines every configured store by using it.
func (d *doctor) stores(ctx context.Context) {
	for _, configured := range d.Config.Stores {
		ctx, cancel := context.WithTimeout(ctx, patience)
		f := d.about("store %q", configured.Name)
		clientCertificate(f, configured)
		opened, err := d.Store(ctx, configured.Name)
		if err == nil {
			err = useStore(ctx, opened)
		}
		switch {
		case err == nil:
			f.ok("write, read, delete", "a value was written, read back and deleted")
		case errors.Is(err, store.ErrDenied):
			f.problem("write, read, delete", "give the user or the certificate the right to the prefix", "%v", err)
		case errors.Is(err, store.ErrUnavailable):
			f.problem("write, read, delete", "see whether it runs, and whether it trusts our certificate and we its", "%v", err)
		default:
			f.problem("write, read, delete", "the error says what the store answered", "%v", err)
		}
		cancel()
	}
}

// useStore writes a value, reads it back and deletes it. Its name is no cluster's: CheckName allows no material of it.
func useStore(ctx context.Context, opened store.Store) (err error) {
	random := make([]byte, 8)
	_, _ = rand.Read(random) // never fails: crypto/rand
	name := fmt.Sprintf("doctor/%x", random)
	value := []byte("written by nitroseal doctor; may be deleted")
	revision, err := opened.Put(ctx, name, value, store.NoRevision)
	if err != nil {
		return err
	}
	defer func() {
		if deletion := opened.Delete(context.WithoutCancel(ctx), name, revision); deletion != nil {
			err = errors.Join(err, fmt.Errorf("deleting the doctor's own value %q; delete it by hand: %w", name, deletion))
		}
	}()
	entry, err := opened.Get(ctx, name)
	switch {
	case err != nil:
		return err
	case !bytes.Equal(entry.Value, value):
		return fmt.Errorf("reading %q back: %w: it is not what was written", name, store.ErrCorrupt)
	}
	return nil
}

// clientCertificate says when our own certificate for etcd ends.
func clientCertificate(f chart, configured config.Store) {
	if len(configured.ClientCert) == 0 {
		return
	}
	block, _ := pem.Decode(configured.ClientCert)
	if block == nil {
		return // the store's own check says so
	}
	certificate, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return
	}
	f.certificate("this client", certificate.NotAfter, "issue a new one and put it into client_cert_file and client_key_file")
}
