package custody_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// addSecondHSM makes the second HSM a recipient of the key "prod".
func (h *house) addSecondHSM() {
	h.t.Helper()
	if _, err := h.keys.AddRecipient(h.t.Context(), "prod", keyring.AdoptRequest{Device: "two", Label: "ec", By: "test"}); err != nil {
		h.t.Fatal(err)
	}
}

func (h *house) wantSurvey(items, single, outdated int) {
	h.t.Helper()
	s, err := h.Survey(h.t.Context(), "prod")
	if err != nil || s.Items != items || s.SingleHSM != single || s.Outdated != outdated || len(s.Problems) != 0 {
		h.t.Fatalf("Survey = %+v, %v, want %d items, %d on one HSM, %d outdated", s, err, items, single, outdated)
	}
}

func TestRewrapSealsEverythingToTheNewRecipient(t *testing.T) {
	h := newHouse(t)
	for i := range 4 {
		h.put("prod", fmt.Sprintf("item%d", i), fmt.Sprint(i))
	}
	if _, err := h.Put(t.Context(), "prod", "elsewhere", text("e"), custody.PutOptions{Key: "other"}); err != nil {
		t.Fatal(err)
	}
	h.wantSurvey(4, 4, 0)
	h.addSecondHSM()
	h.wantSurvey(4, 4, 4)

	operations := h.one.Operations()
	var steps []custody.Progress
	report, err := h.Rewrap(t.Context(), "prod", "ops", func(p custody.Progress) { steps = append(steps, p) })
	if err != nil || report.Items != 4 || report.Rewrapped != 4 || report.SingleHSM != 0 || len(report.Failed) != 0 {
		t.Fatalf("Rewrap = %+v, %v", report, err)
	}
	if spent := h.one.Operations() - operations; spent != 4 {
		t.Errorf("rewrapping four items cost %d operations", spent)
	}
	if len(steps) != 5 || steps[4].Done != 5 || steps[4].Total != 5 {
		t.Errorf("progress was %+v", steps)
	}
	h.wantSurvey(4, 0, 0)

	h.one.SetError(hsm.ErrUnavailable) // the first HSM is lost; the second one opens everything
	for i := range 4 {
		h.wantOpen("prod", fmt.Sprintf("item%d", i), fmt.Sprint(i))
	}
	if report, err := h.Rewrap(t.Context(), "prod", "ops", nil); err != nil || report.Rewrapped != 0 || report.Items != 4 {
		t.Errorf("a second Rewrap = %+v, %v, want nothing to do", report, err)
	}
}

func TestARepeatAfterARewrapIsNoConflict(t *testing.T) {
	h := newHouse(t)
	for n, id := range []string{"r-1", "r-2"} {
		if _, err := putAs(t, h.Keeper, id, id, generation(uint64(n))); err != nil {
			t.Fatal(err)
		}
	}
	h.addSecondHSM()
	if report, err := h.Rewrap(t.Context(), "prod", "", nil); err != nil || report.Rewrapped != 1 {
		t.Fatalf("Rewrap = %+v, %v", report, err)
	}
	for _, cas := range []*uint64{generation(1), nil} {
		again, err := putAs(t, h.Keeper, "r-2", "r-2", cas)
		if err != nil || again.Generation != 3 || again.HSMs != 2 {
			t.Errorf("the repeat = %+v, %v, want it at generation 3, as it was rewrapped", again, err)
		}
	}
	if _, err := putAs(t, h.Keeper, "r-2", "other", generation(1)); !errors.Is(err, custody.ErrInvalid) {
		t.Errorf("the id for other values: %v, want ErrInvalid", err)
	}
	if _, err := putAs(t, h.Keeper, "r-1", "r-1", generation(0)); !errors.Is(err, custody.ErrConflict) {
		t.Errorf("the repeat of the write before: %v, want ErrConflict", err)
	}
	h.wantOpen("prod", "unseal", "r-2")
	h.put("prod", "unseal", "theirs")
	if _, err := putAs(t, h.Keeper, "r-2", "r-2", generation(1)); !errors.Is(err, custody.ErrConflict) {
		t.Errorf("the repeat after somebody else wrote: %v, want ErrConflict", err)
	}
}

func TestRewrapStoppedInTheMiddleGoesOn(t *testing.T) {
	h := newHouse(t)
	for i := range 4 {
		h.put("prod", fmt.Sprintf("item%d", i), fmt.Sprint(i))
	}
	h.addSecondHSM()
	ctx, stop := context.WithCancel(t.Context())
	report, err := h.Rewrap(ctx, "prod", "", func(p custody.Progress) {
		if p.Done == 2 {
			stop()
		}
	})
	if !errors.Is(err, context.Canceled) || report.Rewrapped != 2 {
		t.Fatalf("the stopped Rewrap = %+v, %v", report, err)
	}
	h.wantSurvey(4, 2, 2)
	if report, err := h.Rewrap(t.Context(), "prod", "", nil); err != nil || report.Rewrapped != 2 || report.SingleHSM != 0 {
		t.Fatalf("the second Rewrap = %+v, %v", report, err)
	}
	h.wantSurvey(4, 0, 0)
}

func TestRewrapPassesOverWhatFails(t *testing.T) {
	h := newHouse(t)
	h.put("prod", "a", "a")
	h.put("prod", "b", "b")
	old := h.raw("main", "material/prod/b").Value
	h.put("prod", "b", "b")
	h.put("prod", "c", "c")
	h.plant("main", "material/prod/b", old)
	h.addSecondHSM()
	report, err := h.Rewrap(t.Context(), "prod", "", nil)
	if err != nil || report.Rewrapped != 2 || len(report.Failed) != 1 || !errors.Is(report.Failed[0].Err, custody.ErrStale) {
		t.Fatalf("Rewrap = %+v, %v", report, err)
	}
	if s, err := h.Survey(t.Context(), "prod"); err != nil || len(s.Problems) != 1 || s.SingleHSM != 1 {
		t.Errorf("Survey = %+v, %v", s, err)
	}
}

func TestRewrapWhileItemsAreWritten(t *testing.T) {
	h := newHouse(t)
	for i := range 3 {
		h.put("prod", fmt.Sprintf("item%d", i), "0")
	}
	h.addSecondHSM()
	var group sync.WaitGroup
	group.Go(func() {
		writer := h.keeper(h.records, h)
		for n := range 10 {
			for i := range 3 {
				if _, err := writer.Put(t.Context(), "prod", fmt.Sprintf("item%d", i), text(fmt.Sprint(n)), custody.PutOptions{}); err != nil {
					t.Errorf("Put = %v", err)
				}
			}
		}
	})
	for range 5 {
		if report, err := h.Rewrap(t.Context(), "prod", "", nil); err != nil || len(report.Failed) != 0 {
			t.Errorf("Rewrap = %+v, %v", report, err)
		}
	}
	group.Wait()
	for i := range 3 {
		h.wantOpen("prod", fmt.Sprintf("item%d", i), "9") // no rewrap has brought an older value back
	}
}
