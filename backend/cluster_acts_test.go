package backend

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/store"
)

// alice is the public key of a person, made once: that takes a moment.
var alice = sync.OnceValues(func() (string, error) {
	entity, err := openpgp.NewEntity("Alice", "", "alice@example.org", nil)
	if err != nil {
		return "", err
	}
	var text bytes.Buffer
	lines, err := armor.Encode(&text, openpgp.PublicKeyType, nil)
	if err != nil {
		return "", err
	}
	err = errors.Join(entity.Serialize(lines), lines.Close())
	return text.String() + "\n", err
})

func alicePublic(t testing.TB) string {
	t.Helper()
	key, err := alice()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// newActs is a mount with the cluster "prod", whose requests take a second at most.
func newActs(t *testing.T) (*mount, *fakeCustodian) {
	t.Helper()
	m, fake := newCustody(t)
	m.write("clusters/prod", clusterOf(t, nil)).ok(t)
	m.write("config", fields{"request_timeout": 1}).ok(t)
	return m, fake
}

// sys/init takes as long as it takes: a client that has no answer asks again, and nothing is done twice.
func TestInitOutlivesItsRequest(t *testing.T) {
	m, fake := newActs(t)
	release := make(chan struct{})
	fake.init = func(_ context.Context, c *cluster.Cluster) (cluster.InitResult, error) {
		<-release
		return cluster.InitResult{
			Cluster: c.Name, Initialized: true, Kind: cluster.KindUnseal, Shares: 5, Threshold: 3, Items: []string{"unseal"}, RootRevoked: true,
			People: []cluster.PersonMessage{{PersonShare: cluster.PersonShare{Index: 4, Name: "alice", Fingerprint: "ab"}, Message: []byte("-----BEGIN PGP MESSAGE-----")}},
			Nodes:  outcomesOf(c, cluster.ActionUnsealed, nil), Warnings: []string{"mind the gap"},
		}, nil
	}
	got := m.write("clusters/prod/init", nil).want(t, http.StatusOK)
	if got.text("state") != "running" || len(got.warnings) != 1 || !strings.Contains(got.warnings[0], "clusters/prod/status") {
		t.Errorf("answer = %v %q", got.data, got.warnings)
	}
	act, _ := m.read("clusters/prod/status").ok(t).data["act"].(map[string]any)
	if act["verb"] != "init" || act["state"] != "running" || act["by"] != "token-test (entity e-1)" {
		t.Errorf("status shows %v", act)
	}
	if got := m.write("clusters/prod/init", nil).want(t, http.StatusOK); got.text("state") != "running" {
		t.Errorf("the repetition is answered with %v", got.data)
	}
	m.write("clusters/prod/unseal", nil).want(t, http.StatusServiceUnavailable).says(t, "init", "token-test", "try again")
	m.delete("clusters/prod", nil).want(t, http.StatusServiceUnavailable).says(t, "at work")

	close(release)
	await(t, "the act to end", func() bool { return !m.clusters.acts.busy("prod") })
	got = m.write("clusters/prod/init", nil).want(t, http.StatusOK) // the answer that nobody took
	people, _ := got.data["people"].([]any)
	if got.text("state") != "done" || got.text("initialized") != "true" || got.text("shares") != "5" || len(people) != 1 || got.warnings[0] != "mind the gap" {
		t.Errorf("answer = %v %q", got.data, got.warnings)
	}
	if fake.inits != 1 {
		t.Errorf("it was initialised %d times", fake.inits)
	}
	m.write("clusters/prod/init", nil).ok(t) // whoever asks now wants it anew, which a custodian knows how to take
	if fake.inits != 2 {
		t.Errorf("%d calls of the custodian, want 2", fake.inits)
	}
}

// Vault gives out what is encrypted to people once: an error beside it, or a lost answer, must not lose it.
func TestWhatIsEncryptedToPeopleIsInEveryAnswerOfInit(t *testing.T) {
	m, fake := newActs(t)
	fake.init = func(context.Context, *cluster.Cluster) (cluster.InitResult, error) {
		return cluster.InitResult{
			People: []cluster.PersonMessage{{PersonShare: cluster.PersonShare{Index: 4, Name: "alice"}, Message: []byte("to alice")}}, RootPGP: []byte("to root"),
		}, cluster.ErrHeld
	}
	m.write("clusters/prod/init", nil).want(t, http.StatusServiceUnavailable)
	fake.init = func(context.Context, *cluster.Cluster) (cluster.InitResult, error) { return cluster.InitResult{}, nil }
	for range 2 {
		got := m.write("clusters/prod/init", nil).want(t, http.StatusOK)
		if !strings.Contains(got.text("people"), "to alice") || got.text("root_token") != "to root" {
			t.Errorf("answer = %v", got.data)
		}
	}
	fake.rekey = func(context.Context, cluster.RekeyOptions) (cluster.RekeyResult, error) {
		return cluster.RekeyResult{}, nil
	}
	m.write("clusters/prod/rekey", nil).ok(t)
	if got := m.write("clusters/prod/init", nil).want(t, http.StatusOK); got.text("people") != "[]" {
		t.Errorf("after a rekey the old ones are still given out: %v", got.data)
	}
}

// Until its keys are kept, nothing would refuse a write by which they go elsewhere the moment that they are.
func TestAClusterIsNotChangedWhileItIsInitialised(t *testing.T) {
	m, fake := newActs(t)
	release := make(chan struct{})
	var nodes []string
	fake.init = func(_ context.Context, c *cluster.Cluster) (cluster.InitResult, error) {
		<-release
		nodes = c.Nodes
		m.keep(c.Name)
		return cluster.InitResult{Cluster: c.Name, Initialized: true}, nil
	}
	m.write("clusters/prod/init", nil).want(t, http.StatusOK)
	evil := fields{"nodes": "https://evil.example:8200"}
	m.write("clusters/prod", evil).want(t, http.StatusServiceUnavailable).says(t, "try again")
	close(release)
	await(t, "the act to end", func() bool { return !m.clusters.acts.busy("prod") })
	m.write("clusters/prod", evil).want(t, http.StatusBadRequest).says(t, "accept_destination=true")
	if len(nodes) != 2 {
		t.Errorf("initialised were %v", nodes)
	}
}

// An answer of init that made new keys has the letters of these, and of no earlier ones.
func TestLettersOfAnEarlierInitialisationAreNotThoseOfANewOne(t *testing.T) {
	m, fake := newActs(t)
	fake.init = func(context.Context, *cluster.Cluster) (cluster.InitResult, error) {
		return cluster.InitResult{Initialized: true, People: []cluster.PersonMessage{{Message: []byte("to alice")}}}, nil
	}
	m.write("clusters/prod/init", nil).ok(t)
	fake.init = func(context.Context, *cluster.Cluster) (cluster.InitResult, error) {
		return cluster.InitResult{Initialized: true}, nil
	}
	if got := m.write("clusters/prod/init", nil).ok(t); got.text("people") != "[]" {
		t.Errorf("answer = %v", got.data)
	}
}

// An answer goes to a request that still waits for it: one whose client has gone leaves it to the repetition.
func TestARequestThatIsOverTakesNoAnswer(t *testing.T) {
	m, _ := newActs(t)
	gone, leave := context.WithCancel(t.Context())
	leave()
	for range 20 {
		ran := 0
		wanted := act{verb: "root", by: "alice", kept: true}
		make1 := func(context.Context) (*logical.Response, error) {
			ran++
			return &logical.Response{Data: map[string]any{"root_token": "a message"}}, nil
		}
		if _, err := m.perform(gone, "prod", wanted, make1); !errors.Is(err, errAtWork) {
			t.Fatalf("a request whose client has gone is answered: %v", err)
		}
		await(t, "the act to end", func() bool { return !m.clusters.acts.busy("prod") })
		_, _ = m.perform(gone, "prod", wanted, make1)
		got, err := m.perform(t.Context(), "prod", wanted, make1)
		if err != nil || got.Data["root_token"] != "a message" || ran != 1 {
			t.Fatalf("the repetition got %v, %v, and it was done %d times", got, err, ran)
		}
	}
}

// Who asks for new keys wants new ones, whatever somebody else asked for before.
func TestAnAnswerThatNobodyTookIsForWhoAsked(t *testing.T) {
	m, _ := newActs(t)
	gone, leave := context.WithCancel(t.Context())
	leave()
	ran := 0
	rekey := func(context.Context) (*logical.Response, error) { ran++; return new(logical.Response), nil }
	_, _ = m.perform(gone, "prod", act{verb: "rekey", by: "alice", kept: true}, rekey)
	await(t, "the act to end", func() bool { return !m.clusters.acts.busy("prod") })
	if _, err := m.perform(t.Context(), "prod", act{verb: "rekey", by: "bob", kept: true}, rekey); err != nil || ran != 2 {
		t.Errorf("%d rekeys for two people, %v", ran, err)
	}
}

func TestMistakesInActsAreNamed(t *testing.T) {
	m, _ := newActs(t)
	for _, test := range []struct {
		verb string
		data fields
		says string
	}{
		{"rekey", fields{"kind": "unsealing"}, "recovery"},
		{"rekey", fields{"shares": -1}, "numbers of keys"},
		{"rekey", fields{"cancel": true, "shares": 3}, "no new keys"},
		{"root", fields{}, "pgp_key is missing"},
		{"root", fields{"pgp_key": "%%"}, "neither armored nor base64"},
		{"root", fields{"pgp_key": "YWJj"}, "gpg --armor --export"},
		{"init", fields{"force": true}, "takes none"},
	} {
		m.write("clusters/prod/"+test.verb, test.data).want(t, http.StatusBadRequest).says(t, test.says)
	}
}

func TestAnActThatFailsSaysSoOnce(t *testing.T) {
	m, fake := newActs(t)
	release := make(chan struct{})
	fake.init = func(context.Context, *cluster.Cluster) (cluster.InitResult, error) {
		<-release
		return cluster.InitResult{}, fmt.Errorf("cluster: %w", cluster.ErrEmpty)
	}
	m.write("clusters/prod/init", nil).want(t, http.StatusOK)
	close(release)
	await(t, "the act to end", func() bool { return !m.clusters.acts.busy("prod") })
	act, _ := m.read("clusters/prod/status").ok(t).data["act"].(map[string]any)
	if act["state"] != "failed" || !strings.Contains(fmt.Sprint(act["error"]), "nobody holds its keys") {
		t.Errorf("status shows %v", act)
	}
	m.write("clusters/prod/init", nil).want(t, http.StatusConflict).says(t, "nobody holds its keys")
	if fake.inits != 1 {
		t.Errorf("%d calls of the custodian", fake.inits)
	}
	m.write("clusters/prod/init", nil).want(t, http.StatusConflict)
	if fake.inits != 2 {
		t.Errorf("%d calls of the custodian, want another try", fake.inits)
	}
}

func TestRequestsThatWantTheSameAreOneAct(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newActs(t)
		m.write("config", fields{"request_timeout": 45}).ok(t)
		fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			time.Sleep(10 * time.Second)
			return outcomesOf(c, cluster.ActionUnsealed, nil)
		}
		var group sync.WaitGroup
		answers := make([]reply, 5)
		for i := range answers {
			group.Go(func() { answers[i] = m.write("clusters/prod/unseal", nil) })
		}
		group.Wait()
		for _, got := range answers {
			if got.want(t, http.StatusOK).text("unsealed") != "true" {
				t.Errorf("answer = %v", got.data)
			}
		}
		if fake.tended("prod") != 1 {
			t.Errorf("%d acts for five requests at one time", fake.tended("prod"))
		}
	})
}

// An old answer would tell of nodes that were sealed meanwhile.
func TestAnUnsealThatNobodyWaitedForIsNotTakenForANewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, fake := newActs(t)
		fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
			time.Sleep(10 * time.Second)
			return outcomesOf(c, cluster.ActionUnsealed, nil)
		}
		if got := m.write("clusters/prod/unseal", nil).want(t, http.StatusOK); got.text("state") != "running" {
			t.Errorf("answer = %v", got.data)
		}
		time.Sleep(time.Minute)
		m.write("clusters/prod/unseal", nil).want(t, http.StatusOK)
		if fake.tended("prod") != 2 {
			t.Errorf("%d acts for two requests a minute apart", fake.tended("prod"))
		}
		time.Sleep(time.Minute)
	})
}

func TestAnUnsealThatFailsAtSomeNodesIsAWarning(t *testing.T) {
	m, fake := newActs(t)
	for name, test := range map[string]struct {
		first, second error
		status        int
	}{
		"none":                         {nil, nil, http.StatusOK},
		"one of two":                   {nil, node.ErrUnavailable, http.StatusOK},
		"both, and it passes":          {node.ErrUnavailable, node.ErrUnavailable, http.StatusServiceUnavailable},
		"both, with wrong shares":      {cluster.ErrWrongShares, node.ErrUnavailable, http.StatusConflict},
		"one that is not known by TLS": {node.ErrIdentity, node.ErrIdentity, http.StatusServiceUnavailable},
		"an alarm at one of two":       {nil, cluster.ErrForeignCluster, http.StatusConflict},
		"no keys are kept":             {cluster.ErrNoMaterial, cluster.ErrNoMaterial, http.StatusNotFound},
		"not initialised":              {cluster.ErrNotInitialized, cluster.ErrNotInitialized, http.StatusBadRequest},
		"the HSM is away":              {hsm.ErrUnavailable, hsm.ErrUnavailable, http.StatusServiceUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			fake.tend = func(_ context.Context, c *cluster.Cluster) []cluster.NodeOutcome {
				outcomes := outcomesOf(c, cluster.ActionNone, nil)
				outcomes[0].Err, outcomes[1].Err = test.first, test.second
				return outcomes
			}
			got := m.write("clusters/prod/unseal", nil).want(t, test.status)
			if wanted := test.second != nil && test.status == http.StatusOK; wanted != (len(got.warnings) > 0) {
				t.Errorf("warnings = %q", got.warnings)
			}
		})
	}
}

func TestErrorsOfClustersBecomeTheRightCodes(t *testing.T) {
	for _, test := range []struct {
		err    error
		status int
	}{
		{cluster.ErrInvalid, 400},
		{cluster.ErrNotInitialized, 400},
		{cluster.ErrPGPKey, 400},
		{node.ErrConfig, 400},
		{cluster.ErrNoMaterial, 404},
		{cluster.ErrExists, 409},
		{cluster.ErrEmpty, 409},
		{cluster.ErrMismatch, 409},
		{cluster.ErrForeignCluster, 409},
		{cluster.ErrWrongShares, 409},
		{node.ErrInProgress, 409},
		{cluster.ErrHeld, 503},
		{cluster.ErrBusy, 503},
		{cluster.ErrIntentElsewhere, 503},
		{cluster.ErrFacts, 503},
		{node.ErrUnavailable, 503},
		{node.ErrIdentity, 503},
		{node.ErrRedirect, 503},
		{node.ErrMalformed, 503},
		{node.ErrMayHaveHappened, 503},
		{fmt.Errorf("%w: %w", cluster.ErrForeignCluster, store.ErrUnavailable), 409},
		{fmt.Errorf("%w: %w", cluster.ErrHeld, store.ErrFull), 503},
		{fmt.Errorf("%w: %w", cluster.ErrInvalid, node.ErrConfig), 400},
	} {
		if got := status(fmt.Errorf("a sentence: %w", test.err)); got != test.status {
			t.Errorf("%v: %d, want %d", test.err, got, test.status)
		}
	}
	for _, passes1 := range []error{cluster.ErrHeld, cluster.ErrBusy, node.ErrUnavailable} {
		if !passes(passes1) {
			t.Errorf("%v: no Retry-After", passes1)
		}
	}
}

// What ends a mount waits for a Vault that is being initialised, with patience, and not for ever: Vault holds a lock of all
// mounts meanwhile.
func TestTheEndOfTheMountWaitsForAnInitialisation(t *testing.T) {
	for name, test := range map[string]struct{ takes, waits time.Duration }{
		"that ends in time":   {20 * time.Second, 20 * time.Second},
		"that takes too long": {5 * time.Minute, cleanPatience},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, fake := newActs(t)
				var log bytes.Buffer
				m.logger = NewLogger(hclog.New(&hclog.LoggerOptions{Output: &log}))
				fake.init = func(context.Context, *cluster.Cluster) (cluster.InitResult, error) {
					time.Sleep(test.takes) // whatever becomes of its ctx
					return cluster.InitResult{Cluster: "prod"}, nil
				}
				begun := time.Now()
				m.write("clusters/prod/init", nil).want(t, http.StatusOK)
				m.Cleanup(t.Context())
				if waited := time.Since(begun); waited != test.waits && waited != test.waits+time.Second {
					t.Errorf("it waited %v, want %v", waited, test.waits)
				}
				if complained := strings.Contains(log.String(), "prod"); complained != (test.takes > cleanPatience) {
					t.Errorf("the log says %s", log.String())
				}
				time.Sleep(test.takes) // the end of what goes on
			})
		})
	}
}
