package cluster

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

// foreignCluster is a yard whose cluster somebody else initialised, by hand: its keys are not in custody.
func foreignCluster(t *testing.T, kind nodetest.Kind, change func(*Cluster)) (y *yard, shares [][]byte, token []byte) {
	t.Helper()
	return foreignClusterOf(t, nodetest.Options{Kind: kind, Authority: nodetest.NewAuthority(t)}, change)
}

func foreignClusterOf(t *testing.T, options nodetest.Options, change func(*Cluster)) (y *yard, shares [][]byte, token []byte) {
	t.Helper()
	kind := options.Kind
	y = &yard{newSiteOf(t, options, 1).host("host-1")}
	if change != nil {
		change(y.Cluster)
	}
	request := node.InitRequest{Shares: 5, Threshold: 3}
	if y.Spread != nil {
		request = node.InitRequest{Shares: y.Shares, Threshold: y.Threshold}
	}
	if kind == nodetest.Auto {
		request = node.InitRequest{RecoveryShares: 5, RecoveryThreshold: 3}
	}
	client := y.nodes[0].Client(t)
	answer, err := client.Init(t.Context(), request)
	y.must(err)
	shares = append(answer.Shares, answer.RecoveryShares...)
	if kind != nodetest.Auto {
		for _, share := range shares[:request.Threshold] {
			_, err := client.Unseal(t.Context(), share)
			y.must(err)
		}
	}
	return y, shares, answer.RootToken
}

func TestImportTakesARunningClusterIntoCustody(t *testing.T) {
	y, shares, token := foreignCluster(t, nodetest.Raft, nil)
	result, err := y.process().Import(t.Context(), y.Cluster, ImportRequest{By: "alice", Shares: shares, RootToken: token})
	y.must(err)
	if !result.Proved || result.Unsealed || result.Given != 5 || result.Shares != 5 || result.Threshold != 3 || result.RootToken {
		t.Errorf("result = %+v", result)
	}
	if !strings.Contains(strings.Join(result.Warnings, " "), "root token was not taken") {
		t.Errorf("warnings = %q", result.Warnings)
	}
	if bytes.Equal(shares[0], make([]byte, len(shares[0]))) {
		t.Error("the caller's shares were wiped")
	}
	m := y.wantOneSet(KindUnseal)
	if m.ClusterID != y.nodes[0].ClusterID() || m.StorageType != string(nodetest.Raft) {
		t.Errorf("facts = %+v", m.Facts)
	}
	y.restart()
	if _, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{}); err != nil {
		t.Errorf("Rekey afterwards = %v", err)
	}
}

func TestImportProvesTheSharesOfASealedNodeByUnsealingIt(t *testing.T) {
	y, shares, _ := foreignCluster(t, nodetest.Raft, nil)
	y.nodes[0].Restart()
	result, err := y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares[:3]})
	y.must(err)
	if !result.Proved || !result.Unsealed || result.Given != 3 || len(result.Warnings) != 1 || y.nodes[0].Sealed() {
		t.Errorf("result = %+v", result)
	}
	y.wantOneSet(KindUnseal)
	y.restart()
}

func TestImportOfOtherKinds(t *testing.T) {
	t.Run("recovery keys", func(t *testing.T) {
		y, shares, _ := foreignCluster(t, nodetest.Auto, nil)
		result, err := y.process().Import(t.Context(), y.Cluster, ImportRequest{RecoveryShares: shares})
		y.must(err)
		if result.Kind != KindRecovery || !result.Proved {
			t.Errorf("result = %+v", result)
		}
		y.wantOneSet(KindRecovery)
	})
	t.Run("a spread", func(t *testing.T) {
		y, shares, _ := foreignCluster(t, nodetest.Raft, spread)
		result, err := y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares})
		y.must(err)
		if len(result.Items) != 3 {
			t.Errorf("result = %+v", result)
		}
		y.wantOneSet(KindUnseal)
		y.restart()
	})
	t.Run("with a root token that is kept", func(t *testing.T) {
		y, shares, token := foreignCluster(t, nodetest.Raft, func(c *Cluster) { c.RootToken = RootKeep })
		result, err := y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares, RootToken: token})
		y.must(err)
		root, err := y.process().openRoot(t.Context(), y.Cluster)
		y.must(err)
		if !result.RootToken || !bytes.Equal(root.token, token) {
			t.Errorf("result = %+v, root = %q", result, root.token)
		}
	})
	t.Run("without a node, when asked", func(t *testing.T) {
		y, shares, _ := foreignCluster(t, nodetest.Raft, nil)
		y.nodes[0].Down()
		result, err := y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares, Unproved: true})
		y.must(err)
		if result.Proved || !strings.Contains(strings.Join(result.Warnings, " "), "verify --prove") {
			t.Errorf("result = %+v", result)
		}
		y.nodes[0].Up(t)
		y.restart()
		y.wantOneSet(KindUnseal)
	})
}

func TestImportRefuses(t *testing.T) {
	for name, test := range map[string]struct {
		change  func(y *yard, request *ImportRequest)
		want    error
		says    string
		kind    nodetest.Kind
		prepare func(*Cluster)
	}{
		"no shares":           {func(_ *yard, r *ImportRequest) { r.Shares = nil }, ErrInvalid, "give the shares", "", nil},
		"both kinds":          {func(_ *yard, r *ImportRequest) { r.RecoveryShares = r.Shares }, ErrInvalid, "one of them", "", nil},
		"a share twice":       {func(_ *yard, r *ImportRequest) { r.Shares[4] = r.Shares[0] }, ErrInvalid, "is the same as", "", nil},
		"too few":             {func(_ *yard, r *ImportRequest) { r.Shares = r.Shares[:2] }, ErrInvalid, "wants 3 of its 5", "", nil},
		"too many":            {func(_ *yard, r *ImportRequest) { r.Shares = append(r.Shares, someShares(1, 9)...) }, ErrMismatch, "which of them", "", nil},
		"wrong ones":          {func(_ *yard, r *ImportRequest) { r.Shares = someShares(5, 1) }, ErrWrongShares, "nothing was stored", "", nil},
		"one wrong":           {func(_ *yard, r *ImportRequest) { r.Shares[0] = someShares(1, 1)[0] }, ErrWrongShares, "nothing was stored", "", nil},
		"wrong ones, sealed":  {func(y *yard, r *ImportRequest) { r.Shares = someShares(5, 1); y.nodes[0].Restart() }, ErrWrongShares, "nothing was stored", "", nil},
		"recovery keys":       {func(_ *yard, r *ImportRequest) { r.Shares, r.RecoveryShares = nil, r.Shares }, ErrMismatch, "no recovery keys", "", nil},
		"unseal keys":         {func(_ *yard, r *ImportRequest) { r.Shares, r.RecoveryShares = r.RecoveryShares, nil }, ErrMismatch, "no unseal keys", nodetest.Auto, nil},
		"to replace nothing":  {func(_ *yard, r *ImportRequest) { r.Replace = true }, ErrNoMaterial, "leave --replace out", "", nil},
		"a node that is away": {func(y *yard, _ *ImportRequest) { y.nodes[0].Down() }, ErrUnproved, "--unproved", "", nil},
		"a foreign node, although unproved ones would do": {func(y *yard, r *ImportRequest) {
			y.nodes[0].SetCertificate(nodetest.NewAuthority(y.t).Issue(y.t))
			r.Unproved = true
		}, node.ErrIdentity, "", "", nil},
		"a key that is not ready": {func(y *yard, _ *ImportRequest) { y.notReady("office") }, nil, "", "", nil},
		"a spread that does not fit": {
			func(*yard, *ImportRequest) {}, ErrInvalid, "take 3 shares", "",
			func(c *Cluster) { spread(c); c.Shares, c.Threshold = 4, 2 },
		},
	} {
		t.Run(name, func(t *testing.T) {
			kind := test.kind
			if kind == "" {
				kind = nodetest.Raft
			}
			y, shares, _ := foreignCluster(t, kind, nil)
			if test.prepare != nil {
				test.prepare(y.Cluster)
			}
			request := ImportRequest{Shares: shares}
			if kind == nodetest.Auto {
				request = ImportRequest{RecoveryShares: shares}
			}
			test.change(y, &request)
			_, err := y.process().Import(t.Context(), y.Cluster, request)
			if err == nil || test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Fatalf("Import = %v, want %v with %q", err, test.want, test.says)
			}
			for _, share := range shares {
				if strings.Contains(err.Error(), hexOf(share)[:8]) || strings.Contains(err.Error(), b64(share)[:8]) {
					t.Error("the error tells a share")
				}
			}
			y.wantEmpty()
		})
	}
}

// wantEmpty wants nothing in custody.
func (y *yard) wantEmpty() {
	y.t.Helper()
	names, err := y.main.List(y.t.Context(), "")
	y.must(err)
	local, err := y.local.List(y.t.Context(), "")
	y.must(err)
	for _, name := range append(names, local...) {
		if strings.HasPrefix(name, "material/") || strings.HasPrefix(name, "imports/") || strings.HasPrefix(name, "attempts/") {
			y.t.Errorf("%q was stored", name)
		}
	}
}

func TestImportInPlaceOfWhatIsThere(t *testing.T) {
	y, shares, _ := foreignCluster(t, nodetest.Raft, nil)
	_, err := y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares[:3]})
	y.must(err)
	_, err = y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares})
	if !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), "--replace") {
		t.Fatalf("Import = %v, want ErrExists", err)
	}
	before := y.wantOneSet(KindUnseal).active().ID
	result, err := y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares, Replace: true})
	y.must(err)
	after := y.wantOneSet(KindUnseal)
	if result.Given != 5 || after.active().ID == before || len(after.active().Indices) != 5 {
		t.Errorf("result = %+v, set = %+v", result, after.active())
	}
	// To other wrapping keys: what was there goes.
	y.Key = "bank"
	_, err = y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares, Replace: true})
	y.must(err)
	y.Key, y.Spread, y.Shares, y.Threshold = "", &Spread{Needed: 3, Keys: []string{"office", "bunker", "bank"}}, 5, 5
	_, err = y.process().Import(t.Context(), y.Cluster, ImportRequest{Shares: shares, Replace: true})
	if !errors.Is(err, ErrInvalid) {
		t.Errorf("Import = %v: two of the keys hold three shares and more", err)
	}
	y.restartable2()
}

// restartable2 is restartable under the key that it was imported with last.
func (y *yard) restartable2() {
	y.t.Helper()
	y.Key, y.Spread, y.Shares, y.Threshold = "bank", nil, 0, 0
	y.wantOneSet(KindUnseal)
	y.restart()
}

// Struck down at any step, either nothing is in custody or the next run ends with the whole.
func TestAnImportThatIsCutOffIsFinishedByTheNext(t *testing.T) {
	for name, change := range map[string]func(*Cluster){
		"one key":                  nil,
		"a spread":                 spread,
		"one key and a root token": func(c *Cluster) { c.RootToken = RootKeep },
	} {
		t.Run(name, func(t *testing.T) {
			var shares [][]byte
			var token []byte
			modes := dying
			if change == nil {
				modes = allModes
			}
			steps := everyStep(t, modes,
				func(t *testing.T) *yard {
					t.Helper()
					var y *yard
					y, shares, token = foreignClusterOf(t, nodetest.Options{Kind: nodetest.Raft, Plain: true}, change)
					return y
				},
				func(y *yard) error {
					_, err := y.process().Import(y.t.Context(), y.Cluster, ImportRequest{Shares: shares, RootToken: token})
					return err
				},
				func(y *yard, _ string) {
					noted, err := y.process().ImportLeft(y.t.Context(), y.Cluster)
					y.must(err)
					result, err := y.process().Import(y.t.Context(), y.Cluster, ImportRequest{Shares: shares, RootToken: token})
					if noted && (err != nil || !result.Finished) {
						y.t.Fatalf("Import = %+v, %v; it was to be finished", result, err)
					}
					if !noted && err != nil && !errors.Is(err, ErrExists) { // stored whole, where only the answer was lost
						y.t.Fatal(err)
					}
					y.wantOneSet(KindUnseal)
					_, _, err = y.process().keeper.Open(y.t.Context(), y.Name, itemRoot, custody.ReadOptions{Store: "main"})
					if kept := err == nil; kept != (y.RootToken == RootKeep) {
						y.t.Errorf("the root token: %v", err)
					}
					y.restart()
				})
			if change == nil {
				wantSteps(t, steps, []string{
					"local put attempts/prod/unseal", "node PUT sys/rekey/init",
					"node PUT sys/rekey/update", "node PUT sys/rekey/update", "node PUT sys/rekey/update",
					"node DELETE sys/rekey/init", "local delete attempts/prod/unseal",
					"local put rehearsal/prod", "local delete rehearsal/prod", "local put host",
					"records put material/prod/rehearsal", "store put material/prod/rehearsal", "records put material/prod/rehearsal",
					"records put material/prod/rehearsal", "store delete material/prod/rehearsal", "records put material/prod/rehearsal",
					"local put imports/prod",
					"records put material/prod/unseal", "store put material/prod/unseal", "records put material/prod/unseal",
					"local delete imports/prod",
				})
			}
		})
	}
}

func TestExportGivesKeysToPeopleOnly(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	carol := y.person("Carol")
	_, err := y.process().Rekey(t.Context(), y.Cluster, RekeyOptions{})
	y.must(err)
	alice := newPerson(t, "Alice", nil)
	shares := y.nodes[0].Shares()

	each, err := y.process().Export(t.Context(), y.Cluster, ExportRequest{By: "bob", Recipients: [][]byte{publicKey(t, alice)}, Each: true})
	y.must(err)
	if len(each) != 5 || each[4].Name != "unseal-5.Carol" {
		t.Fatalf("exported = %v", names(each))
	}
	for i, message := range each[:4] {
		if got := string(decrypt(t, alice, message.Message)); got != hexOf(shares[i]) {
			t.Errorf("%s holds another share", message.Name)
		}
	}
	if got := string(decrypt(t, carol, each[4].Message)); got != hexOf(shares[4]) {
		t.Error("Carol's message holds another share")
	}

	whole, err := y.process().Export(t.Context(), y.Cluster, ExportRequest{Recipients: [][]byte{publicKey(t, alice)}})
	y.must(err)
	given, err := ParseShares(decrypt(t, alice, whole[0].Message))
	y.must(err)
	if len(whole) != 2 || whole[0].Name != "prod" || given.N != 5 || given.T != 3 || !slices.EqualFunc(given.Shares, shares[:4], bytes.Equal) {
		t.Errorf("exported %v: %+v", names(whole), given)
	}
	if !slices.Contains(y.acts.all(), "intent export") {
		t.Error("the audit log does not know")
	}
}

func names(exported []Exported) (all []string) {
	for _, message := range exported {
		all = append(all, message.Name)
	}
	return all
}

func TestExportRefuses(t *testing.T) {
	y := initialised(t, nodetest.Raft, 1, nil)
	alice, revoked := newPerson(t, "Alice", nil), newPerson(t, "Revoked", nil)
	y.must(revoked.Revoke(0, "", nil))
	for name, test := range map[string]struct {
		request ExportRequest
		want    error
	}{
		"nobody":                        {ExportRequest{}, ErrInvalid},
		"somebody without a key":        {ExportRequest{Recipients: [][]byte{[]byte("alice@example.org")}}, ErrPGPKey},
		"a private key":                 {ExportRequest{Recipients: [][]byte{privateKey(t, alice)}}, ErrPGPKey},
		"one of two revoked":            {ExportRequest{Recipients: [][]byte{publicKey(t, alice), publicKey(t, revoked)}}, ErrPGPKey},
		"a root token that is not kept": {ExportRequest{Recipients: [][]byte{publicKey(t, alice)}, RootToken: true}, custody.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			exported, err := y.process().Export(t.Context(), y.Cluster, test.request)
			if !errors.Is(err, test.want) || exported != nil {
				t.Errorf("Export = %v, %v, want %v", names(exported), err, test.want)
			}
		})
	}
}
