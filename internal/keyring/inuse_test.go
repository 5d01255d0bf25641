package keyring

import (
	"context"
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

func TestAKeyThatSomebodyNeedsIsDeletedByForceOnly(t *testing.T) {
	var asked []string
	user, failure := "3 items of material are sealed with it", error(nil)
	prepared := func(t *testing.T) *fixture {
		t.Helper()
		f := newFixture(t)
		f.Keyring = New(Config{
			Records: f.store, Devices: f.devices, Now: f.clock.Now,
			InUse: func(_ context.Context, name string) (string, error) {
				asked = append(asked, name)
				return user, failure
			},
		})
		f.generate()
		asked = nil
		return f
	}
	ctx := t.Context()

	t.Run("it is not asked for before the deletion is allowed", func(t *testing.T) {
		f := prepared(t)
		if err := f.Delete(ctx, "prod", DeleteRequest{}); !errors.Is(err, ErrDeletionNotAllowed) || len(asked) != 0 {
			t.Errorf("got %v, asked about %v", err, asked)
		}
	})
	t.Run("it refuses, and names the user", func(t *testing.T) {
		f := prepared(t)
		f.configure(Settings{DeletionAllowed: ptr(true)})
		for _, hsmKeys := range []bool{false, true} {
			err := f.Delete(ctx, "prod", DeleteRequest{DeleteHSMKeys: hsmKeys})
			if !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), user) || !strings.Contains(err.Error(), "force=true") {
				t.Errorf("got %v, want ErrInUse that says by whom", err)
			}
		}
		if key, err := f.Get(ctx, "prod"); err != nil || key.State != StateReady || len(hsmKeys(t, f.one)) != 3 {
			t.Errorf("a refused deletion left %+v, %v", key, err)
		}
		if err := f.Delete(ctx, "prod", DeleteRequest{Force: true}); err != nil {
			t.Errorf("by force: %v", err)
		}
	})
	t.Run("a question without an answer refuses as well", func(t *testing.T) {
		f := prepared(t)
		f.configure(Settings{DeletionAllowed: ptr(true)})
		failure = hsm.ErrUnavailable
		defer func() { failure = nil }()
		if err := f.Delete(ctx, "prod", DeleteRequest{}); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
		if _, err := f.Get(ctx, "prod"); err != nil {
			t.Errorf("a refused deletion left %v", err)
		}
	})
	t.Run("a deletion that was begun is completed without asking", func(t *testing.T) {
		f := prepared(t)
		f.configure(Settings{DeletionAllowed: ptr(true)})
		f.one.SetError(hsm.ErrUnavailable)
		if err := f.Delete(ctx, "prod", DeleteRequest{DeleteHSMKeys: true, Force: true}); !errors.Is(err, hsm.ErrUnavailable) {
			t.Fatal(err)
		}
		f.one.SetError(nil)
		if err := f.Delete(ctx, "prod", DeleteRequest{DeleteHSMKeys: true}); err != nil || len(asked) != 0 {
			t.Errorf("got %v, asked about %v", err, asked)
		}
	})
	t.Run("nobody needs it", func(t *testing.T) {
		f := prepared(t)
		f.configure(Settings{DeletionAllowed: ptr(true)})
		user = ""
		if err := f.Delete(ctx, "prod", DeleteRequest{}); err != nil || len(asked) != 1 || asked[0] != "prod" {
			t.Errorf("got %v, asked about %v", err, asked)
		}
	})
}
