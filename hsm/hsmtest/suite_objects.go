package hsmtest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"sync"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// testObjects checks an hsm.ObjectStore. All objects belong to one application that nobody else uses.
func (s *suite) testObjects(t *testing.T) {
	application := "suite-" + unique()
	device := s.device(t)
	store, ok := device.(hsm.ObjectStore)
	if !ok {
		t.Fatal("the device is no hsm.ObjectStore")
	}
	t.Cleanup(func() { s.sweepObjects(t, store, application, application+"x") })
	largest := s.caps.MaxObject
	if largest == 0 {
		largest = 1024
	}
	ref := func(label string) hsm.ObjectRef { return hsm.ObjectRef{Application: application, Label: label} }
	labels := func(t *testing.T) []string {
		t.Helper()
		refs, err := store.Objects(s.context(t), application)
		if err != nil {
			t.Fatalf("Objects: %v", err)
		}
		found := make([]string, len(refs))
		for i, r := range refs {
			if r.Application != application {
				t.Errorf("Objects(%q) lists %+v", application, r)
			}
			found[i] = r.Label
		}
		return found
	}
	write := func(t *testing.T, label string, value []byte) {
		t.Helper()
		if err := store.WriteObject(s.context(t), ref(label), value); err != nil {
			t.Fatalf("WriteObject %q of %d bytes: %v", label, len(value), err)
		}
	}
	remove := func(t *testing.T, label string) {
		t.Helper()
		if err := store.DeleteObject(s.context(t), ref(label)); err != nil {
			t.Fatalf("DeleteObject %q: %v", label, err)
		}
	}

	t.Run("a name that does not exist is ErrNotFound", func(t *testing.T) {
		if found := labels(t); len(found) != 0 {
			t.Fatalf("a new application has objects: %q", found)
		}
		if value, err := store.ReadObject(s.context(t), ref("nothing")); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("ReadObject gives %d bytes, %v; want ErrNotFound", len(value), err)
		}
		if err := store.DeleteObject(s.context(t), ref("nothing")); !errors.Is(err, hsm.ErrNotFound) {
			t.Errorf("DeleteObject gives %v, want ErrNotFound", err)
		}
	})

	t.Run("a value is read back as written, by this handle and by another", func(t *testing.T) {
		other, ok := s.device(t).(hsm.ObjectStore)
		if !ok {
			t.Fatal("the device is no hsm.ObjectStore")
		}
		all := make([]byte, largest)
		_, _ = rand.Read(all) // never fails: crypto/rand
		for name, value := range map[string][]byte{
			"one-zero-byte": {0}, "trailing-zeros": {1, 2, 0, 0}, "trailing-blanks": []byte("blank  "), "largest": all,
		} {
			write(t, name, value)
			for _, reader := range []hsm.ObjectStore{store, other} {
				got, err := reader.ReadObject(s.context(t), ref(name))
				if err != nil || !bytes.Equal(got, value) {
					t.Errorf("%s: ReadObject gives %d bytes, %v; want the %d written", name, len(got), err, len(value))
				}
			}
			remove(t, name)
		}
	})

	t.Run("objects are listed in the order of their labels, each application its own", func(t *testing.T) {
		for _, label := range []string{"b/2", "a/1", "c/3"} {
			write(t, label, []byte(label))
		}
		stranger := hsm.ObjectRef{Application: application + "x", Label: "a/1"}
		if err := store.WriteObject(s.context(t), stranger, []byte("stranger")); err != nil {
			t.Fatalf("WriteObject of another application: %v", err)
		}
		if got, want := labels(t), []string{"a/1", "b/2", "c/3"}; !slices.Equal(got, want) {
			t.Errorf("Objects lists %q, want %q", got, want)
		}
		if got, err := store.ReadObject(s.context(t), ref("a/1")); err != nil || string(got) != "a/1" {
			t.Errorf("ReadObject gives %q, %v", got, err)
		}
		if err := store.DeleteObject(s.context(t), stranger); err != nil {
			t.Errorf("DeleteObject of another application: %v", err)
		}
		for _, label := range []string{"a/1", "b/2", "c/3"} {
			remove(t, label)
		}
		if got := labels(t); len(got) != 0 {
			t.Errorf("after deleting all, Objects lists %q", got)
		}
	})

	t.Run("an existing name is never replaced", func(t *testing.T) {
		write(t, "once", []byte("first"))
		if err := store.WriteObject(s.context(t), ref("once"), []byte("second")); !errors.Is(err, hsm.ErrExists) {
			t.Errorf("a second WriteObject gives %v, want ErrExists", err)
		}
		if got, err := store.ReadObject(s.context(t), ref("once")); err != nil || string(got) != "first" {
			t.Errorf("ReadObject gives %q, %v; want the first value", got, err)
		}
		if got := labels(t); !slices.Equal(got, []string{"once"}) {
			t.Errorf("Objects lists %q", got)
		}
		remove(t, "once")
		write(t, "once", []byte("again"))
		remove(t, "once")
	})

	t.Run("of writers that come together exactly one wins", func(t *testing.T) {
		const writers = 4
		results := make([]error, writers)
		var all sync.WaitGroup
		for i := range writers {
			all.Go(func() { results[i] = store.WriteObject(s.context(t), ref("race"), []byte{byte(i) + 1}) })
		}
		all.Wait()
		winner := slices.Index(results, nil)
		for i, err := range results {
			if i != winner && !errors.Is(err, hsm.ErrExists) {
				t.Errorf("writer %d gets %v; writer %d won, so it must be ErrExists", i, err, winner)
			}
		}
		if winner < 0 {
			t.Fatal("nobody won")
		}
		if got, err := store.ReadObject(s.context(t), ref("race")); err != nil || !bytes.Equal(got, []byte{byte(winner) + 1}) {
			t.Errorf("ReadObject gives %v, %v; want the winner's", got, err)
		}
		remove(t, "race")
	})

	if s.caps.DuplicateObject == nil {
		return
	}
	t.Run("two objects of one name are ambiguous and both kept", func(t *testing.T) {
		write(t, "twice", []byte("ours"))
		s.caps.DuplicateObject(t, ref("twice"), []byte("somebody else's"))
		if got := labels(t); !slices.Equal(got, []string{"twice", "twice"}) {
			t.Errorf("Objects lists %q, want two entries", got)
		}
		if value, err := store.ReadObject(s.context(t), ref("twice")); !errors.Is(err, hsm.ErrAmbiguous) {
			t.Errorf("ReadObject gives %q, %v; want ErrAmbiguous", value, err)
		}
		if err := store.DeleteObject(s.context(t), ref("twice")); !errors.Is(err, hsm.ErrAmbiguous) {
			t.Errorf("DeleteObject gives %v, want ErrAmbiguous", err)
		}
		if err := store.WriteObject(s.context(t), ref("twice"), []byte("third")); !errors.Is(err, hsm.ErrExists) {
			t.Errorf("WriteObject gives %v, want ErrExists", err)
		}
		if got := labels(t); len(got) != 2 {
			t.Errorf("afterwards Objects lists %q, want both", got)
		}
	})
}

// sweepObjects deletes what a test that failed has left: an owner's HSM is no place for that. Two objects of one name stay.
func (s *suite) sweepObjects(t *testing.T, store hsm.ObjectStore, applications ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, application := range applications {
		refs, err := store.Objects(ctx, application)
		if err != nil {
			t.Errorf("Objects after the tests: %v", err)
		}
		for _, ref := range refs {
			if err := store.DeleteObject(ctx, ref); err != nil && !errors.Is(err, hsm.ErrNotFound) && !errors.Is(err, hsm.ErrAmbiguous) {
				t.Errorf("deleting %+v after the tests: %v", ref, err)
			}
		}
	}
}
