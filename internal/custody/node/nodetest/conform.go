package nodetest

import (
	"bytes"
	"embed"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/google/go-cmp/cmp"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// Subject is a node to be tested, not initialised.
type Subject struct {
	Address string
	TLS     node.TLS
	// Restart ends its process and starts it anew.
	Restart func(t *testing.T)
}

//go:embed testdata/*.golden
var golden embed.FS

// Conform checks that a node of any kind behaves as this package and package node believe Vault to. start runs a new node;
// nodes of the kind Raft can reach one another. What went over the wire is compared with the golden files as well, which were
// made with Vault 1.21.0. update names a folder to write them to; "" for none.
func Conform(t *testing.T, start func(t *testing.T, kind Kind) Subject, update string) {
	t.Helper()
	for _, suite := range []struct {
		kind Kind
		run  func(*conformance)
	}{
		{Raft, (*conformance).raft}, {Alone, (*conformance).alone}, {Auto, (*conformance).auto},
	} {
		t.Run(string(suite.kind), func(t *testing.T) {
			c := &conformance{T: t, kind: suite.kind, start: start, notes: &transcript{}}
			c.subject = start(t, suite.kind)
			c.node = c.client(c.subject)
			suite.run(c)
			if !t.Failed() {
				c.compare(update)
			}
		})
	}
}

// conformance is one run of the suite.
type conformance struct {
	*testing.T
	kind    Kind
	start   func(t *testing.T, kind Kind) Subject
	subject Subject
	node    *node.Node
	notes   *transcript
	shares  [][]byte
	token   []byte
}

func (c *conformance) client(s Subject) *node.Node {
	c.Helper()
	n, err := node.New(node.Config{Address: s.Address, TLS: s.TLS, Timeout: time.Minute, Transport: c.notes.wrap})
	must(c, err)
	c.Cleanup(n.Close)
	return n
}

func (c *conformance) compare(update string) {
	c.Helper()
	name := "testdata/" + string(c.kind) + ".golden"
	got := c.notes.String()
	if update != "" {
		must(c, os.WriteFile(filepath.Join(update, name), []byte(got), 0o600))
		return
	}
	want, err := golden.ReadFile(name)
	must(c, err)
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
		c.Errorf("what went over the wire differs from Vault 1.21.0 (-) here (+):\n%s", diff)
	}
}

// is checks that an error is all that is wanted, and nothing that is not.
func (c *conformance) is(err error, want ...error) {
	c.Helper()
	for _, sentinel := range []error{
		node.ErrUnavailable, node.ErrIdentity, node.ErrRedirect, node.ErrRefused, node.ErrDenied, node.ErrSealed, node.ErrUninitialized,
		node.ErrAlreadyInitialized, node.ErrWrongShares, node.ErrInProgress, node.ErrNotInProgress, node.ErrMayHaveHappened, node.ErrStandby,
		node.ErrMalformed,
	} {
		wanted := false
		for _, w := range want {
			wanted = wanted || errors.Is(w, sentinel)
		}
		if errors.Is(err, sentinel) != wanted {
			c.Errorf("%v: is %q: %t, want %t", err, sentinel, !wanted, wanted)
		}
	}
	if len(want) == 0 && err != nil {
		c.Error(err)
	}
}

// step names what comes next.
func (c *conformance) step(text string) {
	c.Helper()
	if c.Failed() {
		c.FailNow()
	}
	c.notes.comment(text)
}

// wait looks until something is so.
func (c *conformance) wait(what string, is func() bool) {
	c.Helper()
	defer c.notes.pause()()
	deadline := time.After(time.Minute)
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for !is() {
		select {
		case <-deadline:
			c.Fatal("waited a minute for ", what)
		case <-again.C:
		}
	}
}

func (c *conformance) waitActive(n *node.Node) {
	c.Helper()
	c.wait("an active node", func() bool {
		role, err := n.Role(c.Context())
		return err == nil && role != node.RoleNone
	})
}

func (c *conformance) status(n *node.Node) node.Status {
	c.Helper()
	status, err := n.Status(c.Context())
	must(c, err)
	return status
}

func (c *conformance) give(n *node.Node, shares [][]byte) node.Status {
	c.Helper()
	var status node.Status
	for _, share := range shares {
		var err error
		status, err = n.Unseal(c.Context(), share)
		must(c, err)
	}
	return status
}

// wrong is a share of no cluster. It can be combined with the real ones and with wrong ones of other numbers: what tells the
// shares of a set apart, their last byte, it shares with none of them.
func (c *conformance) wrong(number int) []byte {
	for last := byte(1); ; last++ {
		if slices.ContainsFunc(c.shares, func(share []byte) bool { return share[len(share)-1] == last }) {
			continue
		}
		if number--; number == 0 {
			return append(random(32), last)
		}
	}
}

func (c *conformance) raft() {
	c.uninitialized()
	c.initialize(5, 3)
	c.unseal()
	c.rekey(node.UnsealKeys)
	c.pgp()
	c.root()
	c.restart()
	c.join()
}

func (c *conformance) uninitialized() {
	ctx := c.Context()
	c.step("a node that is not initialised")
	status := c.status(c.node)
	if status.Initialized || !status.Sealed || status.Type != "shamir" || status.N+status.T+status.Progress != 0 {
		c.Errorf("%+v", status)
	}
	_, err := c.node.Role(ctx)
	c.is(err, node.ErrSealed, node.ErrUnavailable)
	_, err = c.node.Unseal(ctx, c.wrong(1))
	c.is(err, node.ErrUninitialized, node.ErrRefused)
	_, err = c.node.ResetUnseal(ctx)
	c.is(err)
	_, err = c.node.RekeyStatus(ctx, node.UnsealKeys)
	c.is(err, node.ErrSealed, node.ErrUnavailable)
	_, err = c.node.RootStatus(ctx)
	c.is(err, node.ErrSealed, node.ErrUnavailable)

	c.step("initialisations that are refused")
	for _, request := range []node.InitRequest{
		{Shares: 2, Threshold: 3},
		{Shares: 5, Threshold: 1},
		{Shares: 1, Threshold: 1, RecoveryShares: 1, RecoveryThreshold: 1},
		{Shares: 3, Threshold: 2, PGPKeys: []string{"AAAA"}},
		{Shares: 1, Threshold: 1, PGPKeys: []string{"AAAA"}},
	} {
		answer, err := c.node.Init(ctx, request)
		c.is(err, node.ErrRefused)
		if answer != nil {
			c.Error("an answer came with the error")
		}
	}
}

func (c *conformance) initialize(shares, threshold int) {
	ctx := c.Context()
	c.step("the initialisation, and a second one")
	request := node.InitRequest{Shares: shares, Threshold: threshold}
	if c.kind == Auto {
		request = node.InitRequest{RecoveryShares: shares, RecoveryThreshold: threshold}
	}
	answer, err := c.node.Init(ctx, request)
	c.is(err)
	if c.Failed() {
		c.FailNow()
	}
	c.shares, c.token = answer.Shares, answer.RootToken
	if c.kind == Auto {
		c.shares = answer.RecoveryShares
	}
	if len(c.shares) != shares || len(c.shares[0]) != 33 || len(c.token) != tokenLength || !bytes.HasPrefix(c.token, []byte("hvs.")) {
		c.Error("the answer is none that Vault gives")
	}
	_, err = c.node.Init(ctx, request)
	c.is(err, node.ErrAlreadyInitialized, node.ErrRefused)
}

func (c *conformance) unseal() {
	ctx := c.Context()
	c.step("sealed")
	if status := c.status(c.node); !status.Initialized || !status.Sealed || status.N != 5 || status.T != 3 || status.ClusterID != "" {
		c.Errorf("%+v", status)
	}
	_, err := c.node.Role(ctx)
	c.is(err, node.ErrSealed, node.ErrUnavailable)
	for _, share := range [][]byte{{}, []byte("short"), random(40)} {
		_, err = c.node.Unseal(ctx, share)
		if len(share) == 0 {
			c.is(err, node.ErrRefused)
			continue
		}
		c.is(err, node.ErrWrongShares, node.ErrRefused)
	}

	c.step("a share twice counts once; a wrong one shows at the threshold")
	first := c.give(c.node, c.shares[:1])
	again := c.give(c.node, c.shares[:1])
	if first.Progress != 1 || again.Progress != 1 || first.Nonce == "" || first.Nonce != again.Nonce {
		c.Errorf("%+v, then %+v", first, again)
	}
	if status := c.give(c.node, [][]byte{c.wrong(1)}); status.Progress != 2 {
		c.Errorf("%+v", status)
	}
	_, err = c.node.Unseal(ctx, c.shares[1])
	c.is(err, node.ErrWrongShares, node.ErrRefused)
	if status := c.status(c.node); status.Progress != 0 || status.Nonce != "" {
		c.Errorf("%+v", status)
	}

	c.step("shares of different lengths, shares with one number, and a reset")
	for _, last := range [][]byte{random(20), append(random(32), c.shares[0][32])} {
		c.give(c.node, c.shares[:2])
		_, err = c.node.Unseal(ctx, last)
		c.is(err, node.ErrWrongShares, node.ErrRefused)
	}
	c.give(c.node, c.shares[:2])
	if status, err := c.node.ResetUnseal(ctx); err != nil || status.Progress != 0 || !status.Sealed {
		c.Errorf("%+v, %v", status, err)
	}

	c.step("unsealed")
	status := c.give(c.node, c.shares[2:])
	if status.Sealed || status.Progress != 0 || status.ClusterID == "" || status.ClusterName == "" {
		c.Errorf("%+v", status)
	}
	c.waitActive(c.node)
	if role, err := c.node.Role(ctx); err != nil || role != node.RoleActive {
		c.Error(role, err)
	}
	if status := c.give(c.node, c.shares[:1]); status.Sealed || status.Progress != 0 {
		c.Errorf("%+v", status)
	}
	_, err = c.node.ResetUnseal(ctx)
	c.is(err, node.ErrRefused)
}

func (c *conformance) rekey(kind node.KeyKind) {
	ctx := c.Context()
	t := c.status(c.node).T
	wrongIs := []error{node.ErrWrongShares, node.ErrRefused}

	c.step("no rekey is under way")
	if status, err := c.node.RekeyStatus(ctx, kind); err != nil || status.Started || status.Required != t {
		c.Errorf("%+v, %v", status, err)
	}
	if status, err := c.node.VerifyStatus(ctx, kind); err != nil || status.Started {
		c.Errorf("%+v, %v", status, err)
	}
	_, err := c.node.RekeyUpdate(ctx, kind, c.shares[0], "none")
	c.is(err, node.ErrNotInProgress, node.ErrRefused)
	_, err = c.node.VerifyUpdate(ctx, kind, c.shares[0], "none")
	c.is(err, node.ErrNotInProgress, node.ErrRefused)
	_, err = c.node.VerifyCancel(ctx, kind)
	c.is(err, node.ErrNotInProgress, node.ErrRefused)
	c.is(c.node.RekeyCancel(ctx, kind, "none"))
	_, err = c.node.RekeyStart(ctx, kind, node.RekeyRequest{Shares: 2, Threshold: 3, Verify: true})
	c.is(err, node.ErrRefused)
	_, err = c.node.RekeyStart(ctx, kind, node.RekeyRequest{Shares: 3, Threshold: 2, Verify: true, PGPKeys: []string{"AAAA"}})
	c.is(err, node.ErrRefused)

	c.step("a rekey is started, and another one")
	request := node.RekeyRequest{Shares: 4, Threshold: 2, Verify: true}
	status, err := c.node.RekeyStart(ctx, kind, request)
	if err != nil || !status.Started || status.Nonce == "" || status.N != 4 || status.T != 2 || status.Required != t || !status.VerificationRequired {
		c.Errorf("%+v, %v", status, err)
	}
	_, err = c.node.RekeyStart(ctx, kind, request)
	c.is(err, node.ErrInProgress, node.ErrRefused)
	_, err = c.node.VerifyUpdate(ctx, kind, c.shares[0], "none")
	c.is(err, node.ErrNotInProgress, node.ErrRefused)

	c.step("shares with another nonce, twice, odd and wrong")
	_, err = c.node.RekeyUpdate(ctx, kind, c.shares[0], "another")
	c.is(err, node.ErrInProgress, node.ErrRefused)
	_, err = c.node.RekeyUpdate(ctx, kind, []byte("short"), status.Nonce)
	c.is(err, wrongIs...)
	answer, err := c.node.RekeyUpdate(ctx, kind, c.shares[0], status.Nonce)
	if err != nil || answer.Progress != 1 || answer.Complete {
		c.Errorf("progress %d, %v", answer.Progress, err)
	}
	_, err = c.node.RekeyUpdate(ctx, kind, c.shares[0], status.Nonce)
	c.is(err, node.ErrRefused)
	for i := 2; i <= t; i++ {
		_, err = c.node.RekeyUpdate(ctx, kind, c.wrong(i), status.Nonce)
		if i < t {
			c.is(err)
		}
	}
	c.is(err, wrongIs...)
	if status, err = c.node.RekeyStatus(ctx, kind); err != nil || !status.Started || status.Progress != 0 {
		c.Errorf("%+v, %v", status, err)
	}

	c.step("new keys are made, and wait for their verification")
	made := c.remake(kind, status.Nonce, c.shares[:t])
	if len(made.Shares) != 4 || !made.VerificationRequired || made.VerificationNonce == "" {
		c.Errorf("%d shares, verification %t, nonce %q", len(made.Shares), made.VerificationRequired, made.VerificationNonce)
	}
	if after, err := c.node.RekeyStatus(ctx, kind); err != nil || !after.Started || after.VerificationNonce != made.VerificationNonce {
		c.Errorf("%+v, %v", after, err)
	}
	_, err = c.node.RekeyUpdate(ctx, kind, c.shares[0], status.Nonce)
	c.is(err, node.ErrInProgress, node.ErrRefused)
	_, err = c.node.VerifyUpdate(ctx, kind, made.Shares[0], "another")
	c.is(err, node.ErrInProgress, node.ErrRefused)
	verify, err := c.node.VerifyUpdate(ctx, kind, made.Shares[0], made.VerificationNonce)
	if err != nil || verify.Progress != 1 || verify.Complete {
		c.Errorf("%+v, %v", verify, err)
	}
	_, err = c.node.VerifyUpdate(ctx, kind, made.Shares[0], made.VerificationNonce)
	c.is(err, node.ErrRefused)
	_, err = c.node.VerifyUpdate(ctx, kind, c.wrong(1), made.VerificationNonce)
	c.is(err, wrongIs...)
	anew, err := c.node.VerifyStatus(ctx, kind)
	if err != nil || !anew.Started || anew.Progress != 0 || anew.Nonce == made.VerificationNonce {
		c.Errorf("%+v, %v", anew, err)
	}
	if restarted, err := c.node.VerifyCancel(ctx, kind); err != nil || !restarted.Started || restarted.Nonce == anew.Nonce {
		c.Errorf("%+v, %v", restarted, err)
	}

	c.step("cancelled, with another nonce and with the right one")
	c.is(c.node.RekeyCancel(ctx, kind, "another"), node.ErrRefused)
	c.is(c.node.RekeyCancel(ctx, kind, status.Nonce))
	c.is(c.node.RekeyCancel(ctx, kind, status.Nonce))
	if status := c.status(c.node); status.T != t {
		c.Errorf("%+v", status)
	}

	c.step("a rekey to its end")
	status, err = c.node.RekeyStart(ctx, kind, request)
	c.is(err)
	made = c.remake(kind, status.Nonce, c.shares[len(c.shares)-t:])
	for i, share := range made.Shares[1:3] {
		verify, err = c.node.VerifyUpdate(ctx, kind, share, made.VerificationNonce)
		if err != nil || verify.Complete != (i == 1) {
			c.Errorf("%+v, %v", verify, err)
		}
	}
	if status, err := c.node.RekeyStatus(ctx, kind); err != nil || status.Started || status.Required != 2 {
		c.Errorf("%+v, %v", status, err)
	}
	if status := c.status(c.node); status.N != 4 || status.T != 2 || status.Sealed {
		c.Errorf("%+v", status)
	}
	c.shares = made.Shares
	if kind == node.RecoveryKeys {
		return
	}
	c.step("keys of another kind of seal")
	_, err = c.node.RekeyStatus(ctx, node.RecoveryKeys)
	c.is(err, node.ErrRefused)
}

// remake gives shares to a rekey, to its end.
func (c *conformance) remake(kind node.KeyKind, nonce string, shares [][]byte) node.RekeyAnswer {
	c.Helper()
	var answer node.RekeyAnswer
	for i, share := range shares {
		var err error
		answer, err = c.node.RekeyUpdate(c.Context(), kind, share, nonce)
		must(c, err)
		if answer.Complete != (i == len(shares)-1) {
			c.Fatalf("after %d of %d shares complete is %t", i+1, len(shares), answer.Complete)
		}
	}
	return answer
}

func (c *conformance) pgp() {
	ctx := c.Context()
	c.step("new keys for people, and none of them")
	entity, err := openpgp.NewEntity("person", "", "person@example.com", nil)
	must(c, err)
	var binary bytes.Buffer
	must(c, entity.Serialize(&binary))
	key := base64.StdEncoding.EncodeToString(binary.Bytes())
	open := func(message []byte) string {
		c.Helper()
		details, err := openpgp.ReadMessage(bytes.NewReader(message), openpgp.EntityList{entity}, nil, nil)
		must(c, err)
		var out bytes.Buffer
		_, err = out.ReadFrom(details.UnverifiedBody)
		must(c, err)
		return out.String()
	}
	request := node.RekeyRequest{Shares: 2, Threshold: 2, PGPKeys: []string{key, key}, Verify: true}
	status, err := c.node.RekeyStart(ctx, node.UnsealKeys, request)
	if err != nil || len(status.PGPFingerprints) != 2 {
		c.Fatalf("%+v, %v", status, err)
	}
	answer := c.remake(node.UnsealKeys, status.Nonce, c.shares[:2])
	if len(answer.Shares) != 2 || len(open(answer.Shares[0])) != 66 {
		c.Error("the messages hold no shares in hex")
	}
	c.is(c.node.RekeyCancel(ctx, node.UnsealKeys, status.Nonce))

	root, err := c.node.RootStart(ctx, key)
	if err != nil || len(root.OTP) != 0 || root.PGPFingerprint == "" {
		c.Fatalf("%v", err)
	}
	token := c.makeRoot(root.Nonce)
	message, err := base64.StdEncoding.DecodeString(string(token))
	must(c, err)
	made := []byte(open(message))
	c.is(c.node.RevokeSelf(ctx, made))
}

// makeRoot gives shares to the making of a root token, to its end.
func (c *conformance) makeRoot(nonce string) []byte {
	c.Helper()
	for i, share := range c.shares[:2] {
		answer, err := c.node.RootUpdate(c.Context(), share, nonce)
		must(c, err)
		if answer.Complete != (i == 1) || answer.Progress != i+1 {
			c.Fatalf("after share %d complete is %t and progress %d", i+1, answer.Complete, answer.Progress)
		}
		if answer.Complete {
			return answer.EncodedToken
		}
	}
	return nil
}

func (c *conformance) root() {
	ctx := c.Context()
	c.step("a root token is made")
	if status, err := c.node.RootStatus(ctx); err != nil || status.Started || status.Required != 2 {
		c.Errorf("%v", err)
	}
	c.is(c.node.RootCancel(ctx))
	_, err := c.node.RootUpdate(ctx, c.shares[0], "none")
	c.is(err, node.ErrNotInProgress, node.ErrRefused)
	_, err = c.node.RootStart(ctx, "AAAA")
	c.is(err, node.ErrRefused)
	status, err := c.node.RootStart(ctx, "")
	if err != nil || !status.Started || len(status.OTP) != tokenLength {
		c.Fatalf("%d bytes of a one-time pad, %v", len(status.OTP), err)
	}
	_, err = c.node.RootStart(ctx, "")
	c.is(err, node.ErrInProgress, node.ErrRefused)
	_, err = c.node.RootUpdate(ctx, c.shares[0], "another")
	c.is(err, node.ErrInProgress, node.ErrRefused)
	_, err = c.node.RootUpdate(ctx, []byte("short"), status.Nonce)
	c.is(err, node.ErrWrongShares, node.ErrRefused)
	_, err = c.node.RootUpdate(ctx, c.shares[0], status.Nonce)
	c.is(err)
	_, err = c.node.RootUpdate(ctx, c.shares[0], status.Nonce)
	c.is(err, node.ErrRefused)
	_, err = c.node.RootUpdate(ctx, c.wrong(1), status.Nonce)
	c.is(err, node.ErrWrongShares, node.ErrRefused)
	if now, err := c.node.RootStatus(ctx); err != nil || !now.Started || now.Progress != 0 || now.Nonce != status.Nonce {
		c.Errorf("%v", err)
	}
	token, err := node.DecodeRoot(c.makeRoot(status.Nonce), status.OTP)
	must(c, err)

	c.step("the token is used and revoked")
	c.is(c.node.LookupSelf(ctx, token))
	c.is(c.node.RevokeSelf(ctx, token))
	c.is(c.node.LookupSelf(ctx, token), node.ErrDenied, node.ErrRefused)
	c.is(c.node.RevokeSelf(ctx, token), node.ErrDenied, node.ErrRefused)
	c.is(c.node.LookupSelf(ctx, c.token))

	c.step("one that is cancelled")
	_, err = c.node.RootStart(ctx, "")
	c.is(err)
	c.is(c.node.RootCancel(ctx))
	c.is(c.node.RootCancel(ctx))
}

func (c *conformance) restart() {
	ctx := c.Context()
	c.step("started anew while a rekey and a root token are under way")
	_, err := c.node.RekeyStart(ctx, node.UnsealKeys, node.RekeyRequest{Shares: 1, Threshold: 1})
	c.is(err)
	_, err = c.node.RootStart(ctx, "")
	c.is(err)
	id := c.status(c.node).ClusterID
	c.subject.Restart(c.T)
	c.wait("the restart", func() bool {
		_, err := c.node.Status(ctx)
		return err == nil
	})
	if status := c.status(c.node); !status.Sealed || status.N != 4 || status.T != 2 || status.Progress != 0 {
		c.Errorf("%+v", status)
	}
	if status := c.give(c.node, c.shares[:2]); status.Sealed || status.ClusterID != id {
		c.Errorf("%+v", status)
	}
	c.waitActive(c.node)
	if status, err := c.node.RekeyStatus(ctx, node.UnsealKeys); err != nil || status.Started {
		c.Errorf("%+v, %v", status, err)
	}
	if status, err := c.node.RootStatus(ctx); err != nil || status.Started {
		c.Error("a root token's making outlived the process: ", err)
	}
}

func (c *conformance) join() {
	ctx := c.Context()
	subject := c.start(c.T, Raft)
	second := c.client(subject)
	c.step("a second node: a leader that cannot be reached, another CA")
	_, err := second.Join(ctx, node.JoinRequest{LeaderAddress: "https://127.0.0.1:1", LeaderCA: c.subject.TLS.CA})
	c.is(err, node.ErrUnavailable)
	_, err = second.Join(ctx, node.JoinRequest{LeaderAddress: c.subject.Address, LeaderCA: NewAuthority(c).PEM})
	c.is(err, node.ErrUnavailable)
	_, err = second.Join(ctx, node.JoinRequest{
		LeaderAddress: c.subject.Address, LeaderCA: c.subject.TLS.CA, LeaderServerName: "vault.example.com",
	})
	c.is(err, node.ErrUnavailable)

	c.step("it joins, twice")
	for range 2 {
		joined, err := second.Join(ctx, node.JoinRequest{LeaderAddress: c.subject.Address, LeaderCA: c.subject.TLS.CA})
		if err != nil || !joined {
			c.Fatal(joined, err)
		}
	}
	status := c.status(second)
	if !status.Initialized || !status.Sealed || status.N != 4 || status.T != 2 {
		c.Errorf("%+v", status)
	}
	_, err = second.Init(ctx, node.InitRequest{Shares: 1, Threshold: 1})
	c.is(err, node.ErrAlreadyInitialized, node.ErrRefused)

	c.step("wrong shares, then right ones")
	c.give(second, c.shares[:1])
	_, err = second.Unseal(ctx, c.wrong(1))
	c.is(err, node.ErrWrongShares, node.ErrRefused)
	if status = c.give(second, c.shares[1:3]); !status.Sealed || status.Progress != 0 {
		c.Errorf("%+v", status)
	}
	c.wait("the second node", func() bool {
		status, err = second.Status(ctx)
		return err == nil && !status.Sealed
	})
	c.waitActive(second)
	if status.ClusterID != c.status(c.node).ClusterID {
		c.Errorf("%+v", status)
	}

	c.step("a standby passes on what the active node serves")
	leader, err := second.Leader(ctx)
	if err != nil || leader.Role != node.RoleStandby || leader.Address != c.subject.Address {
		c.Error(leader, err)
	}
	rekey, err := second.RekeyStart(ctx, node.UnsealKeys, node.RekeyRequest{Shares: 1, Threshold: 1})
	c.is(err)
	if there, err := c.node.RekeyStatus(ctx, node.UnsealKeys); err != nil || there.Nonce != rekey.Nonce {
		c.Errorf("%+v, %v", there, err)
	}
	c.is(second.RekeyCancel(ctx, node.UnsealKeys, rekey.Nonce))
	root, err := second.RootStart(ctx, "")
	c.is(err)
	if there, err := c.node.RootStatus(ctx); err != nil || there.Nonce != root.Nonce {
		c.Error(err)
	}
	c.is(second.RootCancel(ctx))
	c.is(second.LookupSelf(ctx, c.token))
	joined, err := second.Join(ctx, node.JoinRequest{LeaderAddress: c.subject.Address, LeaderCA: c.subject.TLS.CA})
	if err != nil || !joined {
		c.Error(joined, err)
	}
}

func (c *conformance) alone() {
	ctx := c.Context()
	c.uninitialized()
	c.step("no raft")
	_, err := c.node.Join(ctx, node.JoinRequest{LeaderAddress: "https://127.0.0.1:1"})
	c.is(err, node.ErrRefused)
	c.initialize(5, 3)
	c.unseal()
	c.rekey(node.UnsealKeys)
	c.root()
}

func (c *conformance) auto() {
	ctx := c.Context()
	c.step("a node with an auto-seal")
	if status := c.status(c.node); status.Initialized || !status.RecoverySeal || status.Type != "transit" {
		c.Errorf("%+v", status)
	}
	_, err := c.node.Init(ctx, node.InitRequest{Shares: 5, Threshold: 3})
	c.is(err, node.ErrRefused)
	c.initialize(5, 3)
	c.wait("its unsealing", func() bool {
		status, err := c.node.Status(ctx)
		return err == nil && !status.Sealed
	})
	c.waitActive(c.node)
	if status := c.status(c.node); status.Sealed || !status.RecoverySeal || status.N != 5 || status.T != 3 || status.ClusterID == "" {
		c.Errorf("%+v", status)
	}
	_, err = c.node.RekeyStart(ctx, node.UnsealKeys, node.RekeyRequest{Shares: 1, Threshold: 1, Verify: true})
	c.is(err, node.ErrRefused)
	c.rekey(node.RecoveryKeys)
	c.root()
}
