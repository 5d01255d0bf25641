package cluster

import (
	"context"
	"errors"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

func TestRootTokenIsUsedAndRevoked(t *testing.T) {
	for _, kind := range []nodetest.Kind{nodetest.Raft, nodetest.Auto} {
		t.Run(string(kind), func(t *testing.T) {
			y := initialised(t, kind, 1, nil)
			before := y.nodes[0].Tokens()
			var kept []byte
			result, err := y.process().Root(t.Context(), y.Cluster, RootOptions{By: "alice", Use: func(ctx context.Context, address string, token []byte) error {
				kept = token
				if address != y.nodes[0].Address() {
					t.Errorf("address = %s", address)
				}
				return y.nodes[0].Client(t).LookupSelf(ctx, token)
			}})
			y.must(err)
			if !result.Revoked || result.Message != nil || y.nodes[0].Tokens() != before {
				t.Errorf("result = %+v, %d tokens live, %d before", result, y.nodes[0].Tokens(), before)
			}
			if strings.Trim(string(kept), "\x00") != "" {
				t.Error("the token was not wiped")
			}
			y.wantNothingLeft(KindUnseal)
		})
	}
}

func TestRootTokenIsRevokedWhateverBecomesOfItsUse(t *testing.T) {
	failure := errors.New("it failed")
	for name, use := range map[string]func(context.Context, string, []byte) error{
		"it fails":       func(context.Context, string, []byte) error { return failure },
		"it is given up": func(ctx context.Context, _ string, _ []byte) error { <-ctx.Done(); return failure },
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, nodetest.Raft, 1, nil)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result, err := y.process().Root(ctx, y.Cluster, RootOptions{Use: func(ctx context.Context, address string, token []byte) error {
				cancel()
				return use(ctx, address, token)
			}})
			if !errors.Is(err, failure) || !result.Revoked || y.nodes[0].Tokens() != 0 {
				t.Errorf("Root = %+v, %v with %d tokens left", result, err, y.nodes[0].Tokens())
			}
			y.wantNothingLeft(KindUnseal)
		})
	}
}

func TestRootTokenThatCannotBeRevokedIsRevokedByTheNextRun(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	_, err := y.process().Root(t.Context(), y.Cluster, RootOptions{Use: func(context.Context, string, []byte) error {
		y.nodes[0].Break("auth/token/revoke-self", 1, nodetest.Answer(503, 0, "try later"))
		return nil
	}})
	if !errors.Is(err, ErrTokenLeft) || !strings.Contains(err.Error(), "--revoke") || y.nodes[0].Tokens() != 1 {
		t.Fatalf("Root = %v with %d tokens", err, y.nodes[0].Tokens())
	}
	left, err := y.local.Get(t.Context(), "tokens/prod")
	y.must(err)
	if strings.Contains(string(left.Value), "hvs.") {
		t.Error("the token that is left is not sealed")
	}
	result, err := y.process().Root(t.Context(), y.Cluster, RootOptions{Revoke: true})
	y.must(err)
	if !result.LeftRevoked || y.nodes[0].Tokens() != 0 {
		t.Errorf("result = %+v with %d tokens", result, y.nodes[0].Tokens())
	}
	y.wantNothingLeft(KindUnseal)
}

func TestRootTokenForAPerson(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	alice := newPerson(t, "Alice", nil)
	result, err := y.process().Root(t.Context(), y.Cluster, RootOptions{PGPKey: publicKey(t, alice)})
	y.must(err)
	token := decrypt(t, alice, result.Message)
	if err := y.nodes[0].Client(t).LookupSelf(t.Context(), token); err != nil {
		t.Errorf("what Alice reads is no token: %v", err)
	}
	if !strings.Contains(result.Recipient, "Alice") || result.Revoked {
		t.Errorf("result = %+v", result)
	}
	y.wantNothingLeft(KindUnseal)
}

func TestRootRefuses(t *testing.T) {
	use := func(context.Context, string, []byte) error { return errors.New("used") }
	revoked := newPerson(t, "Revoked", nil)
	if err := revoked.Revoke(0, "", nil); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		prepare func(*yard)
		options RootOptions
		want    error
		says    string
	}{
		"a token for nothing":      {func(*yard) {}, RootOptions{}, ErrInvalid, "one command"},
		"a token for two":          {func(*yard) {}, RootOptions{Use: use, PGPKey: []byte("x")}, ErrInvalid, "one command"},
		"a key that is none":       {func(*yard) {}, RootOptions{PGPKey: []byte("x")}, ErrPGPKey, ""},
		"a key that was revoked":   {func(*yard) {}, RootOptions{PGPKey: publicKey(t, revoked)}, ErrPGPKey, "revoked"},
		"a sealed cluster":         {func(y *yard) { y.nodes[0].Restart() }, RootOptions{Use: use}, node.ErrSealed, "unseal it first"},
		"another cluster":          {func(y *yard) { y.nodes[0].SetClusterID("other") }, RootOptions{Use: use}, ErrMismatch, ""},
		"somebody else's attempt":  {func(y *yard) { y.must(startRoot(y)) }, RootOptions{Use: use}, ErrBusy, "0 of 3 shares"},
		"a Vault that serves none": {func(y *yard) { y.nodes[0].Break("sys/generate-root/attempt", 1, nodetest.Answer(403, 0)) }, RootOptions{Use: use}, node.ErrRefused, "generate_root"},
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, nodetest.Raft, 1, nil)
			test.prepare(y)
			_, err := y.process().Root(t.Context(), y.Cluster, test.options)
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Fatalf("Root = %v, want %q with %q", err, test.want, test.says)
			}
			if got := y.nodes[0].Count("PUT", "sys/generate-root/update"); got != 0 {
				t.Errorf("%d shares were given", got)
			}
		})
	}
	t.Run("and leaves somebody else's attempt as it is", func(t *testing.T) {
		y := initialised(t, nodetest.Raft, 1, nil)
		y.must(startRoot(y))
		_, err := y.process().Root(t.Context(), y.Cluster, RootOptions{Use: use})
		st, asking := y.nodes[0].Client(t).RootStatus(t.Context())
		if asking != nil || !st.Started || !strings.Contains(err.Error(), st.Nonce) {
			t.Errorf("it is %+v, %v; Root = %v", st, asking, err)
		}
	})
}

func startRoot(y *yard) error {
	_, err := y.nodes[0].Client(y.t).RootStart(y.t.Context(), "")
	return err
}

// Struck down at any step, the next run ends with no token of ours alive, but for the one window that is told of.
func TestARootTokenWhoseMakingIsCutOffIsRevokedByTheNextRun(t *testing.T) {
	steps := everyStep(t, allModes,
		beginning(nodetest.Raft, nil),
		func(y *yard) error {
			_, err := y.process().Root(y.t.Context(), y.Cluster, RootOptions{Use: func(context.Context, string, []byte) error { return nil }})
			return err
		},
		func(y *yard, _ string) {
			used := false
			result, err := y.process().Root(y.t.Context(), y.Cluster, RootOptions{Use: func(context.Context, string, []byte) error {
				used = true
				return nil
			}})
			y.must(err)
			if !used || !result.Revoked {
				y.t.Errorf("result = %+v, used=%t", result, used)
			}
			warned := strings.Contains(strings.Join(result.Warnings, " "), "auth/token/accessors")
			if left := y.nodes[0].Tokens(); left > 0 && !warned {
				y.t.Errorf("%d tokens live, and nobody is told", left)
			}
			y.wantNothingLeft(KindUnseal)
		})
	wantSteps(t, steps, []string{
		"local put attempts/prod/root",
		"node PUT sys/generate-root/attempt",
		"node PUT sys/generate-root/update", "node PUT sys/generate-root/update", "node PUT sys/generate-root/update",
		"local put tokens/prod",
		"node PUT auth/token/revoke-self",
		"local delete tokens/prod", "local delete attempts/prod/root",
	})
}

func TestProve(t *testing.T) {
	for name, test := range map[string]struct {
		kind   nodetest.Kind
		keys   Kind
		shares func(*yard) [][]byte
		want   error
	}{
		"the shares of the cluster":           {nodetest.Raft, KindUnseal, func(y *yard) [][]byte { return y.nodes[0].Shares() }, nil},
		"its recovery keys":                   {nodetest.Auto, KindRecovery, func(y *yard) [][]byte { return y.nodes[0].Shares() }, nil},
		"other shares":                        {nodetest.Raft, KindUnseal, func(*yard) [][]byte { return someShares(5, 1) }, ErrWrongShares},
		"other recovery keys":                 {nodetest.Auto, KindRecovery, func(*yard) [][]byte { return someShares(5, 1) }, ErrWrongShares},
		"too few":                             {nodetest.Raft, KindUnseal, func(y *yard) [][]byte { return y.nodes[0].Shares()[:2] }, ErrInvalid},
		"unseal keys where recovery keys are": {nodetest.Auto, KindUnseal, func(y *yard) [][]byte { return y.nodes[0].Shares() }, ErrMismatch},
		"recovery keys where unseal keys are": {nodetest.Raft, KindRecovery, func(y *yard) [][]byte { return y.nodes[0].Shares() }, ErrMismatch},
		"a cluster that is sealed":            {nodetest.Raft, KindUnseal, func(y *yard) [][]byte { s := y.nodes[0].Shares(); y.nodes[0].Restart(); return s }, node.ErrSealed},
	} {
		t.Run(name, func(t *testing.T) {
			y := initialised(t, test.kind, 1, nil)
			before := y.nodes[0].Shares()
			err := y.process().Prove(t.Context(), y.Cluster, test.keys, test.shares(y), "alice")
			if !errors.Is(err, test.want) {
				t.Fatalf("Prove = %v, want %v", err, test.want)
			}
			if string(y.nodes[0].Shares()[0]) != string(before[0]) {
				t.Error("the keys are other ones")
			}
			if !errors.Is(err, node.ErrSealed) && !errors.Is(err, ErrMismatch) {
				y.wantNothingLeft(test.keys)
			}
		})
	}
}

// A proof that was cut off leaves a rekey of ours, which the next proof and the next rekey end.
func TestAProofThatIsCutOffLeavesNothing(t *testing.T) {
	everyStep(t, allModes,
		beginning(nodetest.Raft, nil),
		func(y *yard) error {
			return y.process().Prove(y.t.Context(), y.Cluster, KindUnseal, y.nodes[0].Shares(), "alice")
		},
		func(y *yard, _ string) {
			y.restartable()
			y.must(y.process().Prove(y.t.Context(), y.Cluster, KindUnseal, y.nodes[0].Shares(), "alice"))
			y.wantOneSet(KindUnseal)
		})
}
