//go:build cgo

package modhost

import (
	"bytes"
	"testing"

	"github.com/miekg/pkcs11"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
)

// openCard starts a host with a card that is logged in and holds a key, and seals a secret for that.
func openCard(t *testing.T, faults ...pkcs11test.Fault) (h *host, card *pkcs11test.SmartCard, request wire.DecryptRequest, ciphertext []byte) {
	t.Helper()
	card = pkcs11test.Card(t, faults...)
	card.GenerateKey(t, "rsa:2048", "k", "01")
	h = startHost(t, environment(&card.Token)...)
	if _, err := h.hello(card.Module); err != nil {
		t.Fatal(err)
	}
	slot := slotOf(h, &card.Token)
	h.must(wire.OpLogin, wire.SlotRequest{Slot: slot}, []byte(card.PIN), nil)
	var keys wire.Keys
	h.must(wire.OpFindKeys, wire.FindKeysRequest{Slot: slot, Label: "k"}, nil, &keys)
	if len(keys.Keys) != 1 {
		t.Fatalf("keys: %+v", keys)
	}
	public := rsaPublic(keys.Keys[0])
	// Raw, which every card can: m^e, with m ending in the secret.
	block := make([]byte, public.Size())
	copy(block[public.Size()-6:], "secret")
	ciphertext = rawEncrypt(public, block)
	return h, card, wire.DecryptRequest{Slot: slot, Handle: keys.Keys[0].Handle, Size: public.Size()}, ciphertext
}

func TestOneDecryptIsOneOperationOfTheCard(t *testing.T) {
	h, card, request, ciphertext := openCard(t)
	before := card.Operations(t)
	for range 3 {
		if got := h.must(wire.OpDecryptRaw, request, ciphertext, nil); !bytes.HasSuffix(got, []byte("secret")) {
			t.Errorf("got %x", got)
		}
	}
	if n := card.Operations(t) - before; n != 3 {
		t.Errorf("3 decryptions cost %d operations of the card", n)
	}
	if n := card.Calls(t, "C_Decrypt"); n != 3 {
		t.Errorf("3 decryptions are %d C_Decrypt", n)
	}
}

func TestACardsWedgedSessionIsNotUsedAgain(t *testing.T) {
	h, _, request, ciphertext := openCard(t)
	for range 20 {
		tooLarge := bytes.Repeat([]byte{0xff}, request.Size) // larger than the modulus: no card takes it
		if _, err := h.call(wire.OpDecryptRaw, request, tooLarge, nil); err == nil {
			t.Fatal("a number larger than the modulus was taken")
		}
		h.must(wire.OpDecryptRaw, request, ciphertext, nil)
	}
}

func TestAFrozenCardDoesNotKeepItsHostAlive(t *testing.T) {
	h, card, request, ciphertext := openCard(t)
	card.Fault(t, pkcs11test.Freezes("C_Decrypt"))
	before := card.Calls(t, "C_Decrypt")
	h.send(wire.OpDecryptRaw, request, ciphertext)
	eventually(t, "the card was not reached", func() bool { return card.Calls(t, "C_Decrypt") > before })
	// What needs no card goes on meanwhile.
	_, err := h.call(wire.OpLogin, wire.SlotRequest{Slot: request.Slot}, []byte("111111"), nil)
	wantCode(t, err, pkcs11.CKR_USER_ALREADY_LOGGED_IN)
	_ = h.write.Close()
	h.waitExit()
	if h.exit != nil {
		t.Errorf("the host ended with %v", h.exit)
	}
}

func TestACardsPINIsSentOnce(t *testing.T) {
	card := pkcs11test.Card(t)
	h := startHost(t, environment(&card.Token)...)
	if _, err := h.hello(card.Module); err != nil {
		t.Fatal(err)
	}
	slot := wire.SlotRequest{Slot: slotOf(h, &card.Token)}
	for i, want := range []uint{pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_LOCKED} {
		_, err := h.call(wire.OpLogin, slot, []byte("111111"), nil)
		wantCode(t, err, want)
		if n := card.WrongPINs(t); n != i+1 {
			t.Errorf("%d wrong PINs were sent after %d requests", n, i+1)
		}
	}
}

func TestARemovedCardIsTheErrorOfItsCalls(t *testing.T) {
	h, card, request, ciphertext := openCard(t)
	card.Remove(t, pkcs11test.CardRemoved)
	_, err := h.call(wire.OpDecryptRaw, request, ciphertext, nil)
	if failure := asFailure(t, err); failure.Code >= wire.CodeNotFound {
		t.Errorf("got %v, want the code of the module", failure)
	}
	var slots wire.Slots
	h.must(wire.OpSlots, nil, nil, &slots)
	for _, slot := range slots.Slots {
		if slot.ID == request.Slot && slot.Present && slot.Failure == nil {
			t.Errorf("the card is still there: %+v", slot)
		}
	}
	// Whatever the module says to a log-out now: afterwards a log-in is sent again.
	_, _ = h.call(wire.OpLogout, wire.SlotRequest{Slot: request.Slot}, nil, nil)
	card.Return(t)
	h.must(wire.OpSlots, nil, nil, &slots)
	h.must(wire.OpLogin, wire.SlotRequest{Slot: request.Slot}, []byte(card.PIN), nil)
}

func TestOtherHashesAreRefused(t *testing.T) {
	h, _, request, ciphertext := openCard(t)
	for op, hash := range map[wire.Op]uint{wire.OpDecryptOAEP: pkcs11.CKM_SHA512, wire.OpDecryptRaw: pkcs11.CKM_SHA_1} {
		request.Hash = hash
		_, err := h.call(op, request, ciphertext, nil)
		wantCode(t, err, wire.CodeBadRequest)
	}
}
