package custody_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// putAs writes an item as a client does that names its requests.
func putAs(t *testing.T, k *custody.Keeper, id, value string, cas *uint64) (custody.Metadata, error) {
	t.Helper()
	return k.Put(t.Context(), "prod", "unseal", text(value), custody.PutOptions{Key: "prod", CAS: cas, By: "test", RequestID: id})
}

// A client that got no answer sends the same body again.
func TestARepeatedWriteWithAGenerationIsNoConflictWithItself(t *testing.T) {
	for name, test := range map[string]struct {
		before uint64 // generation that is there
	}{"of a new item": {0}, "of one that is there": {1}} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			if test.before > 0 {
				h.put("prod", "unseal", "old")
			}
			cas := generation(test.before)
			first, err := putAs(t, h.Keeper, "r-1", "new", cas)
			if err != nil {
				t.Fatal(err)
			}
			for range 3 {
				again, err := putAs(t, h.Keeper, "r-1", "new", cas)
				if err != nil {
					t.Fatalf("the repeat: %v", err)
				}
				if again.Generation != first.Generation || again.State != custody.StateCurrent || again.Updated != first.Updated ||
					again.Expected != first.Expected || again.Size != first.Size || again.UpdatedBy != first.UpdatedBy {
					t.Errorf("the repeat shows %+v, the first %+v", again, first)
				}
			}
			h.wantOpen("prod", "unseal", "new")

			for what, err := range map[string]error{
				"a write without the id":       second(putAs(t, h.Keeper, "", "new", cas)),
				"a write with another id":      second(putAs(t, h.Keeper, "r-2", "new", cas)),
				"a repeat that expected other": second(putAs(t, h.Keeper, "r-1", "new", generation(7))),
			} {
				if !errors.Is(err, custody.ErrConflict) {
					t.Errorf("%s: %v, want ErrConflict", what, err)
				}
			}
			_, err = h.Put(t.Context(), "prod", "unseal", custody.Fields{"other": []byte("x")}, custody.PutOptions{Key: "prod", CAS: cas, RequestID: "r-1"})
			if !errors.Is(err, custody.ErrInvalid) {
				t.Errorf("the id for other fields: %v, want ErrInvalid", err)
			}
		})
	}
}

func second[T any](_ T, err error) error { return err }

// A client that always gives the same id, a nightly job for example, must hear that its new values were not stored.
func TestARequestIDWithOtherValuesOfTheSameFieldsIsRefusedAndNothingIsWritten(t *testing.T) {
	for name, before := range map[string]func(h *house){
		"where its write is there":              func(*house) {},
		"where somebody wrote after it":         func(h *house) { h.put("prod", "unseal", "old token") },
		"where its envelope vanished meanwhile": func(h *house) { h.remove("main", "material/prod/unseal") },
	} {
		for cas, expected := range map[string]*uint64{"no generation": nil, "the generation of the first": generation(0), "the newest": generation(1)} {
			t.Run(name+", with "+cas, func(t *testing.T) {
				h := newHouse(t)
				if _, err := putAs(t, h.Keeper, "nightly", "old token", nil); err != nil {
					t.Fatal(err)
				}
				before(h)
				record := string(h.record("material/prod/unseal").Value)
				_, err := putAs(t, h.Keeper, "nightly", "new token", expected)
				if !errors.Is(err, custody.ErrInvalid) || !strings.Contains(err.Error(), "this request_id was used for another write; use a new one") {
					t.Errorf("the id for other values: %v, want ErrInvalid that says why", err)
				}
				if now := string(h.record("material/prod/unseal").Value); now != record {
					t.Errorf("the record was %s and is %s", record, now)
				}
			})
		}
	}
}

// The first sending ended unclear, and may still come: a second payload under its id would be taken for it.
func TestARequestIDOfAWriteThatEndedUnclearIsNotTakenForOtherValues(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "old")
	lost := h.keeper(h.records, lossy{h})
	if _, err := putAs(t, lost, "r-1", "new", generation(1)); !errors.Is(err, errFault) {
		t.Fatal(err)
	}
	if _, err := putAs(t, h.Keeper, "r-1", "newer", generation(1)); !errors.Is(err, custody.ErrInvalid) {
		t.Errorf("other values: %v, want ErrInvalid", err)
	}
	if _, err := putAs(t, h.Keeper, "r-1", "new", generation(1)); err != nil {
		t.Errorf("the repeat: %v", err)
	}
	h.wantOpen("prod", "unseal", "new")
}

// lossy stores lose every write.
type lossy struct{ *house }

type lossyStore struct{ store.Store }

func (l lossy) Store(ctx context.Context, name string) (store.Store, error) {
	under, err := l.house.Store(ctx, name)
	return lossyStore{under}, err
}

func (lossyStore) Put(context.Context, string, []byte, store.Revision) (store.Revision, error) {
	return store.NoRevision, errFault
}

func TestTheRecordTellsOfARequestItsSaltAndNoValue(t *testing.T) {
	var proofs []string
	for range 2 {
		h := newHouse(t)
		if _, err := putAs(t, h.Keeper, "r-1", "token", nil); err != nil {
			t.Fatal(err)
		}
		raw := h.record("material/prod/unseal").Value
		var rec struct {
			Requests []struct {
				Salt    []byte `json:"salt"`
				Payload []byte `json:"payload_hmac"`
			} `json:"requests"`
		}
		if err := json.Unmarshal(raw, &rec); err != nil || len(rec.Requests) != 1 || len(rec.Requests[0].Salt) != 32 {
			t.Fatalf("the record is %s, %v; want one request with a salt of 32 bytes", raw, err)
		}
		mac := hmac.New(sha256.New, rec.Requests[0].Salt)
		mac.Write([]byte(`{"key":"dG9rZW4="}`))
		if !hmac.Equal(mac.Sum(nil), rec.Requests[0].Payload) {
			t.Errorf("the record is %s, and its HMAC is another one", raw)
		}
		if strings.Contains(string(raw), "dG9rZW4") {
			t.Errorf("the record holds the value: %s", raw)
		}
		proofs = append(proofs, string(rec.Requests[0].Payload))
	}
	if proofs[0] == proofs[1] {
		t.Error("two writes of one value have one HMAC: the salt is not random")
	}
}

// Earlier releases remembered the names of the fields only.
func TestARequestWhosePayloadIsNotRecordedIsNotTakenForItsRepeat(t *testing.T) {
	h := newHouse(t)
	if _, err := putAs(t, h.Keeper, "r-1", "old", generation(0)); err != nil {
		t.Fatal(err)
	}
	without := regexp.MustCompile(`"salt":"[^"]*","payload_hmac":"[^"]*"`).
		ReplaceAll(h.record("material/prod/unseal").Value, []byte(`"fields":["key"]`))
	h.setRecord("material/prod/unseal", without)
	if _, err := putAs(t, h.Keeper, "r-1", "new", generation(0)); !errors.Is(err, custody.ErrConflict) {
		t.Errorf("with a generation: %v, want ErrConflict", err)
	}
	for range 2 {
		if written, err := putAs(t, h.Keeper, "r-1", "new", nil); err != nil || written.Generation != 2 {
			t.Errorf("without: %+v, %v, want it written once", written, err)
		}
	}
	h.wantOpen("prod", "unseal", "new")
}

func TestARepeatAfterSomebodyElseWroteIsAConflict(t *testing.T) {
	h := newHouse(t)
	if _, err := putAs(t, h.Keeper, "r-1", "mine", generation(0)); err != nil {
		t.Fatal(err)
	}
	h.put("prod", "unseal", "theirs")
	if _, err := putAs(t, h.Keeper, "r-1", "mine", generation(0)); !errors.Is(err, custody.ErrConflict) {
		t.Errorf("the repeat: %v, want ErrConflict", err)
	}
	h.wantOpen("prod", "unseal", "theirs")
}

// Whoever can write the store may put an envelope there that claims the generation of the write; it is not taken for it.
func TestAnotherEnvelopeOfTheSameGenerationIsNotTakenForTheWrite(t *testing.T) {
	h, elsewhere := newHouse(t), newHouse(t)
	first, err := putAs(t, h.Keeper, "r-1", "mine", generation(0))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := putAs(t, elsewhere.Keeper, "r-1", "mine", generation(0)); err != nil {
		t.Fatal(err)
	}
	h.plant("main", "material/prod/unseal", elsewhere.raw("main", "material/prod/unseal").Value)
	if _, err := putAs(t, h.Keeper, "r-1", "mine", generation(0)); !errors.Is(err, custody.ErrConflict) {
		t.Errorf("the repeat over a forged generation %d: %v, want ErrConflict", first.Generation, err)
	}
}

// A fault at every call to a store, in every way: the client sends its request again, and it has happened once.
func TestAWriteWhoseAnswerWasLostIsRepeatedWithSuccess(t *testing.T) {
	for _, before := range []uint64{0, 1} {
		for _, kind := range []fault{{}, {effect: true}, {crash: true}, {effect: true, crash: true}} {
			for at := 1; ; at++ {
				h := newHouse(t)
				if before > 0 {
					h.put("prod", "unseal", "old")
				}
				f := kind
				f.at = at
				_, first := putAs(t, h.keeper(faulty{h.records, &f}, faultyStores{h, &f}), "r-1", "new", generation(before))
				if !f.struck() {
					break
				}
				what := fmt.Sprintf("generation %d, fault %+v, first answer %v", before, f, first)
				repeated, err := putAs(t, h.Keeper, "r-1", "new", generation(before))
				if err != nil || repeated.State != custody.StateCurrent {
					t.Fatalf("%s: the repeat gives %+v, %v", what, repeated, err)
				}
				opened := h.wantOpen("prod", "unseal", "new")
				if opened.Generation != repeated.Generation {
					t.Errorf("%s: generation %d opens, and the repeat said %d", what, opened.Generation, repeated.Generation)
				}
			}
		}
	}
}

func TestSendingsOfOneRequestAtOnceAreOneWrite(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "old")
	var group sync.WaitGroup
	var mu sync.Mutex
	generations := map[uint64]int{}
	for range 4 {
		keeper := h.keeper(h.records, h)
		group.Go(func() {
			written, err := putAs(t, keeper, "r-1", "new", generation(1))
			if err != nil {
				t.Errorf("a sending: %v", err)
			}
			mu.Lock()
			defer mu.Unlock()
			generations[written.Generation]++
		})
	}
	group.Wait()
	if len(generations) != 1 {
		t.Errorf("the sendings say generations %v, want one", generations)
	}
	h.wantOpen("prod", "unseal", "new")
}

func TestADeletionWhoseAnswerWasLostIsRepeatedWithSuccess(t *testing.T) {
	for _, kind := range []fault{{}, {effect: true}, {crash: true}, {effect: true, crash: true}} {
		for at := 1; ; at++ {
			h := newHouse(t)
			h.put("prod", "unseal", "older")
			h.put("prod", "unseal", "old")
			f := kind
			f.at = at
			first := h.keeper(faulty{h.records, &f}, faultyStores{h, &f}).Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{CAS: generation(2)})
			if !f.struck() {
				break
			}
			for range 2 {
				err := h.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{CAS: generation(2)})
				if err != nil && !errors.Is(err, custody.ErrNotFound) {
					t.Errorf("fault %+v, first answer %v: the repeat gives %v", f, first, err)
				}
			}
			h.wantOpenError("prod", "unseal", custody.ErrNotFound)
			if err := h.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{CAS: generation(9)}); !errors.Is(err, custody.ErrConflict) {
				t.Errorf("a deletion of what never was: %v, want ErrConflict", err)
			}
		}
	}
}
