package nethsm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// tour is the life of a NetHSM from the box to the factory reset, by one method after the other. What the client sends is
// what the double, held against a recording of a real server, takes.
type tour struct {
	t       *testing.T
	double  *nethsmtest.HSM
	visited map[string]bool

	public, admin, operator, backup, metrics *nethsm.Client

	// authority signs the node's certificate later on.
	authority, signed []byte
	authorityKey      *ecdsa.PrivateKey
}

// visit counts a method as visited and fails the tour where there is an error.
func (v *tour) visit(method string, err error) {
	v.t.Helper()
	v.visited[method] = true
	if err != nil {
		v.t.Fatalf("%s: %v", method, err)
	}
}

// refused counts a method as visited that should fail that way.
func (v *tour) refused(method string, err, want error) {
	v.t.Helper()
	v.visited[method] = true
	if !errors.Is(err, want) {
		v.t.Fatalf("%s = %v, want %v", method, err, want)
	}
}

func (v *tour) equal(what string, got, want any) {
	v.t.Helper()
	if !reflect.DeepEqual(got, want) {
		v.t.Fatalf("%s = %#v, want %#v", what, got, want)
	}
}

const (
	unlockPassphrase = "the unlock passphrase"
	adminPassphrase  = "the passphrase of admin"
	backupPassphrase = "the backup passphrase"
	userPassphrase   = "the passphrase of a user"
)

func TestTour(t *testing.T) {
	double := nethsmtest.Start(t, nethsmtest.Options{})
	authority, authorityKey := newAuthority(t)
	public, err := nethsm.New(nethsm.Options{URLs: double.URLs(), TLS: nethsm.TLS{CA: append(double.CA(), authority...)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := public.Close(); err != nil {
			t.Error(err)
		}
	})
	as := func(user, passphrase string) *nethsm.Client {
		return public.As(nethsm.Credentials{Username: user, Password: []byte(passphrase)})
	}
	v := &tour{
		t: t, double: double, visited: map[string]bool{}, authority: authority, authorityKey: authorityKey,
		public: public, admin: as("admin", adminPassphrase), operator: as("operator", userPassphrase),
		backup: as("backup", userPassphrase), metrics: as("metrics", userPassphrase),
	}
	ctx := t.Context()
	v.provision(ctx)
	v.users(ctx)
	v.namespaces(ctx)
	v.keys(ctx)
	v.operations(ctx)
	v.certificates(ctx)
	v.configuration(ctx)
	v.tls(ctx)
	v.cluster(ctx)
	v.lock(ctx)
	v.system(ctx)

	for _, method := range nethsm.EndpointMethods(t) {
		if !v.visited[method] {
			t.Errorf("the tour does not visit %s", method)
		}
	}
}

func (v *tour) provision(ctx context.Context) {
	state, err := v.public.State(ctx)
	v.visit("State", err)
	v.equal("state", state, nethsm.StateUnprovisioned)
	v.visit("Alive", v.public.Alive(ctx))
	v.refused("Ready", v.public.Ready(ctx), nethsm.ErrState)
	info, err := v.public.Info(ctx)
	v.visit("Info", err)
	v.equal("info", info, nethsm.Info{Vendor: "Nitrokey GmbH", Product: "NetHSM"})
	_, err = v.admin.Users(ctx)
	v.refused("Users", err, nethsm.ErrState)
	_, err = v.public.Diagnose(ctx)
	v.visit("Diagnose", err)

	first := nethsm.Provisioning{UnlockPassphrase: []byte(unlockPassphrase), AdminPassphrase: []byte(adminPassphrase)}
	v.visit("Provision", v.public.Provision(ctx, first))
	v.refused("Provision", v.public.Provision(ctx, first), nethsm.ErrState)
	v.visit("Ready", v.public.Ready(ctx))
	v.refused("Alive", v.public.Alive(ctx), nethsm.ErrState)
	system, err := v.admin.SystemInfo(ctx)
	v.visit("SystemInfo", err)
	v.equal("container", system.Container(), true)
	diagnosis, err := v.admin.Diagnose(ctx)
	v.visit("Diagnose", err)
	v.equal("database runs", diagnosis.Database.Running, true)
}

func (v *tour) users(ctx context.Context) {
	for id, role := range map[string]nethsm.Role{
		"operator": nethsm.RoleOperator, "backup": nethsm.RoleBackup, "metrics": nethsm.RoleMetrics, "other": nethsm.RoleOperator,
	} {
		made, err := v.admin.AddUser(ctx, id, nethsm.NewUser{RealName: "Ünï " + id, Role: role, Passphrase: []byte(userPassphrase)})
		v.visit("AddUser", err)
		v.equal("id", made, id)
	}
	again := nethsm.NewUser{RealName: "Again", Role: nethsm.RoleOperator, Passphrase: []byte(userPassphrase)}
	_, err := v.admin.AddUser(ctx, "operator", again)
	v.refused("AddUser", err, hsm.ErrExists)
	_, err = v.operator.AddUser(ctx, "mine", again)
	v.refused("AddUser", err, hsm.ErrForbidden)
	chosen, err := v.admin.AddUser(ctx, "", again)
	v.visit("AddUser", err)
	users, err := v.admin.Users(ctx)
	v.visit("Users", err)
	want := []string{"admin", "backup", "metrics", "operator", "other", chosen}
	slices.Sort(users)
	slices.Sort(want)
	v.equal("users", users, want)
	user, err := v.operator.User(ctx, "operator")
	v.visit("User", err)
	v.equal("user", user, nethsm.User{RealName: "Ünï operator", Role: nethsm.RoleOperator})
	v.visit("DeleteUser", v.admin.DeleteUser(ctx, chosen))
	v.refused("DeleteUser", v.admin.DeleteUser(ctx, chosen), hsm.ErrNotFound)
	v.refused("DeleteUser", v.admin.DeleteUser(ctx, "admin"), nethsm.ErrRequest)
	v.visit("SetPassphrase", v.operator.SetPassphrase(ctx, "operator", []byte("a \"new\" one\\")))
	v.operator = v.public.As(nethsm.Credentials{Username: "operator", Password: []byte("a \"new\" one\\")})

	v.visit("AddUserTag", v.admin.AddUserTag(ctx, "operator", "berlin"))
	v.visit("AddUserTag", v.admin.AddUserTag(ctx, "operator", "berlin"))
	v.visit("AddUserTag", v.admin.AddUserTag(ctx, "operator", "rome"))
	v.visit("DeleteUserTag", v.admin.DeleteUserTag(ctx, "operator", "rome"))
	v.refused("DeleteUserTag", v.admin.DeleteUserTag(ctx, "operator", "rome"), hsm.ErrNotFound)
	tags, err := v.operator.UserTags(ctx, "operator")
	v.visit("UserTags", err)
	v.equal("tags", tags, []string{"berlin"})
}

func (v *tour) namespaces(ctx context.Context) {
	_, err := v.admin.AddUser(ctx, "ns1~boss", nethsm.NewUser{
		RealName: "Boss", Role: nethsm.RoleAdministrator, Passphrase: []byte(userPassphrase),
	})
	v.visit("AddUser", err)
	v.visit("AddNamespace", v.admin.AddNamespace(ctx, "ns1"))
	v.refused("AddNamespace", v.admin.AddNamespace(ctx, "ns1"), hsm.ErrExists)
	names, err := v.admin.Namespaces(ctx)
	v.visit("Namespaces", err)
	v.equal("namespaces", names, []string{"ns1"})
	boss := v.public.As(nethsm.Credentials{Username: "ns1~boss", Password: []byte(userPassphrase)})
	chosen, err := boss.AddUser(ctx, "ns1~", nethsm.NewUser{RealName: "N", Role: nethsm.RoleOperator, Passphrase: []byte(userPassphrase)})
	v.visit("AddUser", err)
	users, err := boss.Users(ctx)
	v.visit("Users", err)
	v.equal("the one that was made is among them", slices.Contains(users, chosen) && slices.Contains(users, "ns1~boss"), true)
	_, err = boss.Namespaces(ctx)
	v.refused("Namespaces", err, hsm.ErrForbidden)
	v.visit("DeleteNamespace", v.admin.DeleteNamespace(ctx, "ns1"))
}

func (v *tour) keys(ctx context.Context) {
	wanted := nethsm.NewKey{
		ID: "seal", Label: "für Vault", Type: nethsm.TypeRSA, Length: 2048, Tags: []string{"berlin"},
		Mechanisms: []nethsm.Mechanism{nethsm.RSADecryptionOAEPSHA256},
	}
	id, err := v.admin.GenerateKey(ctx, wanted)
	v.visit("GenerateKey", err)
	v.equal("id", id, "seal")
	_, err = v.admin.GenerateKey(ctx, wanted)
	v.refused("GenerateKey", err, hsm.ErrExists)
	_, err = v.operator.GenerateKey(ctx, wanted)
	v.refused("GenerateKey", err, hsm.ErrForbidden)
	aes := []nethsm.Mechanism{nethsm.AESEncryptionCBC, nethsm.AESDecryptionCBC}
	_, err = v.admin.GenerateKey(ctx, nethsm.NewKey{ID: "aes", Type: nethsm.TypeGeneric, Length: 256, Mechanisms: aes})
	v.visit("GenerateKey", err)
	chosen, err := v.admin.GenerateKey(ctx, nethsm.NewKey{Type: nethsm.TypeCurve25519, Mechanisms: []nethsm.Mechanism{nethsm.EdDSASignature}})
	v.visit("GenerateKey", err)
	v.visit("MoveKey", v.admin.MoveKey(ctx, chosen, "ed"))
	v.refused("MoveKey", v.admin.MoveKey(ctx, "ed", "seal"), hsm.ErrExists)
	v.refused("MoveKey", v.admin.MoveKey(ctx, chosen, "free"), hsm.ErrNotFound)

	v.importKeys(ctx)

	key, err := v.operator.Key(ctx, "seal")
	v.visit("Key", err)
	v.equal("key", key, nethsm.Key{
		ID: "seal", Label: "für Vault", Type: nethsm.TypeRSA, Mechanisms: wanted.Mechanisms, Tags: wanted.Tags, Public: key.Public,
	})
	text, err := v.operator.PublicPEM(ctx, "seal")
	v.visit("PublicPEM", err)
	block, _ := pem.Decode(text)
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	v.visit("PublicPEM", err)
	v.equal("the key of the PEM is that of the description", key.Public.(*rsa.PublicKey).Equal(public), true)
	_, err = v.operator.PublicPEM(ctx, "aes")
	v.refused("PublicPEM", err, hsm.ErrUnsupported)
	_, err = v.admin.Key(ctx, "nothing")
	v.refused("Key", err, hsm.ErrNotFound)

	for _, c := range []struct {
		client *nethsm.Client
		filter nethsm.KeyFilter
		want   []string
	}{
		{v.admin, nethsm.KeyFilter{}, []string{"aes", "ed", "imported-ec", "imported-ed", "imported-rsa", "imported-secret", "seal"}},
		{v.operator, nethsm.KeyFilter{Prefix: "imported-e"}, []string{"imported-ec", "imported-ed"}},
		{v.operator, nethsm.KeyFilter{Label: "für Vault"}, []string{"seal"}},
		{v.public.As(nethsm.Credentials{Username: "other", Password: []byte(userPassphrase)}), nethsm.KeyFilter{Usable: true, Prefix: "s"}, []string{}},
	} {
		keys, err := c.client.Keys(ctx, c.filter)
		v.visit("Keys", err)
		slices.Sort(keys)
		v.equal("keys", keys, c.want)
	}

	v.visit("SetKeyLabel", v.admin.SetKeyLabel(ctx, "seal", "another"))
	v.visit("SetKeyLabel", v.admin.SetKeyLabel(ctx, "seal", "another"))
	key, err = v.admin.Key(ctx, "seal")
	v.visit("Key", err)
	v.equal("label", key.Label, "another")
	v.visit("DeleteKeyLabel", v.admin.DeleteKeyLabel(ctx, "seal"))
	v.visit("AddKeyTag", v.admin.AddKeyTag(ctx, "seal", "rome"))
	v.visit("AddKeyTag", v.admin.AddKeyTag(ctx, "seal", "rome"))
	v.visit("DeleteKeyTag", v.admin.DeleteKeyTag(ctx, "seal", "rome"))
	v.refused("DeleteKeyTag", v.admin.DeleteKeyTag(ctx, "seal", "rome"), hsm.ErrNotFound)
	csr, err := v.operator.CSR(ctx, "imported-ec", nethsm.DistinguishedName{CommonName: "nethsm.example", Country: "DE"})
	v.visit("CSR", err)
	block, _ = pem.Decode(csr)
	request, err := x509.ParseCertificateRequest(block.Bytes)
	v.visit("CSR", err)
	v.visit("CSR", request.CheckSignature())
	v.equal("subject", request.Subject.CommonName, "nethsm.example")
}

func (v *tour) importKeys(ctx context.Context) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	v.visit("ImportKey", err)
	ecKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	v.visit("ImportKey", err)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	v.visit("ImportKey", err)
	for id, c := range map[string]struct {
		private   any
		mechanism nethsm.Mechanism
		public    interface{ Equal(crypto.PublicKey) bool }
	}{
		"imported-rsa":    {rsaKey, nethsm.RSADecryptionOAEPSHA256, &rsaKey.PublicKey},
		"imported-ec":     {ecKey, nethsm.ECDSASignature, &ecKey.PublicKey},
		"imported-ed":     {edKey, nethsm.EdDSASignature, edKey.Public().(ed25519.PublicKey)},
		"imported-secret": {nethsm.Secret("0123456789abcdef"), nethsm.AESDecryptionCBC, nil},
	} {
		made := nethsm.ImportedKey{ID: id, Mechanisms: []nethsm.Mechanism{c.mechanism}, Private: c.private}
		got, err := v.admin.ImportKey(ctx, made)
		v.visit("ImportKey", err)
		v.equal("id", got, id)
		key, err := v.admin.Key(ctx, id)
		v.visit("Key", err)
		if c.public == nil {
			v.equal("public key", key.Public, nil)
		} else {
			v.equal("the public key of "+id+" is that of the imported key", c.public.Equal(key.Public), true)
		}
		_, err = v.admin.ImportKey(ctx, made)
		v.refused("ImportKey", err, hsm.ErrExists)
	}
	chosen, err := v.admin.ImportKey(ctx, nethsm.ImportedKey{
		Mechanisms: []nethsm.Mechanism{nethsm.AESEncryptionCBC}, Private: nethsm.Secret("0123456789abcdef"),
	})
	v.visit("ImportKey", err)
	v.visit("DeleteKey", v.admin.DeleteKey(ctx, chosen))
	v.refused("DeleteKey", v.admin.DeleteKey(ctx, chosen), hsm.ErrNotFound)
}

func (v *tour) operations(ctx context.Context) {
	key, err := v.operator.Key(ctx, "seal")
	v.visit("Key", err)
	public := key.Public.(*rsa.PublicKey)
	block, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, []byte("a content key"), nil)
	v.visit("Decrypt", err)
	plaintext, err := v.operator.Decrypt(ctx, "seal", nethsm.ModeOAEPSHA256, block, nil)
	v.visit("Decrypt", err)
	v.equal("plaintext", string(plaintext), "a content key")
	_, err = v.operator.Decrypt(ctx, "seal", nethsm.ModeOAEPSHA256, block[1:], nil)
	v.refused("Decrypt", err, hsm.ErrCiphertext)
	_, err = v.operator.Decrypt(ctx, "seal", nethsm.ModePKCS1, block, nil)
	v.refused("Decrypt", err, hsm.ErrUnsupported)
	_, err = v.admin.Decrypt(ctx, "seal", nethsm.ModeOAEPSHA256, block, nil)
	v.refused("Decrypt", err, hsm.ErrForbidden)
	other := v.public.As(nethsm.Credentials{Username: "other", Password: []byte(userPassphrase)})
	_, err = other.Decrypt(ctx, "seal", nethsm.ModeOAEPSHA256, block, nil)
	v.refused("Decrypt", err, hsm.ErrForbidden)
	_, err = v.operator.Decrypt(ctx, "nothing", nethsm.ModeOAEPSHA256, block, nil)
	v.refused("Decrypt", err, hsm.ErrNotFound)

	message := []byte("exactly 16 bytes")
	ciphertext, iv, err := v.operator.Encrypt(ctx, "aes", message, nil)
	v.visit("Encrypt", err)
	plaintext, err = v.operator.Decrypt(ctx, "aes", nethsm.ModeAESCBC, ciphertext, iv)
	v.visit("Decrypt", err)
	v.equal("plaintext", plaintext, message)
	again, used, err := v.operator.Encrypt(ctx, "aes", message, iv)
	v.visit("Encrypt", err)
	v.equal("with the same IV it is the same", [][]byte{again, used}, [][]byte{ciphertext, iv})
	_, _, err = v.operator.Encrypt(ctx, "aes", message[:3], nil)
	v.refused("Encrypt", err, nethsm.ErrRequest)

	digest := sha256.Sum256(message)
	signature, err := v.operator.Sign(ctx, "imported-ec", nethsm.ModeECDSA, digest[:])
	v.visit("Sign", err)
	key, err = v.operator.Key(ctx, "imported-ec")
	v.visit("Key", err)
	v.equal("ECDSA verifies", ecdsa.VerifyASN1(key.Public.(*ecdsa.PublicKey), digest[:], signature), true)
	signature, err = v.operator.Sign(ctx, "ed", nethsm.ModeEdDSA, message)
	v.visit("Sign", err)
	key, err = v.operator.Key(ctx, "ed")
	v.visit("Key", err)
	v.equal("EdDSA verifies", ed25519.Verify(key.Public.(ed25519.PublicKey), message, signature), true)
	_, err = v.operator.Sign(ctx, "seal", nethsm.ModePSSSHA256, digest[:])
	v.refused("Sign", err, hsm.ErrUnsupported)

	random, err := v.operator.Random(ctx, 1024)
	v.visit("Random", err)
	v.equal("random bytes", len(random), 1024)
	_, err = v.admin.Random(ctx, 1)
	v.refused("Random", err, hsm.ErrForbidden)
}

func (v *tour) certificates(ctx context.Context) {
	_, err := v.operator.KeyCertificate(ctx, "seal")
	v.refused("KeyCertificate", err, hsm.ErrNotFound)
	for _, value := range [][]byte{{}, []byte("\x00 any bytes \xff"), bytes.Repeat([]byte{0}, nethsm.MaxKeyCertificate)} {
		v.visit("PutKeyCertificate", v.admin.PutKeyCertificate(ctx, "seal", value))
		got, err := v.operator.KeyCertificate(ctx, "seal")
		v.visit("KeyCertificate", err)
		v.equal("the value is what was put there", bytes.Equal(got, value), true)
		v.refused("PutKeyCertificate", v.admin.PutKeyCertificate(ctx, "seal", []byte("x")), hsm.ErrExists)
		v.visit("DeleteKeyCertificate", v.admin.DeleteKeyCertificate(ctx, "seal"))
		v.refused("DeleteKeyCertificate", v.admin.DeleteKeyCertificate(ctx, "seal"), hsm.ErrNotFound)
	}
	v.refused("PutKeyCertificate", v.admin.PutKeyCertificate(ctx, "nothing", []byte("x")), hsm.ErrNotFound)
	v.refused("PutKeyCertificate", v.operator.PutKeyCertificate(ctx, "seal", []byte("x")), hsm.ErrForbidden)
}

func (v *tour) configuration(ctx context.Context) {
	on, err := v.admin.UnattendedBoot(ctx)
	v.visit("UnattendedBoot", err)
	v.equal("unattended boot", on, false)
	v.visit("SetUnattendedBoot", v.admin.SetUnattendedBoot(ctx, true))
	on, err = v.admin.UnattendedBoot(ctx)
	v.visit("UnattendedBoot", err)
	v.equal("unattended boot", on, true)
	v.visit("SetUnattendedBoot", v.admin.SetUnattendedBoot(ctx, false))
	_, err = v.operator.UnattendedBoot(ctx)
	v.refused("UnattendedBoot", err, hsm.ErrForbidden)

	var wrong *hsm.PINError
	err = v.admin.SetUnlockPassphrase(ctx, []byte("not the unlock passphrase"), []byte(unlockPassphrase+"!"))
	v.equal("a wrong current passphrase is a PIN error", errors.As(err, &wrong) && wrong.Wrong, true)
	v.visit("SetUnlockPassphrase", v.admin.SetUnlockPassphrase(ctx, []byte(unlockPassphrase), []byte(unlockPassphrase+"!")))
	v.refused("SetUnlockPassphrase", v.operator.SetUnlockPassphrase(ctx, nil, []byte(unlockPassphrase)), hsm.ErrForbidden)
	_, err = v.backup.Backup(ctx, new(bytes.Buffer))
	v.refused("Backup", err, nethsm.ErrState)
	v.visit("SetBackupPassphrase", v.admin.SetBackupPassphrase(ctx, nil, []byte(backupPassphrase)))
	err = v.admin.SetBackupPassphrase(ctx, nil, []byte(backupPassphrase))
	v.equal("a wrong current passphrase is a PIN error", errors.As(err, &wrong) && wrong.Wrong, true)

	v.visit("SetTime", v.admin.SetTime(ctx, time.Now().Add(time.Hour)))
	now, err := v.admin.Time(ctx)
	v.visit("Time", err)
	v.equal("the clock is an hour ahead", time.Until(now).Round(time.Minute), time.Hour)
	v.visit("SetTime", v.admin.SetTime(ctx, time.Now()))

	logging := nethsm.Logging{Address: netip.MustParseAddr("10.0.0.1"), Port: 5140, Level: nethsm.LogWarning}
	v.visit("SetLogging", v.admin.SetLogging(ctx, logging))
	got, err := v.admin.Logging(ctx)
	v.visit("Logging", err)
	v.equal("logging", got, logging)

	network := nethsm.Network{
		Address: netip.MustParseAddr("192.168.1.9"), Netmask: netip.MustParseAddr("255.255.255.0"),
		Gateway: netip.MustParseAddr("192.168.1.1"),
	}
	v.visit("SetNetwork", v.admin.SetNetwork(ctx, network))
	read, err := v.admin.Network(ctx)
	v.visit("Network", err)
	v.equal("network", read, network)

	metrics, err := v.metrics.Metrics(ctx)
	v.visit("Metrics", err)
	v.equal("there are metrics", len(metrics) > 0, true)
	_, err = v.admin.Metrics(ctx)
	v.refused("Metrics", err, hsm.ErrForbidden)
}

func (v *tour) tls(ctx context.Context) {
	text, err := v.admin.TLSPublicKey(ctx)
	v.visit("TLSPublicKey", err)
	block, _ := pem.Decode(text)
	_, err = x509.ParsePKIXPublicKey(block.Bytes)
	v.visit("TLSPublicKey", err)
	certificate, err := v.admin.TLSCertificate(ctx)
	v.visit("TLSCertificate", err)
	v.equal("the certificate is the one that is shown", bytes.HasPrefix(certificate, bytes.TrimSpace(v.double.Node(0).Certificate())), true)
	csr, err := v.admin.TLSCSR(ctx, nethsm.DistinguishedName{CommonName: "127.0.0.1"})
	v.visit("TLSCSR", err)
	block, _ = pem.Decode(csr)
	request, err := x509.ParseCertificateRequest(block.Bytes)
	v.visit("TLSCSR", err)
	v.visit("TLSCSR", request.CheckSignature())
	_, err = v.admin.ClusterCA(ctx)
	v.refused("ClusterCA", err, hsm.ErrNotFound)

	v.refused("SetClusterCA", v.admin.SetClusterCA(ctx, v.authority), nethsm.ErrState)             // it did not sign the node's certificate
	v.refused("SetTLSCertificate", v.admin.SetTLSCertificate(ctx, v.authority), nethsm.ErrRequest) // another key
	v.visit("SetTLSCertificate", v.admin.SetTLSCertificate(ctx, v.sign(request)))
	certificate, err = v.admin.TLSCertificate(ctx)
	v.visit("TLSCertificate", err)
	v.equal("the certificate is the new one", bytes.Equal(bytes.TrimSpace(certificate), bytes.TrimSpace(v.signed)), true)
	v.visit("SetClusterCA", v.admin.SetClusterCA(ctx, v.authority))
	authority, err := v.admin.ClusterCA(ctx)
	v.visit("ClusterCA", err)
	v.equal("the cluster's CA is what was set", bytes.TrimSpace(authority), bytes.TrimSpace(v.authority))

	// Nobody trusts the certificate that comes with a new key, until it is replaced by a good one.
	v.visit("GenerateTLSKey", v.admin.GenerateTLSKey(ctx, nethsm.TypeECP256, 0))
	_, err = v.another(nethsm.TLS{CA: v.authority}).TLSCertificate(ctx)
	v.refused("TLSCertificate", err, hsm.ErrUnavailable)
	admin := v.another(nethsm.TLS{Insecure: true})
	csr, err = admin.TLSCSR(ctx, nethsm.DistinguishedName{CommonName: "127.0.0.1"})
	v.visit("TLSCSR", err)
	block, _ = pem.Decode(csr)
	request, err = x509.ParseCertificateRequest(block.Bytes)
	v.visit("TLSCSR", err)
	v.visit("SetTLSCertificate", admin.SetTLSCertificate(ctx, v.sign(request)))
	_, err = v.another(nethsm.TLS{CA: v.authority}).TLSCertificate(ctx)
	v.visit("TLSCertificate", err)
}

// another is a client of admin that trusts another way and has no connection yet.
func (v *tour) another(trust nethsm.TLS) *nethsm.Client {
	v.t.Helper()
	client, err := nethsm.New(nethsm.Options{URLs: v.double.URLs(), TLS: trust})
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { _ = client.Close() })
	return client.As(nethsm.Credentials{Username: "admin", Password: []byte(adminPassphrase)})
}

// newAuthority makes a CA.
func newAuthority(t *testing.T) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key
}

// sign makes the certificate that a request asks for.
func (v *tour) sign(request *x509.CertificateRequest) []byte {
	v.t.Helper()
	block, _ := pem.Decode(v.authority)
	parent, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		v.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: request.Subject, NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"127.0.0.1"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, request.PublicKey, v.authorityKey)
	if err != nil {
		v.t.Fatal(err)
	}
	v.signed = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return v.signed
}

func (v *tour) cluster(ctx context.Context) {
	members, err := v.admin.Members(ctx)
	v.visit("Members", err)
	v.equal("members", len(members), 1)
	kit, err := v.admin.AddMember(ctx, []string{"https://192.168.1.2:2380"})
	v.visit("AddMember", err)
	v.equal("the kit names both", len(kit.Members), 2)
	_, err = v.admin.AddMember(ctx, []string{"https://192.168.1.3:2380"})
	v.refused("AddMember", err, hsm.ErrExists)
	members, err = v.admin.Members(ctx)
	v.visit("Members", err)
	learner := members[slices.IndexFunc(members, func(m nethsm.Member) bool { return m.Learner })]
	v.visit("SetMemberURLs", v.admin.SetMemberURLs(ctx, learner.ID, []string{"https://192.168.1.4:2380"}))
	v.refused("Promote", v.admin.Promote(ctx, learner.ID), nethsm.ErrState)
	if err := v.double.CatchUp("joined"); err != nil {
		v.t.Fatal(err)
	}
	v.visit("Promote", v.admin.Promote(ctx, learner.ID))
	v.visit("RemoveMember", v.admin.RemoveMember(ctx, learner.ID))
	v.refused("RemoveMember", v.admin.RemoveMember(ctx, learner.ID), hsm.ErrNotFound)
	v.visit("Join", v.admin.Join(ctx, kit, []byte(backupPassphrase)))
	v.visit("Unlock", v.public.Unlock(ctx, []byte(unlockPassphrase+"!")))
}

func (v *tour) lock(ctx context.Context) {
	v.refused("Lock", v.operator.Lock(ctx), hsm.ErrForbidden)
	v.visit("Lock", v.admin.Lock(ctx))
	state, err := v.public.State(ctx)
	v.visit("State", err)
	v.equal("state", state, nethsm.StateLocked)
	_, err = v.operator.Random(ctx, 1)
	v.refused("Random", err, hsm.ErrLocked)
	var wrong *hsm.PINError
	err = v.public.Unlock(ctx, []byte("not the unlock passphrase"))
	v.equal("a wrong passphrase is a PIN error", errors.As(err, &wrong) && wrong.Wrong && wrong.TriesLeft == -1, true)
	v.visit("Unlock", v.public.Unlock(ctx, []byte(unlockPassphrase+"!"))) // it waits for its turn: only one try a second counts
	v.refused("Unlock", v.public.Unlock(ctx, []byte(unlockPassphrase+"!")), nethsm.ErrState)
	random, err := v.operator.Random(ctx, 1)
	v.visit("Random", err)
	v.equal("random bytes", len(random), 1)
}

func (v *tour) system(ctx context.Context) {
	var backup bytes.Buffer
	n, err := v.backup.Backup(ctx, &backup)
	v.visit("Backup", err)
	v.equal("size", n, int64(backup.Len()))
	_, err = v.admin.Backup(ctx, new(bytes.Buffer))
	v.refused("Backup", err, hsm.ErrForbidden)
	v.visit("DeleteKey", v.admin.DeleteKey(ctx, "seal"))
	restoration := func() nethsm.Restoration {
		return nethsm.Restoration{Backup: bytes.NewReader(backup.Bytes()), Passphrase: []byte(backupPassphrase)}
	}
	v.visit("Restore", v.admin.Restore(ctx, restoration()))
	v.unlocked(ctx)
	_, err = v.admin.Key(ctx, "seal")
	v.visit("Key", err)

	_, err = v.admin.Update(ctx, []byte("not an image"))
	v.refused("Update", err, nethsm.ErrRequest)
	image := []byte("_NETHSM_UPDATE_\x00" + field("signature") + field("All is new.") + field("9.0") + "the software")
	notes, err := v.admin.Update(ctx, image)
	v.visit("Update", err)
	v.equal("release notes", notes, "All is new.")
	v.visit("CancelUpdate", v.admin.CancelUpdate(ctx))
	v.refused("CancelUpdate", v.admin.CancelUpdate(ctx), nethsm.ErrState)
	v.refused("CommitUpdate", v.admin.CommitUpdate(ctx), nethsm.ErrState)
	_, err = v.admin.Update(ctx, image)
	v.visit("Update", err)
	v.visit("CommitUpdate", v.admin.CommitUpdate(ctx))
	v.unlocked(ctx)

	v.visit("Reboot", v.admin.Reboot(ctx))
	v.unlocked(ctx)
	v.double.Node(0).SetState(nethsmtest.Failed)
	_, err = v.operator.Random(ctx, 1)
	v.refused("Random", err, nethsm.ErrState)
	v.visit("ForceNewCluster", v.public.ForceNewCluster(ctx, []byte(unlockPassphrase+"!")))
	v.unlocked(ctx)

	// A reset NetHSM becomes what the backup was made of.
	v.visit("FactoryReset", v.admin.FactoryReset(ctx))
	state, err := v.public.State(ctx)
	v.visit("State", err)
	v.equal("state", state, nethsm.StateUnprovisioned)
	v.visit("Restore", v.public.Restore(ctx, restoration()))
	v.unlocked(ctx)
	_, err = v.admin.Key(ctx, "seal")
	v.visit("Key", err)
	if err := v.admin.Shutdown(ctx); !errors.Is(err, hsm.ErrMayHaveHappened) { // the answer may be lost with the node
		v.visit("Shutdown", err)
	}
	v.visited["Shutdown"] = true
}

// unlocked unlocks the node where it is Locked.
func (v *tour) unlocked(ctx context.Context) {
	v.t.Helper()
	state, err := v.public.State(ctx)
	v.visit("State", err)
	if state == nethsm.StateLocked {
		v.visit("Unlock", v.public.Unlock(ctx, []byte(unlockPassphrase+"!")))
	}
}

// field is a field of an update image: three bytes of length, and the bytes.
func field(text string) string { return "\x00\x00" + string(rune(len(text))) + text }

// What a container lacks is told by its double as well.
func TestContainerOfTheDouble(t *testing.T) {
	double := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true, Container: true})
	public, err := nethsm.New(nethsm.Options{URLs: double.URLs(), TLS: nethsm.TLS{CA: double.CA()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = public.Close() })
	admin := public.As(nethsm.Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)})
	zero := netip.IPv4Unspecified()
	for name, call := range map[string]func(context.Context) error{
		"Reboot": admin.Reboot, "Shutdown": admin.Shutdown, "FactoryReset": admin.FactoryReset,
		"SetNetwork": func(ctx context.Context) error {
			return admin.SetNetwork(ctx, nethsm.Network{Address: zero, Netmask: zero, Gateway: zero})
		},
		"Update": func(ctx context.Context) error {
			_, err := admin.Update(ctx, []byte("an image"))
			return err
		},
	} {
		if err := call(t.Context()); !errors.Is(err, nethsm.ErrContainer) || !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("%s = %v, want ErrContainer", name, err)
		}
	}
	if err := public.Ready(t.Context()); err != nil {
		t.Error(err)
	}
}
