package config

import (
	"fmt"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// top is the file as a whole.
type top struct {
	StateDir   string       `hcl:"state_dir,optional"`
	SecretsDir string       `hcl:"secrets_dir,optional"`
	PKCS11     []single     `hcl:"pkcs11,block"`
	Devices    []typed      `hcl:"device,block"`
	Stores     []typed      `hcl:"store,block"`
	Vault      []single     `hcl:"vault,block"`
	Clusters   []typed      `hcl:"cluster,block"`
	Run        []single     `hcl:"run,block"`
	Serve      []single     `hcl:"serve,block"`
	Audits     []auditBlock `hcl:"audit,block"`
}

// The blocks are taken out of the file by their syntax, so that each can be read with complaints of its own; these
// types only tell that they may be there.
type (
	typed struct {
		Name string   `hcl:"name,label"`
		Rest hcl.Body `hcl:",remain"`
	}
	single struct {
		Rest hcl.Body `hcl:",remain"`
	}
	auditBlock struct {
		Kind string   `hcl:"kind,label"`
		Rest hcl.Body `hcl:",remain"`
	}
)

// read reads the whole file.
func (r *reader) read(body *hclsyntax.Body) *Config {
	config := &Config{Path: r.path, Run: Run{Listen: DefaultListen}}
	file := &block{reader: r, what: "the file", body: body, at: hcl.Range{Start: hcl.InitialPos}, good: true}
	var whole top
	file.decode(&whole)
	if whole.StateDir == "" && (file.good || body.Attributes["state_dir"] == nil) {
		file.wrong("state_dir", `state_dir is missing; name a folder that only this user may write, "/var/lib/nitroseal" for example`)
	}
	config.StateDir = file.resolve(whole.StateDir)
	if config.SecretsDir = file.resolve(whole.SecretsDir); config.SecretsDir == "" {
		config.SecretsDir = "/"
	}
	blocks := r.blocks(body)
	for _, b := range blocks { // first, because devices refer to it
		if b.kindOf == "pkcs11" {
			config.PKCS11 = b.pkcs11()
		}
	}
	var sinks *block // the last one of the audit log
	for _, b := range blocks {
		switch b.kindOf {
		case "device":
			if d := b.device(config.PKCS11); !b.again {
				config.Devices = append(config.Devices, d)
			}
		case "store":
			if s := b.store(); !b.again {
				config.Stores = append(config.Stores, s)
			}
		case "vault":
			config.Vault = b.vault()
		case "cluster":
			if c := b.cluster(); !b.again {
				config.Clusters = append(config.Clusters, c)
			}
		case "run":
			config.Run = b.run()
		case "serve":
			config.Serve = b.serve()
		case "audit":
			a := b.audit()
			if slices.ContainsFunc(config.Audits, func(other Audit) bool { return other.where() == a.where() }) {
				b.complain(b.at, "%s is there twice for the same place; keep one", b.what)
			}
			config.Audits = append(config.Audits, a)
			sinks = b
		}
	}
	if sinks != nil && sinks.good && !slices.ContainsFunc(config.Audits, func(a Audit) bool { return !a.elsewhere() }) {
		sinks.complain(sinks.at, "%s: nobody could say whether a server elsewhere took a line, and an act needs a sink that did; add audit %q or %q",
			sinks.what, AuditFile, AuditJournal)
	}
	r.checkReferences(config, body)
	return config
}

// labelled are the blocks that have a label.
var labelled = []string{"device", "store", "cluster", "audit"}

// blocks returns the blocks of the file whose labels are right; about those of others HCL complained.
func (r *reader) blocks(body *hclsyntax.Body) []*block {
	var all []*block
	seen := map[string]bool{}
	for _, nested := range body.Blocks {
		labels := 0
		if slices.Contains(labelled, nested.Type) {
			labels = 1
		}
		if len(nested.Labels) != labels {
			continue
		}
		b := &block{reader: r, kindOf: nested.Type, what: nested.Type, body: nested.Body, at: nested.DefRange(), good: true}
		if labels == 1 {
			b.label = nested.Labels[0]
			b.what = fmt.Sprintf("%s %q", nested.Type, b.label)
			b.checkName(nested.LabelRanges[0])
		}
		if b.again = seen[b.what] && b.kindOf != "audit"; b.again { // acts may be written to several files
			b.complain(b.at, "%s is there twice; keep one", b.what)
		}
		seen[b.what] = true
		all = append(all, b)
	}
	return all
}

// kind takes the attribute "type" out of a block and returns it, empty where there is none that is known.
func (b *block) kind(known ...string) string {
	var head struct {
		Type string   `hcl:"type,optional"`
		Rest hcl.Body `hcl:",remain"`
	}
	attribute, given := b.body.Attributes["type"]
	if !given {
		b.refuse(b.at, "%s: type is missing; write type = %q, or %s", b.what, known[0], strings.Join(known[1:], " or "))
		return ""
	}
	alone := &hclsyntax.Body{
		Attributes: hclsyntax.Attributes{"type": attribute}, SrcRange: b.body.SrcRange, EndRange: b.body.EndRange,
	}
	only := &block{reader: b.reader, what: b.what, body: alone, at: b.at, good: true}
	only.decode(&head)
	if only.good && !slices.Contains(known, head.Type) {
		only.wrong("type", "type %q is not known; it is one of %s", head.Type, strings.Join(known, ", "))
	}
	if !only.good {
		return ""
	}
	rest := *b.body
	rest.Attributes = hclsyntax.Attributes{}
	for name, attribute := range b.body.Attributes {
		if name != "type" {
			rest.Attributes[name] = attribute
		}
	}
	b.body = &rest
	return head.Type
}

// pkcs11Attributes are those of the block pkcs11.
type pkcs11Attributes struct {
	Modules          []string `hcl:"modules"`
	Env              []string `hcl:"env,optional"`
	ModuleHost       string   `hcl:"module_host,optional"`
	ModuleHostSHA256 string   `hcl:"module_host_sha256,optional"`
}

func (b *block) pkcs11() PKCS11 {
	var given pkcs11Attributes
	b.decode(&given)
	for _, module := range given.Modules {
		if !filepath.IsAbs(module) {
			b.wrong("modules", "module %q is not an absolute path", module)
		}
	}
	for _, name := range given.Env {
		if !IsVariable(name) {
			b.wrong("env", "env lists the names of environment variables, and one of these is none")
		}
	}
	if (given.ModuleHost == "") != (given.ModuleHostSHA256 == "") {
		b.wrong("module_host", "module_host and module_host_sha256 belong together; give both or neither")
	}
	return PKCS11{
		Modules: given.Modules, Env: given.Env, ModuleHost: b.resolve(given.ModuleHost), ModuleHostSHA256: given.ModuleHostSHA256,
	}
}

// vaultAttributes are those of the block vault.
type vaultAttributes struct {
	Address       string `hcl:"address"`
	CACertFile    string `hcl:"ca_cert_file,optional"`
	TLSServerName string `hcl:"tls_server_name,optional"`
	TokenFile     string `hcl:"token_file,optional"`
	TokenEnv      string `hcl:"token_env,optional"`
	Mount         string `hcl:"mount,optional"`
	PluginName    string `hcl:"plugin_name,optional"`
	PluginFile    string `hcl:"plugin_file,optional"`
}

func (b *block) vault() *Vault {
	var given vaultAttributes
	given.Mount, given.PluginName = "nitrokey", "vault-plugin-secrets-nitrokey"
	b.decode(&given)
	b.secret("token", given.TokenFile, given.TokenEnv)
	if trouble := vaultAddress(given.Address); b.good && trouble != "" {
		b.wrong("address", "address %s; write https://host:8200", trouble)
	}
	return &Vault{
		Address: given.Address, CACert: b.pem("ca_cert_file", given.CACertFile), TLSServerName: given.TLSServerName,
		TokenFile: b.secretFile("token_file", given.TokenFile), TokenEnv: given.TokenEnv,
		Mount: strings.Trim(given.Mount, "/"), PluginName: given.PluginName, PluginFile: b.resolve(given.PluginFile),
	}
}

// vaultAddress says what is wrong with the address of a Vault, which a token is sent to; empty for nothing.
func vaultAddress(address string) (trouble string) {
	parsed, err := url.Parse(address)
	switch {
	case err != nil || parsed.Scheme != "https" && parsed.Scheme != "http" || parsed.Hostname() == "":
		return "is no URL of a server"
	case parsed.User != nil:
		return "holds a user or a password, and Vault takes a token instead"
	case parsed.RawQuery != "" || parsed.Fragment != "":
		return "has more than host and port"
	case parsed.Scheme == "http" && !loopback(parsed.Hostname()):
		return "would send the token in the clear: http is for a loopback address only"
	}
	return ""
}

// loopback is true for this machine. A name other than localhost is not asked for in DNS: it could change.
func loopback(host string) bool {
	address := net.ParseIP(host)
	return host == "localhost" || address != nil && address.IsLoopback()
}

// checkReferences checks what one block says about another.
func (r *reader) checkReferences(config *Config, body *hclsyntax.Body) {
	for _, nested := range body.Blocks {
		if nested.Type == "serve" && len(nested.Labels) == 0 {
			r.checkServeReferences(config, nested)
		}
		if len(nested.Labels) != 1 {
			continue
		}
		switch nested.Type {
		case "store":
			r.checkStoreReferences(config, nested)
		case "cluster":
			r.checkClusterReferences(config, nested)
		}
	}
}

func (r *reader) checkStoreReferences(config *Config, nested *hclsyntax.Block) {
	store, found := config.Store(nested.Labels[0])
	if !found || store.Type != StoreObject || store.Device == "" {
		return
	}
	if _, known := config.Device(store.Device); !known {
		r.complain(nested.Body.Attributes["device"].Expr.Range(), "store %q: there is no device %q in this file", store.Name, store.Device)
	}
}
