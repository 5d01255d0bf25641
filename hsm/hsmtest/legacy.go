package hsmtest

import (
	"bytes"
	"context"
	"crypto/rsa"
	"fmt"
	"slices"

	"vault-plugin-secrets-nitrokey/hsm"
)

// DecryptPKCS1v15 implements [hsm.LegacyDecrypter].
func (k rsaKey) DecryptPKCS1v15(ctx context.Context, ciphertext []byte) ([]byte, error) {
	private := k.private.(*rsa.PrivateKey)
	if len(ciphertext) != private.Size() {
		return nil, fmt.Errorf("decrypting %d bytes with a key of %d: %w", len(ciphertext), private.Size(), hsm.ErrCiphertext)
	}
	if err := k.begin(ctx); err != nil {
		return nil, err
	}
	plaintext, err := rsa.DecryptPKCS1v15(nil, private, ciphertext) //nolint:staticcheck // what old values are encrypted with
	if err != nil {
		return nil, fmt.Errorf("decrypting: %w", hsm.ErrCiphertext)
	}
	return plaintext, nil
}

// ForeignLabels implements [hsm.ForeignObjects]. An object without an application is made with [Memory.AddObject].
func (m *Memory) ForeignLabels(ctx context.Context) ([]string, error) {
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	var labels []string
	for _, o := range m.token.objects {
		labels = append(labels, o.ref.Label)
	}
	slices.Sort(labels)
	return labels, nil
}

// ReadForeign implements [hsm.ForeignObjects].
func (m *Memory) ReadForeign(ctx context.Context, label string) ([]hsm.ForeignObject, error) {
	if err := m.enter(ctx); err != nil {
		return nil, err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	var found []hsm.ForeignObject
	for _, o := range m.token.objects {
		if o.ref.Label == label {
			found = append(found, hsm.ForeignObject{Application: o.ref.Application, Value: bytes.Clone(o.value)})
		}
	}
	if found == nil {
		return nil, fmt.Errorf("reading the objects %q: %w", label, hsm.ErrNotFound)
	}
	slices.SortFunc(found, func(a, b hsm.ForeignObject) int { return bytes.Compare(a.Value, b.Value) })
	return found, nil
}

// DeleteForeign implements [hsm.ForeignObjects].
func (m *Memory) DeleteForeign(ctx context.Context, label string, value []byte) error {
	if err := m.enter(ctx); err != nil {
		return err
	}
	m.token.mu.Lock()
	defer m.token.mu.Unlock()
	before := len(m.token.objects)
	m.token.objects = slices.DeleteFunc(m.token.objects, func(o object) bool {
		return o.ref.Label == label && bytes.Equal(o.value, value)
	})
	if len(m.token.objects) == before {
		return fmt.Errorf("deleting the objects %q: %w", label, hsm.ErrNotFound)
	}
	return nil
}
