package nethsm_test

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// eventually waits for something that happens in the background.
func eventually(t *testing.T, what string, happened func() bool) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for !happened() {
		select {
		case <-time.After(10 * time.Millisecond):
		case <-timeout:
			t.Fatalf("%s did not happen", what)
		}
	}
}

// asked counts the requests to a path on all nodes.
func asked(h *nethsmtest.HSM, method, path string) int {
	n := 0
	for _, node := range h.Nodes() {
		for _, request := range node.Requests() {
			if request.Method == method && strings.HasPrefix(strings.TrimPrefix(request.Path, "/api/v1"), path) {
				n++
			}
		}
	}
	return n
}

// A NetHSM locks nobody out, but it is asked no more than once a second, and no single 401 is believed.
func TestWrongPasswordIsNotHammered(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	key := generate(t, openDevice(t, deviceOn(h)), "seal")
	config := deviceOn(h)
	config.Operator.Password = []byte("not the password")
	device := openDevice(t, config)
	h.Node(0).ResetCounters()
	ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
	defer cancel()
	var all sync.WaitGroup
	for range 5 {
		all.Go(func() {
			for ctx.Err() == nil {
				keys, err := device.FindKeys(ctx, hsm.KeyQuery{ID: key.Ref().ID})
				if err == nil || !hsm.Away(err) || errors.Is(err, hsm.ErrNotFound) {
					t.Errorf("FindKeys with a wrong password = %v, %v; want an error that says try again", keys, err)
				}
				if err != nil && strings.Contains(err.Error(), "not the password") {
					t.Errorf("the error holds the password: %v", err)
				}
				select {
				case <-time.After(50 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		})
	}
	all.Wait()
	if n := len(h.Node(0).Requests()); n > 12 {
		t.Errorf("a wrong password cost %d requests in 2.5 s", n)
	}
	if n := asked(h, http.MethodGet, "/keys"); n > 4 {
		t.Errorf("a wrong password was tried %d times in 2.5 s", n)
	}
}

func TestRoleThatIsTooWeakIsForbidden(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	generate(t, openDevice(t, deviceOn(h)), "seal")
	config, ctx := deviceOn(h), shortly(t)
	// The administrator has the place of the operator, and the operator that of the administrator.
	strong, weak := *config.Administrator, config.Operator
	config.Operator, config.Administrator = strong, &weak
	device := openDevice(t, config)
	key, err := hsm.FindKey(ctx, device, hsm.KeyQuery{ID: "seal"})
	if err != nil {
		t.Fatal(err)
	}
	_, decrypted := key.(hsm.Decrypter).DecryptOAEP(ctx, crypto.SHA256, encrypted(t, key))
	_, generated := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "other"})
	_, random := device.Random(ctx, 8)
	for name, err := range map[string]error{
		"DecryptOAEP": decrypted, "GenerateKey": generated, "Random": random, "DeleteKey": device.DeleteKey(ctx, key.Ref()),
		"Lock":        device.Lock(ctx),
		"WriteObject": device.WriteObject(ctx, hsm.ObjectRef{Application: "a", Label: "b"}, []byte("c")),
	} {
		if !errors.Is(err, hsm.ErrForbidden) || errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("%s = %v, want ErrForbidden", name, err)
		}
		if err != nil && !strings.Contains(err.Error(), "role") {
			t.Errorf("%s does not speak of the role: %v", name, err)
		}
	}
	if h.Node(0).State() != nethsmtest.Operational {
		t.Error("somebody who may not lock locked it")
	}
}

func TestTagThatIsNotMetIsNamed(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx, admin := openDevice(t, deviceOn(h)), shortly(t), administrator(t, h)
	key := generate(t, device, "seal")
	decrypts(t, key)
	if err := admin.AddKeyTag(ctx, "seal", "unseal"); err != nil {
		t.Fatal(err)
	}
	_, stale := key.DecryptOAEP(ctx, crypto.SHA256, encrypted(t, key))
	found, err := hsm.FindKey(ctx, device, hsm.KeyQuery{ID: "seal"})
	if err != nil {
		t.Fatal(err)
	}
	_, fresh := found.(hsm.Decrypter).DecryptOAEP(ctx, crypto.SHA256, encrypted(t, key))
	for name, err := range map[string]error{"a key found before": stale, "a key found after": fresh} {
		if !errors.Is(err, hsm.ErrForbidden) || !strings.Contains(err.Error(), "tag") {
			t.Errorf("%s: %v, want ErrForbidden with a word on tags", name, err)
		}
	}
	if !strings.Contains(fresh.Error(), `"unseal"`) || !strings.Contains(fresh.Error(), nethsmtest.OperatorUser) {
		t.Errorf("the error names not the tag and the user: %v", fresh)
	}
	if err := admin.AddUserTag(ctx, nethsmtest.OperatorUser, "unseal"); err != nil {
		t.Fatal(err)
	}
	decrypts(t, key)
}

func TestKeyThatWasReplacedUnderItsIDHasChanged(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx, admin := openDevice(t, deviceOn(h)), shortly(t), administrator(t, h)
	for name, test := range map[string]struct {
		replace func() error
		want    error
	}{
		"nothing in its place": {func() error { return nil }, hsm.ErrNotFound},
		"a key of the same kind": {func() error {
			_, err := admin.GenerateKey(ctx, nethsm.NewKey{
				ID: "seal", Type: nethsm.TypeRSA, Length: 2048, Mechanisms: []nethsm.Mechanism{nethsm.RSADecryptionOAEPSHA256},
			})
			return err
		}, hsm.ErrKeyChanged},
		"a key of another mechanism": {func() error {
			_, err := admin.GenerateKey(ctx, nethsm.NewKey{
				ID: "seal", Type: nethsm.TypeRSA, Length: 2048, Mechanisms: []nethsm.Mechanism{nethsm.RSASignaturePKCS1},
			})
			return err
		}, hsm.ErrKeyChanged},
		"a key of another type": {func() error {
			_, err := admin.GenerateKey(ctx, nethsm.NewKey{
				ID: "seal", Type: nethsm.TypeGeneric, Length: 128, Mechanisms: []nethsm.Mechanism{nethsm.AESDecryptionCBC},
			})
			return err
		}, hsm.ErrKeyChanged},
	} {
		key := generate(t, device, "seal")
		if err := admin.DeleteKey(ctx, "seal"); err != nil {
			t.Fatal(err)
		}
		if err := test.replace(); err != nil {
			t.Fatal(err)
		}
		_, err := key.DecryptOAEP(ctx, crypto.SHA256, encrypted(t, key))
		if !errors.Is(err, test.want) || errors.Is(err, hsm.ErrCiphertext) {
			t.Errorf("%s: DecryptOAEP = %v, want %v and no word on the ciphertext", name, err, test.want)
		}
		if err := device.DeleteKey(ctx, key.Ref()); err == nil {
			t.Errorf("%s: DeleteKey deletes what is not that key", name)
		}
		if err := admin.DeleteKey(ctx, "seal"); err != nil && !errors.Is(err, hsm.ErrNotFound) {
			t.Fatal(err)
		}
	}
}

func TestAllNodesDownIsUnavailableAndPasses(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	device := openDevice(t, deviceOn(h))
	key := generate(t, device, "seal")
	for _, node := range h.Nodes() {
		node.Stop()
	}
	began := time.Now()
	_, decrypted := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
	_, generated := device.GenerateKey(shortly(t), hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "other"})
	_, told := device.Info(shortly(t))
	_, listed := device.Objects(shortly(t), "nitroseal")
	for name, err := range map[string]error{"DecryptOAEP": decrypted, "GenerateKey": generated, "Info": told, "Objects": listed} {
		if !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrMayHaveHappened) {
			t.Errorf("%s = %v, want ErrUnavailable and nothing that may have happened", name, err)
		}
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("refused connections cost %v", took)
	}
	for _, node := range h.Nodes() {
		if err := node.Start(); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the return of the NetHSM", func() bool {
		_, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
		return err == nil
	})
}

func TestOneOfThreeNodesDownIsNotNoticed(t *testing.T) {
	for away := range 3 {
		h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
		device := openDevice(t, deviceOn(h))
		key := generate(t, device, "seal")
		h.Node(away).Stop()
		for range 4 {
			decrypts(t, key)
		}
		generate(t, device, "other")
		ref := hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}
		if err := device.WriteObject(shortly(t), ref, []byte("value")); err != nil {
			t.Errorf("WriteObject without node %d: %v", away, err)
		}
		if value, err := device.ReadObject(shortly(t), ref); err != nil || string(value) != "value" {
			t.Errorf("ReadObject without node %d = %q, %v", away, value, err)
		}
		if info, err := device.Info(shortly(t)); err != nil || info.State != hsm.StateOperational {
			t.Errorf("Info without node %d = %+v, %v", away, info, err)
		}
	}
}

// A node that has lost its database refuses right passwords. The others serve meanwhile, and nobody is called wrong.
func TestNodeWithoutItsDatabaseIsLeftAlone(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	device := openDevice(t, deviceOn(h))
	key := generate(t, device, "seal")
	h.Node(0).LoseEtcd()
	for range 6 {
		decrypts(t, key)
	}
	generate(t, device, "other")
	if err := device.WriteObject(shortly(t), hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}, []byte("value")); err != nil {
		t.Errorf("WriteObject: %v", err)
	}
	for _, node := range h.Nodes() {
		node.LoseEtcd()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	var wrong *hsm.PINError
	if _, err := key.DecryptOAEP(ctx, crypto.SHA256, encrypted(t, key)); !hsm.Away(err) || errors.As(err, &wrong) {
		t.Errorf("DecryptOAEP without any database = %v, want an error that says try again and does not blame the password", err)
	}
	for _, node := range h.Nodes() {
		node.ReturnEtcd()
	}
	eventually(t, "the return of the NetHSM", func() bool {
		_, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
		return err == nil
	})
}

func TestHangHoldsNobodyBeyondTheDeadline(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device := openDevice(t, deviceOn(h))
	key := generate(t, device, "seal")
	h.Node(0).SetHang(true)
	defer h.Node(0).SetHang(false)
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}
	for name, call := range map[string]func(context.Context) error{
		"Info":     func(ctx context.Context) error { _, err := device.Info(ctx); return err },
		"FindKeys": func(ctx context.Context) error { _, err := device.FindKeys(ctx, hsm.KeyQuery{}); return err },
		"DecryptOAEP": func(ctx context.Context) error {
			_, err := key.DecryptOAEP(ctx, crypto.SHA256, encrypted(t, key))
			return err
		},
		"GenerateKey": func(ctx context.Context) error {
			_, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "other"})
			return err
		},
		"DeleteKey":    func(ctx context.Context) error { return device.DeleteKey(ctx, key.Ref()) },
		"Random":       func(ctx context.Context) error { _, err := device.Random(ctx, 8); return err },
		"Unlock":       func(ctx context.Context) error { return device.Unlock(ctx, []byte(nethsmtest.UnlockPassphrase)) },
		"Lock":         device.Lock,
		"Objects":      func(ctx context.Context) error { _, err := device.Objects(ctx, "nitroseal"); return err },
		"ReadObject":   func(ctx context.Context) error { _, err := device.ReadObject(ctx, ref); return err },
		"WriteObject":  func(ctx context.Context) error { return device.WriteObject(ctx, ref, []byte("value")) },
		"DeleteObject": func(ctx context.Context) error { return device.DeleteObject(ctx, ref) },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		began := time.Now()
		err := call(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s = %v, want the caller's deadline", name, err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("%s took %v beyond a deadline of 0.2 s", name, took)
		}
	}
}

func TestOneOfThreeNodesHangsAndTheOthersServe(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	config := deviceOn(h)
	config.Timeout = 9 * time.Second
	device := openDevice(t, config)
	key := generate(t, device, "seal")
	h.Node(0).SetHang(true)
	defer h.Node(0).SetHang(false)
	for range 4 {
		decrypts(t, key)
	}
	if info, err := device.Info(shortly(t)); err != nil || info.State != hsm.StateOperational {
		t.Errorf("Info = %+v, %v", info, err)
	}
	if err := device.WriteObject(shortly(t), hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}, []byte("value")); err != nil {
		t.Errorf("WriteObject: %v", err)
	}
}

func TestLockedNodeWantsAPerson(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device := openDevice(t, deviceOn(h))
	key := generate(t, device, "seal")
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	_, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
	if !errors.Is(err, hsm.ErrLocked) {
		t.Errorf("DecryptOAEP on a locked NetHSM = %v, want ErrLocked", err)
	}
	if info, err := device.Info(shortly(t)); err != nil || info.State != hsm.StateLocked {
		t.Errorf("Info = %+v, %v; want locked", info, err)
	}
	if err := device.Unlock(shortly(t), []byte(nethsmtest.UnlockPassphrase)); err != nil {
		t.Fatal(err)
	}
	decrypts(t, key)
}

func TestLockedNodeIsUnlockedByItself(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	log := &synchronized{}
	config := deviceOn(h)
	config.UnlockPassphrase = []byte(nethsmtest.UnlockPassphrase)
	config.Logger = slog.New(slog.NewTextHandler(log, nil))
	device := openDevice(t, config)
	key := generate(t, device, "seal")
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	decrypts(t, key) // it waits for the unlocking
	if said := log.String(); !strings.Contains(said, "unlocked by itself") || strings.Contains(said, nethsmtest.UnlockPassphrase) {
		t.Errorf("the log says %s", said)
	}
	if n := asked(h, http.MethodPost, "/unlock"); n != 1 {
		t.Errorf("it was unlocked %d times", n)
	}

	// What goes to one node alone waits for it, too.
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	generate(t, device, "other")

	// Who locks it on purpose finds it locked until he unlocks it.
	if err := device.Lock(shortly(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key)); !errors.Is(err, hsm.ErrLocked) {
		t.Errorf("DecryptOAEP after Lock = %v, want ErrLocked", err)
	}
	if n := asked(h, http.MethodPost, "/unlock"); n != 2 || h.Node(0).State() != nethsmtest.Locked {
		t.Errorf("what was locked on purpose is %s after %d unlockings", h.Node(0).State(), n)
	}
	if err := device.Unlock(shortly(t), nil); err != nil {
		t.Fatal(err)
	}
	decrypts(t, key)
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "unlocking it by itself again", func() bool {
		_, err := key.DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
		return err == nil
	})
}

func TestWrongUnlockPassphraseIsTriedOnce(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	key := generate(t, openDevice(t, deviceOn(h)), "seal")
	config := deviceOn(h)
	config.UnlockPassphrase = []byte("not the passphrase")
	device := openDevice(t, config)
	found, err := hsm.FindKey(shortly(t), device, hsm.KeyQuery{ID: key.Ref().ID})
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		_, err := found.(hsm.Decrypter).DecryptOAEP(shortly(t), crypto.SHA256, encrypted(t, key))
		if !errors.Is(err, hsm.ErrLocked) {
			t.Errorf("DecryptOAEP = %v, want ErrLocked", err)
		}
		select {
		case <-time.After(600 * time.Millisecond): // the NetHSM would take another one after a second
		case <-t.Context().Done():
		}
	}
	if n := asked(h, http.MethodPost, "/unlock"); n != 1 {
		t.Errorf("a wrong passphrase was tried %d times", n)
	}
}

func TestLostAnswerOfAGenerationIsLookedFor(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx := openDevice(t, deviceOn(h)), shortly(t)
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/keys/generate", Cut: true, After: -1, Times: 1})
	decrypts(t, generate(t, device, "seal"))

	// A request that surely was not carried out leaves nothing, and says that it may be there.
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/keys/generate", Drop: true, Times: 1})
	key, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "other"})
	if !errors.Is(err, hsm.ErrUnavailable) || !errors.Is(err, hsm.ErrMayHaveHappened) {
		t.Errorf("GenerateKey without an answer = %v, %v; want ErrUnavailable and ErrMayHaveHappened", key, err)
	}
	generate(t, device, "other")

	// A key that was there before is not taken for a new one.
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/keys/generate", Cut: true, After: -1, Times: 1})
	if key, err := device.GenerateKey(ctx, hsm.KeySpec{Algorithm: hsm.RSA2048, ID: "seal"}); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("GenerateKey with a taken id = %v, %v; want ErrExists", key, err)
	}
}

// The node that made the key goes down over it. Another one tells that it is there.
func TestNodeThatDiesOverAGenerationIsNotAskedAgain(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	device := openDevice(t, deviceOn(h))
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodGet, Path: "/keys/seal", Times: 1, Status: http.StatusNotFound})
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodGet, Drop: true})
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/keys/generate", Cut: true, After: -1})
	decrypts(t, generate(t, device, "seal"))
	if n := asked(h, http.MethodPost, "/keys/generate"); n != 1 {
		t.Errorf("the key was asked for %d times", n)
	}
}

func TestLostAnswerOfADeletionIsNoError(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx := openDevice(t, deviceOn(h)), shortly(t)
	key := generate(t, device, "seal")
	ref := hsm.ObjectRef{Application: "nitroseal", Label: "a#1"}
	if err := device.WriteObject(ctx, ref, []byte("value")); err != nil {
		t.Fatal(err)
	}
	lost := nethsmtest.Fault{Method: http.MethodDelete, Path: "/keys/", Cut: true, After: -1, Times: 1}
	h.Node(0).Inject(lost)
	if err := device.DeleteKey(ctx, key.Ref()); err != nil {
		t.Errorf("DeleteKey = %v", err)
	}
	h.Node(0).Inject(lost)
	if err := device.DeleteObject(ctx, ref); err != nil {
		t.Errorf("DeleteObject = %v", err)
	}
	// A request that does not arrive leaves what is there, and nobody can know.
	key = generate(t, device, "seal")
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodDelete, Path: "/keys/", Drop: true, Times: 1})
	if err := device.DeleteKey(ctx, key.Ref()); !errors.Is(err, hsm.ErrMayHaveHappened) || !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("DeleteKey without an answer = %v, want ErrUnavailable and ErrMayHaveHappened", err)
	}
	decrypts(t, key)
}

// synchronized is a log that several goroutines write.
type synchronized struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *synchronized) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *synchronized) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}
