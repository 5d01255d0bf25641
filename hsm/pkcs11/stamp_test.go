package pkcs11

import (
	"errors"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

func TestAHostOlderThanAnotherProcessesWriteIsNotAskedWhatThereIs(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	// As OpenSC does: a host knows the objects that were there when it was born, and those that it wrote itself.
	f.objects["prod"] = "value"
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if h.number == 1 && r.Op == wire.OpObjects {
			h.answer(r, wire.Objects{}, nil)
			return true
		}
		return false
	})
	if refs, err := d.Objects(patient(t), "nitroseal"); err != nil || len(refs) != 0 {
		t.Fatalf("the first host sees %v, %v", refs, err)
	}
	other := New(Options{StateDir: m.options.StateDir}) // stands for another process of the machine
	other.wrote(nil)
	if refs, err := d.Objects(patient(t), "nitroseal"); err != nil || len(refs) != 1 {
		t.Errorf("after another process wrote there are %v, %v, want the object", refs, err)
	}
	if err := d.DeleteObject(patient(t), hsm.ObjectRef{Application: "nitroseal", Label: "prod"}); err != nil {
		t.Error(err)
	}
	born := f.born()
	if _, err := d.Objects(patient(t), "nitroseal"); err != nil || f.born() != born {
		t.Errorf("our own write cost another host: %d after %d, %v", f.born(), born, err)
	}
}

func TestAKeyMadeByAnotherProgramIsFound(t *testing.T) {
	f, m, module := newFake(t)
	d := f.open(t, m, module)
	f.follow(func(h *fakeHost, r wire.Frame) bool {
		if h.number == 1 && r.Op == wire.OpFindKeys {
			h.answer(r, wire.Keys{}, nil)
			return true
		}
		return false
	})
	query := hsm.KeyQuery{Label: "unseal"}
	if _, err := hsm.FindKey(patient(t), d, query); !errors.Is(err, hsm.ErrNotFound) || f.born() != 1 {
		t.Fatalf("a young host is believed: %v, %d hosts", err, f.born())
	}
	eventually(t, "a key that a new host sees is found", func() bool {
		_, err := hsm.FindKey(patient(t), d, query)
		return err == nil
	})
	if f.born() != 2 {
		t.Errorf("%d hosts were born, want 2", f.born())
	}
}
