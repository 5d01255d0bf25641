package object_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/object"
	"vault-plugin-secrets-nitrokey/internal/store/storetest"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// openNetHSM opens a double as a device that keeps objects.
func openNetHSM(t *testing.T, h *nethsmtest.HSM) *nethsm.Device {
	t.Helper()
	return openNetHSMWith(t, nethsm.Options{URLs: h.URLs(), TLS: nethsm.TLS{CA: h.CA()}})
}

func openNetHSMWith(t *testing.T, options nethsm.Options) *nethsm.Device {
	t.Helper()
	manager := nethsm.NewManager(nil)
	t.Cleanup(func() {
		if err := manager.Close(); err != nil {
			t.Errorf("closing the manager: %v", err)
		}
	})
	device, err := manager.Open(nethsm.DeviceConfig{
		Options:       options,
		Operator:      nethsm.Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)},
		Administrator: &nethsm.Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)},
		Objects:       true,
		Owner:         t.Name(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return device
}

func TestStoreOnNetHSM(t *testing.T) {
	for _, nodes := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d nodes", nodes), func(t *testing.T) {
			h, stateDir := nethsmtest.Start(t, nethsmtest.Options{Nodes: nodes, Provisioned: true}), t.TempDir()
			device := openNetHSM(t, h)
			places := 0
			storetest.TestStore(t, func(t *testing.T) storetest.Place {
				t.Helper()
				places++
				config := object.Config{Application: fmt.Sprintf("place%d", places), StateDir: stateDir, Serial: "nethsm"}
				return func() store.Store {
					s, err := object.New(func(context.Context) (hsm.ObjectStore, error) { return device, nil }, config)
					if err != nil {
						t.Fatal(err)
					}
					return s
				}
			}, storetest.Capabilities{MaxValue: object.MaxValueSize, MaxName: object.MaxNameLength, Rounds: 10, Writers: 4})
		})
	}
}

// On a NetHSM a name is taken once, also by writers that share no lock: those of another machine.
func TestWritersOfTwoMachinesOnNetHSM(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	first, second := open(t, openNetHSM(t, h), t.TempDir()), open(t, openNetHSM(t, h), t.TempDir())
	revision := store.NoRevision
	for round := range 10 {
		errs := make(chan error, 2)
		for _, s := range []*object.Store{first, second} {
			go func() {
				_, err := s.Put(t.Context(), "a", fmt.Appendf(nil, "round %d", round), revision)
				errs <- err
			}()
		}
		won := 0
		for range 2 {
			switch err := <-errs; {
			case err == nil:
				won++
			case !errors.Is(err, store.ErrConflict) && !errors.Is(err, store.ErrUnavailable):
				t.Errorf("Put = %v, want ErrConflict", err)
			}
		}
		if won > 1 {
			t.Fatalf("both writers of round %d won", round)
		}
		entry, err := first.Get(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		revision = entry.Revision
	}
}

// A NetHSM that dies between the carrier and its value leaves the old value, and the next write completes.
func TestInterruptedWriteOnNetHSMKeepsTheOldValue(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device := openNetHSM(t, h)
	s := open(t, device, t.TempDir())
	revision, err := s.Put(t.Context(), "a", []byte("old"), store.NoRevision)
	if err != nil {
		t.Fatal(err)
	}
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPut, Path: "/keys/", Drop: true, Times: 1})
	if _, err := s.Put(t.Context(), "a", []byte("new"), revision); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("Put that is interrupted = %v, want ErrUnavailable", err)
	}
	entry, err := s.Get(t.Context(), "a")
	if err != nil || string(entry.Value) != "old" || entry.Revision != revision {
		t.Fatalf("Get = %q, %v, want the old value", entry.Value, err)
	}
	if _, err := s.Put(t.Context(), "a", []byte("new"), revision); err != nil {
		t.Fatal(err)
	}
	if got := labels(t, device); len(got) != 1 || got[0] != "a#2" {
		t.Errorf("the NetHSM holds %q, want a#2", got)
	}
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPut, Path: "/keys/", Status: http.StatusInternalServerError, Times: 2})
	entry, err = s.Get(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Put(t.Context(), "a", []byte("newer"), entry.Revision); !errors.Is(err, store.ErrFull) {
		t.Errorf("Put on a NetHSM without room = %v, want ErrFull", err)
	}
}
