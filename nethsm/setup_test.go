package nethsm

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// setupClient is a client of a double, without credentials.
func setupClient(t *testing.T, h *nethsmtest.HSM) *Client {
	t.Helper()
	client, err := New(Options{URLs: h.URLs(), TLS: TLS{CA: h.CA()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := client.Close(); err != nil {
			t.Error(err)
		}
	})
	return client
}

// wholeSetup asks for everything that a setup can do in the root namespace.
func wholeSetup() *Setup {
	on := true
	return &Setup{
		Administrator:    Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)},
		Operator:         Account{Username: "vault", Passphrase: Secret("VaultOperatorPassphrase")},
		Key:              WantedKey{ID: "unseal", Length: 2048},
		Tag:              "vault",
		UnattendedBoot:   &on,
		Backup:           Account{Username: "backups", Passphrase: Secret("BackupsUserPassphrase")},
		BackupPassphrase: Secret(nethsmtest.BackupFilePassphrase),
	}
}

// namespaceSetup puts operator and key into a namespace.
func namespaceSetup() *Setup {
	s := wholeSetup()
	s.Namespace = "vaults"
	s.NamespaceAdministrator = Account{Username: "chief", Passphrase: Secret("NamespaceChiefPassphrase")}
	return s
}

// withoutBackup spares a test the seconds of scrypt that backups cost.
func withoutBackup(s *Setup) *Setup {
	s.Backup, s.BackupPassphrase = Account{}, nil
	return s
}

func provisioned(t *testing.T, nodes int) *nethsmtest.HSM {
	t.Helper()
	return nethsmtest.Start(t, nethsmtest.Options{Provisioned: true, Nodes: nodes})
}

func quiet(Step) {}

// changing are the requests that were no reading.
func changing(h *nethsmtest.HSM) []string {
	var out []string
	for _, node := range h.Nodes() {
		for _, r := range node.Requests() {
			if r.Method != http.MethodGet {
				out = append(out, r.Method+" "+r.Path)
			}
		}
	}
	return out
}

func states(plan []Step) string {
	var out []string
	for _, step := range plan {
		out = append(out, fmt.Sprintf("%s: %s", step.What, step.State))
	}
	return strings.Join(out, "\n")
}

func TestASetupDoesEverythingOnceAndNothingTwice(t *testing.T) {
	for name, test := range map[string]struct {
		make  func() *Setup
		nodes int
		steps int
	}{
		"in the root namespace":   {wholeSetup, 1, 6},
		"in a namespace":          {func() *Setup { return withoutBackup(namespaceSetup()) }, 1, 6},
		"on a cluster":            {func() *Setup { return withoutBackup(wholeSetup()) }, 2, 5},
		"with no backup and boot": {func() *Setup { s := withoutBackup(wholeSetup()); s.UnattendedBoot = nil; return s }, 1, 3},
	} {
		t.Run(name, func(t *testing.T) {
			h := provisioned(t, test.nodes)
			client := setupClient(t, h)

			plan, err := test.make().Plan(t.Context(), client)
			if err != nil {
				t.Fatal(err)
			}
			if got := changing(h); got != nil {
				t.Fatalf("the plan sent %v", got)
			}
			if len(plan) != test.steps {
				t.Errorf("%d steps:\n%s", len(plan), states(plan))
			}
			for _, step := range plan {
				if step.State != StepToDo && step.State != StepUnknown {
					t.Errorf("before: %s: %s", step.What, step.State)
				}
			}

			var reported []string
			plan, err = test.make().Apply(t.Context(), client, func(s Step) { reported = append(reported, s.What) })
			if err != nil {
				t.Fatal(err)
			}
			for _, step := range plan {
				if step.State != StepDone || !step.Changed {
					t.Errorf("after: %s: %s, changed %v", step.What, step.State, step.Changed)
				}
			}
			if len(reported) != test.steps {
				t.Errorf("reported: %v", reported)
			}
			if err := test.make().Prove(t.Context(), client); err != nil {
				t.Error(err)
			}

			for _, node := range h.Nodes() {
				node.ResetCounters()
			}
			plan, err = test.make().Apply(t.Context(), client, quiet)
			if err != nil {
				t.Fatal(err)
			}
			for _, step := range plan {
				if step.State != StepDone || step.Changed {
					t.Errorf("the second time: %s: %s, changed %v", step.What, step.State, step.Changed)
				}
			}
			// A backup that is begun is a POST, and changes nothing.
			sent := slices.DeleteFunc(changing(h), func(r string) bool { return strings.HasSuffix(r, "/system/backup") })
			if len(sent) > 0 {
				t.Errorf("the second time it sent %v", sent)
			}
		})
	}
}

func TestWhatASetupMakesIsAsTightAsItShouldBe(t *testing.T) {
	h := provisioned(t, 1)
	client := setupClient(t, h)
	if _, err := wholeSetup().Apply(t.Context(), client, quiet); err != nil {
		t.Fatal(err)
	}
	admin := client.As(wholeSetup().Administrator)
	key, err := admin.Key(t.Context(), "unseal")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(key.Mechanisms, []Mechanism{RSADecryptionOAEPSHA256}) || !slices.Equal(key.Tags, []string{"vault"}) {
		t.Errorf("the key: %+v", key)
	}
	for id, role := range map[string]Role{"vault": RoleOperator, "backups": RoleBackup} {
		if user, err := admin.User(t.Context(), id); err != nil || user.Role != role {
			t.Errorf("%s: %+v, %v", id, user, err)
		}
	}
	if on, err := admin.UnattendedBoot(t.Context()); err != nil || !on {
		t.Errorf("unattended boot: %v, %v", on, err)
	}
	// Another operator has not the tag.
	other := client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
	if _, err := other.Decrypt(t.Context(), "unseal", ModeOAEPSHA256, make([]byte, 256), nil); !errors.Is(err, hsm.ErrForbidden) {
		t.Errorf("another operator: %v", err)
	}
}

// TestASetupInterruptedAnywhereIsFinishedByTheNextRun lets every changing request fail once, in each of the ways in
// which one can, and then runs the setup again.
func TestASetupInterruptedAnywhereIsFinishedByTheNextRun(t *testing.T) {
	ways := map[string]nethsmtest.Fault{
		"the answer is lost":   {Cut: true, After: -1, Times: 1},
		"the request is lost":  {Drop: true, Times: 1},
		"the database is away": {Status: http.StatusInternalServerError, Times: 1},
	}
	for _, request := range []struct {
		method, path string
		backup       string // the one way that is tried where backups take part
	}{
		{http.MethodPut, "/users/vaults~chief", ""},
		{http.MethodPut, "/namespaces/vaults", ""},
		{http.MethodPut, "/users/vaults~vault", ""},
		{http.MethodPut, "/users/vaults~vault/tags", ""},
		{http.MethodPost, "/keys/generate", ""},
		{http.MethodPut, "/config/unattended-boot", ""},
		{http.MethodPut, "/users/backups", "the answer is lost"},
		{http.MethodPost, "/system/backup", "the database is away"},
		{http.MethodPut, "/config/backup-passphrase", "the answer is lost"},
	} {
		for way, fault := range ways {
			if request.backup != "" && request.backup != way {
				continue
			}
			t.Run(way+" at "+request.method+" "+request.path, func(t *testing.T) {
				setup := func() *Setup {
					if request.backup == "" {
						return withoutBackup(namespaceSetup())
					}
					return namespaceSetup()
				}
				h := unprovisioned(t)
				client := setupClient(t, h)
				commission(t, client)
				fault.Method, fault.Path = request.method, request.path
				h.Node(0).Inject(fault)

				_, err := setup().Apply(t.Context(), client, quiet)
				if stopped, is := errors.AsType[*SetupError](err); err != nil && (!is || len(stopped.Remaining) == 0) {
					t.Fatalf("the first run: %v", err)
				}
				h.Node(0).ClearFaults()
				plan, err := setup().Apply(t.Context(), client, quiet)
				if err != nil {
					t.Fatalf("the second run: %v", err)
				}
				for _, step := range plan {
					if step.State != StepDone {
						t.Errorf("%s: %s", step.What, step.State)
					}
				}
				if err := setup().Prove(t.Context(), client); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// unprovisioned is a new NetHSM, which has no backup passphrase yet.
func unprovisioned(t *testing.T) *nethsmtest.HSM {
	t.Helper()
	return nethsmtest.Start(t, nethsmtest.Options{})
}

func commission(t *testing.T, client *Client) {
	t.Helper()
	err := client.Commission(t.Context(), Provisioning{
		UnlockPassphrase: Secret(nethsmtest.UnlockPassphrase), AdminPassphrase: Secret(nethsmtest.AdminPassphrase),
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestASetupStopsAtTheFirstFailureAndSaysWhatRemains(t *testing.T) {
	h := provisioned(t, 1)
	client := setupClient(t, h)
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/keys/generate", Status: http.StatusForbidden})
	_, err := wholeSetup().Apply(t.Context(), client, quiet)
	var stopped *SetupError
	if !errors.As(err, &stopped) || !errors.Is(err, hsm.ErrForbidden) {
		t.Fatal(err)
	}
	if got := strings.Join(stopped.Done, "; "); got != `operator "vault"; tag "vault" of operator "vault"` {
		t.Errorf("done: %s", got)
	}
	if len(stopped.Remaining) != 4 || stopped.Remaining[0] != `key "unseal"` {
		t.Errorf("remaining: %q", stopped.Remaining)
	}
	for _, r := range changing(h) {
		if strings.Contains(r, "unattended") || strings.Contains(r, "backup") {
			t.Errorf("after the failure it sent %s", r)
		}
	}
}

func TestASetupEndsWithItsContext(t *testing.T) {
	h := provisioned(t, 1)
	client := setupClient(t, h)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := withoutBackup(wholeSetup()).Apply(ctx, client, func(Step) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if plan, err := withoutBackup(wholeSetup()).Apply(t.Context(), client, quiet); err != nil {
		t.Errorf("the next run: %v\n%s", err, states(plan))
	}
}

func TestWhatDiffersIsReportedAndNothingIsChanged(t *testing.T) {
	ctx := t.Context()
	oaep := []Mechanism{RSADecryptionOAEPSHA256}
	key := func(key NewKey) func(*testing.T, *Client) {
		return func(t *testing.T, admin *Client) {
			t.Helper()
			key.ID = "unseal"
			if _, err := admin.GenerateKey(ctx, key); err != nil {
				t.Fatal(err)
			}
		}
	}
	user := func(id string, role Role, passphrase string) func(*testing.T, *Client) {
		return func(t *testing.T, admin *Client) {
			t.Helper()
			if _, err := admin.AddUser(ctx, id, NewUser{RealName: "there before", Role: role, Passphrase: Secret(passphrase)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, test := range map[string]struct {
		before func(*testing.T, *Client)
		change func(*Setup)
		want   string
	}{
		"the operator has another role": {before: user("vault", RoleMetrics, "VaultOperatorPassphrase"), want: "role Metrics"},
		"the operator's password is not known here": {
			before: user("vault", RoleOperator, "VaultOperatorPassphrase"),
			change: func(s *Setup) {
				s.Operator.Passphrase, s.Operator.NewPassphrase = nil, func() ([]byte, error) { panic("nothing is to be made") }
			},
			want: "its password is not known here",
		},
		"the backup user is an operator": {before: user("backups", RoleOperator, "BackupsUserPassphrase"), want: "role Operator"},
		"the key has more mechanisms": {
			before: key(NewKey{Type: TypeRSA, Length: 2048, Tags: []string{"vault"}, Mechanisms: append([]Mechanism{RSADecryptionPKCS1}, oaep...)}),
			want:   "it can also do RSA_Decryption_PKCS1",
		},
		"the key has another mechanism": {
			before: key(NewKey{Type: TypeRSA, Length: 2048, Tags: []string{"vault"}, Mechanisms: []Mechanism{RSADecryptionRAW}}),
			want:   "it cannot do RSA_Decryption_OAEP_SHA256",
		},
		"the key is of another type": {
			before: key(NewKey{Type: TypeECP256, Tags: []string{"vault"}, Mechanisms: []Mechanism{ECDSASignature}}), want: "type EC_P256",
		},
		"the key is shorter": {
			before: key(NewKey{Type: TypeRSA, Length: 1024, Tags: []string{"vault"}, Mechanisms: oaep}), want: "it has 1024 bits, and 2048 are wanted",
		},
		"the key has no tag":         {before: key(NewKey{Type: TypeRSA, Length: 2048, Mechanisms: oaep}), want: "every operator may use it"},
		"the key has another tag":    {before: key(NewKey{Type: TypeRSA, Length: 2048, Mechanisms: oaep, Tags: []string{"x"}}), want: "vault is not among them"},
		"the key has a tag too many": {before: key(NewKey{Type: TypeRSA, Length: 2048, Mechanisms: oaep, Tags: []string{"vault", "x"}}), want: "may use it too"},
		"the key has another label": {
			before: key(NewKey{Type: TypeRSA, Length: 2048, Mechanisms: oaep, Tags: []string{"vault"}, Label: "old"}),
			change: func(s *Setup) { s.Key.Label = "new" },
			want:   `its label is "old"`,
		},
		"the namespace is there without this administrator": {
			before: func(t *testing.T, admin *Client) {
				t.Helper()
				user("vaults~other", RoleAdministrator, "OtherChiefPassphrase")(t, admin)
				if err := admin.AddNamespace(ctx, "vaults"); err != nil {
					t.Fatal(err)
				}
			},
			change: func(s *Setup) {
				s.Namespace, s.NamespaceAdministrator = "vaults", namespaceSetup().NamespaceAdministrator
			},
			want: "only its own administrators can make one",
		},
	} {
		t.Run(name, func(t *testing.T) {
			h := provisioned(t, 1)
			client := setupClient(t, h)
			test.before(t, client.As(wholeSetup().Administrator))
			h.Node(0).ResetCounters()
			setup := wholeSetup()
			if test.change != nil {
				test.change(setup)
			}
			plan, err := setup.Plan(ctx, client)
			if err != nil {
				t.Fatal(err)
			}
			found := slices.ContainsFunc(plan, func(s Step) bool { return s.State == StepDiffers && strings.Contains(s.Found, test.want) })
			if !found {
				t.Errorf("the plan does not say %q:\n%+v", test.want, plan)
			}
			_, err = setup.Apply(ctx, client, quiet)
			if !errors.Is(err, ErrDiffers) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v", err)
			}
			if sent := changing(h); sent != nil {
				t.Errorf("it sent %v", sent)
			}
		})
	}
}

func TestAnotherBackupPassphraseIsReportedAndNotChanged(t *testing.T) {
	h := provisioned(t, 1)
	client := setupClient(t, h)
	if _, err := wholeSetup().Apply(t.Context(), client, quiet); err != nil {
		t.Fatal(err)
	}
	h.Node(0).ResetCounters()
	setup := wholeSetup()
	setup.BackupPassphrase = Secret("AnotherBackupPassphrase")
	_, err := setup.Apply(t.Context(), client, quiet)
	if !errors.Is(err, ErrDiffers) {
		t.Fatal(err)
	}
	if strings.Contains(err.Error(), "before any change") || strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("only the run finds that out, and may have changed something before: %v", err)
	}
	if sent := changing(h); len(sent) != 1 || !strings.HasSuffix(sent[0], "/system/backup") {
		t.Errorf("it sent %v", sent)
	}
}

func TestAnAdministratorOfANamespaceSetsUpHisNamespace(t *testing.T) {
	h := provisioned(t, 1)
	client := setupClient(t, h)
	if err := h.AddUser("vaults~chief", "Administrator", "NamespaceChiefPassphrase"); err != nil {
		t.Fatal(err)
	}
	setup := &Setup{
		Administrator: Credentials{Username: "vaults~chief", Password: []byte("NamespaceChiefPassphrase")},
		Namespace:     "vaults",
		Operator:      Account{Username: "vault", Passphrase: Secret("VaultOperatorPassphrase")},
		Key:           WantedKey{ID: "unseal", Length: 2048},
		Tag:           "vault",
	}
	if _, err := setup.Apply(t.Context(), client, quiet); err != nil {
		t.Fatal(err)
	}
	if err := setup.Prove(t.Context(), client); err != nil {
		t.Fatal(err)
	}
}

func TestAGeneratedPasswordIsAskedForOnceAndUsed(t *testing.T) {
	h := provisioned(t, 1)
	client := setupClient(t, h)
	setup := withoutBackup(wholeSetup())
	made := 0
	setup.Operator.Passphrase = nil
	setup.Operator.NewPassphrase = func() ([]byte, error) { made++; return []byte("GeneratedPassphrase"), nil }
	if _, err := setup.Plan(t.Context(), client); err != nil || made != 0 {
		t.Fatalf("the plan made %d passwords, %v", made, err)
	}
	if _, err := setup.Apply(t.Context(), client, quiet); err != nil || made != 1 {
		t.Fatalf("the run made %d passwords, %v", made, err)
	}
	if err := setup.Prove(t.Context(), client); err != nil {
		t.Error(err)
	}
}

func TestWhatASetupCannotDoIsRefusedBeforeAnythingIsSent(t *testing.T) {
	h := provisioned(t, 1)
	client := setupClient(t, h)
	on := true
	for name, change := range map[string]func(*Setup){
		"no operator":                              func(s *Setup) { s.Operator.Username = "" },
		"a key that is too short":                  func(s *Setup) { s.Key.Length = 1024 },
		"a tag that is none":                       func(s *Setup) { s.Tag = "-x" },
		"no tag":                                   func(s *Setup) { s.Tag = "" },
		"a key id that is none":                    func(s *Setup) { s.Key.ID = "a b" },
		"a namespace without an administrator":     func(s *Setup) { s.Namespace = "vaults" },
		"an administrator without a namespace":     func(s *Setup) { s.NamespaceAdministrator.Username = "chief" },
		"an administrator of another namespace":    func(s *Setup) { s.Administrator.Username = "other~chief" },
		"unattended boot by a namespace's":         func(s *Setup) { s.Namespace, s.Administrator.Username, s.UnattendedBoot = "v", "v~chief", &on },
		"an operator with the name of a namespace": func(s *Setup) { s.Operator.Username = "vaults~vault" },
		"a backup passphrase without a user":       func(s *Setup) { s.Backup.Username = "" },
		"a backup user without a password":         func(s *Setup) { s.Backup.Passphrase = nil },
		"a backup user without a passphrase":       func(s *Setup) { s.BackupPassphrase = nil },
	} {
		t.Run(name, func(t *testing.T) {
			h.Node(0).ResetCounters()
			setup := wholeSetup()
			change(setup)
			if _, err := setup.Apply(t.Context(), client, quiet); !errors.Is(err, ErrRequest) {
				t.Errorf("got %v", err)
			}
			if sent := h.Node(0).Requests(); len(sent) > 0 {
				t.Errorf("it sent %v", sent)
			}
		})
	}
}

func TestASetupWantsOperationalNodes(t *testing.T) {
	for state, want := range map[nethsmtest.State]string{
		nethsmtest.Unprovisioned: "provision it first",
		nethsmtest.Locked:        "unlock it first",
		nethsmtest.Failed:        "etcd",
	} {
		t.Run(string(state), func(t *testing.T) {
			h := provisioned(t, 1)
			h.Node(0).SetState(state)
			_, err := wholeSetup().Plan(t.Context(), setupClient(t, h))
			if !errors.Is(err, ErrState) || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestASetupSaysNothingSecret(t *testing.T) {
	h := provisioned(t, 1)
	client := setupClient(t, h)
	setup := namespaceSetup()
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPut, Path: "/users/backups", Status: http.StatusForbidden})
	plan, err := setup.Apply(t.Context(), client, quiet)
	said := fmt.Sprintf("%+v %v %+v", plan, err, setup.Operator)
	for _, secret := range []string{"VaultOperatorPassphrase", "NamespaceChiefPassphrase", "BackupsUserPassphrase", nethsmtest.BackupFilePassphrase} {
		if strings.Contains(said, secret) {
			t.Errorf("%q is in %s", secret, said)
		}
	}
}
