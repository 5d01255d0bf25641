package autounseal

import (
	"context"
	"fmt"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/sealtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// What a storm is: the power comes back, and with it every Vault at once.
const (
	stormLimit = 3 * time.Minute
	// A sealed Vault costs two operations to come up: its root key, and the first look at its seal.
	operationsToComeUp = 2
)

// fleet makes seals that are played, each with what its storage keeps.
func fleet(t testing.TB, s *serve, seal vaulttest.Seal, size int, tally *sealtest.Tally) []*sealtest.Seal {
	t.Helper()
	seals := make([]*sealtest.Seal, size)
	for i := range seals {
		seals[i] = s.double(t, seal, tally)
	}
	prepared(t, seals)
	return seals
}

func prepared(t testing.TB, seals []*sealtest.Seal) {
	t.Helper()
	outcome := sealtest.Each(seals, func(seal *sealtest.Seal) error { return seal.Prepare(t.Context()) })
	if outcome.Healthy != len(seals) {
		t.Fatalf("%s: %v", outcome, outcome.Failures[0])
	}
}

// storm lets the power come back, and fails the test where a seal does not come up, or is answered in a way that no client
// should be.
func storm(t *testing.T, seals []*sealtest.Seal, tally *sealtest.Tally) sealtest.Outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stormLimit)
	defer cancel()
	outcome := sealtest.Storm(ctx, seals)
	t.Logf("%s\n%s", outcome, tally)
	if outcome.Healthy != len(seals) {
		t.Errorf("%d seals did not come up: %v", len(outcome.Failures), outcome.Failures[0])
	}
	if unfair := tally.Unfair(); unfair != "" {
		t.Error(unfair)
	}
	if lost := tally.Lost(); len(lost) > 0 {
		t.Errorf("%d calls had no answer: %v", len(lost), lost[0])
	}
	return outcome
}

// fortySeals: a card of 600 ms brings a Vault up in 1.2 s, so forty take 48 s, and no request waits longer than its client.
func fortySeals(t testing.TB) func(*testing.T) {
	t.Helper()
	s, card, seal := cardServer(t)
	s.Set(t, `device "hsm"`, "type = \"pkcs11\"\n serial = %q\n pin_file = \"pin\"", card.Serial) // one operation at a time
	return func(t *testing.T) {
		t.Helper()
		const size, operation = 40, 600 * time.Millisecond
		s.Start(t)
		tally := sealtest.NewTally()
		seals := fleet(t, s, s.served(t, seal), size, tally)
		s.Kill(t) // so that nothing that the seals have was sealed in the last minute
		s.Start(t)
		before := card.Operations(t)
		card.Fault(t, pkcs11test.Slow(operation))
		outcome := storm(t, seals, tally)
		used := card.Operations(t) - before
		// A length query costs an operation as well, where one is made.
		if used < operationsToComeUp*size || used > operationsToComeUp*size+size/4 {
			t.Errorf("%d operations for %d seals", used, size)
		}
		if most := 2 * operationsToComeUp * size * operation; outcome.Took > most { // it takes half of that where nobody else works
			t.Errorf("it took %s: what did the card do meanwhile?", outcome.Took)
		}
		s.healthy(t)
	}
}

// An unseal does not wait behind the health checks of Vaults that are up.
func TestAnUnsealGoesBeforeHealthChecks(t *testing.T) {
	s, card, seal := cardServer(t)
	s.Set(t, `device "hsm"`, "type = \"pkcs11\"\n serial = %q\n pin_file = \"pin\"", card.Serial)
	s.Start(t)
	sealed := fleet(t, s, s.served(t, seal), 1, nil)[0]
	s.Kill(t)
	s.Start(t)

	const operation = 300 * time.Millisecond
	before := card.Operations(t)
	card.Fault(t, pkcs11test.Slow(operation))
	const checks = 30
	done := make(chan sealtest.Outcome, 1)
	var healthy []*sealtest.Seal
	for range checks {
		healthy = append(healthy, s.double(t, seal, nil))
	}
	go func() { // waited for below
		done <- sealtest.Each(healthy, func(seal *sealtest.Seal) error { return seal.Check(t.Context()) })
	}()
	pkcs11test.Until(t, "health checks are under way", func() bool { return card.Operations(t) >= before+3 })
	began := time.Now()
	plaintext, err := sealed.Decrypt(t.Context(), sealed.Root())
	took, behind := time.Since(began), card.Operations(t)-before
	must(t, err)
	if len(plaintext) == 0 || behind > checks/2 {
		t.Errorf("the unseal took %s: it was answered after %d of %d health checks", took, behind, checks)
	}
	if outcome := <-done; outcome.Healthy != checks {
		t.Errorf("of the health checks: %s, %v", outcome, outcome.Failures)
	}
}

// A thousand seals with one card of 5 ms, eight operations at a time: the server comes up with them, and each is answered.
func TestAThousandSealsComeUpStrict(t *testing.T) {
	s, card, seal := cardServer(t)
	s.Set(t, `device "hsm"`, "type = \"pkcs11\"\n serial = %q\n pin_file = \"pin\"\n parallel = 8", card.Serial)
	s.Start(t)
	const size = 1000
	tally := sealtest.NewTally()
	seals := fleet(t, s, s.served(t, seal), size, tally)
	s.Kill(t)
	card.Fault(t, pkcs11test.Slow(5*time.Millisecond))
	before := card.Operations(t)
	s.run(t) // it listens, and has only begun to open what it needs
	reloaded := make(chan struct{})
	go func() { // ends before the test does, which waits for it
		defer close(reloaded)
		for card.Operations(t)-before < size/2 && t.Context().Err() == nil {
			<-time.After(10 * time.Millisecond)
		}
		s.Running.Signal(t, syscall.SIGHUP) // somebody has the configuration read anew, of all times
	}()
	storm(t, seals, tally)
	<-reloaded
	used := card.Operations(t) - before
	t.Logf("%d operations", used)
	if used < operationsToComeUp*size {
		t.Errorf("%d operations for %d seals: what was opened without the HSM?", used, size)
	}
	s.Running.Says(t, 0, "the new configuration is in use")
	s.healthy(t)
	outcome := sealtest.Each(seals[:50], func(seal *sealtest.Seal) error { return seal.Check(t.Context()) })
	if outcome.Healthy != 50 {
		t.Errorf("after the storm: %s, %v", outcome, outcome.Failures)
	}
	for _, seal := range seals {
		seal.Close()
	}
	vaulttest.Eventually(t, vaulttest.Patience, "nothing of the storm to be left", func() error {
		if now := s.metric(t, "go_goroutines"); now > size/5 {
			return fmt.Errorf("the server has %v goroutines", now)
		}
		return nil
	})
}

// With a lease the same storm costs the HSM next to nothing: a key encryption key for each version of the wrapping key.
func TestAThousandSealsComeUpWithALease(t *testing.T) {
	s, card, seal := cardServer(t)
	s.Must(t, "key", "configure", "prod", "--lease", "10m")
	s.Start(t)
	s.served(t, seal)
	const size = 1000
	tally := sealtest.NewTally()
	var seals []*sealtest.Seal
	for range size {
		seals = append(seals, s.double(t, seal, tally))
	}
	s.watched["prod"] = &watch{seal, encrypts(t, seal, watchedText)}
	sealsLeased(t, seal, true)
	prepared(t, seals[:size/2])
	s.Rotate(t, "prod")
	sealsLeased(t, seal, true)
	prepared(t, seals[size/2:])
	for _, one := range []*sealtest.Seal{seals[0], seals[size-1]} {
		if !carriesKEK(t, one.Root()) {
			t.Fatal("what a seal keeps is not leased")
		}
	}
	versions := map[string]bool{sealtest.Version(seals[0].Root()): true, sealtest.Version(seals[size-1].Root()): true}
	if len(versions) != 2 {
		t.Fatalf("the seals are of the versions %v", versions)
	}

	s.Kill(t)
	card.Fault(t, pkcs11test.Slow(600*time.Millisecond))
	before := card.Operations(t)
	s.run(t)
	storm(t, seals, tally)
	// One is for the authentication key of a version, which a server opens at its start.
	if used := card.Operations(t) - before; used > 2*len(versions) {
		t.Errorf("%d operations for %d versions of the wrapping key", used, len(versions))
	}
	s.healthy(t)
}
