package main

import (
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

// tendedView is what was done for a node, as JSON.
type tendedView struct {
	Node        string   `json:"node"`
	Action      string   `json:"action"` // none, unsealed, waiting, auto-seal; empty where it failed
	Initialized bool     `json:"initialized"`
	Sealed      bool     `json:"sealed"`
	Joined      bool     `json:"joined"`
	Stored      []string `json:"stored"` // what was held on the local disk and is in the store now
	RootRevoked bool     `json:"root_revoked"`
	People      int      `json:"people"` // who must still give their share
	Note        string   `json:"note"`
	Error       string   `json:"error"`
	TookMS      float64  `json:"took_ms"`

	words string
}

func tended(nodes []cluster.NodeOutcome) []tendedView {
	shown := []tendedView{}
	for i := range nodes {
		o := &nodes[i].Outcome
		shown = append(shown, tendedView{
			Node: nodes[i].Address, Action: string(o.Action), Initialized: o.Node.Seal.Initialized, Sealed: o.Node.Seal.Sealed, Joined: o.Joined,
			Stored: list(o.Stored), RootRevoked: o.RootRevoked, People: o.People, Note: o.Note, Error: text(nodes[i].Err),
			TookMS: milliseconds(o.Took), words: describeOutcome(o),
		})
	}
	return shown
}

// sentence says what came of a node.
func (v *tendedView) sentence() string {
	if v.Error != "" {
		return "FAILED: " + v.Error
	}
	return v.words
}

// describeOutcome says what came of a node in a few words.
func describeOutcome(o *cluster.Outcome) string {
	words := []string{map[cluster.Action]string{
		cluster.ActionNone: "was unsealed", cluster.ActionUnsealed: "unsealed now", cluster.ActionWaiting: "waiting",
		cluster.ActionAutoSeal: "unseals itself",
	}[o.Action]}
	if o.Joined {
		words = append([]string{"joined"}, words...)
	}
	if o.Stored != nil {
		words = append(words, "stored "+strings.Join(o.Stored, ", "))
	}
	if o.People == 1 {
		words = append(words, "1 person must still give a share")
	} else if o.People > 1 {
		words = append(words, fmt.Sprintf("%d people must still give their shares", o.People))
	}
	if o.Note != "" {
		words = append(words, o.Note)
	}
	return strings.Join(words, "; ")
}
