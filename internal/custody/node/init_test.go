package node_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/custody/node/nodetest"
)

var fiveOfThree = node.InitRequest{Shares: 5, Threshold: 3}

// TestAnInitialisationGoesOnWhenItsCallerGoes: Vault would go on as well, and the keys would be lost.
func TestAnInitialisationGoesOnWhenItsCallerGoes(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	played.Break("sys/init", 1, nodetest.Then(cancel))
	n, err := node.New(node.Config{Address: played.Address(), TLS: played.TLS(), Timeout: time.Nanosecond}) // not for this call
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	answer, err := n.Init(ctx, fiveOfThree)
	if err != nil || len(answer.Shares) != 5 || ctx.Err() == nil {
		t.Fatal(err)
	}
	answer.Wipe()
	if answer.Shares != nil || answer.RootToken != nil {
		t.Error("something is left")
	}
	answer = nil
	answer.Wipe()
}

func TestAnInitialisationIsNotBegunForACallerThatHasGone(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := played.Client(t).Init(ctx, fiveOfThree); !errors.Is(err, context.Canceled) || errors.Is(err, node.ErrMayHaveHappened) {
		t.Error(err)
	}
	if played.Count("PUT", "sys/init") != 0 {
		t.Error("it was sent")
	}
}

func TestAnInitialisationHasADeadlineOfItsOwn(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	played.Break("sys/init", 1, nodetest.Hang)
	n, err := node.New(node.Config{Address: played.Address(), TLS: played.TLS(), InitTimeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	_, err = n.Init(t.Context(), fiveOfThree)
	if !errors.Is(err, node.ErrMayHaveHappened) || !errors.Is(err, node.ErrUnavailable) || !strings.Contains(err.Error(), "within 1s") {
		t.Error(err)
	}
}

func TestALostInitialisationIsADoubt(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	played.Break("sys/init", 1, nodetest.Lose)
	answer, err := n.Init(t.Context(), fiveOfThree)
	if !errors.Is(err, node.ErrMayHaveHappened) || answer != nil {
		t.Error(answer, err)
	}
	if status, err := n.Status(t.Context()); err != nil || !status.Initialized {
		t.Error(status, err)
	}
	if played.Count("PUT", "sys/init") != 1 {
		t.Error("it was sent again")
	}
}

// TestWhatCouldBeReadOfATornInitialisationIsKept: these keys exist nowhere else.
func TestWhatCouldBeReadOfATornInitialisationIsKept(t *testing.T) {
	for name, c := range map[string]struct {
		at     string
		shares int
	}{
		"in the token":                        {`"root_token":"hvs.`, 5},
		"between the lists":                   {`"keys_base64":[`, 5}, // the list in hex is whole
		"before the first key":                {`"keys":[`, 0},
		"in the first key":                    {`"keys":["ab`[:9], 0},
		"one byte before the end of all keys": {`"keys_base64"`, 5},
	} {
		t.Run(name, func(t *testing.T) {
			played := nodetest.Start(t, nodetest.Options{})
			played.Break("sys/init", 1, nodetest.TornAt(c.at))
			answer, err := played.Client(t).Init(t.Context(), fiveOfThree)
			if !errors.Is(err, node.ErrMayHaveHappened) {
				t.Error(err)
			}
			if c.shares == 0 {
				if answer != nil {
					t.Errorf("%v", answer)
				}
				return
			}
			if answer == nil || len(answer.Shares) != c.shares {
				t.Fatalf("%v", answer)
			}
			for i, share := range played.Shares() {
				if !bytes.Equal(share, answer.Shares[i]) {
					t.Errorf("share %d is another one", i)
				}
			}
		})
	}
}

// TestAnOddInitialisationIsKept: with fewer or more keys than asked for, with no token.
func TestAnOddInitialisationIsKept(t *testing.T) {
	for name, body := range map[string]string{
		"no token":                 `{"keys_base64":["AAAA","BBBB","CCCC","DDDD","EEEE"]}`,
		"a key that is none":       `{"keys":["zz"],"keys_base64":["AAAA","BBBB"],"root_token":"hvs.x"}`,
		"fewer keys":               `{"keys_base64":["AAAA"],"root_token":"hvs.x"}`,
		"a token of another world": `{"keys_base64":["AAAA","BBBB"],"root_token":5}`,
	} {
		t.Run(name, func(t *testing.T) {
			played := nodetest.Start(t, nodetest.Options{})
			played.Break("sys/init", 1, nodetest.Body(body))
			answer, err := played.Client(t).Init(t.Context(), fiveOfThree)
			if !errors.Is(err, node.ErrMayHaveHappened) || !errors.Is(err, node.ErrMalformed) {
				t.Error(err)
			}
			if name != "a key that is none" && (answer == nil || len(answer.Shares) == 0) {
				t.Error("the keys are lost")
			}
		})
	}
}

// TestBetweenTheHalvesOfAnInitialisation a node says that it is initialised, with no numbers yet.
func TestBetweenTheHalvesOfAnInitialisation(t *testing.T) {
	played := nodetest.Start(t, nodetest.Options{})
	n := played.Client(t)
	var between node.Status
	var second error
	played.DuringInit(func() {
		between, _ = n.Status(t.Context())
		_, second = n.Init(t.Context(), fiveOfThree)
	})
	if _, err := n.Init(t.Context(), fiveOfThree); err != nil {
		t.Fatal(err)
	}
	if !between.Initialized || between.T != 0 || !errors.Is(second, node.ErrAlreadyInitialized) {
		t.Errorf("%+v, %v", between, second)
	}
}
