package nethsm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// deviceOn is the configuration of a device on a double: with all rights, and keeping objects.
func deviceOn(h *nethsmtest.HSM) nethsm.DeviceConfig {
	return nethsm.DeviceConfig{
		Options:  nethsm.Options{URLs: h.URLs(), TLS: nethsm.TLS{CA: h.CA()}},
		Operator: nethsm.Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)},
		Administrator: &nethsm.Credentials{
			Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase),
		},
		Objects: true,
		Owner:   "test",
	}
}

// openDevice opens a device of a manager of its own, both closed when the test ends.
func openDevice(t *testing.T, config nethsm.DeviceConfig) *nethsm.Device {
	t.Helper()
	manager := nethsm.NewManager(nil)
	device, err := manager.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Errorf("closing the manager: %v", err)
		}
	})
	return device
}

// administrator is a client with an administrator's rights, to prepare a double.
func administrator(t *testing.T, h *nethsmtest.HSM) *nethsm.Client {
	t.Helper()
	client, err := nethsm.New(nethsm.Options{URLs: h.URLs(), TLS: nethsm.TLS{CA: h.CA()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Errorf("closing the client: %v", err)
		}
	})
	return client.As(nethsm.Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)})
}

// shortly is a context for what must not take long.
func shortly(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func operations(h *nethsmtest.HSM) func(*testing.T) int {
	return func(*testing.T) int {
		total := 0
		for _, node := range h.Nodes() {
			total += node.Operations()
		}
		return total
	}
}

// inNamespace makes a namespace with users of its own and returns the configuration for it.
func inNamespace(t *testing.T, h *nethsmtest.HSM) nethsm.DeviceConfig {
	t.Helper()
	const name = "team"
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	config, ctx, root := deviceOn(h), shortly(t), administrator(t, h)
	config.Administrator = &nethsm.Credentials{Username: name + "~admin", Password: []byte("NamespaceAdmin")}
	config.Operator = nethsm.Credentials{Username: name + "~operator", Password: []byte("NamespaceOperator")}
	_, err := root.AddUser(ctx, config.Administrator.Username,
		nethsm.NewUser{RealName: "admin", Role: nethsm.RoleAdministrator, Passphrase: config.Administrator.Password})
	must(err)
	must(root.AddNamespace(ctx, name))
	_, err = root.As(*config.Administrator).AddUser(ctx, config.Operator.Username,
		nethsm.NewUser{RealName: "operator", Role: nethsm.RoleOperator, Passphrase: config.Operator.Password})
	must(err)
	return config
}

func TestDeviceKeepsTheContract(t *testing.T) {
	for name, test := range map[string]struct {
		nodes   int
		prepare func(*testing.T, *nethsmtest.HSM) nethsm.DeviceConfig
	}{
		"one node":       {1, nil},
		"three nodes":    {3, nil},
		"in a namespace": {1, inNamespace},
	} {
		t.Run(name, func(t *testing.T) {
			h := nethsmtest.Start(t, nethsmtest.Options{Nodes: test.nodes, Provisioned: true})
			config := deviceOn(h)
			if test.prepare != nil {
				config = test.prepare(t, h)
			}
			manager := nethsm.NewManager(nil)
			t.Cleanup(func() {
				if err := manager.Close(); err != nil {
					t.Errorf("closing the manager: %v", err)
				}
			})
			hsmtest.TestDevice(t, func(t *testing.T) hsm.Device {
				t.Helper()
				device, err := manager.Open(config)
				if err != nil {
					t.Fatal(err)
				}
				return device
			}, hsmtest.Capabilities{
				Algorithms:      []hsm.Algorithm{hsm.RSA2048, hsm.RSA3072, hsm.RSA4096},
				DuplicateLabels: true, Objects: true, MaxObject: 63 << 10, Random: true, Operations: operations(h),
			})
		})
	}
}

// generate makes an RSA-2048 key.
func generate(t *testing.T, device *nethsm.Device, id string) hsm.Decrypter {
	t.Helper()
	key, err := device.GenerateKey(shortly(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: id, Label: "label of " + id})
	if err != nil {
		t.Fatal(err)
	}
	return key.(hsm.Decrypter)
}

// encrypted is a message to a key.
func encrypted(t *testing.T, key hsm.Key) []byte {
	t.Helper()
	ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, key.Public().(*rsa.PublicKey), []byte("message"), nil)
	if err != nil {
		t.Fatal(err)
	}
	return ciphertext
}

// decrypts makes sure that a key works.
func decrypts(t *testing.T, key hsm.Decrypter) {
	t.Helper()
	plaintext, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
	if err != nil || string(plaintext) != "message" {
		t.Fatalf("DecryptOAEP = %q, %v", plaintext, err)
	}
}

func TestInfoNeedsNoPasswordAndTakesTheBestNode(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	config := deviceOn(h)
	config.Operator.Password, config.Administrator = []byte("wrong for sure"), nil
	config.Objects = false
	device := openDevice(t, config)
	for _, step := range []struct {
		states [3]nethsmtest.State
		want   hsm.State
	}{
		{[3]nethsmtest.State{nethsmtest.Operational, nethsmtest.Operational, nethsmtest.Operational}, hsm.StateOperational},
		{[3]nethsmtest.State{nethsmtest.Locked, nethsmtest.Failed, nethsmtest.Operational}, hsm.StateOperational},
		{[3]nethsmtest.State{nethsmtest.Failed, nethsmtest.Locked, nethsmtest.Failed}, hsm.StateLocked},
		{[3]nethsmtest.State{nethsmtest.Failed, nethsmtest.Failed, nethsmtest.Failed}, hsm.StateFailed},
		{[3]nethsmtest.State{nethsmtest.Unprovisioned, nethsmtest.Failed, nethsmtest.Failed}, hsm.StateUnprovisioned},
	} {
		for i, state := range step.states {
			h.Node(i).SetState(state)
		}
		info, err := device.Info(shortly(t))
		if err != nil || info.State != step.want {
			t.Errorf("with nodes %v the state is %q, %v; want %q", step.states, info.State, err, step.want)
		}
		if info.Vendor != "Nitrokey GmbH" || info.Model != "NetHSM" || info.Serial != "" {
			t.Errorf("Info = %+v", info)
		}
	}
}

func TestUncheckedCertificateIsNoted(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	config := deviceOn(h)
	if info, err := openDevice(t, config).Info(shortly(t)); err != nil || len(info.Notes) != 0 {
		t.Errorf("Info with a CA = %+v, %v", info, err)
	}
	config.TLS = nethsm.TLS{Insecure: true}
	info, err := openDevice(t, config).Info(shortly(t))
	if err != nil || len(info.Notes) != 1 || !strings.Contains(info.Notes[0], "certificate") {
		t.Errorf("Info without one = %+v, %v", info, err)
	}
}

func TestKeysAreCalledByTheirLabelOrElseTheirID(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx := openDevice(t, deviceOn(h)), shortly(t)
	if _, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "seal"}); err != nil {
		t.Fatal(err)
	}
	key, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Label: "seal"})
	if err != nil || key.Ref().Label != "seal" || key.Ref().ID != "seal" {
		t.Fatalf("the key without a label: %+v, %v", key, err)
	}
	// Somebody gives the label "seal" to another key: now two keys are called so, and nobody guesses.
	if _, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "other", Label: "seal"}); err != nil {
		t.Fatal(err)
	}
	if _, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Label: "seal"}); !errors.Is(err, hsm.ErrAmbiguous) {
		t.Errorf("FindKey by a label that is another key's id = %v, want ErrAmbiguous", err)
	}
}

func TestLongLabelIsShortenedAndFoundByItsWholeLength(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx := openDevice(t, deviceOn(h)), shortly(t)
	const label = "nitroseal-the-production-cluster-of-the-bank-v12"
	made, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "long", Label: label})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := made.Ref().Label, "nitroseal-the-~5a2b0dc6~bank-v12"; got != want || len(got) > 32 {
		t.Errorf("the label is %q, want %q", got, want)
	}
	for _, query := range []string{label, made.Ref().Label} {
		if found, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Label: query}); err != nil || found.Ref() != made.Ref() {
			t.Errorf("FindKey by %q = %v, %v", query, found, err)
		}
	}
}

func TestKeysOfOtherKindsAreNamedAndNotUsed(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx, admin := openDevice(t, deviceOn(h)), shortly(t), administrator(t, h)
	for _, key := range []nethsm.NewKey{
		{ID: "ec", Type: nethsm.TypeECP256, Mechanisms: []nethsm.Mechanism{nethsm.ECDSASignature}},
		{ID: "aes", Type: nethsm.TypeGeneric, Length: 256, Mechanisms: []nethsm.Mechanism{nethsm.AESEncryptionCBC}},
		{ID: "weak", Type: nethsm.TypeRSA, Length: 1024, Mechanisms: []nethsm.Mechanism{nethsm.RSADecryptionOAEPSHA256}},
	} {
		if _, err := admin.GenerateKey(ctx, key); err != nil {
			t.Fatal(err)
		}
		for _, query := range []hsm.KeyQuery{{ID: key.ID}, {Label: key.ID}} {
			if keys, err := device.FindKeys(ctx, query); !errors.Is(err, hsm.ErrUnsupported) {
				t.Errorf("FindKeys(%v) = %v, %v; want ErrUnsupported", query, keys, err)
			}
		}
	}
	if keys, err := device.FindKeys(ctx, hsm.KeyQuery{}); err != nil || len(keys) != 0 {
		t.Errorf("FindKeys of all = %v, %v; want none", keys, err)
	}
}

func TestTraitsNameEveryMechanismThatIsTooMuch(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx, admin := openDevice(t, deviceOn(h)), shortly(t), administrator(t, h)
	for _, test := range []struct {
		id         string
		mechanisms []nethsm.Mechanism
		also       []string
		hashes     []crypto.Hash
		proof      error
	}{
		{"ours", []nethsm.Mechanism{nethsm.RSADecryptionOAEPSHA256}, nil, []crypto.Hash{crypto.SHA256}, nil},
		{
			"both",
			[]nethsm.Mechanism{nethsm.RSADecryptionOAEPSHA256, nethsm.RSASignaturePKCS1},
			[]string{"RSA_Signature_PKCS1"},
			[]crypto.Hash{crypto.SHA256},
			nil,
		},
		{
			"theirs",
			[]nethsm.Mechanism{nethsm.RSADecryptionPKCS1, nethsm.RSADecryptionOAEPSHA1},
			[]string{"RSA_Decryption_OAEP_SHA1", "RSA_Decryption_PKCS1"},
			nil, hsm.ErrUnsupported,
		},
	} {
		_, err := admin.GenerateKey(ctx, nethsm.NewKey{ID: test.id, Type: nethsm.TypeRSA, Length: 2048, Mechanisms: test.mechanisms})
		if err != nil {
			t.Fatal(err)
		}
		key, err := hsm.FindKey(ctx, device, hsm.KeyQuery{ID: test.id})
		if err != nil {
			t.Fatal(err)
		}
		traits := key.Traits()
		slices.Sort(traits.AlsoUsableFor)
		if !traits.Sensitive || traits.Extractable || !traits.ForeignUsesRefused || !slices.Equal(traits.AlsoUsableFor, test.also) {
			t.Errorf("%s: Traits = %+v, want also usable for %q", test.id, traits, test.also)
		}
		if hashes := key.(hsm.Decrypter).OAEPHashes(); !slices.Equal(hashes, test.hashes) {
			t.Errorf("%s: OAEPHashes = %v, want %v", test.id, hashes, test.hashes)
		}
		_, err = hsm.Prove(ctx, key)
		if !errors.Is(err, test.proof) {
			t.Errorf("%s: Prove = %v, want %v", test.id, err, test.proof)
		}
		if err != nil && !strings.Contains(err.Error(), "RSA_Decryption_OAEP_SHA256") {
			t.Errorf("%s: the error does not name the mechanism that is missing: %v", test.id, err)
		}
	}
}

// A block that cannot be one of the key costs no request.
func TestBlocksOfTheWrongSizeAreNotSent(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	key := generate(t, openDevice(t, deviceOn(h)), "seal")
	modulus := key.Public().(*rsa.PublicKey).N.Bytes()
	h.Node(0).ResetCounters()
	for name, block := range map[string][]byte{
		"no bytes": nil, "a byte short": modulus[1:], "a byte long": append([]byte{0}, modulus...),
		"zero": make([]byte, len(modulus)), "the modulus": modulus,
	} {
		if _, err := key.DecryptOAEP(shortly(t), crypto.SHA256, block); !errors.Is(err, hsm.ErrCiphertext) {
			t.Errorf("%s: DecryptOAEP = %v, want ErrCiphertext", name, err)
		}
	}
	if _, err := key.DecryptOAEP(shortly(t), crypto.SHA1, modulus); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("DecryptOAEP with SHA-1 = %v, want ErrUnsupported", err)
	}
	if sent := h.Node(0).Requests(); len(sent) != 0 {
		t.Errorf("requests were sent: %v", sent)
	}
}

func TestGenerationMakesKeysForOneUseAndOneTag(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	config, ctx, admin := deviceOn(h), shortly(t), administrator(t, h)
	config.Tags = []string{"unseal", "spare"}
	device := openDevice(t, config)

	// An operator without the tag would not be able to use it: nothing is made.
	if key, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "seal"}); !errors.Is(err, hsm.ErrForbidden) ||
		!strings.Contains(err.Error(), `"unseal"`) || !strings.Contains(err.Error(), nethsmtest.OperatorUser) {
		t.Errorf("GenerateKey for tags that the operator lacks = %v, %v; want ErrForbidden with tag and user", key, err)
	}
	if ids, err := admin.Keys(ctx, nethsm.KeyFilter{}); err != nil || len(ids) != 0 {
		t.Errorf("the NetHSM has the keys %q, %v", ids, err)
	}

	if err := admin.AddUserTag(ctx, nethsmtest.OperatorUser, "unseal"); err != nil {
		t.Fatal(err)
	}
	decrypts(t, generate(t, device, "seal"))
	made, err := admin.Key(ctx, "seal")
	slices.Sort(made.Tags)
	if err != nil || !slices.Equal(made.Tags, []string{"spare", "unseal"}) ||
		!slices.Equal(made.Mechanisms, []nethsm.Mechanism{nethsm.RSADecryptionOAEPSHA256}) {
		t.Errorf("the key is %+v, %v", made, err)
	}
}

func TestWithoutAnAdministratorNothingIsChanged(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	key := generate(t, openDevice(t, deviceOn(h)), "seal")
	config, ctx := deviceOn(h), shortly(t)
	config.Administrator, config.Objects = nil, false
	device := openDevice(t, config)
	h.Node(0).ResetCounters()
	_, generated := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "other"})
	for name, err := range map[string]error{
		"GenerateKey": generated, "DeleteKey": device.DeleteKey(ctx, key.Ref()), "Lock": device.Lock(ctx),
	} {
		if !errors.Is(err, hsm.ErrForbidden) || !strings.Contains(err.Error(), "administrator") {
			t.Errorf("%s = %v, want ErrForbidden with a word on administrators", name, err)
		}
	}
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}
	_, listed := device.Objects(ctx, "nitroseal")
	_, read := device.ReadObject(ctx, ref)
	for name, err := range map[string]error{
		"Objects": listed, "ReadObject": read, "WriteObject": device.WriteObject(ctx, ref, []byte("x")), "DeleteObject": device.DeleteObject(ctx, ref),
	} {
		if !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("%s = %v, want ErrUnsupported", name, err)
		}
	}
	if sent := h.Node(0).Requests(); len(sent) != 0 {
		t.Errorf("requests were sent: %v", sent)
	}
}

func TestAlgorithmsThatANetHSMHasNotAreUnsupported(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device := openDevice(t, deviceOn(h))
	for _, algorithm := range []hsm.Algorithm{hsm.ECDHP256, hsm.ECDHP384, "rsa-1024", ""} {
		if key, err := device.GenerateKey(shortly(t), hsm.KeySpec{Algorithm: algorithm, ID: "x"}); !errors.Is(err, hsm.ErrUnsupported) {
			t.Errorf("GenerateKey of %q = %v, %v; want ErrUnsupported", algorithm, key, err)
		}
	}
	for _, id := range []string{"not an id", "-a", strings.Repeat("a", 129), "nitroseal-object.a..b"} {
		if key, err := device.GenerateKey(shortly(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: id}); !errors.Is(err, nethsm.ErrRequest) {
			t.Errorf("GenerateKey with the id %q = %v, %v; want ErrRequest", id, key, err)
		}
		if keys, err := device.FindKeys(shortly(t), hsm.KeyQuery{ID: id}); err != nil || len(keys) != 0 {
			t.Errorf("FindKeys with the id %q = %v, %v; want none", id, keys, err)
		}
	}
}

func TestNodesAreShownInTheOrderOfTheConfiguration(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	device := openDevice(t, deviceOn(h))
	h.Node(1).SetState(nethsmtest.Locked)
	h.Node(2).Stop()
	nodes := device.Nodes(shortly(t))
	if len(nodes) != 3 {
		t.Fatalf("Nodes = %+v", nodes)
	}
	for i, want := range []hsm.State{hsm.StateOperational, hsm.StateLocked, hsm.StateAbsent} {
		if nodes[i].State != want || nodes[i].URL != h.Node(i).URL() || (nodes[i].Err == nil) != (want == hsm.StateOperational) {
			t.Errorf("node %d is %+v, want state %q of %s", i, nodes[i], want, h.Node(i).URL())
		}
	}
}

func TestUnlockAndLockReachEveryNode(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	device, ctx := openDevice(t, deviceOn(h)), shortly(t)
	states := func() []nethsmtest.State {
		return []nethsmtest.State{h.Node(0).State(), h.Node(1).State(), h.Node(2).State()}
	}
	if err := device.Lock(ctx); err != nil {
		t.Fatal(err)
	}
	if got := states(); !slices.Equal(got, []nethsmtest.State{nethsmtest.Locked, nethsmtest.Locked, nethsmtest.Locked}) {
		t.Fatalf("after Lock the nodes are %v", got)
	}
	if err := device.Lock(ctx); err != nil {
		t.Errorf("locking what is locked: %v", err)
	}
	var pin *hsm.PINError
	if err := device.Unlock(ctx, []byte("wrong passphrase")); !errors.As(err, &pin) || !pin.Wrong {
		t.Errorf("Unlock with a wrong passphrase = %v, want a PINError", err)
	}
	if err := device.Unlock(ctx, nil); !errors.Is(err, hsm.ErrLocked) {
		t.Errorf("Unlock without a passphrase = %v, want ErrLocked", err)
	}
	// A node that does not answer does not keep the others locked.
	h.Node(1).Stop()
	if err := device.Unlock(ctx, []byte(nethsmtest.UnlockPassphrase)); err != nil {
		t.Errorf("Unlock with one node away = %v", err)
	}
	if h.Node(0).State() != nethsmtest.Operational || h.Node(2).State() != nethsmtest.Operational {
		t.Errorf("after Unlock the nodes are %v", states())
	}
	if err := h.Node(1).Start(); err != nil {
		t.Fatal(err)
	}
	if err := device.Unlock(ctx, []byte(nethsmtest.UnlockPassphrase)); err != nil {
		t.Errorf("Unlock where two are open already = %v", err)
	}
	if got := states(); !slices.Equal(got, []nethsmtest.State{nethsmtest.Operational, nethsmtest.Operational, nethsmtest.Operational}) {
		t.Errorf("after Unlock the nodes are %v", got)
	}
	// What fails on one node does not keep the others from it.
	h.Node(0).SetState(nethsmtest.Failed)
	h.Node(2).SetState(nethsmtest.Locked)
	if err := device.Unlock(ctx, []byte(nethsmtest.UnlockPassphrase)); err == nil || !strings.Contains(err.Error(), h.Node(0).URL()) {
		t.Errorf("Unlock with a failed node = %v, want an error that names it", err)
	}
	if h.Node(2).State() != nethsmtest.Operational {
		t.Errorf("after Unlock the nodes are %v", states())
	}
}

func TestOpenRefusesWhatCannotWork(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{})
	manager := nethsm.NewManager(nil)
	t.Cleanup(func() { _ = manager.Close() })
	for name, change := range map[string]func(*nethsm.DeviceConfig){
		"no URL":                                  func(c *nethsm.DeviceConfig) { c.URLs = nil },
		"a URL that is none":                      func(c *nethsm.DeviceConfig) { c.URLs = []string{"nethsm"} },
		"no operator":                             func(c *nethsm.DeviceConfig) { c.Operator.Username = "" },
		"a user name that is none":                func(c *nethsm.DeviceConfig) { c.Operator.Username = "a b" },
		"a namespace that is none":                func(c *nethsm.DeviceConfig) { c.Operator.Username = "~operator" },
		"no password":                             func(c *nethsm.DeviceConfig) { c.Operator.Password = nil },
		"an administrator without a password":     func(c *nethsm.DeviceConfig) { c.Administrator.Password = nil },
		"an administrator of another namespace":   func(c *nethsm.DeviceConfig) { c.Administrator.Username = "ns~admin" },
		"objects without an administrator":        func(c *nethsm.DeviceConfig) { c.Administrator = nil },
		"an unlock passphrase that is too short":  func(c *nethsm.DeviceConfig) { c.UnlockPassphrase = []byte("short") },
		"an unlock passphrase that is too long":   func(c *nethsm.DeviceConfig) { c.UnlockPassphrase = bytes.Repeat([]byte("x"), 201) },
		"a tag that is none":                      func(c *nethsm.DeviceConfig) { c.Tags = []string{"a b"} },
		"a CA that holds no certificate":          func(c *nethsm.DeviceConfig) { c.TLS.CA = []byte("nonsense") },
		"a pin that is no SHA-256 in hexadecimal": func(c *nethsm.DeviceConfig) { c.TLS.Pins = []string{"abc"} },
	} {
		config := deviceOn(h)
		change(&config)
		device, err := manager.Open(config)
		if !errors.Is(err, nethsm.ErrConfig) {
			t.Errorf("%s: Open = %v, want ErrConfig", name, err)
		}
		if err == nil {
			_ = device.Close()
		} else if strings.Contains(err.Error(), nethsmtest.OperatorPassphrase) {
			t.Errorf("%s: the error holds a password: %v", name, err)
		}
	}
}

// handshakes counts those of all nodes.
func handshakes(h *nethsmtest.HSM) int {
	total := 0
	for _, node := range h.Nodes() {
		total += node.Handshakes()
	}
	return total
}

func TestDevicesOfOneConfigurationShareConnections(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	manager := nethsm.NewManager(nil)
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Error(err)
		}
	})
	open := func(change func(*nethsm.DeviceConfig)) *nethsm.Device {
		t.Helper()
		config := deviceOn(h)
		change(&config)
		device, err := manager.Open(config)
		if err != nil {
			t.Fatal(err)
		}
		return device
	}
	same := func(*nethsm.DeviceConfig) {}
	first := open(same)
	decrypts(t, generate(t, first, "seal"))
	find := func(device *nethsm.Device) hsm.Decrypter {
		t.Helper()
		key, err := hsm.FindKey(shortly(t), device, hsm.KeyQuery{ID: "seal"})
		if err != nil {
			t.Fatal(err)
		}
		return key.(hsm.Decrypter)
	}
	h.Node(0).ResetCounters()
	second := open(func(c *nethsm.DeviceConfig) {
		c.Owner, c.Tags, c.Objects = "another mount", []string{"t"}, false
		c.URLs = []string{c.URLs[0] + "/api/v1"}
	})
	key := find(second)
	decrypts(t, key)
	if n := handshakes(h); n != 0 {
		t.Errorf("a second device of the same configuration cost %d TLS handshakes", n)
	}
	// Closing one disturbs nobody else.
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	decrypts(t, key)
	if n := handshakes(h); n != 0 {
		t.Errorf("closing one device cost the other %d TLS handshakes", n)
	}
	// Other credentials, trust or URLs share nothing.
	for name, change := range map[string]func(*nethsm.DeviceConfig){
		"another administrator": func(c *nethsm.DeviceConfig) { c.Administrator, c.Objects = nil, false },
		"another trust":         func(c *nethsm.DeviceConfig) { c.TLS = nethsm.TLS{Pins: []string{h.Node(0).Pin()}} },
		"another passphrase":    func(c *nethsm.DeviceConfig) { c.UnlockPassphrase = []byte(nethsmtest.UnlockPassphrase) },
	} {
		before := handshakes(h)
		decrypts(t, find(open(change)))
		if handshakes(h) == before {
			t.Errorf("a device with %s used the connections of another one", name)
		}
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key)); !errors.Is(err, hsm.ErrUnavailable) || !errors.Is(err, nethsm.ErrClosed) {
		t.Errorf("a key of a closed device = %v, want ErrUnavailable and ErrClosed", err)
	}
}

func TestClosedManagerOpensNothing(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	manager := nethsm.NewManager(nil)
	device, err := manager.Open(deviceOn(h))
	if err != nil {
		t.Fatal(err)
	}
	if err := manager.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := device.Info(shortly(t)); !errors.Is(err, nethsm.ErrClosed) {
		t.Errorf("a device of a closed manager: %v", err)
	}
	if _, err := manager.Open(deviceOn(h)); !errors.Is(err, nethsm.ErrClosed) {
		t.Errorf("Open after Close = %v", err)
	}
	if err := errors.Join(device.Close(), manager.Close()); err != nil {
		t.Errorf("closing again: %v", err)
	}
}

// Whoever gave the passwords may wipe them as soon as Open returns.
func TestPasswordsAreCopied(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	config := deviceOn(h)
	config.UnlockPassphrase = []byte(nethsmtest.UnlockPassphrase)
	device := openDevice(t, config)
	clear(config.Operator.Password)
	clear(config.Administrator.Password)
	clear(config.UnlockPassphrase)
	h.Node(0).SetState(nethsmtest.Locked)
	if err := device.Unlock(shortly(t), nil); err != nil {
		t.Fatal(err)
	}
	decrypts(t, generate(t, device, "seal"))
}

// All keys are looked through, a few at a time.
func TestFingerprintIsFoundAmongMany(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx, admin := openDevice(t, deviceOn(h)), shortly(t), administrator(t, h)
	for i := range 60 {
		_, err := admin.GenerateKey(ctx, nethsm.NewKey{
			ID: fmt.Sprintf("aes%02d", i), Type: nethsm.TypeGeneric, Length: 128, Mechanisms: []nethsm.Mechanism{nethsm.AESEncryptionCBC},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	made := generate(t, device, "seal")
	if err := device.WriteObject(ctx, hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}, []byte("value")); err != nil {
		t.Fatal(err)
	}
	h.Node(0).ResetCounters()
	found, err := hsm.FindKey(ctx, device, hsm.KeyQuery{Fingerprint: made.Ref().Fingerprint})
	if err != nil || found.Ref() != made.Ref() {
		t.Errorf("FindKey = %v, %v", found, err)
	}
	if n := len(h.Node(0).Requests()); n != 62 {
		t.Errorf("it took %d requests, want 62: the list, and each key but the carrier of the object", n)
	}
	if n := handshakes(h); n > 32 { // net/http dials for a request that finds none idle, and may then use another
		t.Errorf("it opened %d connections", n)
	}
}
