package nethsm

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

func TestANewNetHSMIsProvisionedOnce(t *testing.T) {
	h := unprovisioned(t)
	client := setupClient(t, h)
	commission(t, client)
	if state, err := client.State(t.Context()); err != nil || state != StateOperational {
		t.Fatalf("%s, %v", state, err)
	}
	admin := client.As(Credentials{Username: "admin", Password: []byte(nethsmtest.AdminPassphrase)})
	if skew, err := admin.ClockSkew(t.Context()); err != nil || skew.Abs() > 2*time.Second {
		t.Errorf("the clock is off by %v, %v", skew, err)
	}

	h.Node(0).ResetCounters()
	err := client.Commission(t.Context(), Provisioning{UnlockPassphrase: Secret("AnotherPassphrase"), AdminPassphrase: Secret("AnotherPassphrase")})
	if !errors.Is(err, ErrState) || !errors.Is(err, hsm.ErrExists) || !strings.Contains(err.Error(), "provisioned already") {
		t.Errorf("the second time: %v", err)
	}
	if sent := changing(h); sent != nil {
		t.Errorf("the second time it sent %v", sent)
	}
}

func TestALostAnswerOfProvisioningIsFoundOut(t *testing.T) {
	h := unprovisioned(t)
	client := setupClient(t, h)
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/provision", Cut: true, After: -1, Times: 1})
	commission(t, client)
}

func TestAProvisioningThatNeverArrivedIsNoSuccess(t *testing.T) {
	h := unprovisioned(t)
	client := setupClient(t, h)
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/provision", Drop: true})
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err := client.Commission(ctx, Provisioning{UnlockPassphrase: Secret("AnotherPassphrase"), AdminPassphrase: Secret("AnotherPassphrase")})
	if err == nil {
		t.Fatal("it said that it is provisioned")
	}
	h.Node(0).ClearFaults()
	commission(t, client)
}

func TestPassphrasesThatANetHSMWouldRefuseAreNotSent(t *testing.T) {
	h := unprovisioned(t)
	client := setupClient(t, h)
	for name, p := range map[string]Provisioning{
		"a short unlock passphrase": {UnlockPassphrase: Secret("123456789"), AdminPassphrase: Secret("long enough")},
		"a short admin passphrase":  {UnlockPassphrase: Secret("long enough"), AdminPassphrase: Secret("123456789")},
		"none":                      {},
		"a long one":                {UnlockPassphrase: Secret(strings.Repeat("x", 201)), AdminPassphrase: Secret("long enough")},
	} {
		t.Run(name, func(t *testing.T) {
			if err := client.Commission(t.Context(), p); !errors.Is(err, ErrRequest) {
				t.Errorf("got %v", err)
			}
			if sent := changing(h); sent != nil {
				t.Errorf("it sent %v", sent)
			}
		})
	}
}

func TestACertificateIsShownWithoutASingleRequest(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{SelfSigned: true})
	shown, err := ShowCertificate(t.Context(), h.URLs()[0], "")
	if err != nil {
		t.Fatal(err)
	}
	if shown.Pin != h.Node(0).Pin() || !shown.SelfSigned || shown.Verified || shown.NotAfter.Before(time.Now()) {
		t.Errorf("%+v, and the node's pin is %s", shown, h.Node(0).Pin())
	}
	if sent := h.Node(0).Requests(); len(sent) > 0 {
		t.Errorf("it sent %v", sent)
	}
	// With the pin the node is trusted, with another one nothing is sent to it.
	for pin, trusted := range map[string]bool{shown.Pin: true, strings.Repeat("00", 32): false} {
		client, err := New(Options{URLs: h.URLs(), TLS: TLS{Pins: []string{pin}}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.State(t.Context()); (err == nil) != trusted {
			t.Errorf("with the pin %s: %v", pin, err)
		}
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	}

	signed := nethsmtest.Start(t, nethsmtest.Options{})
	if shown, err = ShowCertificate(t.Context(), signed.URLs()[0], ""); err != nil || shown.SelfSigned || shown.Verified {
		t.Errorf("of a CA that nobody knows: %+v, %v", shown, err)
	}
}

func TestEveryLockedNodeIsUnlockedAndTheOthersAreLeftAlone(t *testing.T) {
	h := provisioned(t, 3)
	client := setupClient(t, h)
	h.Node(0).SetState(nethsmtest.Locked)
	h.Node(2).SetState(nethsmtest.Locked)
	results := client.UnlockNodes(t.Context(), []byte(nethsmtest.UnlockPassphrase))
	for i, result := range results {
		if result.Err != nil || result.After != StateOperational || result.Changed() != (i != 1) {
			t.Errorf("node %d: %+v", i, result)
		}
	}
	for _, r := range h.Node(1).Requests() {
		if r.Method != http.MethodGet {
			t.Errorf("the node that was open got %+v", r)
		}
	}
}

func TestWhatKeepsANodeLockedIsToldApart(t *testing.T) {
	h := provisioned(t, 4)
	client := setupClient(t, h)
	h.Node(0).SetState(nethsmtest.Locked)
	h.Node(1).SetState(nethsmtest.Unprovisioned)
	h.Node(2).SetState(nethsmtest.Failed)
	h.Node(3).Stop()
	results := client.UnlockNodes(t.Context(), []byte("WrongPassphrase"))
	var wrong *hsm.PINError
	if !errors.As(results[0].Err, &wrong) || !wrong.Wrong {
		t.Errorf("wrong passphrase: %v", results[0].Err)
	}
	if err := results[1].Err; !errors.Is(err, ErrState) || errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("unprovisioned: %v", err)
	}
	for i := 2; i < 4; i++ {
		if !errors.Is(results[i].Err, hsm.ErrUnavailable) {
			t.Errorf("node %d: %v", i, results[i].Err)
		}
	}
}

func TestNodesAreLockedByTheirAdministratorOnly(t *testing.T) {
	h := provisioned(t, 2)
	client := setupClient(t, h)
	operator := client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
	for _, result := range operator.LockNodes(t.Context()) {
		if !errors.Is(result.Err, hsm.ErrForbidden) || result.Changed() {
			t.Errorf("as an operator: %+v", result)
		}
	}
	admin := client.As(Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)})
	for _, changed := range []bool{true, false} {
		for _, result := range admin.LockNodes(t.Context()) {
			if result.Err != nil || result.After != StateLocked || result.Changed() != changed {
				t.Errorf("as the administrator: %+v", result)
			}
		}
	}
}

// TestALogInTellsAWrongPasswordInTheEnd shortens the minute that a NetHSM gets before its 401 is believed.
func TestALogInTellsAWrongPasswordInTheEnd(t *testing.T) {
	h := provisioned(t, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	operator := setupClient(t, h).As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte("WrongPassphrase")})
	if _, err := operator.User(ctx, nethsmtest.OperatorUser); !errors.Is(err, hsm.ErrUnavailable) {
		t.Fatalf("at first: %v", err)
	}
	s := operator.login.standing[0]
	s.mu.Lock()
	s.refusal.since = s.refusal.since.Add(-2 * verdictTime)
	s.mu.Unlock()
	err := operator.LogIn(ctx)
	if wrong, is := errors.AsType[*hsm.PINError](err); !is || !wrong.Wrong || strings.Contains(err.Error(), "WrongPassphrase") {
		t.Errorf("in the end: %v", err)
	}
}

func TestALogInWaitsForANetHSMThatLostItsDatabase(t *testing.T) {
	h := provisioned(t, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	operator := setupClient(t, h).As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
	h.Node(0).LoseEtcd()
	if _, err := operator.User(ctx, nethsmtest.OperatorUser); !errors.Is(err, hsm.ErrUnavailable) {
		t.Fatalf("at first: %v", err)
	}
	h.Node(0).ReturnEtcd()
	if err := operator.LogIn(ctx); err != nil {
		t.Error(err)
	}
}
