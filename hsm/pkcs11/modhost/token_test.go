//go:build cgo

package modhost

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

func TestSlotsAndMechanisms(t *testing.T) {
	k := pkcs11test.SoftHSM(t)
	h := startHost(t, environment(k)...)
	reply, err := h.hello(k.Module)
	if err != nil {
		t.Fatal(err)
	}
	if reply.Manufacturer != "SoftHSM" || reply.CryptokiVersion != "2.40" || !strings.Contains(reply.Library, "PKCS11") {
		t.Errorf("the module tells of itself %+v", reply)
	}
	var slots wire.Slots
	h.must(wire.OpSlots, nil, nil, &slots)
	index := slices.IndexFunc(slots.Slots, func(s wire.Slot) bool { return s.Token.Serial == k.Serial })
	if index < 0 {
		t.Fatalf("no token %q in %+v", k.Serial, slots)
	}
	got := slots.Slots[index]
	want := wire.Slot{ID: k.Slot(t), Present: true, Token: wire.Token{
		Label: k.Label, Serial: k.Serial, Manufacturer: "SoftHSM project", Model: "SoftHSM v2", Firmware: "2.6", Flags: got.Token.Flags,
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("slot (-want +got):\n%s", diff)
	}
	if got.Token.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 || got.Token.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0 {
		t.Errorf("flags 0x%x", got.Token.Flags)
	}
	var mechanisms wire.Mechanisms
	h.must(wire.OpMechanisms, wire.SlotRequest{Slot: got.ID}, nil, &mechanisms)
	index = slices.IndexFunc(mechanisms.Mechanisms, func(m wire.Mechanism) bool { return m.Type == pkcs11.CKM_RSA_PKCS_OAEP })
	if index < 0 {
		t.Fatalf("no RSA-OAEP in %+v", mechanisms)
	}
	if m := mechanisms.Mechanisms[index]; m.Flags&pkcs11.CKF_DECRYPT == 0 || m.MaxSize < 4096 || m.MinSize > 2048 {
		t.Errorf("RSA-OAEP: %+v", m)
	}
	_, err = h.call(wire.OpMechanisms, wire.SlotRequest{Slot: 4711}, nil, nil)
	wantCode(t, err, pkcs11.CKR_SLOT_ID_INVALID)
}

func TestLogin(t *testing.T) {
	k := pkcs11test.SoftHSM(t)
	h := startHost(t, environment(k)...)
	if _, err := h.hello(k.Module); err != nil {
		t.Fatal(err)
	}
	slot := wire.SlotRequest{Slot: slotOf(h, k)}
	login := func(pin string) error {
		_, err := h.call(wire.OpLogin, slot, []byte(pin), nil)
		return err
	}
	logout := func() error {
		_, err := h.call(wire.OpLogout, slot, nil, nil)
		return err
	}
	generate := func() error {
		_, err := h.call(wire.OpGenerateKey, wire.GenerateRequest{Slot: slot.Slot, Algorithm: "ecdh-p256", Label: "k"}, nil, nil)
		return err
	}
	wantCode(t, generate(), pkcs11.CKR_USER_NOT_LOGGED_IN)
	wantCode(t, logout(), pkcs11.CKR_USER_NOT_LOGGED_IN)
	if failure := asFailure(t, login("111111")); failure.Code != pkcs11.CKR_PIN_INCORRECT || failure.Function != "C_Login" {
		t.Errorf("got %v", failure)
	}
	// A failed log-in leaves nothing behind: not even a session that would make the next one say something else.
	if err := login(k.PIN); err != nil {
		t.Fatal(err)
	}
	if err := generate(); err != nil {
		t.Errorf("logged in: %v", err)
	}
	// No PIN is proved by this answer, and none is sent for it.
	wantCode(t, login(k.PIN), pkcs11.CKR_USER_ALREADY_LOGGED_IN)
	wantCode(t, login("111111"), pkcs11.CKR_USER_ALREADY_LOGGED_IN)
	if err := logout(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, generate(), pkcs11.CKR_USER_NOT_LOGGED_IN)
	if err := login(k.PIN); err != nil {
		t.Errorf("after a log-out: %v", err)
	}
}

func TestOneRequestIsOneOperationOfTheModule(t *testing.T) {
	k := pkcs11test.SoftHSM(t)
	k.GenerateKey(t, "rsa:2048", "r", "01")
	k.GenerateKey(t, "EC:prime256v1", "e", "02")
	spy := pkcs11test.Spied(t, k)
	count := func(function string) int { return spy.Calls(t)[function] }
	h := startHost(t, environment(&spy.Token)...)
	reply, err := h.hello(spy.Module)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(reply.Notes, func(note string) bool { return strings.Contains(note, "PKCS11SPY") }) {
		t.Errorf("nobody is told of the spy: %q", reply.Notes)
	}
	slot := slotOf(h, k)

	var logins sync.WaitGroup
	for range 4 { // at one time: one is sent
		logins.Go(func() { _, _ = h.call(wire.OpLogin, wire.SlotRequest{Slot: slot}, []byte(k.PIN), nil) })
	}
	logins.Wait()
	if n := count("C_Login"); n != 1 {
		t.Errorf("%d C_Login for four requests to log in with the same PIN", n)
	}

	var keys wire.Keys
	h.must(wire.OpFindKeys, wire.FindKeysRequest{Slot: slot}, nil, &keys)
	if len(keys.Keys) != 2 {
		t.Fatalf("found %+v", keys)
	}
	if n, of := count("C_FindObjectsFinal"), count("C_FindObjectsInit"); n != of || n == 0 {
		t.Errorf("%d searches were ended of %d", n, of)
	}
	r, e := keys.Keys[0], keys.Keys[1]
	ciphertext, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, rsaPublic(r), []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		h.must(wire.OpDecryptOAEP, wire.DecryptRequest{Slot: slot, Handle: r.Handle, Hash: pkcs11.CKM_SHA_1, Size: 256}, ciphertext, nil)
		h.must(wire.OpDecryptRaw, wire.DecryptRequest{Slot: slot, Handle: r.Handle, Size: 256}, ciphertext, nil)
		h.must(wire.OpDerive, wire.DeriveRequest{Slot: slot, Handle: e.Handle, Size: 32}, e.Point, nil)
	}
	for function, want := range map[string]int{"C_Decrypt": 6, "C_DecryptInit": 6, "C_DeriveKey": 3, "C_DestroyObject": 3} {
		if n := count(function); n != want {
			t.Errorf("%d %s, want %d", n, function, want)
		}
	}
	if open, closed := count("C_OpenSession"), count("C_CloseSession"); open != closed+1 {
		t.Errorf("%d sessions opened and %d closed: all but the keeper's must be", open, closed)
	}
}

func TestSessionsAreBounded(t *testing.T) {
	h, _, slot := openToken(t)
	var key wire.Key
	h.must(wire.OpGenerateKey, wire.GenerateRequest{Slot: slot, Algorithm: "rsa-2048", Label: "k"}, nil, &key)
	ciphertext, err := rsa.EncryptOAEP(sha1.New(), rand.Reader, rsaPublic(key), []byte("secret"), nil)
	if err != nil {
		t.Fatal(err)
	}
	var calls sync.WaitGroup
	for range 64 { // eight sessions
		calls.Go(func() {
			request := wire.DecryptRequest{Slot: slot, Handle: key.Handle, Hash: pkcs11.CKM_SHA_1, Size: 256}
			if got, err := h.call(wire.OpDecryptOAEP, request, ciphertext, nil); err != nil || string(got) != "secret" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	calls.Wait()
}

func TestKeysOfOthersDoNotConfuse(t *testing.T) {
	h, k, slot := openToken(t)
	find := func(r wire.FindKeysRequest) []wire.Key {
		t.Helper()
		r.Slot = slot
		var keys wire.Keys
		h.must(wire.OpFindKeys, r, nil, &keys)
		return keys.Keys
	}
	k.GenerateKey(t, "rsa:2048", "twin", "aa")
	k.GenerateKey(t, "rsa:2048", "twin", "bb")
	k.GenerateKey(t, "EC:prime256v1", "single", "cc")
	k.GenerateKey(t, "EC:secp521r1", "strange", "dd")
	k.GenerateKey(t, "rsa:1024", "weak", "ee")
	k.WriteObject(t, "other", "single", []byte("a data object of the same label"))

	if got := find(wire.FindKeysRequest{Label: "nobody"}); len(got) != 0 {
		t.Errorf("an unknown label: %+v", got)
	}
	if got := find(wire.FindKeysRequest{Label: "twin"}); len(got) != 2 || got[0].ID != "aa" || got[1].ID != "bb" {
		t.Errorf("two keys with one label: %+v", got)
	}
	if got := find(wire.FindKeysRequest{Label: "twin", ID: "bb"}); len(got) != 1 || got[0].ID != "bb" {
		t.Errorf("one of them by its id: %+v", got)
	}
	if got := find(wire.FindKeysRequest{Label: "single"}); len(got) != 1 || got[0].Unusable != "" || got[0].PublicHandle == 0 {
		t.Errorf("a data object has the same label: %+v", got)
	}
	if got := find(wire.FindKeysRequest{ID: "dd"}); len(got) != 1 || !strings.Contains(got[0].Unusable, "1.3.132.0.35") {
		t.Errorf("P-521: %+v", got)
	}
	if got := find(wire.FindKeysRequest{ID: "ee"}); len(got) != 1 || !strings.Contains(got[0].Unusable, "1024 bits") {
		t.Errorf("RSA-1024: %+v", got)
	}
	if got := find(wire.FindKeysRequest{}); len(got) != 5 {
		t.Errorf("%d keys in all", len(got))
	}
	if got := find(wire.FindKeysRequest{ID: "aa"})[0]; !slices.Contains(got.Uses, "sign") || !slices.Contains(got.Uses, "unwrap") {
		t.Errorf("a key of pkcs11-tool is usable for %q", got.Uses)
	}
	_, err := h.call(wire.OpFindKeys, wire.FindKeysRequest{Slot: slot, ID: "xyz"}, nil, nil)
	wantCode(t, err, wire.CodeBadRequest)

	// Without the public key object an RSA key tells all of itself, an elliptic-curve key does not.
	k.Tool(t, "--delete-object", "--type", "pubkey", "--id", "aa")
	k.Tool(t, "--delete-object", "--type", "pubkey", "--id", "cc")
	if got := find(wire.FindKeysRequest{ID: "aa"}); len(got) != 1 || got[0].Unusable != "" || got[0].PublicHandle != 0 {
		t.Errorf("RSA without a public key object: %+v", got)
	}
	if got := find(wire.FindKeysRequest{ID: "cc"}); len(got) != 1 || got[0].Unusable == "" {
		t.Errorf("EC without a public key object: %+v", got)
	}
}

func TestTwoKeysWithOneID(t *testing.T) {
	h, k, slot := openToken(t)
	for _, label := range []string{"first", "second"} {
		k.GenerateKey(t, "rsa:2048", label, "aa")
		k.GenerateKey(t, "EC:prime256v1", label, "bb")
	}
	var keys wire.Keys
	h.must(wire.OpFindKeys, wire.FindKeysRequest{Slot: slot, ID: "aa"}, nil, &keys)
	if len(keys.Keys) != 2 || keys.Keys[0].PublicHandle == keys.Keys[1].PublicHandle || keys.Keys[0].Unusable != "" || keys.Keys[1].Unusable != "" {
		t.Errorf("RSA keys know their public halves: %+v", keys)
	}
	h.must(wire.OpFindKeys, wire.FindKeysRequest{Slot: slot, ID: "bb"}, nil, &keys)
	if len(keys.Keys) != 2 || !strings.Contains(keys.Keys[0].Unusable, "2 different public keys") || !strings.Contains(keys.Keys[1].Unusable, "2 different") {
		t.Errorf("EC keys do not: %+v", keys)
	}
}

func TestSearchesGoToTheEnd(t *testing.T) {
	h, _, slot := openToken(t)
	var want []string
	for i := range 150 {
		label := fmt.Sprintf("object-%03d", i)
		want = append(want, label)
		h.must(wire.OpCreateObject, wire.ObjectRequest{Slot: slot, Application: "many", Label: label}, []byte(label), nil)
	}
	var got wire.Objects
	h.must(wire.OpObjects, wire.ObjectRequest{Slot: slot, Application: "many"}, nil, &got)
	if diff := cmp.Diff(want, got.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
}

func TestGenerateAndDestroy(t *testing.T) {
	h, k, slot := openToken(t)
	request := wire.GenerateRequest{Slot: slot, Algorithm: "ecdh-p256", Label: "once", ID: "0102"}
	var key wire.Key
	h.must(wire.OpGenerateKey, request, nil, &key)
	_, err := h.call(wire.OpGenerateKey, request, nil, nil)
	wantCode(t, err, wire.CodeExists)
	for name, bad := range map[string]wire.GenerateRequest{
		"an unknown algorithm":     {Slot: slot, Algorithm: "rsa-1024", Label: "k"},
		"an id that is not hex":    {Slot: slot, Algorithm: "rsa-2048", Label: "k", ID: "0g"},
		"an id of half a byte":     {Slot: slot, Algorithm: "rsa-2048", Label: "k", ID: "012"},
		"an id of a thousand byte": {Slot: slot, Algorithm: "rsa-2048", Label: "k", ID: strings.Repeat("00", 1000)},
	} {
		_, err := h.call(wire.OpGenerateKey, bad, nil, nil)
		if failure := asFailure(t, err); failure.Code != wire.CodeBadRequest || failure.Detail == "" {
			t.Errorf("%s: %v", name, failure)
		}
	}

	var other wire.Key
	h.must(wire.OpGenerateKey, wire.GenerateRequest{Slot: slot, Algorithm: "ecdh-p256", Label: "other"}, nil, &other)
	for name, bad := range map[string]wire.DestroyKeyRequest{
		"a public key for a private one":   {Slot: slot, Handle: key.PublicHandle},
		"the public half of another":       {Slot: slot, Handle: key.Handle, PublicHandle: other.PublicHandle},
		"a private key for a public half":  {Slot: slot, Handle: key.Handle, PublicHandle: other.Handle},
		"itself for its own public half":   {Slot: slot, Handle: key.Handle, PublicHandle: key.Handle},
		"a key that is not there":          {Slot: slot, Handle: 4711},
		"a public half that is not there":  {Slot: slot, Handle: key.Handle, PublicHandle: 4711},
		"a private key of no handle at al": {Slot: slot},
	} {
		if _, err := h.call(wire.OpDestroyKey, bad, nil, nil); err == nil {
			t.Errorf("destroyed: %s", name)
		}
	}
	h.must(wire.OpDestroyKey, wire.DestroyKeyRequest{Slot: slot, Handle: key.Handle, PublicHandle: key.PublicHandle}, nil, nil)
	list := k.Tool(t, "--list-objects")
	if strings.Contains(list, "once") || strings.Count(list, "other") != 2 {
		t.Errorf("left on the token:\n%s", list)
	}
}

func TestDataObjects(t *testing.T) {
	h, k, slot := openToken(t)
	object := wire.ObjectRequest{Slot: slot, Application: "nitroseal", Label: "prod/root/1"}
	value := bytes.Repeat([]byte("sealed "), 1000)

	_, err := h.call(wire.OpReadObject, object, nil, nil)
	wantCode(t, err, wire.CodeNotFound)
	_, err = h.call(wire.OpDestroyObject, object, nil, nil)
	wantCode(t, err, wire.CodeNotFound)

	h.must(wire.OpCreateObject, object, value, nil)
	if got := h.must(wire.OpReadObject, object, nil, nil); !bytes.Equal(got, value) {
		t.Errorf("read %d bytes, wrote %d", len(got), len(value))
	}
	if shown := k.Tool(t, "--list-objects", "--type", "data"); !strings.Contains(shown, "private") {
		t.Errorf("the object is not private:\n%s", shown)
	}
	var list wire.Objects
	h.must(wire.OpObjects, wire.ObjectRequest{Slot: slot, Application: "nitroseal"}, nil, &list)
	if diff := cmp.Diff([]string{object.Label}, list.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	list = wire.Objects{}
	h.must(wire.OpObjects, wire.ObjectRequest{Slot: slot, Application: "somebody else"}, nil, &list)
	if len(list.Labels) != 0 {
		t.Errorf("objects of nobody: %q", list.Labels)
	}

	h.must(wire.OpCreateObject, object, []byte("another of the same name"), nil)
	_, err = h.call(wire.OpReadObject, object, nil, nil)
	wantCode(t, err, wire.CodeAmbiguous)
	_, err = h.call(wire.OpDestroyObject, object, nil, nil)
	wantCode(t, err, wire.CodeAmbiguous)
	h.must(wire.OpObjects, wire.ObjectRequest{Slot: slot, Application: "nitroseal"}, nil, &list)
	if diff := cmp.Diff([]string{object.Label, object.Label}, list.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}

	object.Label = "large"
	value = make([]byte, 500_000)
	rand.Read(value)
	h.must(wire.OpCreateObject, object, value, nil)
	if got := h.must(wire.OpReadObject, object, nil, nil); !bytes.Equal(got, value) {
		t.Errorf("read %d bytes, wrote %d", len(got), len(value))
	}
	h.must(wire.OpDestroyObject, object, nil, nil)
	_, err = h.call(wire.OpReadObject, object, nil, nil)
	wantCode(t, err, wire.CodeNotFound)
}

func TestForeignObjects(t *testing.T) {
	h, k, slot := openToken(t)
	one := sha256.Sum256([]byte("one"))
	destroy := wire.ForeignRequest{Slot: slot, Label: "vault-test", SHA256: one[:]}
	_, err := h.call(wire.OpReadForeign, wire.ForeignRequest{Slot: slot, Label: "vault-test"}, nil, nil)
	wantCode(t, err, wire.CodeNotFound)
	_, err = h.call(wire.OpDestroyForeign, destroy, nil, nil)
	wantCode(t, err, wire.CodeNotFound)

	k.WriteForeignObject(t, "vault-test", []byte("one"))
	k.WriteForeignObject(t, "vault-test", []byte("another"))
	k.WriteObject(t, "an-application", "vault-test", []byte("one"))
	k.WriteForeignObject(t, "vault-test-2", []byte("one"))
	again := startHost(t, environment(k)...)
	if _, err := again.hello(k.Module); err != nil {
		t.Fatal(err)
	}
	again.must(wire.OpLogin, wire.SlotRequest{Slot: slot}, []byte(k.PIN), nil)
	var list wire.Objects
	again.must(wire.OpForeignObjects, wire.SlotRequest{Slot: slot}, nil, &list)
	if diff := cmp.Diff([]string{"vault-test", "vault-test", "vault-test", "vault-test-2"}, list.Labels); diff != "" {
		t.Errorf("labels (-want +got):\n%s", diff)
	}
	var found wire.Foreign
	values := again.must(wire.OpReadForeign, wire.ForeignRequest{Slot: slot, Label: "vault-test"}, nil, &found)
	want := wire.Foreign{Objects: []wire.ForeignObject{{Size: 7}, {Size: 3}, {Application: "an-application", Size: 3}}}
	if diff := cmp.Diff(want, found); diff != "" || string(values) != "anotheroneone" {
		t.Errorf("values %q (-want +got):\n%s", values, diff)
	}
	again.must(wire.OpDestroyForeign, destroy, nil, nil)
	if shown := k.Tool(t, "--list-objects", "--type", "data"); strings.Count(shown, "'vault-test'") != 1 || !strings.Contains(shown, "vault-test-2") {
		t.Errorf("left on the token:\n%s", shown)
	}
}

func TestObjectsSurviveTheHost(t *testing.T) {
	h, k, slot := openToken(t)
	h.must(wire.OpCreateObject, wire.ObjectRequest{Slot: slot, Application: "a", Label: "l"}, []byte("value"), nil)
	again := startHost(t, environment(k)...)
	if _, err := again.hello(k.Module); err != nil {
		t.Fatal(err)
	}
	object := wire.ObjectRequest{Slot: slotOf(again, k), Application: "a", Label: "l"}
	_, err := again.call(wire.OpReadObject, object, nil, nil)
	wantCode(t, err, wire.CodeNotFound) // private: hidden from who is not logged in
	again.must(wire.OpLogin, wire.SlotRequest{Slot: object.Slot}, []byte(k.PIN), nil)
	if got := again.must(wire.OpReadObject, object, nil, nil); string(got) != "value" {
		t.Errorf("got %q", got)
	}
}

func TestRandom(t *testing.T) {
	h, _, slot := openToken(t)
	seen := map[string]bool{}
	for _, count := range []int{16, 16, 32, 1024} {
		got := h.must(wire.OpRandom, wire.RandomRequest{Slot: slot, Count: count}, nil, nil)
		if len(got) != count || seen[string(got)] || bytes.Equal(got, make([]byte, count)) {
			t.Errorf("%d bytes: %x", count, got)
		}
		seen[string(got)] = true
	}
}

func TestSetPIN(t *testing.T) {
	h, k, slot := openToken(t)
	set := func(old, pin string) error {
		_, err := h.call(wire.OpSetPIN, wire.SetPINRequest{Slot: slot, OldLen: len(old)}, []byte(old+pin), nil)
		return err
	}
	wantCode(t, set("111111", "222222"), pkcs11.CKR_PIN_INCORRECT)
	if err := set(k.PIN, "975310"); err != nil {
		t.Fatal(err)
	}
	again := startHost(t, environment(k)...)
	if _, err := again.hello(k.Module); err != nil {
		t.Fatal(err)
	}
	_, err := again.call(wire.OpLogin, wire.SlotRequest{Slot: slot}, []byte(k.PIN), nil)
	wantCode(t, err, pkcs11.CKR_PIN_INCORRECT)
	again.must(wire.OpLogin, wire.SlotRequest{Slot: slot}, []byte("975310"), nil)
}
