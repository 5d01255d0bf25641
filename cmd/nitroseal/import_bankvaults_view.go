package main

import (
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/bankvaults"
)

// bankVaultsView is what import bank-vaults found and did, as JSON.
type bankVaultsView struct {
	Cluster string               `json:"cluster"`
	Values  []bankVaultsCopyView `json:"values"`
	// How much is in custody, and how much of that had the older format. Missing are numbers between those that are there.
	Shares         int      `json:"shares"`
	RecoveryShares int      `json:"recovery_shares"`
	RootToken      bool     `json:"root_token"`
	OldFormat      int      `json:"pkcs1_v15"`
	Missing        []string `json:"missing"`
	// Already is true where an earlier run had imported it, Proved where the running Vault takes the keys.
	Already  bool     `json:"already"`
	Proved   bool     `json:"proved"`
	Warnings []string `json:"warnings"`

	copies []bankvaults.Copy
	opened bool
}

// bankVaultsCopyView is a value as it was found.
type bankVaultsCopyView struct {
	Name  string `json:"name"`
	Copy  string `json:"copy"`
	From  string `json:"from"`
	State string `json:"state"` // found, imported, left or deleted
}

func newBankVaultsView(cluster string, copies []bankvaults.Copy) *bankVaultsView {
	v := &bankVaultsView{Cluster: cluster, Values: []bankVaultsCopyView{}, Missing: []string{}, Warnings: []string{}, copies: copies}
	for _, c := range copies {
		v.Values = append(v.Values, bankVaultsCopyView{Name: c.Name.String(), Copy: c.Sum(), From: c.From, State: "found"})
	}
	return v
}

// tell says what is in custody.
func (v *bankVaultsView) tell(m *bankvaults.Material, root bool) {
	v.opened = true
	v.Shares, v.RecoveryShares, v.RootToken, v.OldFormat = len(m.Shares), len(m.RecoveryShares), root && m.RootToken != nil, m.OldFormat
	for _, name := range m.Missing() {
		v.Missing = append(v.Missing, name.String())
	}
	for i := range v.Values {
		v.Values[i].State = "imported"
	}
}

// leave and gone say what became of copies.
func (v *bankVaultsView) leave(copies []bankvaults.Copy) {
	for _, c := range copies {
		v.became(c, "left")
	}
}

func (v *bankVaultsView) gone(c bankvaults.Copy) { v.became(c, "deleted") }

func (v *bankVaultsView) became(c bankvaults.Copy, state string) {
	for i, known := range v.copies {
		if known.String() == c.String() {
			v.Values[i].State = state
		}
	}
}

func (v *bankVaultsView) rows(t *table) {
	if len(v.Values) > 0 {
		t.row("NAME", "COPY", "STATE", "FROM")
		for _, c := range v.Values {
			t.row(c.Name, c.Copy, c.State, c.From)
		}
	}
	if v.opened {
		what := fmt.Sprintf("%d unseal keys", v.Shares)
		if v.RecoveryShares > 0 {
			what += fmt.Sprintf(", %d recovery keys", v.RecoveryShares)
		}
		if v.RootToken {
			what += ", the root token"
		}
		t.row(what + " are in custody of cluster " + v.Cluster)
	}
	switch {
	case v.Already && v.opened:
		t.row("they were there before")
	case v.Already:
		t.row("nothing of Bank-Vaults' is left to import, and the keys of cluster " + v.Cluster + " are in custody")
	}
	if v.Proved {
		t.row("the running Vault takes them")
	}
	if len(v.Missing) > 0 {
		t.row("missing in between: " + strings.Join(v.Missing, ", "))
	}
	for _, warning := range v.Warnings {
		t.row(warning)
	}
}
