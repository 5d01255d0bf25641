package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	"vault-plugin-secrets-nitrokey/backend"
	"vault-plugin-secrets-nitrokey/internal/kmsplugin"
)

// notServed is a serve that must not be reached.
func notServed(t *testing.T) func(role, *api.PluginAPIClientMeta, arguments) error {
	t.Helper()
	return func(role, *api.PluginAPIClientMeta, arguments) error {
		t.Error("the plugin is served")
		return nil
	}
}

func TestServingThatFailsIsToldAndEndsWithOne(t *testing.T) {
	t.Setenv(plugin.HandshakeConfig.MagicCookieKey, plugin.HandshakeConfig.MagicCookieValue)
	for name, test := range map[string]struct {
		err  error
		code int
		says string
	}{
		"an error":         {errors.New("no socket could be made"), 1, "serving the plugin: no socket could be made\n"},
		"the ordinary end": {nil, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			var served arguments
			serve := func(_ role, _ *api.PluginAPIClientMeta, given arguments) error {
				served = given
				return test.err
			}
			code := run([]string{"-state-dir=/s"}, &stdout, &stderr, serve)
			if code != test.code || stderr.String() != test.says || stdout.Len() > 0 {
				t.Errorf("exit %d, stderr %q, stdout %q; want %d and %q: stdout belongs to the handshake", code, stderr.String(), stdout.String(),
					test.code, test.says)
			}
			if served.stateDir != "/s" {
				t.Errorf("it was served with %+v", served)
			}
		})
	}
}

func TestTheCookieSaysWhatTheHostWants(t *testing.T) {
	engine, seal := plugin.HandshakeConfig, kmsplugin.Handshake
	for name, test := range map[string]struct {
		engine, seal string
		want         role
	}{
		"a secrets engine": {engine.MagicCookieValue, "", roleEngine},
		"a seal":           {"", seal.MagicCookieValue, roleSeal},
		"a seal of an OpenBao that has the other too":  {engine.MagicCookieValue, seal.MagicCookieValue, roleSeal},
		"a secrets engine beside a stranger's cookie":  {engine.MagicCookieValue, "1", roleEngine},
		"another value is none, nor is a person's own": {"yes", "yes", roleNone},
		"a person": {"", "", roleNone},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(engine.MagicCookieKey, test.engine)
			t.Setenv(seal.MagicCookieKey, test.seal)
			var got role
			serve := func(as role, _ *api.PluginAPIClientMeta, _ arguments) error {
				got = as
				return nil
			}
			if code := run(nil, io.Discard, io.Discard, serve); got != test.want || (code == 0) != (test.want != roleNone) {
				t.Errorf("served as %q with exit code %d; want %q", got, code, test.want)
			}
		})
	}
}

func TestVersionIsPrinted(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run([]string{"-version"}, &stdout, &stderr, notServed(t)); code != 0 || stdout.String() != backend.Version+"\n" || stderr.Len() > 0 {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout.String(), stderr.String())
	}
}

func TestStartedByHandItExplainsHowToRegisterThisVeryFile(t *testing.T) {
	t.Setenv(plugin.HandshakeConfig.MagicCookieKey, "")
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(content)
	var stdout, stderr bytes.Buffer
	if code := run(nil, &stdout, &stderr, notServed(t)); code != 1 {
		t.Errorf("exit %d, want 1: a script must notice that nothing is served", code)
	}
	for _, part := range []string{
		"vault plugin register -sha256=" + hex.EncodeToString(sum[:]), "-version=" + backend.Version, "-args=-pkcs11-module=", "-args=-state-dir=",
		"secret vault-plugin-secrets-nitrokey", "vault secrets enable -path=nitrokey",
	} {
		if !strings.Contains(stderr.String(), part) {
			t.Errorf("the explanation lacks %q:\n%s", part, stderr.String())
		}
	}
}

func TestHelpNamesEveryArgument(t *testing.T) {
	var stdout, stderr bytes.Buffer
	if code := run([]string{"-help"}, &stdout, &stderr, notServed(t)); code != 0 {
		t.Errorf("exit %d", code)
	}
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	if _, err := parse(flags, nil, io.Discard); err != nil {
		t.Fatal(err)
	}
	flags.VisitAll(func(f *flag.Flag) {
		if !strings.Contains(stderr.String(), "  -"+f.Name) {
			t.Errorf("the help does not name -%s", f.Name)
		}
	})
}

func TestArgumentsAreRead(t *testing.T) {
	got, err := parse(flag.NewFlagSet("", flag.ContinueOnError), []string{
		"-pkcs11-module=/a.so", "-pkcs11-module=/b.so", "-secrets-dir=/s", "-state-dir=/t", "-module-env=A", "-module-env=B",
		"-module-host=/h", "-module-host-sha256=00", "-nethsm-url=https://a:8443", "-nethsm-url=https://b", "-mlock",
	}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	want := arguments{
		modules: list{"/a.so", "/b.so"}, secretsDir: "/s", stateDir: "/t", moduleEnv: list{"A", "B"}, moduleHost: "/h", moduleHostSHA256: "00",
		netHSMs: list{"https://a:8443", "https://b"}, mlock: true,
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(arguments{})); diff != "" {
		t.Errorf("arguments (-want +got):\n%s", diff)
	}
}

func TestWrongArgumentsAreExplained(t *testing.T) {
	for name, test := range map[string]struct {
		args []string
		says string
	}{
		"one that is unknown":             {[]string{"-pin=123456"}, "not defined: -pin"},
		"one that is no flag":             {[]string{"serve"}, `unknown argument "serve"`},
		"a module by bare name":           {[]string{"-pkcs11-module=opensc-pkcs11.so"}, "not an absolute path"},
		"a NetHSM by bare name":           {[]string{"-nethsm-url=nethsm.example"}, "write https://"},
		"a NetHSM beyond TLS":             {[]string{"-nethsm-url=http://nethsm.example"}, "in the clear"},
		"an empty module":                 {[]string{"-pkcs11-module="}, "empty"},
		"a relative directory":            {[]string{"-state-dir=state"}, "not an absolute path"},
		"a variable with its value":       {[]string{"-module-env=A=b"}, "names a variable"},
		"a module host without its hash":  {[]string{"-module-host=/h"}, "belong together"},
		"a hash without its module host":  {[]string{"-module-host-sha256=00"}, "belong together"},
		"a relative directory of secrets": {[]string{"-secrets-dir=../s"}, "not an absolute path"},
	} {
		t.Run(name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if code := run(slices.Clone(test.args), &stdout, &stderr, notServed(t)); code != 2 || !strings.Contains(stderr.String(), test.says) {
				t.Errorf("exit %d, stderr %q; want 2 and %q", code, stderr.String(), test.says)
			}
		})
	}
}
