package device

import (
	"context"
	"crypto"
	"crypto/ecdh"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Observer is told of every operation on the devices of a [Registry]: which one, how long it took, what came of it. It must
// return at once. The names of operations are the constants below; both they and the devices are few.
type Observer interface {
	DeviceOperation(device, operation string, took time.Duration, err error)
}

// The operations that an [Observer] is told of.
const (
	OperationDecrypt  = "decrypt" // a private-key operation
	OperationAgree    = "agree"   // a private-key operation
	OperationProve    = "prove"   // a private-key operation, two at most
	OperationFind     = "find"
	OperationGenerate = "generate"
	OperationDelete   = "delete"
	OperationInfo     = "info"
)

// observe returns a device that tells the observer what it does. What a device can do besides is asked by type assertion, so
// there is a type for each set of abilities that providers have; a device with another set stays as it is, unobserved.
func observe(name string, d hsm.Device, observer Observer) hsm.Device {
	if observer == nil {
		return d
	}
	o := &observed{Device: d, watch: watch{name, observer}}
	switch d := d.(type) {
	case interface {
		hsm.ObjectStore
		hsm.Randomer
		hsm.Unlocker
		hsm.Clustered
	}:
		return &observedNetHSM{o, d, d, d, d}
	case interface {
		hsm.ObjectStore
		hsm.Randomer
		hsm.PINChanger
	}:
		return &observedToken{o, d, d, d}
	}
	return d
}

// observedToken is a PKCS#11 token.
type observedToken struct {
	*observed
	hsm.ObjectStore
	hsm.Randomer
	hsm.PINChanger
}

// observedNetHSM is a NetHSM.
type observedNetHSM struct {
	*observed
	hsm.ObjectStore
	hsm.Randomer
	hsm.Unlocker
	hsm.Clustered
}

// watch tells an observer of one device.
type watch struct {
	name     string
	observer Observer
}

func (w watch) done(operation string, begun time.Time, err *error) {
	w.observer.DeviceOperation(w.name, operation, time.Since(begun), *err)
}

// observed is what all devices do.
type observed struct {
	hsm.Device

	watch watch
}

// Info implements [hsm.Device].
func (o *observed) Info(ctx context.Context) (_ hsm.Info, err error) {
	defer o.watch.done(OperationInfo, time.Now(), &err)
	return o.Device.Info(ctx)
}

// FindKeys implements [hsm.Device].
func (o *observed) FindKeys(ctx context.Context, query hsm.KeyQuery) (_ []hsm.Key, err error) {
	defer o.watch.done(OperationFind, time.Now(), &err)
	keys, err := o.Device.FindKeys(ctx, query)
	for i, key := range keys {
		keys[i] = observeKey(key, o.watch)
	}
	return keys, err
}

// GenerateKey implements [hsm.Device].
func (o *observed) GenerateKey(ctx context.Context, spec hsm.KeySpec) (_ hsm.Key, err error) {
	defer o.watch.done(OperationGenerate, time.Now(), &err)
	key, err := o.Device.GenerateKey(ctx, spec)
	if err != nil {
		return nil, err
	}
	return observeKey(key, o.watch), nil
}

// DeleteKey implements [hsm.Device].
func (o *observed) DeleteKey(ctx context.Context, ref hsm.KeyRef) (err error) {
	defer o.watch.done(OperationDelete, time.Now(), &err)
	return o.Device.DeleteKey(ctx, ref)
}

// observeKey returns a key that tells of its operations, with the abilities that it had.
func observeKey(key hsm.Key, w watch) hsm.Key {
	prover, proves := key.(hsm.Prover)
	switch key := key.(type) {
	case hsm.Decrypter:
		o := &observedDecrypter{key, w}
		if !proves {
			return o
		}
		return &provingDecrypter{o, observedProver{prover, w}}
	case hsm.Agreer:
		o := &observedAgreer{key, w}
		if !proves {
			return o
		}
		return &provingAgreer{o, observedProver{prover, w}}
	}
	return key // it can do nothing that we would use
}

type observedDecrypter struct {
	hsm.Decrypter

	watch watch
}

// DecryptOAEP implements [hsm.Decrypter].
func (o *observedDecrypter) DecryptOAEP(ctx context.Context, hash crypto.Hash, ciphertext []byte) (_ []byte, err error) {
	defer o.watch.done(OperationDecrypt, time.Now(), &err)
	return o.Decrypter.DecryptOAEP(ctx, hash, ciphertext)
}

type observedAgreer struct {
	hsm.Agreer

	watch watch
}

// Agree implements [hsm.Agreer].
func (o *observedAgreer) Agree(ctx context.Context, peer *ecdh.PublicKey) (_ []byte, err error) {
	defer o.watch.done(OperationAgree, time.Now(), &err)
	return o.Agreer.Agree(ctx, peer)
}

// observedProver has nothing of a key but its proof: the rest comes from the type beside it.
type observedProver struct {
	prover hsm.Prover
	watch  watch
}

// Prove implements [hsm.Prover].
func (o observedProver) Prove(ctx context.Context) (err error) {
	defer o.watch.done(OperationProve, time.Now(), &err)
	return o.prover.Prove(ctx)
}

type provingDecrypter struct {
	*observedDecrypter
	observedProver
}

type provingAgreer struct {
	*observedAgreer
	observedProver
}
