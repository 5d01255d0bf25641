//go:build cgo

// Package bankvaultstest leaves on a token what Bank-Vaults leaves there, by its public description and with the calls that
// it makes: a key pair with the attributes that it gives one, values encrypted on the device in either of its formats, and
// data objects under its names. One thing differs on purpose: the objects get CKA_TOKEN, which Bank-Vaults leaves out, and
// without which SoftHSM keeps them for the session only; OpenSC before 0.27 kept them without.
package bankvaultstest

import (
	"crypto/rsa"
	"math/big"
	"slices"
	"testing"

	"github.com/miekg/pkcs11"
)

// KeyLabel is the label that Bank-Vaults gives its key pair.
const KeyLabel = "bank-vaults"

// Format is how values are encrypted.
type Format struct{ mechanism func() *pkcs11.Mechanism }

// The formats.
var (
	// OAEP is that of version 1.33 and later.
	OAEP = Format{func() *pkcs11.Mechanism {
		params := pkcs11.NewOAEPParams(pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1, pkcs11.CKZ_DATA_SPECIFIED, nil)
		return pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_OAEP, params)
	}}
	// PKCS1v15 is that of the versions before.
	PKCS1v15 = Format{func() *pkcs11.Mechanism { return pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil) }}
)

// Session is a session on a token, logged in.
type Session struct {
	ctx    *pkcs11.Ctx
	handle pkcs11.SessionHandle
	public pkcs11.ObjectHandle
}

// Open opens a session in this process and logs in. The module is given back by Close, which the end of the test calls at
// the latest: two at a time cannot be open.
func Open(t testing.TB, module, serial, pin string) *Session {
	t.Helper()
	s := &Session{ctx: pkcs11.New(module)}
	if s.ctx == nil {
		t.Fatalf("the module %s cannot be loaded", module)
	}
	check(t, s.ctx.Initialize())
	t.Cleanup(func() { s.Close(t) })
	slots, err := s.ctx.GetSlotList(true)
	check(t, err)
	i := slices.IndexFunc(slots, func(slot uint) bool {
		info, err := s.ctx.GetTokenInfo(slot)
		return err == nil && info.SerialNumber == serial
	})
	if i < 0 {
		t.Fatalf("no token %s", serial)
	}
	s.handle, err = s.ctx.OpenSession(slots[i], pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	check(t, err)
	check(t, s.ctx.Login(s.handle, pkcs11.CKU_USER, pin))
	return s
}

// Close gives the module back.
func (s *Session) Close(t testing.TB) {
	t.Helper()
	if s.ctx == nil {
		return
	}
	check(t, s.ctx.Finalize())
	s.ctx.Destroy()
	s.ctx = nil
}

// GenerateKey makes the key pair as Bank-Vaults does: without an id, with no more attributes than these.
func (s *Session) GenerateKey(t testing.TB, label string) *rsa.PublicKey {
	t.Helper()
	public := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_VERIFY, true),
		pkcs11.NewAttribute(pkcs11.CKA_ENCRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_PUBLIC_EXPONENT, []byte{1, 0, 1}),
		pkcs11.NewAttribute(pkcs11.CKA_MODULUS_BITS, 2048),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	}
	private := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
	}
	mechanism := []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, nil)}
	handle, _, err := s.ctx.GenerateKeyPair(s.handle, mechanism, public, private)
	check(t, err)
	s.public = handle
	parts, err := s.ctx.GetAttributeValue(s.handle, handle, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_MODULUS, nil)})
	check(t, err)
	return &rsa.PublicKey{N: new(big.Int).SetBytes(parts[0].Value), E: 65537}
}

// Encrypt encrypts a value on the device with the key made last.
func (s *Session) Encrypt(t testing.TB, format Format, value string) []byte {
	t.Helper()
	check(t, s.ctx.EncryptInit(s.handle, []*pkcs11.Mechanism{format.mechanism()}, s.public))
	block, err := s.ctx.Encrypt(s.handle, []byte(value))
	check(t, err)
	return block
}

// Put makes a data object, whether or not the label is taken. more are attributes besides class, label and value, such as
// Bank-Vaults' other versions, or OpenSC, gave them.
func (s *Session) Put(t testing.TB, label string, value []byte, more ...*pkcs11.Attribute) {
	t.Helper()
	attributes := append([]*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, label),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, value),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
	}, more...)
	_, err := s.ctx.CreateObject(s.handle, attributes)
	check(t, err)
}

// LikeOpenSC are the attributes that a data object has under OpenSC besides: the label is its application as well.
func LikeOpenSC(label string) []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, label), pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false), pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, true),
	}
}

// Private makes a data object that only those see who are logged in.
func Private() *pkcs11.Attribute { return pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true) }

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
