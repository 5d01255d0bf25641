package custody_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
)

const item = "material/prod/unseal"

func TestFiveFieldsAreOneOperation(t *testing.T) {
	h := newHouse(t)
	fields := custody.Fields{}
	for i := range 5 {
		fields[fmt.Sprintf("unseal_key_%d", i+1)] = []byte{byte(i), 1, 2, 3}
	}
	before := h.one.Operations()
	m, err := h.Put(t.Context(), "prod", "unseal", fields, custody.PutOptions{Key: "prod", By: "ops"})
	if err != nil {
		t.Fatal(err)
	}
	if m.Generation != 1 || m.State != custody.StateCurrent || m.Store != "main" || m.Key != "prod" || m.HSMs != 1 || m.UpdatedBy != "ops" {
		t.Errorf("Put = %+v", m)
	}
	if _, err := h.Get(t.Context(), "prod", "unseal", custody.ReadOptions{}); err != nil {
		t.Fatal(err)
	}
	if spent := h.one.Operations() - before; spent != 0 {
		t.Errorf("writing and describing cost %d operations of the HSM", spent)
	}
	opened, m, err := h.Open(t.Context(), "prod", "unseal", custody.ReadOptions{})
	if err != nil || !equal(opened, fields) {
		t.Fatalf("Open = %v, %v", opened, err)
	}
	if spent := h.one.Operations() - before; spent != 1 {
		t.Errorf("opening cost %d operations of the HSM, want 1", spent)
	}
	if len(m.Fields) != 5 || !slices.IsSorted(m.Fields) {
		t.Errorf("Fields = %q", m.Fields)
	}
}

func TestTheStoreSeesNothingInTheClear(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "a-secret-that-is-long-enough")
	for name, entry := range map[string]store.Entry{"store": h.raw("main", item), "record": h.record(item)} {
		if strings.Contains(string(entry.Value), "a-secret") || strings.Contains(string(entry.Value), "YS1zZWNyZXQ") {
			t.Errorf("the %s shows the secret", name)
		}
	}
	if _, err := envelope.Parse(h.raw("main", item).Value); err != nil {
		t.Errorf("the store holds something else than the JWE: %v", err)
	}
}

func TestGenerations(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	for want := uint64(1); want <= 3; want++ {
		if m := h.put("prod", "unseal", fmt.Sprint(want)); m.Generation != want {
			t.Fatalf("Put = generation %d, want %d", m.Generation, want)
		}
	}
	put := func(cas uint64) error {
		_, err := h.Put(ctx, "prod", "unseal", text("x"), custody.PutOptions{CAS: generation(cas)})
		return err
	}
	for _, wrong := range []uint64{0, 1, 2, 4} {
		if err := put(wrong); !errors.Is(err, custody.ErrConflict) {
			t.Errorf("Put with cas=%d: %v, want ErrConflict", wrong, err)
		}
	}
	h.wantOpen("prod", "unseal", "3")
	if err := put(3); err != nil {
		t.Errorf("Put with the right cas: %v", err)
	}
	if _, err := h.Put(ctx, "prod", "new", text("x"), custody.PutOptions{Key: "prod", CAS: generation(1)}); !errors.Is(err, custody.ErrConflict) {
		t.Errorf("Put of a new item with cas=1: %v, want ErrConflict", err)
	}
	if _, err := h.Put(ctx, "prod", "new", text("x"), custody.PutOptions{Key: "prod", CAS: generation(0)}); err != nil {
		t.Errorf("Put of a new item with cas=0: %v", err)
	}
}

func TestOlderGenerationPutBackIsRefusedUntilAccepted(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "old")
	backup := h.raw("main", item).Value
	h.put("prod", "unseal", "new")
	h.plant("main", item, backup)

	h.wantOpenError("prod", "unseal", custody.ErrStale)
	m, err := h.Get(t.Context(), "prod", "unseal", custody.ReadOptions{})
	if err != nil || m.State != custody.StateStale || m.Generation != 1 || m.Expected != 2 || len(m.Warnings) == 0 {
		t.Errorf("Get = %+v, %v", m, err)
	}
	if _, err := h.Put(t.Context(), "prod", "unseal", text("newer"), custody.PutOptions{}); !errors.Is(err, custody.ErrStale) {
		t.Errorf("Put over it = %v, want ErrStale", err)
	}
	if _, err := h.AcceptGeneration(t.Context(), "prod", "unseal", 2, custody.ReadOptions{}); !errors.Is(err, custody.ErrConflict) {
		t.Errorf("accepting another generation = %v, want ErrConflict", err)
	}
	if m, err := h.AcceptGeneration(t.Context(), "prod", "unseal", 1, custody.ReadOptions{By: "ops"}); err != nil || m.Generation != 1 || m.State != custody.StateCurrent {
		t.Fatalf("AcceptGeneration = %+v, %v", m, err)
	}
	h.wantOpen("prod", "unseal", "old")
	if m := h.put("prod", "unseal", "next"); m.Generation != 3 {
		t.Errorf("the next generation is %d: generations must not recur", m.Generation)
	}
}

func TestNewerGenerationThanForeseenIsRefusedUntilAccepted(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "1")
	backup := h.record(item).Value // the mount is restored from a backup later
	h.put("prod", "unseal", "2")
	h.put("prod", "unseal", "3")
	h.setRecord(item, backup)

	h.wantOpenError("prod", "unseal", custody.ErrAhead)
	if _, err := h.Put(t.Context(), "prod", "unseal", text("x"), custody.PutOptions{}); !errors.Is(err, custody.ErrAhead) {
		t.Errorf("Put over it = %v, want ErrAhead", err)
	}
	if _, err := h.AcceptGeneration(t.Context(), "prod", "unseal", 3, custody.ReadOptions{}); err != nil {
		t.Fatal(err)
	}
	h.wantOpen("prod", "unseal", "3")
}

func TestEnvelopeMovedToAnotherNameDoesNotOpen(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "unseal")
	h.put("prod", "root", "root")
	h.put("test", "unseal", "test")
	h.plant("main", "material/prod/root", h.raw("main", item).Value)
	h.wantOpenError("prod", "root", envelope.ErrContext)
	h.plant("main", item, h.raw("main", "material/test/unseal").Value)
	h.wantOpenError("prod", "unseal", envelope.ErrContext)
	h.plant("main", "material/prod/planted", h.raw("main", "material/test/unseal").Value)
	h.wantOpenError("prod", "planted", envelope.ErrContext)
}

func TestEnvelopeOfAnotherEntranceDoesNotOpen(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "x")
	wrapped, err := h.keys.Wrap(t.Context(), "prod", envelope.UseWrap, []byte(`{"key":"eA=="}`), nil)
	if err != nil {
		t.Fatal(err)
	}
	h.plant("main", item, wrapped.Envelope)
	h.wantOpenError("prod", "unseal", envelope.ErrContext)
}

// Whoever knows the public keys and can write the store makes an envelope with the very context that is expected.
func TestForgedEnvelopeDoesNotOpen(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "genuine")
	key, err := h.keys.Get(t.Context(), "prod")
	if err != nil {
		t.Fatal(err)
	}
	rcpt := key.Versions[0].Recipients[0]
	forged, err := envelope.Seal(envelope.Context{
		Use: envelope.UseMaterial, Key: "prod", Version: 1, Cluster: "prod", Name: "unseal", Generation: 1,
	}, []envelope.Recipient{{KID: rcpt.KID, Algorithm: rcpt.Algorithm, Public: rcpt.Public}}, envelope.NewAuthKey(), []byte(`{"key":"eA=="}`))
	if err != nil {
		t.Fatal(err)
	}
	h.plant("main", item, forged)
	if _, _, err := h.Open(t.Context(), "prod", "unseal", custody.ReadOptions{}); !errors.Is(err, envelope.ErrNotAuthentic) {
		t.Errorf("Open = %v, want ErrNotAuthentic", err)
	}
	h.forget(item)
	if _, _, err := h.Open(t.Context(), "prod", "unseal", custody.ReadOptions{}); !errors.Is(err, envelope.ErrNotAuthentic) {
		t.Errorf("Open without a record = %v, want ErrNotAuthentic", err)
	}
	if _, err := h.records.Get(t.Context(), item); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a forged envelope has begun a record: %v", err)
	}
}

func TestRubbishInTheStoreIsSaidToBeRubbish(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "x")
	for _, rubbish := range []string{"", "{}", "text", string(h.raw("main", item).Value[:100])} {
		h.plant("main", item, []byte(rubbish))
		h.wantOpenError("prod", "unseal", envelope.ErrMalformed)
	}
}

func TestVanishedEnvelopeIsNoMissingItem(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "x")
	if err := h.stores["main"].Delete(t.Context(), item, h.raw("main", item).Revision); err != nil {
		t.Fatal(err)
	}
	h.wantOpenError("prod", "unseal", custody.ErrVanished)
	if m, err := h.Get(t.Context(), "prod", "unseal", custody.ReadOptions{}); err != nil || m.State != custody.StateVanished || m.Expected != 1 {
		t.Errorf("Get = %+v, %v", m, err)
	}
	if refs, _, err := h.List(t.Context(), "prod"); err != nil || len(refs) != 1 {
		t.Errorf("List = %v, %v: it must stay listed", refs, err)
	}
	if m := h.put("prod", "unseal", "anew"); m.Generation != 2 {
		t.Errorf("written anew it has generation %d", m.Generation)
	}
	h.wantOpen("prod", "unseal", "anew")
}

func TestItemWithoutARecordSaysSoOnceAndOpens(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "1")
	h.put("prod", "unseal", "2")
	h.forget(item)

	if m, err := h.Get(t.Context(), "prod", "unseal", custody.ReadOptions{}); err != nil || m.State != custody.StateUnrecorded || m.Generation != 2 {
		t.Errorf("Get = %+v, %v", m, err)
	}
	if _, err := h.Put(t.Context(), "prod", "unseal", text("x"), custody.PutOptions{}); !errors.Is(err, custody.ErrUnrecorded) {
		t.Errorf("Put over it = %v, want ErrUnrecorded", err)
	}
	if err := h.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{}); !errors.Is(err, custody.ErrUnrecorded) {
		t.Errorf("Delete = %v, want ErrUnrecorded", err)
	}
	if m := h.wantOpen("prod", "unseal", "2"); m.State != custody.StateUnrecorded || !strings.Contains(fmt.Sprint(m.Warnings), "no record") {
		t.Errorf("the first open says %+v", m)
	}
	if m := h.wantOpen("prod", "unseal", "2"); m.State != custody.StateCurrent || strings.Contains(fmt.Sprint(m.Warnings), "no record") {
		t.Errorf("the second open says %+v", m)
	}
	if m := h.put("prod", "unseal", "3"); m.Generation != 3 {
		t.Errorf("the next generation is %d", m.Generation)
	}
}

func TestItemWithoutARecordIsWrittenOverByItsGeneration(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "1")
	h.put("prod", "unseal", "2")
	h.forget(item)
	m, err := h.Put(t.Context(), "prod", "unseal", text("3"), custody.PutOptions{CAS: generation(2)})
	if err != nil || m.Generation != 3 {
		t.Fatalf("Put = %+v, %v", m, err)
	}
	h.wantOpen("prod", "unseal", "3")
	h.forget(item)
	if err := h.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{CAS: generation(3)}); err != nil {
		t.Fatal(err)
	}
	h.wantOpenError("prod", "unseal", custody.ErrNotFound)
}

func TestDeletedItemDoesNotComeBack(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "1")
	backup := h.raw("main", item).Value
	h.put("prod", "unseal", "2")
	if err := h.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{CAS: generation(1)}); !errors.Is(err, custody.ErrConflict) {
		t.Errorf("Delete with a wrong cas = %v, want ErrConflict", err)
	}
	if err := h.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{CAS: generation(2)}); err != nil {
		t.Fatal(err)
	}
	h.wantOpenError("prod", "unseal", custody.ErrNotFound)
	if err := h.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{}); !errors.Is(err, custody.ErrNotFound) {
		t.Errorf("second Delete = %v, want ErrNotFound", err)
	}
	if refs, _, err := h.List(t.Context(), ""); err != nil || len(refs) != 0 {
		t.Errorf("List = %v, %v", refs, err)
	}

	h.plant("main", item, backup)
	h.wantOpenError("prod", "unseal", custody.ErrStale)
	if err := h.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{}); err != nil {
		t.Fatalf("deleting what was put back: %v", err)
	}
	if m := h.put("prod", "unseal", "3"); m.Generation != 3 {
		t.Errorf("the item begun anew has generation %d", m.Generation)
	}
	h.plant("main", item, backup)
	h.wantOpenError("prod", "unseal", custody.ErrStale)
}

func TestItemStaysInItsStore(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	if _, err := h.Put(ctx, "prod", "unseal", text("x"), custody.PutOptions{Key: "prod", Store: "second"}); err != nil {
		t.Fatal(err)
	}
	h.wantOpen("prod", "unseal", "x")
	if m := h.put("prod", "unseal", "y"); m.Store != "second" {
		t.Errorf("written again it lies in %q", m.Store)
	}
	if _, err := h.Put(ctx, "prod", "unseal", text("z"), custody.PutOptions{Store: "main"}); !errors.Is(err, custody.ErrInvalid) {
		t.Errorf("Put into another store = %v, want ErrInvalid", err)
	}
	h.forget(item)
	h.wantOpenError("prod", "unseal", custody.ErrNotFound) // the default store has none
	if _, _, err := h.Open(ctx, "prod", "unseal", custody.ReadOptions{Store: "second"}); err != nil {
		t.Errorf("Open from the named store = %v", err)
	}
	h.wantOpen("prod", "unseal", "y")
}

func TestItemChangesItsKey(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "x")
	m, err := h.Put(t.Context(), "prod", "unseal", text("y"), custody.PutOptions{Key: "other"})
	if err != nil || m.Key != "other" {
		t.Fatalf("Put = %+v, %v", m, err)
	}
	if m := h.wantOpen("prod", "unseal", "y"); m.Key != "other" {
		t.Errorf("Open says key %q", m.Key)
	}
}

func TestBadRequests(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	for _, bad := range [][2]string{{"", "a"}, {"a", ""}, {"a/b", "c"}, {"a", "b/c"}, {"..", "a"}, {"a", strings.Repeat("n", 200)}, {"a b", "c"}} {
		if _, err := h.Put(ctx, bad[0], bad[1], text("x"), custody.PutOptions{Key: "prod"}); !errors.Is(err, custody.ErrInvalid) {
			t.Errorf("Put(%q, %q) = %v, want ErrInvalid", bad[0], bad[1], err)
		}
		if _, _, err := h.Open(ctx, bad[0], bad[1], custody.ReadOptions{}); !errors.Is(err, custody.ErrInvalid) {
			t.Errorf("Open(%q, %q) = %v, want ErrInvalid", bad[0], bad[1], err)
		}
	}
	if _, err := h.Put(ctx, "prod", "a", nil, custody.PutOptions{Key: "prod"}); !errors.Is(err, custody.ErrInvalid) {
		t.Errorf("Put without fields = %v, want ErrInvalid", err)
	}
	if _, err := h.Put(ctx, "prod", "a", text("x"), custody.PutOptions{}); !errors.Is(err, custody.ErrInvalid) {
		t.Errorf("Put without a key = %v, want ErrInvalid", err)
	}
	if _, err := h.Put(ctx, "prod", "a", text("x"), custody.PutOptions{Key: "misspelt"}); !errors.Is(err, keyring.ErrKeyNotFound) {
		t.Errorf("Put with an unknown key = %v, want ErrKeyNotFound", err)
	}
	if paths, err := h.records.List(ctx, ""); err != nil || len(paths) != 0 {
		t.Errorf("bad requests left the records %q, %v", paths, err)
	}
}

func TestListShowsWhatHasNoRecordAndWhatCannotBeReached(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "x")
	h.put("prod", "root", "x")
	h.put("test", "unseal", "x")
	if _, err := h.Put(t.Context(), "prod", "elsewhere", text("x"), custody.PutOptions{Key: "prod", Store: "second"}); err != nil {
		t.Fatal(err)
	}
	h.forget("material/prod/root")
	want := []custody.Ref{{Cluster: "prod", Name: "elsewhere"}, {Cluster: "prod", Name: "root"}, {Cluster: "prod", Name: "unseal"}}
	if refs, warnings, err := h.List(t.Context(), "prod"); err != nil || !slices.Equal(refs, want) || len(warnings) != 0 {
		t.Errorf("List = %v, %q, %v", refs, warnings, err)
	}
	if refs, _, err := h.List(t.Context(), ""); err != nil || len(refs) != 4 {
		t.Errorf("List of all = %v, %v", refs, err)
	}
	h.setGone("second", store.ErrUnavailable)
	if refs, warnings, err := h.List(t.Context(), "prod"); err != nil || !slices.Equal(refs, want) || len(warnings) != 1 {
		t.Errorf("List with a store away = %v, %q, %v", refs, warnings, err)
	}
	if _, _, err := h.Open(t.Context(), "prod", "elsewhere", custody.ReadOptions{}); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Open with its store away = %v, want ErrUnavailable", err)
	}
}

func TestLossOfMountLosesNothing(t *testing.T) {
	h := newHouse(t)
	for i := range 3 {
		h.put("prod", fmt.Sprintf("item%d", i), fmt.Sprint(i))
	}
	for i := range 3 {
		h.forget(fmt.Sprintf("material/prod/item%d", i))
	}
	refs, _, err := h.List(t.Context(), "prod")
	if err != nil || len(refs) != 3 {
		t.Fatalf("List = %v, %v", refs, err)
	}
	for i, ref := range refs {
		h.wantOpen(ref.Cluster, ref.Name, fmt.Sprint(i))
	}
}

func TestOfWritersWithOneGenerationExactlyOneWins(t *testing.T) {
	h := newHouse(t)
	keepers := []*custody.Keeper{h.Keeper, h.keeper(h.records, h)}
	h.put("prod", "unseal", "start")
	for round := range 8 {
		m, err := h.Get(t.Context(), "prod", "unseal", custody.ReadOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var won atomic.Int32
		var winner atomic.Value
		var group sync.WaitGroup
		for writer := range 4 {
			group.Go(func() {
				value := fmt.Sprintf("%d/%d", round, writer)
				_, err := keepers[writer%2].Put(t.Context(), "prod", "unseal", text(value), custody.PutOptions{CAS: generation(m.Generation)})
				switch {
				case err == nil:
					won.Add(1)
					winner.Store(value)
				case !errors.Is(err, custody.ErrConflict):
					t.Errorf("Put = %v", err)
				}
			})
		}
		group.Wait()
		if won.Load() != 1 {
			t.Fatalf("round %d: %d writers won, want 1", round, won.Load())
		}
		value, _ := winner.Load().(string)
		h.wantOpen("prod", "unseal", value)
	}
}

func TestWritersReadersAndDeletersAtOnce(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "start")
	keepers := []*custody.Keeper{h.Keeper, h.keeper(h.records, h)}
	var group sync.WaitGroup
	allowed := func(err error) bool {
		return err == nil || errors.Is(err, custody.ErrNotFound) || errors.Is(err, custody.ErrConflict)
	}
	for worker := range 6 {
		keeper := keepers[worker%2]
		group.Go(func() {
			for i := range 15 {
				var err error
				switch {
				case worker < 2:
					_, err = keeper.Put(t.Context(), "prod", "unseal", text(fmt.Sprint(i)), custody.PutOptions{Key: "prod"})
				case worker < 4:
					_, _, err = keeper.Open(t.Context(), "prod", "unseal", custody.ReadOptions{})
				case worker == 4 && i%5 == 0:
					err = keeper.Delete(t.Context(), "prod", "unseal", custody.DeleteOptions{})
				default:
					_, err = keeper.Get(t.Context(), "prod", "unseal", custody.ReadOptions{})
				}
				if !allowed(err) {
					t.Errorf("worker %d: %v", worker, err)
					return
				}
			}
		})
	}
	group.Wait()
	h.put("prod", "unseal", "end")
	h.wantOpen("prod", "unseal", "end")
}

func TestErrorsOfHSMAndStoreComeThrough(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "x")
	h.one.SetError(hsm.ErrUnavailable)
	if _, _, err := h.Open(t.Context(), "prod", "unseal", custody.ReadOptions{}); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("Open without the HSM = %v, want ErrUnavailable", err)
	}
	if _, err := h.Put(t.Context(), "prod", "unseal", text("y"), custody.PutOptions{}); err != nil {
		t.Errorf("Put without the HSM = %v: sealing needs none", err)
	}
	h.one.SetError(nil)
	h.wantOpen("prod", "unseal", "y")
}

// misfit is a store that refuses every write for good.
type misfit struct {
	store.Store

	err error
}

func (m misfit) Put(context.Context, string, []byte, store.Revision) (store.Revision, error) {
	return store.NoRevision, m.err
}

func TestItemThatAStoreRefusesMayGoToAnother(t *testing.T) {
	for sentence, refusal := range map[string]error{"too large": store.ErrTooLarge, "no room": store.ErrFull, "no right": store.ErrDenied} {
		t.Run(sentence, func(t *testing.T) {
			h := newHouse(t)
			ctx := t.Context()
			h.stores["second"] = misfit{h.stores["second"], refusal}
			if _, err := h.Put(ctx, "prod", "unseal", text("x"), custody.PutOptions{Key: "prod", Store: "second"}); !errors.Is(err, refusal) {
				t.Fatalf("Put = %v, want %q", err, refusal)
			}
			h.wantOpenError("prod", "unseal", custody.ErrNotFound)
			if refs, _, err := h.List(ctx, ""); err != nil || len(refs) != 0 {
				t.Errorf("List = %v, %v", refs, err)
			}
			_, err := h.Put(ctx, "prod", "unseal", text("x"), custody.PutOptions{Key: "prod", Store: "main"})
			if errors.Is(err, custody.ErrInvalid) { // that write may still appear there: the operator decides
				if err := h.Delete(ctx, "prod", "unseal", custody.DeleteOptions{}); err != nil {
					t.Fatalf("Delete = %v", err)
				}
				_, err = h.Put(ctx, "prod", "unseal", text("x"), custody.PutOptions{Key: "prod", Store: "main"})
			}
			if err != nil {
				t.Fatalf("Put into another store = %v", err)
			}
			h.wantOpen("prod", "unseal", "x")
		})
	}
}

func TestRefusedWriteLeavesTheItemAsItWas(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "old")
	before := h.record(item).Value
	under := h.stores["main"]
	h.stores["main"] = misfit{under, store.ErrTooLarge}
	if _, err := h.Put(t.Context(), "prod", "unseal", text("new"), custody.PutOptions{}); !errors.Is(err, store.ErrTooLarge) {
		t.Fatalf("Put = %v, want ErrTooLarge", err)
	}
	h.stores["main"] = under
	h.wantOpen("prod", "unseal", "old")
	if after := h.record(item).Value; strings.Contains(string(after), "pending") || strings.Contains(string(before), "pending") {
		t.Errorf("the record still foresees something: %s", after)
	}
}

// The record lies in mounts: every later release reads it.
func TestFormatOfRecordsIsFixed(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "x")
	const golden = `{"format":1,"store":"main","key":"prod","generation":1,"highest":1,"write":"","fields":["key"],` +
		`"created":"2026-03-01T03:00:00Z","updated":"2026-03-01T03:00:00Z","updated_by":"test"}`
	random := regexp.MustCompile(`"write":"[A-Z2-7]{26}"`)
	if got := random.ReplaceAllString(string(h.record(item).Value), `"write":""`); got != golden {
		t.Errorf("the record is %s, want %s", got, golden)
	}
	const busy = `{"format":1,"store":"main","key":"prod","generation":1,"pending":{"first":2,"last":3},"highest":3,"deleting":1,"write":"",` +
		`"created":"2026-03-01T03:00:00Z","updated":"2026-03-01T03:00:00Z"}`
	h.setRecord(item, []byte(busy))
	h.wantOpen("prod", "unseal", "x")
}

func TestDamagedRecordIsSaidToBeDamaged(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "unseal", "x")
	for _, damaged := range []string{
		"", "{}", `{"format":2,"store":"main","key":"prod","generation":1,"highest":1}`, `{"format":1,"store":"main","key":"prod","generation":2,"highest":1}`,
		`{"format":1,"store":"","key":"prod","generation":1,"highest":1}`, `{"format":1,"store":"main","key":"prod","generation":1,"highest":1,"deleted":true}`,
		`{"format":1,"store":"main","key":"prod","generation":2,"highest":2,"pending":{"first":1,"last":2}}`,
	} {
		h.setRecord(item, []byte(damaged))
		h.wantOpenError("prod", "unseal", custody.ErrRecordMalformed)
		if refs, warnings, err := h.List(t.Context(), ""); err != nil || len(refs) != 1 || len(warnings) != 1 {
			t.Errorf("List = %v, %q, %v, want the item and a warning", refs, warnings, err)
		}
	}
}

func TestTwoNamesOfOneHSMAreOneHSM(t *testing.T) {
	for name, test := range map[string]struct {
		label string
		two   func(h *house) *hsmtest.Memory
		hsms  int
	}{
		"another HSM":                  {"ec", func(h *house) *hsmtest.Memory { return h.two }, 2},
		"the same one by another name": {"other", func(h *house) *hsmtest.Memory { return h.one.Attach() }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHouse(t)
			h.two = test.two(h)
			if _, err := h.keys.AddRecipient(t.Context(), "prod", keyring.AdoptRequest{Device: "two", Label: test.label, By: "test"}); err != nil {
				t.Fatal(err)
			}
			m := h.put("prod", "unseal", "value")
			warned := slices.ContainsFunc(m.Warnings, func(w string) bool { return strings.Contains(w, "one HSM only") })
			if m.HSMs != test.hsms || len(m.KIDs) != 2 || warned != (test.hsms == 1) {
				t.Errorf("%d keys on %d HSMs, want %d; warnings %q", len(m.KIDs), m.HSMs, test.hsms, m.Warnings)
			}
		})
	}
}

func TestWhatOpensOnOneHSMOnlyIsWarnedAboutUntilSomebodyTakesItOnThemselves(t *testing.T) {
	h := newHouse(t)
	yes := true
	warned := func(generation uint64) bool {
		m, err := h.Get(t.Context(), "prod", "unseal", custody.ReadOptions{})
		if err != nil || m.HSMs != 1 || m.Generation != generation {
			t.Fatalf("Get = %+v, %v", m, err)
		}
		return slices.ContainsFunc(m.Warnings, func(w string) bool { return strings.Contains(w, "one HSM only") })
	}
	configure := func(settings keyring.Settings) {
		settings.By = "test"
		if _, err := h.keys.Configure(t.Context(), "prod", settings); err != nil {
			t.Fatal(err)
		}
	}
	h.put("prod", "unseal", "value")
	if !warned(1) {
		t.Error("no warning, although losing the HSM loses it")
	}
	configure(keyring.Settings{AcceptSingleHSM: &yes})
	if warned(1) {
		t.Error("a warning, although somebody accepted that")
	}
	no := false
	configure(keyring.Settings{AcceptSingleHSM: &no})
	if !warned(1) {
		t.Error("no warning, although nobody accepts that any more")
	}
	configure(keyring.Settings{BackupConfirmed: &yes})
	if warned(1) {
		t.Error("a warning, although the HSM's key is backed up")
	}
	if _, err := h.keys.Rotate(t.Context(), "prod", keyring.RotateRequest{Adopt: &keyring.AdoptRequest{Device: "one", Label: "other", By: "test"}}); err != nil {
		t.Fatal(err)
	}
	if warned(1) {
		t.Error("a warning about the old version, whose backup is confirmed")
	}
	h.put("prod", "unseal", "value")
	if !warned(2) {
		t.Error("no warning about the new version, whose key nobody backed up")
	}
}
