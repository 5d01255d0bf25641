package bench

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/test/sealtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

const (
	sealRounds  = 9
	sealLasting = 500 * time.Millisecond // of each crowd in a round
	sealAlone   = 50                     // operations of each kind in a round, one at a time
	manySeals   = 64
	// hsmTime is how long an operation of the card takes, and hsmParallel how many it does at a time, where it stands for a
	// faster HSM than a card.
	hsmTime, hsmParallel = 5 * time.Millisecond, 8
	stormSize            = 1000
	cardStormSize        = 40
	stormLimit           = 3 * time.Minute
)

// sealed is as long as what a seal gives away at each unseal: the root key, in JSON.
const sealed = `["QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="]`

// BenchmarkSeals measures only what a seal server does. Run it with -benchtime 1x.
func BenchmarkSeals(b *testing.B) {
	for b.Loop() {
		table := newTable()
		table.seals(b, vaulttest.Start(b, vaulttest.Options{}), pkcs11test.SoftHSM(b))
		table.sealStorms(b)
		fmt.Println(strings.Join(table.other, "\n"))
	}
}

// seals measures `nitroseal serve` with a token of SoftHSM, against the bare call and the transit engine of a Vault.
func (t *table) seals(b *testing.B, vault *vaulttest.Server, token *pkcs11test.Token) {
	server := newSealServer(b, token, clients, "")
	server.start(b)
	<-time.After(rest)
	now, _, host := server.memory(b)
	t.add("serve: memory at rest", megabytes(now), "≤ 40 MB")
	t.add("serve: memory of its module host", megabytes(host), "≤ 40 MB")
	t.sealSpeeds(b, server, vault)
	server.running.Stop(b)

	locked := newSealServer(b, token, clients, "mlock = true")
	locked.start(b)
	<-time.After(rest)
	now, _, host = locked.memory(b)
	t.add("serve: memory at rest with everything locked", megabytes(now), "≤ 140 MB")
	t.add("serve: memory of its module host then", megabytes(host), "≤ 40 MB")
	locked.running.Stop(b)
}

// sealSpeeds compares decryptions in rounds that take turns.
func (t *table) sealSpeeds(b *testing.B, server *sealServer, vault *vaulttest.Server) {
	raw := server.raw(b)
	strict, leased := server.decrypt(b, "strict", clients), server.decrypt(b, "leased", manySeals)
	transit := vaultTransit(b, vault)
	var rawAlone, strictAlone, leasedAlone, transitAlone []time.Duration
	var rawRates, strictRates []float64
	var leasedCrowd, transitCrowd crowds
	n := 100 // so many of the bare call a client take about as long as a crowd
	for round := range sealRounds {
		progress("decryptions of seals, round %d of %d", round+1, sealRounds)
		for range sealAlone {
			rawAlone = append(rawAlone, raw.run(b, 1, 1)[1])
			strictAlone = append(strictAlone, strict.alone(b))
			leasedAlone = append(leasedAlone, leased.alone(b))
			transitAlone = append(transitAlone, transit.alone(b))
		}
		rate := rawRate(b, raw, n, clients)
		n = max(1, int(rate*sealLasting.Seconds())/clients)
		rawRates = append(rawRates, rate)
		rate, _ = strict.crowd(b, clients, sealLasting)
		strictRates = append(strictRates, rate)
		leasedCrowd.add(leased.crowd(b, manySeals, sealLasting))
		transitCrowd.add(transit.crowd(b, manySeals, sealLasting))
	}
	rawP50 := median(rawAlone)
	t.add("seal: one C_Decrypt by itself, SoftHSM", milliseconds(rawP50), "")
	t.add("seal: decrypt by `serve`, strict", milliseconds(median(strictAlone)), "≤ 0.5 ms more = "+milliseconds(rawP50+500*time.Microsecond))
	t.add("seal: decrypt by `serve`, leased", milliseconds(median(leasedAlone)), "")
	t.add("seal: decrypt by Vault's transit engine", milliseconds(median(transitAlone)), "")
	t.rates("SoftHSM", rawRates, strictRates, 0.75)
	t.add(fmt.Sprintf("seal: %d clients of Vault's transit engine", manySeals),
		fmt.Sprintf("%.0f/s, p99 %s", median(transitCrowd.rates), milliseconds(median(transitCrowd.p99))), "")
	t.add(fmt.Sprintf("seal: %d clients of `serve`, leased", manySeals),
		fmt.Sprintf("%.0f/s, p99 %s: %.1f × and %.2f × those of Vault's transit engine", median(leasedCrowd.rates), milliseconds(median(leasedCrowd.p99)),
			median(ratios(leasedCrowd.rates, transitCrowd.rates)), median(ratios(leasedCrowd.p99, transitCrowd.p99))),
		"≥ 2 × (3 × is the aim) and ≤ 0.5 ×")
}

// rates adds the throughput of strict decryptions and the bare call's. What counts is the ratio within each round: another one
// may have had a busier machine.
func (t *table) rates(hsm string, raw, strict []float64, wanted float64) {
	t.add(fmt.Sprintf("seal: %d clients of C_Decrypt, %s", clients, hsm), fmt.Sprintf("%.0f/s", median(raw)), "")
	t.add(fmt.Sprintf("seal: %d clients of `serve`, strict, %s", clients, hsm),
		fmt.Sprintf("%.0f/s = %.2f × the bare calls", median(strict), median(ratios(strict, raw))), fmt.Sprintf("≥ %.2f ×", wanted))
}

// crowds are what several crowds of one load came to.
type crowds struct {
	rates []float64
	p99   []time.Duration
}

func (c *crowds) add(rate float64, times []time.Duration) {
	c.rates, c.p99 = append(c.rates, rate), append(c.p99, percentile(times, 99))
}

// ratios of what was measured in the same round.
func ratios[T float64 | time.Duration](these, those []T) []float64 {
	all := make([]float64, len(these))
	for i := range these {
		all[i] = float64(these[i]) / float64(those[i])
	}
	return all
}

// rawRate is how many bare calls a second so many clients make, n each.
func rawRate(b *testing.B, raw *rawLoop, n, clients int) float64 {
	return float64(n*clients) / raw.run(b, n, clients)[0].Seconds()
}

// sealStorms measures with a card, at first one that stands for a faster HSM. It changes the environment.
func (t *table) sealStorms(b *testing.B) {
	card := pkcs11test.Card(b, pkcs11test.SHA1Only) // which is what the bare call asks for
	server := newSealServer(b, &card.Token, hsmParallel, "")
	raw := server.raw(b)
	server.start(b)
	card.Fault(b, pkcs11test.Slow(hsmTime))
	strict := server.decrypt(b, "strict", 2*clients)
	var rawRates, strictRates, busyRates []float64
	n := 25
	for round := range sealRounds {
		progress("decryptions with an HSM of %v, round %d of %d", hsmTime, round+1, sealRounds)
		rate := rawRate(b, raw, n, clients)
		n = max(1, int(rate*sealLasting.Seconds())/clients)
		rawRates = append(rawRates, rate)
		rate, _ = strict.crowd(b, clients, sealLasting)
		strictRates = append(strictRates, rate)
		rate, _ = strict.crowd(b, 2*clients, sealLasting)
		busyRates = append(busyRates, rate)
	}
	t.rates(fmt.Sprintf("an operation of %v, %d at a time", hsmTime, hsmParallel), rawRates, strictRates, 0.95)
	t.add(fmt.Sprintf("seal: %d clients of `serve`, strict, the same", 2*clients),
		fmt.Sprintf("%.0f/s = %.2f × the bare calls of %d", median(busyRates), median(ratios(busyRates, rawRates)), clients), "")

	t.storm(b, server, card, "strict", stormSize, hsmTime, hsmParallel)
	t.storm(b, server, card, "leased", stormSize, hsmTime, hsmParallel)
	server.host.Set(b, `device "hsm"`, "type = \"pkcs11\"\n serial = %q\n pin_file = \"pin\"", card.Serial)
	t.storm(b, server, card, "strict", cardStormSize, cardTime, 1)
	server.running.Stop(b)
}

// storm gives power to many Vaults at once, whose seal server was started anew and is ready, and measures until all are
// unsealed and have found their seal healthy. What the server itself asked of the HSM to become ready is not counted.
func (t *table) storm(b *testing.B, server *sealServer, card *pkcs11test.SmartCard, key string, size int, operation time.Duration, parallel int) {
	progress("%d Vaults power up at once, %s, with an HSM of %v, %d at a time", size, key, operation, parallel)
	tally := sealtest.NewTally()
	seals := make([]*sealtest.Seal, size)
	for i := range seals {
		seals[i] = server.seal(key, tally)
		defer seals[i].Close()
	}
	prepared := sealtest.Each(seals, func(s *sealtest.Seal) error { return s.Prepare(b.Context()) })
	if prepared.Healthy != size {
		b.Fatal(prepared, prepared.Failures[0])
	}
	for _, s := range seals {
		s.Close()
	}
	card.Mend(b, pkcs11test.Slow(operation))
	server.running.Stop(b) // so that nothing that the seals keep was sealed a moment ago
	server.start(b)
	<-time.After(rest)
	before, _, _ := server.memory(b)
	server.forget(b)
	card.Fault(b, pkcs11test.Slow(operation))
	operations := card.Operations(b)
	ctx, cancel := context.WithTimeout(b.Context(), stormLimit)
	defer cancel()
	outcome := sealtest.Storm(ctx, seals)
	operations = card.Operations(b) - operations
	_, most, _ := server.memory(b)
	progress("%s\n%s", outcome, tally)
	if unfair := tally.Unfair(); unfair != "" || outcome.Healthy != size {
		b.Fatalf("%s %s %v", unfair, outcome, outcome.Failures)
	}

	name := fmt.Sprintf("seal: storm of %d Vaults, %s, an operation of %v, %d at a time", size, key, operation, parallel)
	wanted := fmt.Sprintf("all healthy, each answered; 2 × %d operations = %v at least", size,
		(2 * time.Duration(size) * operation / time.Duration(parallel)).Round(time.Millisecond))
	if key == "leased" {
		wanted = "all healthy, each answered; ≤ 1 operation for a version of the key (opened before the storm)"
	}
	t.add(name, fmt.Sprintf("%v, %d operations", outcome.Took.Round(time.Millisecond), operations), wanted)
	t.add("serve: more memory in it", megabytes(max(0, most-before)), "≤ 80 MB")
}

// vaultTransit is the decryption by Vault's own transit engine of what a seal encrypts, with a token that may do what
// a seal needs and no more.
func vaultTransit(b *testing.B, server *vaulttest.Server) *load {
	root := server.Client(b)
	if mounts, err := root.Sys().ListMounts(); err != nil || mounts["transit/"] == nil {
		must(b, root.Sys().Mount("transit", &api.MountInput{Type: "transit"}))
	}
	_, err := root.Logical().WriteWithContext(b.Context(), "transit/keys/seal", nil)
	must(b, err)
	must(b, root.Sys().PutPolicy("seal", `
		path "transit/encrypt/seal" { capabilities = ["update"] }
		path "transit/decrypt/seal" { capabilities = ["update"] }`))
	token, err := root.Auth().Token().CreateOrphan(&api.TokenCreateRequest{Policies: []string{"seal"}, Period: "24h"})
	must(b, err)
	plaintext := vaulttest.Base64(sealed)
	encrypted, err := root.Logical().WriteWithContext(b.Context(), "transit/encrypt/seal", vaulttest.Fields{"plaintext": plaintext})
	must(b, err)
	return newLoad(b, "Vault's transit", target{server.Address, server.CAFile, token.Auth.ClientToken}, "transit/decrypt/seal",
		vaulttest.Fields{"ciphertext": encrypted.Data["ciphertext"]}, plaintext, manySeals)
}
