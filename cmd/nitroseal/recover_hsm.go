package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// defaultStateDir is where documentation and packages put the state directory.
const defaultStateDir = "/var/lib/nitroseal"

// recoveryHSM is the HSM of a recovery, which no configuration names.
type recoveryHSM struct {
	module                       string
	moduleEnv                    []string
	moduleHost, moduleHostSHA256 string
	serial, tokenLabel           string
	pin                          secretFlag
	stateDir                     string

	urls       []string
	username   string
	password   secretFlag
	caCert     string
	pins       []string
	serverName string

	keyID, keyLabel string
}

func (h *recoveryHSM) add(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&h.module, "module", "", "PKCS#11 module of the token; its file and folders must be writable by nobody else")
	flags.StringVar(&h.serial, "serial", "", "serial number of the token")
	flags.StringVar(&h.tokenLabel, "token-label", "", "label of the token")
	h.pin = secretFlag{name: "pin", prompt: "PIN of the token"}
	h.pin.add(cmd, "the PIN")
	flags.StringVar(&h.stateDir, "state-dir", defaultStateDir, "folder that remembers wrong PINs; the programs on this machine share one")
	flags.StringArrayVar(&h.moduleEnv, "module-env", nil, "environment variable that the module gets; again for each")
	flags.StringVar(&h.moduleHost, "module-host", "", "program that loads the module, where this one was built without cgo")
	flags.StringVar(&h.moduleHostSHA256, "module-host-sha256", "", "its SHA-256 in hexadecimal")
	flags.StringArrayVar(&h.urls, "url", nil, "node of a NetHSM, https://host[:port]; again for each node of a cluster")
	flags.StringVar(&h.username, "username", "operator", "user of the NetHSM with the role Operator")
	h.password = secretFlag{name: "password", prompt: "Password of the NetHSM's user"}
	h.password.add(cmd, "the password of the NetHSM's user")
	flags.StringVar(&h.caCert, "ca-cert", "", "file with the CA of the NetHSM's certificates, PEM")
	flags.StringArrayVar(&h.pins, "tls-pin", nil, "SHA-256 of the NetHSM's certificate, in hexadecimal; again for each certificate")
	flags.StringVar(&h.serverName, "server-name", "", "name in the certificates, where it is not the host of the URL")
	flags.StringVar(&h.keyID, "key-id", "", "id of the HSM key (default: it is found by its fingerprint)")
	flags.StringVar(&h.keyLabel, "key-label", "", "label of the HSM key (default: it is found by its fingerprint)")
	cmd.MarkFlagsMutuallyExclusive("module", "url")
	cmd.MarkFlagsMutuallyExclusive("serial", "token-label")
	cmd.MarkFlagsRequiredTogether("module-host", "module-host-sha256")
	_ = cmd.MarkFlagFilename("module", "so")
	_ = cmd.MarkFlagFilename("ca-cert")
	_ = cmd.MarkFlagDirname("state-dir")
}

// prepare asks for what only a person knows, and returns what opens the HSM.
func (h *recoveryHSM) prepare(ctx context.Context, a *app) (func(context.Context) (hsm.Device, error), error) {
	switch {
	case h.module != "":
		return h.prepareToken(ctx, a)
	case len(h.urls) > 0:
		return h.prepareNetHSM(ctx, a)
	}
	return nil, usage("no HSM is named; give --module and --serial for a token, or --url for a NetHSM")
}

func (h *recoveryHSM) prepareToken(ctx context.Context, a *app) (func(context.Context) (hsm.Device, error), error) {
	if h.serial == "" && h.tokenLabel == "" {
		return nil, usage("which token? Give its --serial, or its --token-label")
	}
	// Nobody logs in without the PIN ledger: that of the programs on this machine, which may know that the PIN is wrong.
	if err := usableStateDir(h.stateDir); err != nil {
		return nil, fmt.Errorf("%w: the state directory %s %w, or name another one with --state-dir", config.ErrInvalid, h.stateDir, err)
	}
	pin, err := a.secret(ctx, &h.pin)
	if err != nil {
		return nil, err
	}
	a.wipeAtEnd(pin)
	tokens := pkcs11.New(pkcs11.Options{
		Modules: []string{h.module}, StateDir: h.stateDir, Env: h.moduleEnv, HostPath: h.moduleHost, HostSHA256: h.moduleHostSHA256,
		Logger: a.logger(), Advice: pkcs11.Advice{
			Give:    "give the right one with --pin-file, and log in once at your word where the configuration names the token (nitroseal device pin try NAME)",
			Unbar:   "lift the bar with a configuration that names the token (nitroseal device pin unbar NAME)",
			LastTry: "log in once with a configuration that names the token (nitroseal device pin try NAME --last-try)",
			Force:   "--last-try",
		},
	})
	a.onClose(tokens.Close)
	return func(ctx context.Context) (hsm.Device, error) {
		device, err := tokens.Open(ctx, pkcs11.Config{
			Module: h.module, Serial: h.serial, TokenLabel: h.tokenLabel, PIN: pin, Owner: owner,
		})
		if err != nil {
			return nil, err // not a typed nil in the interface
		}
		a.onClose(device.Close)
		return device, nil
	}, nil
}

func (h *recoveryHSM) prepareNetHSM(ctx context.Context, a *app) (func(context.Context) (hsm.Device, error), error) {
	options := nethsm.Options{
		URLs: h.urls, UserAgent: "nitroseal", Logger: a.logger(), TLS: nethsm.TLS{Pins: h.pins, ServerName: h.serverName},
	}
	if h.caCert != "" {
		ca, err := os.ReadFile(h.caCert)
		if err != nil {
			return nil, usage("the CA in %s cannot be read: %w", h.caCert, pathless(err))
		}
		options.TLS.CA = ca
	}
	password, err := a.secret(ctx, &h.password)
	if err != nil {
		return nil, err
	}
	a.wipeAtEnd(password)
	nodes := nethsm.NewManager(a.logger())
	a.onClose(nodes.Close)
	return func(context.Context) (hsm.Device, error) {
		device, err := nodes.Open(nethsm.DeviceConfig{
			Options: options, Operator: nethsm.Credentials{Username: h.username, Password: password}, Owner: owner,
		})
		if err != nil {
			return nil, err
		}
		a.onClose(device.Close)
		return device, nil
	}, nil
}

// findKey finds the key on the HSM that the envelope was sealed to: by what it is, or by what flags call it.
func (h *recoveryHSM) findKey(ctx context.Context, device hsm.Device, sealed *envelope.Envelope) (hsm.Key, envelope.Recipient, error) {
	keys, err := device.FindKeys(ctx, hsm.KeyQuery{ID: h.keyID, Label: h.keyLabel})
	if err != nil {
		return nil, envelope.Recipient{}, fmt.Errorf("looking for the key: %w", err)
	}
	var others []string
	for _, key := range keys {
		if recipient, known := recipientOf(sealed, key); known {
			return key, recipient, nil
		}
		others = append(others, key.Ref().Fingerprint)
	}
	kids := make([]string, 0, envelope.MaxRecipients)
	for _, r := range sealed.Recipients() {
		kids = append(kids, r.KID)
	}
	slices.Sort(others)
	none := "no key"
	if others != nil {
		none = "only " + strings.Join(others, ", ")
	}
	return nil, envelope.Recipient{}, fmt.Errorf("%w: the envelope is sealed to the keys with the fingerprints %s, and of that name and with these "+
		"rights the HSM has %s", errors.Join(hsm.ErrNotFound, envelope.ErrNotRecipient), strings.Join(kids, ", "), none)
}

// recipientOf is the recipient of an envelope that a key is.
func recipientOf(sealed *envelope.Envelope, key hsm.Key) (envelope.Recipient, bool) {
	for _, r := range sealed.Recipients() {
		if r.KID == key.Ref().Fingerprint {
			return envelope.Recipient{KID: r.KID, Algorithm: r.Algorithm, Public: key.Public()}, true
		}
	}
	return envelope.Recipient{}, false
}
