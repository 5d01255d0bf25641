package autounseal

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/sealtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// serveTales tell what happens to a Vault, and to its seal server, when something goes wrong between them.
var serveTales = []tale{
	{"serve, and the HSM is gone for two minutes", hsmGone},
	{"serve is killed in the middle of init, unseal and rotation", killedInTheMiddle},
	{"serve has forty seals, and a card that takes 600 ms", fortySeals},
	{"serve, and the HSM goes while a lease is open, and while the server starts", hsmGoneInALease},
	{"one of two servers is down, etcd is, a certificate is renewed, a token revoked", twoServers},
}

// cardServer is a server whose keys are on a card, and the stanza of a cluster.
func cardServer(t testing.TB) (s *serve, card *pkcs11test.SmartCard, seal vaulttest.Seal) {
	t.Helper()
	card = pkcs11test.Card(t)
	host := vaulttest.NewHost(t)
	host.WithToken(t, &card.Token)
	s = serveOn(t, host, "")
	host.WithKey(t)
	return s, card, s.key(t, "prod")
}

// hsmGone: Vault looks at its seal when it becomes active and each minute while it is not well, so the test does not have to
// wait for the ten minutes that lie between two looks at one that is well.
func hsmGone(t testing.TB) func(*testing.T) {
	t.Helper()
	s, card, seal := cardServer(t)
	return func(t *testing.T) {
		t.Helper()
		s.Start(t)
		vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{s.served(t, seal)}})
		remember(t, vault, "secret", "kept")
		must(t, vault.SealHealthy(t))
		server := s.Running.Process(t)

		gone := time.Now()
		card.Remove(t, pkcs11test.CardRemoved)
		unavailable(t, seal, "decrypt", vaulttest.Fields{"ciphertext": encrypts(t, seal, "a")})
		s.health(t, http.StatusServiceUnavailable)
		vault.StepDown(t)
		vault.WaitActive(t)
		vaulttest.Eventually(t, time.Minute, "Vault to find its seal unhealthy", func() error {
			if vault.SealHealthy(t) == nil {
				return fmt.Errorf("it finds it healthy")
			}
			return nil
		})
		look := time.NewTicker(10 * time.Second)
		defer look.Stop()
		for time.Since(gone) < 2*time.Minute {
			recalls(t, vault, "secret", "kept")
			encrypts(t, seal, "sealing needs no HSM")
			if vault.SealHealthy(t) == nil {
				t.Fatal("Vault finds its seal healthy, and its HSM is away")
			}
			unavailable(t, seal, "decrypt", vaulttest.Fields{"ciphertext": encrypts(t, seal, "a")})
			<-look.C
		}

		card.Return(t)
		opensAgain(t, seal, encrypts(t, seal, "a"), "a")
		s.healthy(t)
		vaulttest.Eventually(t, 90*time.Second, "Vault to find its seal healthy at its next look", func() error { return vault.SealHealthy(t) })
		if now := s.Running.Process(t); now != server || !now.Alive() {
			t.Errorf("the server was %v and is %v", server, now)
		}
		if sent := card.WrongPINs(t); sent != 0 {
			t.Errorf("%d wrong PINs were sent", sent)
		}
	}
}

// unavailable asks what needs the HSM, which is away: it is answered with 503, and told when to come again.
func unavailable(t testing.TB, seal vaulttest.Seal, verb string, fields vaulttest.Fields) {
	t.Helper()
	got := call(t, seal, http.MethodPut, path(seal, verb), fields)
	if got.Code != http.StatusServiceUnavailable || got.Header.Get("Retry-After") == "" || len(got.Errors) == 0 {
		t.Errorf("%s without the HSM is answered with %d %s, Retry-After %q", verb, got.Code, got.Raw, got.Header.Get("Retry-After"))
	}
}

// opensAgain waits until a ciphertext opens.
func opensAgain(t testing.TB, seal vaulttest.Seal, ciphertext, text string) {
	t.Helper()
	vaulttest.Eventually(t, vaulttest.Patience, "the HSM to be found again", func() error { return opens(t, seal, ciphertext, text) })
}

// hsmGoneInALease: what a lease holds opens without the HSM until the lease ends, the server is told to seal, or it ends.
func hsmGoneInALease(t testing.TB) func(*testing.T) {
	t.Helper()
	s, card, seal := cardServer(t)
	return func(t *testing.T) {
		t.Helper()
		s.Must(t, "key", "configure", "prod", "--lease", "10m")
		s.Start(t)
		s.served(t, seal)
		strict := encrypts(t, seal, "strict")
		leased := sealsLeased(t, seal, true)
		if carriesKEK(t, strict) { // the lease was open at once
			strict = ""
		}

		card.Remove(t, pkcs11test.CardRemoved)
		must(t, opens(t, seal, leased, "x"))
		must(t, opens(t, seal, sealsLeased(t, seal, true), "x"))
		mark := s.Running.Mark()
		s.Running.Signal(t, syscall.SIGUSR1)
		s.Running.Says(t, mark, "all leases were ended")
		unavailable(t, seal, "decrypt", vaulttest.Fields{"ciphertext": leased})
		encrypts(t, seal, "sealing needs no HSM")
		if strict != "" {
			unavailable(t, seal, "decrypt", vaulttest.Fields{"ciphertext": strict})
		}
		s.health(t, http.StatusServiceUnavailable)
		card.Return(t)
		opensAgain(t, seal, leased, "x")
		s.healthy(t)

		// A server that starts without the HSM listens, says so, and serves as soon as the HSM is back.
		s.Kill(t)
		card.Remove(t, pkcs11test.CardRemoved)
		s.run(t)
		unavailable(t, seal, "encrypt", vaulttest.Fields{"plaintext": "YQ=="})
		unavailable(t, seal, "decrypt", vaulttest.Fields{"ciphertext": leased})
		if code, body, err := s.get("/v1/sys/health"); err != nil || code != http.StatusServiceUnavailable {
			t.Errorf("its health is %d %s %v", code, body, err)
		}
		card.Return(t)
		s.healthy(t)
		must(t, opens(t, seal, leased, "x"))
		if sent := card.WrongPINs(t); sent != 0 {
			t.Errorf("%d wrong PINs were sent", sent)
		}

		// Whoever is being served when it is told to stop still gets his answer.
		s.Must(t, "key", "configure", "prod", "--lease", "0")
		strict = sealsLeased(t, seal, false)
		before := card.Calls(t, "C_Decrypt")
		card.Fault(t, pkcs11test.Slow(2*time.Second))
		client := s.double(t, seal, nil)
		answered := make(chan error, 1)
		go func() { // waited for below
			_, err := client.Decrypt(context.Background(), strict)
			answered <- err
		}()
		pkcs11test.Until(t, "it is being served", func() bool { return card.Calls(t, "C_Decrypt") > before })
		s.Running.Stop(t)
		if err := <-answered; err != nil {
			t.Errorf("the request under way when the server was stopped: %v", err)
		}
	}
}

// killedInTheMiddle: the card freezes in an operation, so that the test knows where in its work the server is killed.
func killedInTheMiddle(t testing.TB) func(*testing.T) {
	t.Helper()
	s, card, seal := cardServer(t)
	return func(t *testing.T) {
		t.Helper()
		s.Start(t)
		s.served(t, seal)
		s.watched["prod"] = &watch{seal, encrypts(t, seal, watchedText)}
		gate := vaulttest.NewGate(t, s.Address)
		behind := seal
		behind.Address = gate.Address
		vault := vaulttest.Start(t, vaulttest.Options{Bare: true, Seals: []vaulttest.Seal{behind}})
		frozen := pkcs11test.Freezes("C_Decrypt")
		inside := func(since, operations int) {
			t.Helper()
			pkcs11test.Until(t, "an operation is in the card", func() bool { return card.Calls(t, "C_Decrypt") >= since+operations })
		}
		// Whoever asks meanwhile waits before the gate. Without it Vault would ask in vain, twice, and give up the init.
		replaced := func(mend ...pkcs11test.Fault) {
			t.Helper()
			gate.Hold()
			s.Kill(t)
			card.Mend(t, mend...)
			s.Start(t)
			gate.Open()
		}

		before := card.Calls(t, "C_Decrypt")
		card.Fault(t, frozen)
		type result struct {
			answer *api.InitResponse
			err    error
		}
		initialised := make(chan result, 1)
		client := vault.Anonymous(t)
		go func() { // ends with its answer, which is waited for below
			answer, err := client.Sys().Init(&api.InitRequest{RecoveryShares: 1, RecoveryThreshold: 1})
			initialised <- result{answer, err}
		}()
		inside(before, 1)
		replaced(frozen)
		done := <-initialised
		must(t, done.err)
		vault.RootToken, vault.RecoveryKey = done.answer.RootToken, done.answer.RecoveryKeysB64[0]
		vault.WaitActive(t)
		remember(t, vault, "secret", "kept")
		vault.Restart(t)
		recalls(t, vault, "secret", "kept")

		vault.Kill(t)
		before = card.Calls(t, "C_Decrypt")
		card.Fault(t, frozen)
		vault.Launch(t)
		inside(before, 1)
		s.Kill(t) // nothing waits for it this time: Vault tries again by itself
		card.Mend(t, frozen)
		s.Start(t)
		vault.WaitActive(t)
		recalls(t, vault, "secret", "kept")

		s.Must(t, "key", "rotate", "prod", "--device", "hsm", "--generate", "--algorithm", "rsa-2048")
		s.Kill(t)
		s.Start(t)
		if now := s.version(t, "prod"); now != "v1" {
			t.Errorf("%s seals, whose record nobody has read", now)
		}
		s.keepRecord(t, "prod")
		vaulttest.Eventually(t, vaulttest.Patience, "version 2 to seal", func() error {
			if now := s.version(t, "prod"); now != "v2" {
				return fmt.Errorf("%s does", now)
			}
			return nil
		})
		// The root key is opened, slowly; what comes next opens something to seal it under the new version.
		vault.Kill(t)
		before = card.Calls(t, "C_Decrypt")
		slow := pkcs11test.Slow(2 * time.Second)
		card.Fault(t, slow)
		vault.Launch(t)
		inside(before, 1)
		card.Fault(t, frozen)
		inside(before, 2)
		replaced(frozen, slow)
		vault.WaitActive(t)
		recalls(t, vault, "secret", "kept")
		vault.Restart(t)
		s.Minimum(t, "prod", 2)
		vault.Restart(t)
		recalls(t, vault, "secret", "kept")
		vault.RecoversARootToken(t)
		must(t, vault.SealHealthy(t))
	}
}

// twoServers share an HSM, the key record, and the tokens in etcd, and stand behind a balancer.
func twoServers(t testing.TB) func(*testing.T) {
	t.Helper()
	host := vaulttest.NewHost(t)
	host.WithToken(t, pkcs11test.SoftHSM(t))
	etcd := etcdtest.Start(t, 1)
	host.WithEtcd(t, etcd)
	first := serveOn(t, host, `tokens = "etcd"`)
	host.WithKey(t)
	second := serveOn(t, host.Another(t), `tokens = "etcd"`)
	second.Authority = first.Authority
	second.Put(t, "serve-ca.pem", first.Authority.PEM)
	second.certify(t, first.Authority)
	both := []*serve{first, second}
	return func(t *testing.T) {
		t.Helper()
		seal := first.key(t, "prod")
		for _, s := range both {
			s.Start(t)
			s.served(t, s.with(seal.Token, "prod"))
		}
		balancer := sealtest.NewBalancer(t, first.Address, second.Address)
		seal.Address = balancer.Address
		vault := vaulttest.Start(t, vaulttest.Options{Seals: []vaulttest.Seal{seal}})
		remember(t, vault, "secret", "kept")
		restarts := func() {
			t.Helper()
			vault.Restart(t)
			recalls(t, vault, "secret", "kept")
			must(t, vault.SealHealthy(t))
		}

		for _, s := range both {
			s.Kill(t)
			restarts()
			s.Start(t)
		}
		for _, s := range both {
			if balancer.Served(s.Address) == 0 {
				t.Errorf("the server at %s was never asked", s.Address)
			}
		}
		// What one server sealed opens with the other: they share nothing that changes.
		ciphertext := encrypts(t, first.with(seal.Token, "prod"), "sealed by the first")
		must(t, opens(t, second.with(seal.Token, "prod"), ciphertext, "sealed by the first"))

		renewed(t, first)
		restarts()

		etcd.Kill(t, 0)
		first.Kill(t)
		first.Start(t) // with the list of tokens that it had before
		restarts()
		etcd.Restart(t, 0)
		etcd.WaitReady(t)
		next := first.key(t, "prod")
		for _, s := range both { // they have heard from etcd again
			s.served(t, s.with(next.Token, "prod"))
		}

		revoked(t, seal.Token, both)
		if err := vault.SealHealthy(t); err != nil {
			t.Errorf("Vault has looked at its seal already: %v", err)
		}
		recalls(t, vault, "secret", "kept") // a Vault that runs goes on
		vault.Stop(t)
		vault.MustNotStart(t, "error parsing Seal configuration", "permission denied")
		next.Address = balancer.Address
		vault.SetSeals(next)
		vault.Resume(t)
		recalls(t, vault, "secret", "kept")
		for _, s := range both {
			s.Running.Stop(t)
		}
	}
}

// revoked revokes a token at one server. All refuse it within seconds.
func revoked(t *testing.T, token string, servers []*serve) {
	t.Helper()
	id := strings.Split(token, ".")[1]
	servers[1].Must(t, "serve", "token", "revoke", id)
	began := time.Now()
	for _, s := range servers {
		vaulttest.Eventually(t, 10*time.Second, "the token to be refused", func() error {
			seal := s.with(token, "prod")
			got := call(t, seal, http.MethodPut, path(seal, "encrypt"), vaulttest.Fields{"plaintext": "YQ=="})
			if got.Code != http.StatusForbidden {
				return fmt.Errorf("%d %s", got.Code, got.Raw)
			}
			return nil
		})
	}
	t.Logf("a revoked token was refused after %s", time.Since(began).Round(time.Millisecond))
}

// renewed gives a running server a new certificate, and then one that is none.
func renewed(t *testing.T, s *serve) {
	t.Helper()
	process := s.Running.Process(t)
	old := shownSerial(t, s)
	s.certify(t, s.Authority)
	vaulttest.Eventually(t, vaulttest.Patience, "the new certificate to be shown", func() error {
		if shownSerial(t, s) == old {
			return fmt.Errorf("the old one is")
		}
		return nil
	})
	current, mark := shownSerial(t, s), s.Running.Mark()
	s.Put(t, "serve.pem", []byte("no certificate\n"))
	s.Running.Says(t, mark, "certificate")
	if now := shownSerial(t, s); now != current {
		t.Errorf("serial %s is shown, not %s, after a file that holds none", now, current)
	}
	s.certify(t, s.Authority)
	s.Running.Signal(t, syscall.SIGHUP)
	vaulttest.Eventually(t, vaulttest.Patience, "the next certificate to be shown", func() error {
		if shownSerial(t, s) == current {
			return fmt.Errorf("the old one is")
		}
		return nil
	})
	if now := s.Running.Process(t); now != process || !now.Alive() {
		t.Errorf("the server was %v and is %v", process, now)
	}
}

// shownSerial is the serial number of the certificate that a server shows.
func shownSerial(t testing.TB, s *serve) string {
	t.Helper()
	dialer := tls.Dialer{Config: s.trust()}
	conn, err := dialer.DialContext(t.Context(), "tcp", strings.TrimPrefix(s.Address, "https://"))
	must(t, err)
	defer conn.Close()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String()
}
