package server

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/token"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// TestAVaultLivesWithIt: what one asks, from its start over `operator init` to a restart, in this order.
func TestAVaultLivesWithIt(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	stored := map[string]string{}
	for _, step := range strings.Fields(`renew encrypt:a renew
		encrypt:root encrypt:check decrypt:check encrypt:recovery decrypt:root encrypt:0 encrypt:0 encrypt:check decrypt:check
		renew renew encrypt:a decrypt:root encrypt:0 encrypt:0 encrypt:check decrypt:check`) {
		call, what, _ := strings.Cut(step, ":")
		var got answer
		switch call {
		case "renew":
			got = r.ask(client, http.MethodPut, "/v1/auth/token/renew-self", text, `{"increment":0}`)
			if auth, _ := got.body["auth"].(map[string]any); auth["client_token"] != text || auth["renewable"] != true {
				t.Errorf("%s: %s", step, got.raw)
			}
		case "encrypt":
			got = r.encrypt(client, text, "prod", what)
			stored[what] = got.data("ciphertext")
		case "decrypt":
			got = r.decrypt(client, text, "prod", stored[what])
			if got.data("plaintext") != base64.StdEncoding.EncodeToString([]byte(what)) {
				t.Errorf("%s: %s", step, got.raw)
			}
		}
		if got.code != http.StatusOK {
			t.Fatalf("%s: %d %s", step, got.code, got.raw)
		}
	}
	if told := r.told.String(); !strings.HasPrefix(told, "READY=1 STATUS=of 1 keys, 1 can seal and 1 can open") {
		t.Errorf("systemd was told\n%s", told)
	}
	if got := r.metric(`nitroseal_serve_requests_total{operation="renew-self",result="ok"}`); got != "4" {
		t.Errorf("%s renewals were counted", got)
	}
	r.end()
	if told := r.told.String(); !strings.Contains(told, "STOPPING=1") {
		t.Errorf("systemd was told\n%s", told)
	}
}

// TestVaultsOwnClientIsUnderstood: what it takes from answers, and what it makes of errors.
func TestVaultsOwnClientIsUnderstood(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{Name: "vault of berlin"})
	r := w.start(nil).waitReady()
	config := api.DefaultConfig()
	config.Address, config.MaxRetries = "https://"+r.at, 0
	config.HttpClient = r.client()
	client, err := api.NewClient(config)
	must(t, err)
	client.SetToken(text)
	renewed, err := client.Auth().Token().RenewSelfWithContext(t.Context(), 0)
	must(t, err)
	if renewed.Auth == nil || renewed.Auth.ClientToken != text || !renewed.Auth.Renewable || renewed.Auth.LeaseDuration < 1 {
		t.Errorf("renewed: %+v", renewed.Auth)
	}
	sealed, err := client.Logical().WriteWithContext(t.Context(), "transit/encrypt/prod", map[string]any{"plaintext": "YQ=="})
	must(t, err)
	opened, err := client.Logical().WriteWithContext(t.Context(), "transit/decrypt/prod", map[string]any{"ciphertext": sealed.Data["ciphertext"]})
	must(t, err)
	if opened.Data["plaintext"] != "YQ==" {
		t.Errorf("opened: %v", opened.Data)
	}
	self, err := client.Auth().Token().LookupSelfWithContext(t.Context())
	must(t, err)
	if self.Data["display_name"] != "vault of berlin" {
		t.Errorf("the token: %v", self.Data)
	}
	health, err := client.Sys().HealthWithContext(t.Context())
	must(t, err)
	if !health.Initialized || health.Sealed || health.Version != "1.2.3" {
		t.Errorf("health: %+v", health)
	}
	_, err = client.Logical().WriteWithContext(t.Context(), "transit/decrypt/prod", map[string]any{"ciphertext": "vault:v1:AAAA"})
	if refused, ok := err.(*api.ResponseError); !ok || refused.StatusCode != http.StatusBadRequest || !strings.HasPrefix(refused.Errors[0], "invalid ciphertext") { //nolint:errorlint // its own client never wraps it
		t.Errorf("a foreign ciphertext: %v", err)
	}
}

// TestAnEnvelopeOpensWhereItWasSealedOnly: two names on one HSM key, and envelopes of other uses.
func TestAnEnvelopeOpensWhereItWasSealedOnly(t *testing.T) {
	w := newWorld(t)
	other := newUnit("two", 1)
	w.units = append(w.units, other)
	_, err := w.keys.Wrap(t.Context(), "prod", "wrap", []byte("a secret"), nil)
	must(t, err)
	text, foreign := w.token(token.Spec{}), w.token(token.Spec{Keys: []string{"absent"}})
	r := w.start(nil).waitReady()
	client := r.client()
	wrapped, err := w.keys.Wrap(t.Context(), "prod", "wrap", []byte("a secret"), nil)
	must(t, err)
	posted := "vault:v1:" + base64.StdEncoding.EncodeToString(wrapped.Envelope)
	if got := r.decrypt(client, text, "prod", posted); got.code != http.StatusBadRequest {
		t.Errorf("an envelope of another use: %d %s", got.code, got.raw)
	}
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	if got := r.decrypt(client, foreign, "prod", sealed); got.code != http.StatusForbidden {
		t.Errorf("with a token of another key: %d %s", got.code, got.raw)
	}
	if got := r.decrypt(client, foreign, "absent", sealed); got.code != http.StatusBadRequest {
		t.Errorf("with a key that is not there: %d %s", got.code, got.raw)
	}
	before := w.units[0].Operations()
	damaged := sealed[:len(sealed)-8] + "AAAAAAA="
	if got := r.decrypt(client, text, "prod", damaged); got.code != http.StatusBadRequest || w.units[0].Operations() != before {
		t.Errorf("a damaged one: %d %s, at %d operations", got.code, got.raw, w.units[0].Operations()-before)
	}
}

func TestATokenThatIsRevokedOpensNothingSoonAfter(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	if got := r.encrypt(client, text, "prod", "a"); got.code != http.StatusOK {
		t.Fatalf("%d %s", got.code, got.raw)
	}
	id := strings.Split(text, ".")[1]
	if r.metric(`nitroseal_serve_token_last_use_timestamp_seconds{token="`+id+`"}`) == "" {
		t.Error("there is no last use of the token")
	}
	_, err := token.Revoke(t.Context(), w.tokens, id)
	must(t, err)
	eventually(t, "the token is refused", func() bool { return r.encrypt(client, text, "prod", "a").code == http.StatusForbidden })
	if r.metric(`nitroseal_serve_token_last_use_timestamp_seconds{token="`+id+`"}`) != "" {
		t.Error("the metrics still know the token")
	}
	text = w.token(token.Spec{})
	eventually(t, "a new token is taken", func() bool { return r.encrypt(client, text, "prod", "a").code == http.StatusOK })
}

func TestATokenIsBoundToAddressesAndCertificates(t *testing.T) {
	w := newWorld(t)
	here, elsewhere := w.token(token.Spec{Addresses: []string{"127.0.0.0/8"}}), w.token(token.Spec{Addresses: []string{"192.0.2.0/24"}})
	named := w.token(token.Spec{CertificateNames: []string{"vault-1.example"}})
	r := w.start(func(site *Site) {
		site.Listen.ClientCA = func() ([]byte, error) { return w.ca.pem(), nil }
	}).waitReady()
	anonymous, one, two := r.client(), r.client(w.ca.pair("vault-1.example")), r.client(w.ca.pair("vault-2.example"))
	for name, test := range map[string]struct {
		client *http.Client
		token  string
		code   int
	}{
		"from its address":             {anonymous, here, http.StatusOK},
		"from another address":         {anonymous, elsewhere, http.StatusForbidden},
		"without its certificate":      {anonymous, named, http.StatusForbidden},
		"with its certificate":         {one, named, http.StatusOK},
		"with another certificate":     {two, named, http.StatusForbidden},
		"with one that nobody asked":   {two, here, http.StatusOK},
		"health without a certificate": {anonymous, "", http.StatusForbidden},
	} {
		if got := r.encrypt(test.client, test.token, "prod", "a"); got.code != test.code {
			t.Errorf("%s: %d %s", name, got.code, got.raw)
		}
	}
	if log := r.logged.String(); !strings.Contains(log, "a request was refused") || strings.Contains(log, named) {
		t.Errorf("the log says\n%s", log)
	}
	stranger := newAuthority(t)
	if _, err := r.try(r.client(stranger.pair("vault-1.example")), http.MethodPut, "/v1/auth/token/renew-self", named, "{}"); err == nil {
		t.Error("a certificate of another CA is taken")
	}
}

func TestARotationElsewhereIsFollowed(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	old := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	r.encrypt(client, text, "prod", "a secret") // the first one writes the record, so nothing of it is cached yet
	w.units[0].AddEC(t, "prod-2", "02", elliptic())
	_, err := w.keys.Rotate(t.Context(), "prod", keyring.RotateRequest{Adopt: &keyring.AdoptRequest{Device: "one", Label: "prod-2", By: "alice"}})
	must(t, err)
	_, err = w.keys.Backup(t.Context(), "prod", "alice")
	must(t, err)
	var sealed answer
	eventually(t, "the new version seals", func() bool {
		sealed = r.encrypt(client, text, "prod", "a secret")
		return strings.HasPrefix(sealed.data("ciphertext"), "vault:v2:")
	})
	for _, ciphertext := range []string{old, sealed.data("ciphertext")} {
		if got := r.decrypt(client, text, "prod", ciphertext); got.code != http.StatusOK {
			t.Errorf("%.12s: %d %s", ciphertext, got.code, got.raw)
		}
	}
}

func TestALeaseServesAStormWithOneOperation(t *testing.T) {
	w := newWorld(t)
	w.lease("prod", time.Hour)
	text := w.token(token.Spec{Limit: &token.Limit{}})
	first := w.start(nil).waitReady()
	var sealed string
	eventually(t, "it seals to a lease", func() bool {
		sealed = first.encrypt(first.client(), text, "prod", "a secret").data("ciphertext")
		return first.metric("nitroseal_serve_lease_locked{key=\"prod\",version=\"1\"}") != ""
	})
	sealed = first.encrypt(first.client(), text, "prod", "a secret").data("ciphertext")
	first.end()
	before := w.units[0].Operations()
	r := w.start(nil).waitReady()
	client := r.client()
	var running sync.WaitGroup
	for range 200 {
		running.Go(func() {
			if got, err := r.try(client, http.MethodPut, "/v1/transit/decrypt/prod", text, `{"ciphertext":"`+sealed+`"}`); err != nil || got.code != http.StatusOK {
				t.Errorf("%d %s %v", got.code, got.raw, err)
			}
		})
	}
	running.Wait()
	if got := w.units[0].Operations() - before; got > 2 { // the authentication key and the KEK
		t.Errorf("%d operations", got)
	}
	// Sealing wipes it, and the next opening asks the HSM again.
	r.seal <- syscall.SIGUSR1
	eventually(t, "it is sealed", func() bool {
		return r.logged.count("sealed: all leases were ended") == 1
	})
	before = w.units[0].Operations()
	if got := r.decrypt(client, text, "prod", sealed); got.code != http.StatusOK || w.units[0].Operations() != before+1 {
		t.Errorf("after it was sealed: %d %s at %d operations", got.code, got.raw, w.units[0].Operations()-before)
	}
	// The HSM goes away: what is leased opens, and all is encrypted.
	w.units[0].away(hsm.ErrUnavailable)
	if got := r.decrypt(client, text, "prod", sealed); got.code != http.StatusOK {
		t.Errorf("without the HSM, leased: %d %s", got.code, got.raw)
	}
	if got := r.encrypt(client, text, "prod", "another secret"); got.code != http.StatusOK {
		t.Errorf("without the HSM: %d %s", got.code, got.raw)
	}
	if got := r.ask(client, http.MethodGet, "/v1/sys/health", "", ""); got.code != http.StatusOK || !strings.Contains(got.raw, `"mode":"leased"`) {
		t.Errorf("health: %d %s", got.code, got.raw)
	}
}

// TestAnHSMThatGoesAwayComesBackByItself.
func TestAnHSMThatGoesAwayComesBackByItself(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	health := func(query string) int { return r.ask(client, http.MethodGet, "/v1/sys/health"+query, "", "").code }
	w.units[0].away(hsm.ErrUnavailable)
	got := r.decrypt(client, text, "prod", sealed)
	if got.code != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" || !strings.HasPrefix(got.raw, `{"errors":["`) {
		t.Errorf("decrypt: %d %s", got.code, got.raw)
	}
	if got := r.encrypt(client, text, "prod", "another secret"); got.code != http.StatusOK {
		t.Errorf("encrypt: %d %s", got.code, got.raw)
	}
	w.units[0].tellAll(hsm.ErrUnavailable)
	eventually(t, "health tells", func() bool { return health("") == http.StatusServiceUnavailable })
	if code := health("?sealedcode=200"); code != http.StatusOK {
		t.Errorf("for a balancer: %d", code)
	}
	if code := health("?sealedcode=banana"); code != http.StatusServiceUnavailable {
		t.Errorf("for a banana: %d", code)
	}
	if !strings.Contains(r.page("/readyz"), `"ready": true`) || !strings.Contains(r.page("/healthz"), "true") {
		t.Errorf("it can seal and does not say so: %s", r.page("/readyz"))
	}
	w.units[0].away(nil)
	if got := r.decrypt(client, text, "prod", sealed); got.code != http.StatusOK {
		t.Errorf("decrypt, the HSM being back: %d %s", got.code, got.raw)
	}
	eventually(t, "health tells", func() bool { return health("") == http.StatusOK })
}

// TestAnHSMThatIsAwayAtTheStart, or whose PIN nobody can read: it listens, and says what it waits for.
func TestAnHSMThatIsAwayAtTheStart(t *testing.T) {
	for name, why := range map[string]error{"away": hsm.ErrUnavailable, "without its PIN": fmt.Errorf("%w: pin_file: no such file", device.ErrConfig)} {
		t.Run(name, func(t *testing.T) { startWithoutHSM(t, why) })
	}
}

func startWithoutHSM(t *testing.T, why error) {
	t.Helper()
	w := newWorld(t)
	text := w.token(token.Spec{})
	before, err := w.keys.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("a secret"), nil)
	must(t, err)
	w.units[0].away(why)
	r := w.start(nil)
	client := r.client()
	eventually(t, "it says that it waits", func() bool { return r.logged.count("a key is not ready") == 1 })
	got := r.encrypt(client, text, "prod", "a secret")
	if got.code != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" {
		t.Errorf("encrypt: %d %s", got.code, got.raw)
	}
	if got := r.decrypt(client, text, "prod", transit.Format(before.Version, before.Envelope)); got.code != http.StatusServiceUnavailable {
		t.Errorf("decrypt: %d %s", got.code, got.raw)
	}
	if got := r.ask(client, http.MethodPut, "/v1/auth/token/renew-self", text, "{}"); got.code != http.StatusOK {
		t.Errorf("renew-self: %d %s", got.code, got.raw)
	}
	if got := r.ask(client, http.MethodGet, "/v1/sys/health?sealedcode=200", "", ""); got.code != http.StatusServiceUnavailable {
		t.Errorf("a balancer is told to send Vaults that start: %d %s", got.code, got.raw)
	}
	select {
	case <-r.ready:
		t.Error("it calls itself ready")
	default:
	}
	if strings.Contains(r.told.String(), "READY") || !strings.Contains(r.page("/readyz"), `"ready": false`) {
		t.Errorf("systemd was told %s, others %s", r.told, r.page("/readyz"))
	}
	w.units[0].away(nil)
	r.waitReady()
	if got := r.encrypt(client, text, "prod", "a secret"); got.code != http.StatusOK {
		t.Errorf("encrypt, the HSM being back: %d %s", got.code, got.raw)
	}
}

// TestAKeyThatHasSealedIsNotMadeToWait: requests may come before a key was looked at for the first time, since its token is new.
func TestAKeyThatHasSealedIsNotMadeToWait(t *testing.T) {
	w := newWorld(t)
	d := newDesk(w.keys, nil, newMetrics(), slog.New(slog.DiscardHandler))
	_, err := d.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("a secret"), nil)
	must(t, err)
	d.waiting.Store(&map[string]int{"prod": 1})
	if _, err := d.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("a secret"), nil); err != nil {
		t.Errorf("it has sealed, and was then looked at: %v", err)
	}
	d.waiting.Store(&map[string]int{"prod": 2})
	var busy *transit.BusyError
	if _, err := d.Wrap(t.Context(), "prod", envelope.UseTransit, []byte("a secret"), nil); !errors.As(err, &busy) {
		t.Errorf("it waits for a version that is new: %v", err)
	}
}

// TestTokensThatCameLateMakeNobodyReadyBeforeTheirKeysWereLookedAt: systemd would start a Vault whose key cannot seal.
func TestTokensThatCameLateMakeNobodyReadyBeforeTheirKeysWereLookedAt(t *testing.T) {
	w := newWorld(t)
	w.token(token.Spec{})
	tokens := token.NewRegistry(token.RegistryOptions{Store: w.tokens})
	in, err := newService(&Site{Keys: w.keys, Tokens: tokens}, &server{metrics: newMetrics(), hooks: newHooks(newMetrics()), logger: slog.New(slog.DiscardHandler)})
	must(t, err)
	in.look()
	must(t, tokens.Refresh(t.Context()))
	if in.settled() {
		t.Error("it is ready, and nobody knows for what")
	}
	in.look()
	if in.settled() {
		t.Error("it is ready, and its key was not warmed")
	}
}

// TestAMisspeltKeyTakesNothingFromTheOthers, and keeps no server from being ready.
func TestAMisspeltKeyTakesNothingFromTheOthers(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{Keys: []string{"prod", "prd"}})
	r := w.start(nil).waitReady()
	client := r.client()
	got := r.ask(client, http.MethodGet, "/v1/sys/health", "", "")
	if got.code != http.StatusOK || !strings.Contains(got.raw, `"name":"prd"`) {
		t.Errorf("health: %d %s", got.code, got.raw)
	}
	if !strings.Contains(r.page("/readyz"), `"ready": true`) {
		t.Errorf("not ready: %s", r.page("/readyz"))
	}
	if got := r.encrypt(client, text, "prd", "a"); got.code != http.StatusBadRequest || !strings.Contains(got.raw, "encryption key not found") {
		t.Errorf("%d %s", got.code, got.raw)
	}
}

func TestAKeyThatTheConfigurationDoesNotNameIsNotServed(t *testing.T) {
	w := newWorld(t)
	text := w.token(token.Spec{})
	r := w.start(func(site *Site) { site.Names = []string{"other"} }).waitReady()
	if got := r.encrypt(r.client(), text, "prod", "a"); got.code != http.StatusBadRequest {
		t.Errorf("%d %s", got.code, got.raw)
	}
	if got := r.ask(r.client(), http.MethodGet, "/v1/sys/health", "", ""); got.code != http.StatusServiceUnavailable {
		t.Errorf("a key that is named and not there: %d %s", got.code, got.raw)
	}
}

// TestAnUnsealGoesFirst: of an HSM that does one thing at a time, with health checks before the unseal.
func TestAnUnsealGoesFirst(t *testing.T) {
	w := newWorld(t)
	w.units[0].places = make(chan struct{}, 1)
	text := w.token(token.Spec{})
	other := w.start(nil).waitReady()
	old := other.encrypt(other.client(), text, "prod", "root key").data("ciphertext") // by another server, as far as the next one knows
	other.end()
	r := w.start(nil).waitReady()
	client := r.client()
	fresh := r.encrypt(client, text, "prod", "Heartbeat 7").data("ciphertext")
	w.units[0].Delay(100 * time.Millisecond)
	giveBack := w.units[0].hold()
	var running sync.WaitGroup
	var mu sync.Mutex
	var order []string
	ask := func(name, ciphertext string) {
		running.Go(func() {
			if got, err := r.try(client, http.MethodPut, "/v1/transit/decrypt/prod", text, `{"ciphertext":"`+ciphertext+`"}`); err != nil || got.code != http.StatusOK {
				t.Errorf("%s: %d %s %v", name, got.code, got.raw, err)
			}
			mu.Lock()
			defer mu.Unlock()
			order = append(order, name)
		})
	}
	waits := func(n int) func() bool {
		return func() bool {
			inside, waiting := r.queue()
			return inside+waiting == n
		}
	}
	for i := range 6 {
		ask("check", fresh)
		eventually(t, "a check waits", waits(i+1))
	}
	ask("unseal", old)
	eventually(t, "the unseal waits", waits(7))
	giveBack()
	running.Wait()
	if at := slices.Index(order, "unseal"); at > 4 { // two were inside; what was answered together is noted in any order
		t.Errorf("it came after %d checks: %v", at, order)
	}
}

// TestAStopLetsEndWhatRuns and turns away what waits.
func TestAStopLetsEndWhatRuns(t *testing.T) {
	w := newWorld(t)
	w.units[0].places = make(chan struct{}, 1)
	text := w.token(token.Spec{})
	r := w.start(nil).waitReady()
	client := r.client()
	sealed := r.encrypt(client, text, "prod", "a secret").data("ciphertext")
	giveBack := w.units[0].hold()
	codes := make(chan int, 8)
	for range 5 {
		go func() {
			got, err := r.try(client, http.MethodPut, "/v1/transit/decrypt/prod", text, `{"ciphertext":"`+sealed+`"}`)
			if err != nil {
				t.Error(err)
			}
			codes <- got.code
		}()
	}
	eventually(t, "they wait", func() bool {
		inside, waiting := r.queue()
		return inside == 2 && waiting == 3
	})
	ended := make(chan struct{})
	go func() { r.end(); close(ended) }()
	eventually(t, "who waits is turned away", func() bool { _, waiting := r.queue(); return waiting == 0 })
	giveBack()
	<-ended
	counts := map[int]int{}
	for range 5 {
		counts[<-codes]++
	}
	if counts[http.StatusOK] != 2 || counts[http.StatusServiceUnavailable] != 3 {
		t.Errorf("answers: %v", counts)
	}
	if _, err := r.try(client, http.MethodGet, "/v1/sys/health", "", ""); err == nil {
		t.Error("it answers after its end")
	}
}

// TestAnAddressThatIsTakenIsSaid by an error that can be asked for.
func TestAnAddressThatIsTakenIsSaid(t *testing.T) {
	w := newWorld(t)
	first := w.start(nil).waitReady()
	err := Run(context.Background(), Options{Build: (&running{t: t, world: w, change: func(site *Site) { site.Listen.Address = first.at }}).build})
	if !isTaken(err) {
		t.Errorf("Run: %v", err)
	}
}
