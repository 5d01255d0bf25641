package main

import (
	"bufio"
	"context"
	"fmt"
	"strings"

	"vault-plugin-secrets-nitrokey/nethsm"
)

// trustOnFirstUse looks at the certificates of nodes that neither a CA nor a pin was given for. One that an authority
// of this machine signed needs no more. Any other one is trusted only with a person's word; the result is the pins of
// those, nil where there are none.
func (a *app) trustOnFirstUse(ctx context.Context, options nethsm.Options) ([]string, error) {
	var pins []string
	proved := 0
	for _, url := range options.URLs {
		if strings.HasPrefix(url, "http://") {
			continue // a loopback address: there is nothing to prove
		}
		looking, cancel := a.within(ctx, ordinaryTimeout)
		shown, err := nethsm.ShowCertificate(looking, url, options.TLS.ServerName)
		cancel()
		switch {
		case err != nil:
			return nil, err
		case shown.Verified:
			proved++
			continue
		}
		a.describe(url, shown)
		if err := a.confirm(ctx, "Is that the certificate of your NetHSM?",
			"run this again with --pin "+shown.Pin+" once you have compared it"); err != nil {
			return nil, err
		}
		pins = append(pins, shown.Pin)
	}
	if pins != nil && proved > 0 {
		return nil, usage("some of the nodes' certificates are signed by an authority of this machine and others are " +
			"not; give --ca-cert, or --pin for each")
	}
	return pins, nil
}

// describe shows a certificate that nothing proves.
func (a *app) describe(url string, shown nethsm.ShownCertificate) {
	a.say("The certificate of %s is signed by no authority that this machine knows.", url)
	kind := "signed by " + shown.Issuer
	if shown.SelfSigned {
		kind = "signed by itself, as a NetHSM does until it is given another one"
	}
	a.say("  subject  %s (%s)", printable(shown.Subject), printable(kind))
	a.say("  valid    %s to %s", stamp(shown.NotBefore), stamp(shown.NotAfter))
	a.say("  SHA-256  %s", shown.Pin)
	a.say("Compare the SHA-256 where nobody can sit in between: over a cable to the NetHSM, or on the machine that runs " +
		"its container.")
}

// confirm asks a person. Without a terminal, or with another answer than yes, it is a refusal that says what to do instead.
func (a *app) confirm(ctx context.Context, question, instead string) error {
	if !isTerminal(a.stdin) || a.stdinTaken {
		return usage("a person has to confirm this, and there is no terminal to ask at; %s", instead)
	}
	_, _ = fmt.Fprintf(a.stderr, "%s Type yes: ", question)
	answer := make(chan string, 1)
	go func() { // ends with the line, or with the process: a read of a terminal cannot be interrupted
		line, _ := bufio.NewReaderSize(a.stdin, 64).ReadString('\n')
		answer <- line
	}()
	select {
	case line := <-answer:
		if strings.TrimSpace(line) == "yes" {
			return nil
		}
		return usage("not confirmed, so nothing was done")
	case <-ctx.Done():
		a.say("")
		return ctx.Err()
	}
}
