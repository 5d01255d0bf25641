package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/nethsm"
)

// nethsmTarget is the NetHSM of a verb: one of the configuration, or one that flags describe.
type nethsmTarget struct {
	app *app

	device     string
	urls       []string
	caCertFile string
	pins       []string
	serverName string
	insecure   bool
	node       string // one of the nodes; empty: all

	configured config.Device // the device of the configuration; its Name is empty where flags describe the target
	secretsDir string
	all        []string // the URLs of all nodes
	trusted    []string // pins that a person confirmed
}

// add adds the flags. A verb of one node has --node to choose it among those of a device.
func (t *nethsmTarget) add(cmd *cobra.Command, oneNode bool) {
	flags := cmd.Flags()
	flags.StringVar(&t.device, "device", "", "NetHSM of the configuration")
	flags.StringArrayVar(&t.urls, "url", nil, "node of a NetHSM that is not in the configuration, https://host[:port]; "+
		"again for each node of a cluster")
	flags.StringVar(&t.caCertFile, "ca-cert", "", "file with the CA of the nodes' certificates, PEM")
	flags.StringArrayVar(&t.pins, "pin", nil, "SHA-256 of a node's certificate, in hexadecimal; again for each certificate")
	flags.StringVar(&t.serverName, "server-name", "", "name in the certificates, where it is not the host of the URL")
	flags.BoolVar(&t.insecure, "insecure", false, "trust any certificate: whoever sits in between reads the passwords")
	if oneNode {
		flags.StringVar(&t.node, "node", "", "URL of the node, where the device has several")
	} else {
		flags.StringVar(&t.node, "node", "", "URL of one node; without it all nodes are meant")
	}
	cmd.MarkFlagsMutuallyExclusive("device", "url")
	cmd.MarkFlagsMutuallyExclusive("insecure", "ca-cert")
	cmd.MarkFlagsMutuallyExclusive("insecure", "pin")
	_ = cmd.MarkFlagFilename("ca-cert")
	_ = cmd.RegisterFlagCompletionFunc("device", t.app.completeDevices)
}

// open returns a client without credentials; it does not touch the NetHSM but to look at certificates that nothing given
// can prove.
func (t *nethsmTarget) open(ctx context.Context) (*nethsm.Client, error) {
	options, err := t.options()
	if err != nil {
		return nil, err
	}
	options.UserAgent = "nitroseal"
	options.Logger = t.app.logger()
	if !options.TLS.Insecure && len(options.TLS.CA) == 0 && len(options.TLS.Pins) == 0 {
		if t.trusted, err = t.app.trustOnFirstUse(ctx, options); err != nil {
			return nil, err
		}
		options.TLS.Pins = t.trusted
	}
	client, err := nethsm.New(options)
	if err != nil {
		return nil, &usageError{err}
	}
	t.app.onClose(client.Close)
	t.all = client.URLs()
	if t.node == "" {
		return client, nil
	}
	node, err := client.At(t.node)
	if err != nil {
		return nil, &usageError{err}
	}
	return node, nil
}

// openOne is open for a verb that concerns one node.
func (t *nethsmTarget) openOne(ctx context.Context) (*nethsm.Client, error) {
	client, err := t.open(ctx)
	if err != nil {
		return nil, err
	}
	if urls := client.URLs(); len(urls) > 1 {
		return nil, usage("this concerns one node, and there are %d; choose one with --node: %s",
			len(urls), strings.Join(urls, ", "))
	}
	return client, nil
}

// options are those of the configuration, or of the flags.
func (t *nethsmTarget) options() (nethsm.Options, error) {
	switch {
	case t.device != "":
		return t.configuredOptions()
	case len(t.urls) == 0:
		return nethsm.Options{}, usage("no NetHSM is named; give --device with the name of one of the configuration, or --url")
	}
	options := nethsm.Options{URLs: t.urls, TLS: nethsm.TLS{Pins: t.pins, ServerName: t.serverName, Insecure: t.insecure}}
	if t.caCertFile != "" {
		ca, err := os.ReadFile(t.caCertFile)
		if err != nil {
			return nethsm.Options{}, usage("the CA in %s cannot be read: %w", t.caCertFile, pathless(err))
		}
		options.TLS.CA = ca
	}
	return options, nil
}

func (t *nethsmTarget) configuredOptions() (nethsm.Options, error) {
	if t.caCertFile != "" || t.pins != nil || t.serverName != "" || t.insecure {
		return nethsm.Options{}, usage("the configuration says how %q proves itself; change it there, or describe the "+
			"NetHSM with --url", t.device)
	}
	configured, err := t.app.deviceConfig(t.device)
	if err != nil {
		return nethsm.Options{}, err
	}
	if configured.Type != device.TypeNetHSM {
		return nethsm.Options{}, usage("the device %q is of type %s and no NetHSM", t.device, configured.Type)
	}
	c, err := t.app.config()
	if err != nil {
		return nethsm.Options{}, err
	}
	t.configured, t.secretsDir = configured, c.SecretsDir
	return nethsm.Options{
		URLs: configured.URLs,
		TLS: nethsm.TLS{
			CA: []byte(configured.CACert), Pins: configured.TLSPins, ServerName: configured.TLSServerName, Insecure: configured.Insecure,
		},
		Timeout: configured.RequestTimeout,
	}, nil
}

// configuredSecret reads a secret of the device in the configuration; nil where there is none.
func (t *nethsmTarget) configuredSecret(file, env string) ([]byte, error) {
	switch {
	case file != "":
		return device.SecretFiles{Dir: t.secretsDir, Credentials: true}.Read(file)
	case env != "":
		value := os.Getenv(env)
		if value == "" {
			return nil, fmt.Errorf("%w: device %q: the environment variable %s is not set; it holds a secret of the "+
				"device", config.ErrInvalid, t.device, env)
		}
		return []byte(value), nil
	default:
		return nil, nil
	}
}

// nethsmAdministrator is the administrator that a verb logs in as.
type nethsmAdministrator struct {
	username string
	password secretFlag
}

func (l *nethsmAdministrator) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&l.username, "admin-user", "", `administrator, "namespace~user" for one of a namespace (default: the configuration's, else "admin")`)
	l.password = secretFlag{name: "admin-password", prompt: "Password of the administrator"}
	l.password.add(cmd, "the administrator's password")
}

// known tells whether the password comes from somewhere without asking a person.
func (l *nethsmAdministrator) known(t *nethsmTarget) bool {
	return l.password.given() || t.configured.AdminPasswordFile != "" || t.configured.AdminPasswordEnv != ""
}

// credentials are those of the flags, else those of the configuration, else a person types the password. They are wiped at
// the end.
func (l *nethsmAdministrator) credentials(ctx context.Context, t *nethsmTarget) (nethsm.Credentials, error) {
	username := l.username
	var password []byte
	var err error
	if !l.password.given() && (username == "" || username == t.configured.AdminUsername) {
		password, err = t.configuredSecret(t.configured.AdminPasswordFile, t.configured.AdminPasswordEnv)
		if password != nil {
			username = t.configured.AdminUsername
		}
	}
	if username == "" {
		username = "admin"
	}
	if err == nil && password == nil {
		password, err = t.app.secret(ctx, &l.password)
	}
	if err != nil {
		return nethsm.Credentials{}, err
	}
	t.app.wipeAtEnd(password)
	return nethsm.Credentials{Username: username, Password: password}, nil
}

// logIn returns a view of the client with these credentials, when they were found to be right. A wrong password takes
// more than a minute to tell from a NetHSM that lost its database; meanwhile the log says what is waited for.
func (a *app) logIn(ctx context.Context, client *nethsm.Client, login nethsm.Credentials) (*nethsm.Client, error) {
	view := client.As(login)
	return view, view.LogIn(ctx)
}

// wipeAtEnd overwrites a secret when the command ends.
func (a *app) wipeAtEnd(secret []byte) {
	a.onClose(func() error {
		clear(secret)
		return nil
	})
}
