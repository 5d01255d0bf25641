package keyring

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func generateRequest() GenerateRequest {
	return GenerateRequest{Device: "one", Algorithm: hsm.ECDHP384, By: "alice"}
}

func (f *fixture) begin(request GenerateRequest) *Key {
	f.t.Helper()
	key, err := f.Begin(f.t.Context(), "prod", request)
	if err != nil {
		f.t.Fatalf("beginning: %v", err)
	}
	return key
}

func (f *fixture) finish() *Key {
	f.t.Helper()
	key, err := f.Finish(f.t.Context(), "prod")
	if err != nil {
		f.t.Fatalf("finishing: %v", err)
	}
	return key
}

func TestAnHSMKeyIsAnnouncedBeforeItIsMade(t *testing.T) {
	f := newFixture(t)
	key := f.begin(generateRequest())
	if key.State != StateGenerating || key.LatestVersion != 0 || key.RecordSHA256 != "" {
		t.Fatalf("begun as %+v", key)
	}
	if p := key.Pending; p.Version != 1 || len(p.ID) != 32 || p.Label != "nitroseal-prod-v1" || p.By != "alice" {
		t.Errorf("pending %+v", p)
	}
	if f.one.Generations() != 0 {
		t.Error("the HSM made a key before Finish")
	}
	for _, purpose := range []Purpose{PurposeWrap, PurposeEncrypt} {
		if err := f.Ready(t.Context(), "prod", purpose); !errors.Is(err, ErrGenerating) {
			t.Errorf("ready for %s: %v, want ErrGenerating", purpose, err)
		}
	}
	if _, err := f.Wrap(t.Context(), "prod", envelope.UseWrap, nil, nil); !errors.Is(err, ErrGenerating) {
		t.Errorf("wrapping: %v, want ErrGenerating", err)
	}
	if _, err := f.Backup(t.Context(), "prod", "carol"); !errors.Is(err, ErrGenerating) {
		t.Errorf("reading the key record: %v, want ErrGenerating", err)
	}
	if _, err := f.AddRecipient(t.Context(), "prod", AdoptRequest{Device: "two", Label: "ec"}); !errors.Is(err, ErrGenerating) {
		t.Errorf("adding a recipient: %v, want ErrGenerating", err)
	}
	if _, err := f.Adopt(t.Context(), "prod", AdoptRequest{Device: "two", Label: "ec"}); !errors.Is(err, ErrGenerating) {
		t.Errorf("adopting: %v, want ErrGenerating", err)
	}
	if _, err := f.Configure(t.Context(), "prod", Settings{BackupConfirmed: ptr(true)}); !errors.Is(err, ErrGenerating) {
		t.Errorf("confirming the backup of nothing: %v, want ErrGenerating", err)
	}
	if err := f.Delete(t.Context(), "prod", DeleteRequest{}); !errors.Is(err, ErrGenerating) {
		t.Errorf("deleting: %v, want ErrGenerating", err)
	}

	made := f.finish()
	if made.State != StateReady || made.Versions[0].Recipients[0].ID != key.Pending.ID ||
		made.Versions[0].Recipients[0].Kind != hsm.ECDHP384 || made.Versions[0].CreatedBy != "alice" {
		t.Errorf("made %+v", made)
	}
	if f.unwrapped(f.wrap("secret")) != "secret" {
		t.Error("it does not work")
	}
	for range 3 {
		f.finish()
	}
	if f.one.Generations() != 1 {
		t.Errorf("the HSM made %d keys", f.one.Generations())
	}
}

func TestRepeatedRequestsResumeAndOthersAreRefused(t *testing.T) {
	f := newFixture(t)
	request := generateRequest()
	request.RequestID = "r1"
	id := f.begin(request).Pending.ID

	if again := f.begin(request); again.Pending.ID != id {
		t.Error("a repeat chose another id")
	}
	resent := generateRequest() // the same without a request id
	if again := f.begin(resent); again.Pending.ID != id {
		t.Error("a repeat without request id chose another id")
	}
	for name, test := range map[string]struct {
		change func(*GenerateRequest)
		want   error
	}{
		"the request id with another algorithm": {func(r *GenerateRequest) { r.Algorithm = hsm.ECDHP256 }, ErrRequestReused},
		"another request id and algorithm": {
			func(r *GenerateRequest) { r.Algorithm, r.RequestID = hsm.ECDHP256, "r2" },
			ErrGenerating,
		},
		"another device":       {func(r *GenerateRequest) { r.Device, r.RequestID = "two", "" }, ErrGenerating},
		"no device":            {func(r *GenerateRequest) { r.Device = "" }, ErrInvalid},
		"an unknown algorithm": {func(r *GenerateRequest) { r.Algorithm = "dsa" }, ErrInvalid},
	} {
		other := request
		test.change(&other)
		if _, err := f.Begin(t.Context(), "prod", other); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	f.finish()
	if again := f.begin(request); again.State != StateReady || again.LatestVersion != 1 {
		t.Errorf("a repeat after the end answers %+v", again)
	}
	if _, err := f.Begin(t.Context(), "prod", generateRequest()); !errors.Is(err, ErrKeyExists) {
		t.Errorf("a new request for a key that exists: %v, want ErrKeyExists", err)
	}
}

func TestARotationWorksWithTheOldVersionUntilItIsFinished(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	request := generateRequest()
	request.RequestID = "r1"
	rotation := RotateRequest{Generate: &request}
	key, err := f.Rotate(t.Context(), "prod", rotation)
	if err != nil || key.State != StateGenerating || key.Pending.Version != 2 || key.LatestVersion != 1 {
		t.Fatalf("rotating: %+v, %v", key, err)
	}
	if f.unwrapped(f.wrap("meanwhile")) != "meanwhile" {
		t.Error("the old version does not work")
	}
	f.configure(Settings{AcceptSingleHSM: ptr(true)})
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Adopt: &AdoptRequest{Device: "two", Label: "ec"}}); !errors.Is(err, ErrGenerating) {
		t.Errorf("another rotation: %v, want ErrGenerating", err)
	}
	if got := f.finish(); got.LatestVersion != 2 || got.AcceptSingleHSM == nil || got.State != StateReady {
		t.Errorf("finished as %+v", got)
	}
	for range 3 {
		if key, err := f.Rotate(t.Context(), "prod", rotation); err != nil || key.LatestVersion != 2 || key.Pending != nil {
			t.Errorf("a repeat after the end: %+v, %v", key, err)
		}
	}
	for name, bad := range map[string]RotateRequest{
		"neither": {}, "both": {Adopt: &AdoptRequest{Device: "one", Label: "ec"}, Generate: &request},
	} {
		if _, err := f.Rotate(t.Context(), "prod", bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if _, err := f.Rotate(t.Context(), "nobody", rotation); !errors.Is(err, ErrKeyNotFound) {
		t.Errorf("a key that does not exist: %v, want ErrKeyNotFound", err)
	}
}

func TestAFailureToMakeAKeyCanBeReadAndTriedAgain(t *testing.T) {
	f := newFixture(t)
	f.begin(generateRequest())
	f.one.SetCapacity(2)
	if _, err := f.Finish(t.Context(), "prod"); !errors.Is(err, hsm.ErrFull) {
		t.Fatalf("a full HSM: %v, want ErrFull", err)
	}
	key, err := f.Get(t.Context(), "prod")
	if err != nil || key.State != StateGenerating || key.Pending.LastError == "" || len(key.Warnings) == 0 {
		t.Errorf("nobody can read why: %+v, %v", key, err)
	}
	f.one.SetCapacity(-1)
	if key := f.finish(); key.State != StateReady || key.Pending != nil {
		t.Errorf("finished as %+v", key)
	}
}

func TestABeginForAnHSMThatIsNotThereBeginsNothing(t *testing.T) {
	f := newFixture(t)
	request := generateRequest()
	request.Device = "three"
	if _, err := f.Begin(t.Context(), "prod", request); !errors.Is(err, ErrNoDevice) || !errors.Is(err, ErrInvalid) {
		t.Errorf("got %v", err)
	}
	if names, _ := f.List(t.Context()); len(names) != 0 {
		t.Errorf("left %v", names)
	}
}

func TestAKeyOfAnotherKindUnderTheChosenIDIsNotTaken(t *testing.T) {
	f := newFixture(t)
	id := f.begin(generateRequest()).Pending.ID
	f.one.AddRSA(t, "foreign", id, 2048)
	if _, err := f.Finish(t.Context(), "prod"); !errors.Is(err, ErrUnusableKey) {
		t.Errorf("got %v, want ErrUnusableKey", err)
	}
}

func TestAbandoningUndoesARotationAndKeepsTheKey(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	request := generateRequest()
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Generate: &request}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := f.Abandon(t.Context(), "prod"); err != nil {
			t.Fatal(err)
		}
	}
	key, err := f.Get(t.Context(), "prod")
	if err != nil || key.State != StateReady || key.LatestVersion != 1 {
		t.Errorf("left %+v, %v", key, err)
	}
	if got := hsmKeys(t, f.one); !slices.Equal(got, []string{"01", "02"}) {
		t.Errorf("HSM keys left: %v", got)
	}
	if err := f.Abandon(t.Context(), "nobody"); err != nil {
		t.Errorf("abandoning what is not there: %v", err)
	}
}

func TestAbandoningNeverDeletesAnHSMKeyThatSomebodyAdopted(t *testing.T) {
	f := newFixture(t)
	id := f.begin(generateRequest()).Pending.ID
	f.one.AddEC(t, "made", id, ecdh.P384()) // Finish crashed after this
	if _, err := f.Adopt(t.Context(), "other", AdoptRequest{Device: "one", ID: id}); err != nil {
		t.Fatal(err)
	}
	if err := f.Abandon(t.Context(), "prod"); err != nil {
		t.Fatal(err)
	}
	if got := hsmKeys(t, f.one); !slices.Contains(got, id) {
		t.Errorf("HSM keys left: %v, without the adopted %s", got, id)
	}
}

func TestAnIntentOnADeadHSMCanBeForgotten(t *testing.T) {
	f := newFixture(t)
	f.begin(generateRequest())
	f.one.SetError(hsm.ErrUnavailable)
	if err := f.Abandon(t.Context(), "prod"); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("abandoning without the HSM: %v", err)
	}
	if key, err := f.Get(t.Context(), "prod"); err != nil || key.State != StateAbandoning {
		t.Errorf("left %+v, %v", key, err)
	}
	if _, err := f.Begin(t.Context(), "prod", generateRequest()); !errors.Is(err, ErrGenerating) {
		t.Errorf("beginning anew meanwhile: %v, want ErrGenerating", err)
	}
	if err := f.AbandonWithoutHSM(t.Context(), "prod"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Get(t.Context(), "prod"); !errors.Is(err, ErrKeyNotFound) {
		t.Errorf("left: %v", err)
	}
}

func TestASlowHSMDoesNotKeepOthersFromAnAnswer(t *testing.T) {
	f := newFixture(t)
	f.adopt()
	raw := f.wrap("secret")
	request := generateRequest()
	request.Device = "two"
	if _, err := f.Rotate(t.Context(), "prod", RotateRequest{Generate: &request}); err != nil {
		t.Fatal(err)
	}
	f.two.Delay(time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	finished := make(chan error, 1)
	go func() {
		_, err := f.Finish(ctx, "prod")
		finished <- err
	}()
	defer func() {
		cancel()
		if err := <-finished; !errors.Is(err, context.Canceled) {
			t.Errorf("a Finish whose caller left: %v", err)
		}
	}()
	quick, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	if _, err := f.Rotate(quick, "prod", RotateRequest{Generate: &request}); err != nil {
		t.Errorf("a repeat of the request: %v", err)
	}
	if opened, err := f.Unwrap(quick, "prod", envelope.UseWrap, raw, []byte("ctx")); err != nil || string(opened.Payload) != "secret" {
		t.Errorf("unwrapping: %v", err)
	}
	if _, err := f.Configure(quick, "prod", Settings{DeletionAllowed: ptr(true)}); err != nil {
		t.Errorf("configuring: %v", err)
	}
	if _, err := f.AddRecipient(quick, "prod", AdoptRequest{Device: "two", Label: "ec"}); !errors.Is(err, ErrGenerating) {
		t.Errorf("adding a recipient: %v, want ErrGenerating", err)
	}
	if err := f.Delete(quick, "prod", DeleteRequest{}); !errors.Is(err, ErrGenerating) {
		t.Errorf("deleting: %v, want ErrGenerating", err)
	}
}

// lossyDevice fails its first generation with an error, having made nothing.
type lossyDevice struct {
	hsm.Device
	failure error
	asked   []string // ids, in order
}

func (d *lossyDevice) GenerateKey(ctx context.Context, spec hsm.KeySpec) (hsm.Key, error) {
	d.asked = append(d.asked, spec.ID)
	if len(d.asked) == 1 {
		return nil, d.failure
	}
	return d.Device.GenerateKey(ctx, spec)
}

// A request that arrives late could put its key in the place of one that was made under the same id meanwhile, and what
// was sealed to that one would be lost.
func TestAnIDIsAskedForOnceUnlessTheHSMSurelyRefused(t *testing.T) {
	for name, c := range map[string]struct {
		failure error
		again   bool // the same id
	}{
		"the answer was lost":        {fmt.Errorf("no answer: %w: %w", hsm.ErrUnavailable, hsm.ErrMayHaveHappened), false},
		"the caller had gone":        {context.DeadlineExceeded, false},
		"the HSM could not be asked": {hsm.ErrUnavailable, true},
		"the HSM was full":           {hsm.ErrFull, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			device := &lossyDevice{Device: f.one, failure: c.failure}
			f.devices.set("one", device)
			first := f.begin(generateRequest()).Pending.ID
			if _, err := f.Finish(t.Context(), "prod"); !errors.Is(err, c.failure) {
				t.Fatalf("finishing: %v", err)
			}
			f.restart() // nothing of this lives in memory
			key := f.finish()
			if len(device.asked) != 2 || device.asked[0] != first || (device.asked[1] == first) != c.again {
				t.Errorf("asked for %v, the first of them announced as %s", device.asked, first)
			}
			if id := key.Versions[0].Recipients[0].ID; id != device.asked[1] {
				t.Errorf("the version has the HSM key %s, and %s was made", id, device.asked[1])
			}
		})
	}
}

func TestAnHSMKeyWhoseAnswerWasLostIsTakenWhereItAppearsAfterAll(t *testing.T) {
	f := newFixture(t)
	device := &lossyDevice{Device: f.one, failure: hsm.ErrMayHaveHappened}
	f.devices.set("one", device)
	first := f.begin(generateRequest()).Pending.ID
	if _, err := f.Finish(t.Context(), "prod"); err == nil {
		t.Fatal("the answer was not lost")
	}
	if _, err := f.one.GenerateKey(t.Context(), hsm.KeySpec{Algorithm: hsm.ECDHP384, Label: "late", ID: first}); err != nil {
		t.Fatal(err)
	}
	if key := f.finish(); key.Versions[0].Recipients[0].ID != first || len(device.asked) != 1 {
		t.Errorf("finished as %+v after asking for %v", key, device.asked)
	}
}

func TestAbandoningRemovesTheKeysOfAllIDsThatWereAskedFor(t *testing.T) {
	f := newFixture(t)
	device := &lossyDevice{Device: f.one, failure: hsm.ErrMayHaveHappened}
	f.devices.set("one", device)
	first := f.begin(generateRequest()).Pending.ID
	if _, err := f.Finish(t.Context(), "prod"); err == nil {
		t.Fatal("the answer was not lost")
	}
	refusing := &lossyDevice{Device: f.one, failure: hsm.ErrUnavailable}
	f.devices.set("one", refusing)
	if _, err := f.Finish(t.Context(), "prod"); err == nil {
		t.Fatal("the HSM was not away")
	}
	before := f.one.Generations()
	for _, id := range []string{first, refusing.asked[0]} {
		if _, err := f.one.GenerateKey(t.Context(), hsm.KeySpec{Algorithm: hsm.ECDHP384, Label: "late", ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Abandon(t.Context(), "prod"); err != nil {
		t.Fatal(err)
	}
	left, err := f.one.FindKeys(t.Context(), hsm.KeyQuery{Label: "late"})
	if err != nil || len(left) != 0 || f.one.Generations() != before+2 {
		t.Errorf("left %v, %v", left, err)
	}
}

// What another trouble says later does not make the lost request undone.
func TestALostRequestStaysLostWhenTheHSMIsAwayAfterwards(t *testing.T) {
	f := newFixture(t)
	device := &lossyDevice{Device: f.one, failure: hsm.ErrMayHaveHappened}
	f.devices.set("one", device)
	first := f.begin(generateRequest()).Pending.ID
	if _, err := f.Finish(t.Context(), "prod"); err == nil {
		t.Fatal("the answer was not lost")
	}
	f.one.SetError(hsm.ErrUnavailable)
	if _, err := f.Finish(t.Context(), "prod"); !errors.Is(err, hsm.ErrUnavailable) {
		t.Fatalf("finishing without the HSM: %v", err)
	}
	f.one.SetError(nil)
	f.finish()
	if len(device.asked) != 2 || device.asked[1] == first {
		t.Errorf("asked for %v", device.asked)
	}
}

// swallowing is a device whose answers to generations are all lost.
type swallowing struct {
	hsm.Device
	asked map[string]int
}

func (d *swallowing) GenerateKey(_ context.Context, spec hsm.KeySpec) (hsm.Key, error) {
	d.asked[spec.ID]++
	return nil, fmt.Errorf("no answer: %w: %w", hsm.ErrUnavailable, hsm.ErrMayHaveHappened)
}

func TestAnHSMThatSwallowsRequestsIsNotAskedForEver(t *testing.T) {
	f := newFixture(t)
	device := &swallowing{Device: f.one, asked: map[string]int{}}
	f.devices.set("one", device)
	f.begin(generateRequest())
	var last error
	for range 3 * maxFormer {
		if _, last = f.Finish(t.Context(), "prod"); !errors.Is(last, hsm.ErrUnavailable) {
			t.Fatalf("finishing: %v", last)
		}
	}
	for id, times := range device.asked {
		if times != 1 {
			t.Errorf("asked %d times for id %s", times, id)
		}
	}
	if len(device.asked) != maxFormer+1 || !strings.Contains(last.Error(), "abandon") {
		t.Errorf("asked for %d ids, and in the end: %v", len(device.asked), last)
	}
	f.devices.set("one", f.one)
	for id := range device.asked { // they are carried out after all
		if _, err := f.one.GenerateKey(t.Context(), hsm.KeySpec{Algorithm: hsm.ECDHP384, Label: "late", ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Abandon(t.Context(), "prod"); err != nil {
		t.Fatal(err)
	}
	if left, err := f.one.FindKeys(t.Context(), hsm.KeyQuery{Label: "late"}); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
