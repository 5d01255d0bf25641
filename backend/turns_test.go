package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

func TestTurnsAreTakenOneAfterTheOtherForEachName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all turns
		first, err := all.take(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		other, err := all.take(t.Context(), "b")
		if err != nil {
			t.Fatal("another name waited:", err)
		}
		other()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := all.take(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a second user of the name: %v, want to wait until its deadline", err)
		}
		go func() {
			time.Sleep(time.Minute)
			first()
		}()
		second, err := all.take(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		second()
		if len(all.names) != 0 {
			t.Errorf("%d names are kept though nobody uses them", len(all.names))
		}
	})
}

// A client that lost its answer sends the change of a PIN again, while the first is still waiting for the card.
func TestOverlappingPINChangesOfAHungTokenEndAtTheirDeadlineAndHarmNothingElse(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	m.list("devices/prod-hsm/keys/").ok(t)
	m.write("config", fields{"request_timeout": 1}).ok(t)
	hung := make(chan struct{}, 2)
	m.rack.changing = func(ctx context.Context) error {
		hung <- struct{}{}
		<-ctx.Done()
		return fmt.Errorf("%w: %w", hsm.ErrMayHaveHappened, ctx.Err())
	}
	var group sync.WaitGroup
	replies := make([]reply, 2)
	for i := range replies {
		group.Go(func() { replies[i] = m.write("devices/prod-hsm/pin", fields{"new_pin": "735591"}) })
	}
	<-hung
	m.write("devices/other", fields{"module": testModule, "serial": "SN-other", "pin": rightPIN}).ok(t)
	group.Wait()
	for _, got := range replies {
		got.want(t, http.StatusServiceUnavailable).says(t, "request_timeout")
	}
	m.rack.changing = nil
	m.list("devices/prod-hsm/keys/").ok(t)
	if got := m.read("devices/prod-hsm"); got.text("pin_change_pending") != "false" {
		t.Errorf("after the next use: %v", got.data)
	}
	m.write("devices/prod-hsm/pin", fields{"new_pin": "735591"}).ok(t)
	if token.PIN() != "735591" {
		t.Error("the PIN was not changed")
	}
}

func TestPINChangeFirstSettlesOneThatWasCutShort(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	record, err := m.readDevice(t.Context(), "prod-hsm")
	if err != nil {
		t.Fatal(err)
	}
	record.NextPIN = "735591"
	if err := m.putDevice(t.Context(), "prod-hsm", record); err != nil {
		t.Fatal(err)
	}
	if err := token.ChangePIN(t.Context(), []byte("735591")); err != nil {
		t.Fatal(err)
	}
	m = m.remount()
	m.write("devices/prod-hsm/pin", fields{"new_pin": "902144"}).ok(t)
	m.list("devices/prod-hsm/keys/").ok(t)
	if token.PIN() != "902144" || token.wrong != 0 {
		t.Errorf("the token has the PIN %q after %d wrong ones", token.PIN(), token.wrong)
	}
}

func TestConcurrentWritesOfTheConfigurationLoseNothing(t *testing.T) {
	for range 20 {
		m := newMount(t)
		var group sync.WaitGroup
		for field, value := range map[string]any{"request_timeout": 30, "default_key": "prod", "default_store": "etcd"} {
			group.Go(func() { m.write("config", fields{field: value}).ok(t) })
		}
		group.Wait()
		if got := m.read("config"); got.text("request_timeout") != "30" || got.text("default_key") != "prod" || got.text("default_store") != "etcd" {
			t.Fatalf("a write was lost: %v", got.data)
		}
	}
}
