package config

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// clustered is a configuration with a store and a cluster, which has these lines besides its nodes, key and store. Its first
// line of its own is the 14th of the file.
func clustered(lines string) string {
	return minimal("store \"here\" {\n  type = \"file\"\n  dir = \"m\"\n}\ncluster \"prod\" {\n  nodes = [\"https://v:8200\"]\n  key = \"prod\"\n  store = \"here\"\n" +
		"  ca_cert_file = \"ca.pem\"\n" + lines + "}\n")
}

func TestAClusterIsRefusedWhereItsSharesCouldGoAstray(t *testing.T) {
	for name, test := range map[string]struct {
		lines, replace, with string
		want                 string
	}{
		"no node":                   {replace: `"https://v:8200"`, with: ``, want: ":10:11: cluster \"prod\": nodes lists the addresses of the nodes themselves"},
		"an address that is no URL": {replace: `https://v:8200`, with: `v:8200`, want: ":10:11: cluster \"prod\": the address of node 1 is no URL; write https://host:8200"},
		"a path in an address":      {replace: `https://v:8200`, with: `https://v:8200/v1`, want: ":10:11: cluster \"prod\": the address of node 1 has more than host and port"},
		"a password in an address":  {replace: `https://v:8200`, with: `https://u:648219@v:8200`, want: ":10:11: cluster \"prod\": the address of node 1 holds a user or a password"},
		"a node twice":              {replace: `"https://v:8200"`, with: `"https://v:8200", "https://v:8200"`, want: ":10:11: cluster \"prod\": node https://v:8200 is there twice"},
		"a node twice, spelt apart": {replace: `"https://v:8200"`, with: `"https://v:8200", "HTTPS://V:8200/"`, want: ":10:11: cluster \"prod\": node HTTPS://V:8200/ is there twice"},
		"no CA in capital letters":  {replace: "[\"https://v:8200\"]\n  key = \"prod\"\n  store = \"here\"\n  ca_cert_file = \"ca.pem\"", with: "[\"HTTPS://v:8200\"]\n  key = \"prod\"\n  store = \"here\"", want: ":9:1: cluster \"prod\": nothing says how to know a node"},
		"a node of two clusters": {
			lines: "}\ncluster \"test\" {\n  nodes = [\"https://v:8200/\"]\n  key = \"prod\"\n  store = \"here\"\n  ca_cert_file = \"ca.pem\"\n",
			want:  ":16:11: cluster \"test\": node https://v:8200/ is one of cluster \"prod\"",
		},
		"plain http to another host":  {replace: `https://v:8200`, with: `http://v:8200`, lines: "  plain_http = true\n", want: ":10:11: cluster \"prod\": the address of node 1 would send the shares in the clear"},
		"plain http without a word":   {replace: `https://v:8200`, with: `http://127.0.0.1:8200`, want: ":10:11: cluster \"prod\": the address of node 1 is plain http"},
		"trust that says nothing":     {replace: `https://v:8200`, with: `http://127.0.0.1:8200`, lines: "  plain_http = true\n", want: ":14:16: cluster \"prod\": the nodes speak plain http"},
		"nothing to know a node by":   {replace: `  ca_cert_file = "ca.pem"`, with: ``, want: ":9:1: cluster \"prod\": nothing says how to know a node"},
		"a store that is not there":   {replace: `store = "here"`, with: `store = "there"`, want: ":12:11: cluster \"prod\": there is no store \"there\" in this file"},
		"no store":                    {replace: `store = "here"`, with: `store = ""`, want: ":12:11: cluster \"prod\": store is empty"},
		"a store that is not named":   {replace: `  store = "here"`, with: ``, want: ":9:16: Missing required argument"},
		"neither key nor spread":      {replace: `  key = "prod"`, with: ``, want: ":9:1: cluster \"prod\": one of key and spread says"},
		"both key and spread":         {lines: "  spread = \"2 of a, b\"\n", want: ":11:9: cluster \"prod\": one of key and spread says"},
		"a spread that is none":       {replace: `key = "prod"`, with: `spread = "office, bunker"`, want: ":11:12: cluster \"prod\": spread is not of the form"},
		"no share":                    {lines: "  shares = 0\n  threshold = 1\n", want: ":14:12: cluster \"prod\": shares is not between 1 and 255"},
		"too many shares":             {lines: "  shares = 256\n  threshold = 3\n", want: ":14:12: cluster \"prod\": shares is not between 1 and 255"},
		"shares without a threshold":  {lines: "  recovery_shares = 5\n", want: ":14:21: cluster \"prod\": recovery_shares and recovery_threshold belong together"},
		"a threshold above":           {lines: "  shares = 3\n  threshold = 5\n", want: ":15:15: cluster \"prod\": threshold asks for 5 shares, and there are 3"},
		"copies of one share":         {lines: "  shares = 3\n  threshold = 1\n", want: ":15:15: cluster \"prod\": threshold = 1 makes copies of one share"},
		"a root token that is none":   {lines: "  root_token = \"throw\"\n", want: ":14:16: cluster \"prod\": root_token \"throw\" is not known; it is one of discard, keep, pgp"},
		"a root token for nobody":     {lines: "  root_token = \"pgp\"\n", want: ":14:16: cluster \"prod\": the root token is encrypted to nobody"},
		"a key that nothing is for":   {lines: "  root_pgp_key_file = \"alice.asc\"\n", want: ":14:23: cluster \"prod\": root_pgp_key_file is for root_token = \"pgp\""},
		"a person twice":              {lines: "  person \"alice\" {\n    pgp_key_file = \"alice.asc\"\n  }\n  person \"alice\" {\n    pgp_key_file = \"alice.asc\"\n  }\n", want: ":17:3: cluster \"prod\": person \"alice\" is there twice"},
		"a person without a name":     {lines: "  person {\n    pgp_key_file = \"alice.asc\"\n  }\n", want: ":14:10: Missing name for person"},
		"a person whose name is none": {lines: "  person \"a/b\" {\n    pgp_key_file = \"alice.asc\"\n  }\n", want: ":14:10: cluster \"prod\": person \"a/b\": the name is not one"},
		"a person without a key":      {lines: "  person \"alice\" {\n  }\n", want: ":14:18: Missing required argument"},
		"a key that is not there":     {lines: "  person \"alice\" {\n    pgp_key_file = \"nobody.asc\"\n  }\n", want: ":15:20: cluster \"prod\": person \"alice\": pgp_key_file: reading /"},
		"something else of a person":  {lines: "  person \"alice\" {\n    pgp_key_file = \"alice.asc\"\n    keybase = \"a\"\n  }\n", want: ":16:5: cluster \"prod\": person \"alice\": keybase is not known"},
		"a timeout without a unit":    {lines: "  timeout = \"10\"\n", want: ":14:13: cluster \"prod\": timeout is not a duration"},
		"a misspelt attribute":        {lines: "  treshold = 3\n", want: ":14:3: cluster \"prod\": treshold is not known; did you mean threshold?"},
	} {
		t.Run(name, func(t *testing.T) {
			source := clustered(test.lines)
			if test.replace != "" {
				source = strings.Replace(source, test.replace, test.with, 1)
			}
			refusedWith(t, source, test.want)
		})
	}
}

func TestRunAndAuditAreRefusedWhereTheyCannotBeMeant(t *testing.T) {
	for name, test := range map[string]struct{ source, want string }{
		"an address without a port":      {"run {\n  listen = \"127.0.0.1\"\n}\n", ":6:12: run: listen is not host and port"},
		"an open address without TLS":    {"run {\n  listen = \":9108\"\n}\n", ":6:12: run: listen is an address that others can reach"},
		"a certificate without a key":    {"run {\n  tls_cert_file = \"run.pem\"\n}\n", ":6:19: run: tls_cert_file and tls_key_file belong together"},
		"a key without a certificate":    {"run {\n  tls_key_file = \"run.key\"\n}\n", ":5:1: run: tls_cert_file and tls_key_file belong together"},
		"an interval that hammers":       {"run {\n  interval = \"10ms\"\n}\n", ":6:14: run: interval is not between 1s and 1h0m0s"},
		"an interval of days":            {"run {\n  interval = \"48h\"\n}\n", ":6:14: run: interval is not between 1s and 1h0m0s"},
		"run twice":                      {"run {\n}\nrun {\n}\n", ":7:1: run is there twice; keep one"},
		"a sink that is none":            {"audit \"printer\" {\n}\n", ":5:1: audit \"printer\" is not known; it is one of file, journal and syslog"},
		"a sink without a kind":          {"audit {\n}\n", ":5:7: Missing kind for audit"},
		"a file without a path":          {"audit \"file\" {\n}\n", ":5:14: Missing required argument"},
		"a file with an empty path":      {"audit \"file\" {\n  path = \"\"\n}\n", ":6:10: audit \"file\": path is empty"},
		"one file twice":                 {"audit \"file\" {\n  path = \"a\"\n}\naudit \"file\" {\n  path = \"./a\"\n}\n", ":8:1: audit \"file\" is there twice for the same place"},
		"a syslog server that is none":   {"audit \"syslog\" {\n  address = \"http://h:514\"\n}\n", ":6:13: audit \"syslog\": address is no syslog server"},
		"a syslog server without a port": {"audit \"syslog\" {\n  address = \"udp://h\"\n}\n", ":6:13: audit \"syslog\": address is no syslog server"},
		"a server elsewhere alone":       {"audit \"syslog\" {\n  address = \"udp://h:514\"\n}\n", ":5:1: audit \"syslog\": nobody could say whether a server elsewhere took a line"},
		"a journal with a path":          {"audit \"journal\" {\n  path = \"a\"\n}\n", ":6:3: audit \"journal\": path is not known"},
	} {
		t.Run(name, func(t *testing.T) { refusedWith(t, minimal(test.source), test.want) })
	}
}

// refusedWith wants exactly one complaint, which begins so.
func refusedWith(t *testing.T, source, want string) {
	t.Helper()
	path := write(t, source)
	_, err := Load(path)
	var refused *Error
	if !errors.As(err, &refused) || !errors.Is(err, ErrInvalid) {
		t.Fatalf("Load answers %v, want an *Error that is ErrInvalid", err)
	}
	if len(refused.Complaints) != 1 || !strings.HasPrefix(strings.TrimPrefix(refused.Complaints[0].String(), path), want) {
		t.Errorf("Load answers\n%v\nwant one complaint\n%s", err, want)
	}
	if strings.Contains(err.Error(), "648219") {
		t.Errorf("the secret is repeated: %v", err)
	}
}

func TestActsMayBeWrittenToSeveralFiles(t *testing.T) {
	path := write(t, minimal("audit \"file\" {\n  path = \"/a\"\n}\naudit \"file\" {\n  path = \"/b\"\n}\naudit \"syslog\" {\n  address = \"tcp://h:601\"\n}\n"))
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Audit{{Kind: AuditFile, Path: "/a"}, {Kind: AuditFile, Path: "/b"}, {Kind: AuditSyslog, Address: "tcp://h:601"}}, got.Audits); diff != "" {
		t.Errorf("read (-want +got):\n%s", diff)
	}
	if got.Run.Listen != DefaultListen || got.Run.Secure() {
		t.Errorf("without a block run it is %+v", got.Run)
	}
}

func TestACredentialIsNoPath(t *testing.T) {
	path := write(t, minimal("secrets_dir = \"/etc/nitroseal/secrets\"\n"+
		"device \"one\" {\n  type = \"pkcs11\"\n  slot = 1\n  pin_file = \"credential:pin\"\n}\n"+
		"run {\n  listen = \"\"\n}\n"))
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.Devices[0].PINFile != "credential:pin" || got.Run.Listen != "" {
		t.Errorf("read %+v, %+v", got.Devices[0], got.Run)
	}
}
