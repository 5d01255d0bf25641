package main

import (
	"cmp"
	"fmt"
	"path/filepath"
	"strings"
)

// setupDevice is how the NetHSM is used from now on: what to write into nitroseal.hcl, and what to tell Vault. There is no
// secret in it, only where one lies.
type setupDevice struct {
	HCL string `json:"nitroseal_hcl"`
	// Registration are the arguments that the plugin has to be registered with: it sends no file to a NetHSM that those do
	// not name.
	Registration []string `json:"vault_plugin_arguments"`
	Vault        []string `json:"vault_commands"`
}

// device describes what was set up.
func (v *setupVerb) device() *setupDevice {
	name := cmp.Or(v.name, v.target.device, "nethsm")
	username := v.operator
	if v.namespace != "" {
		username = v.namespace + "~" + v.operator
	}
	urls, pins := v.target.all, v.pins()

	hcl := []string{
		fmt.Sprintf("device %q {", name),
		`  type = "nethsm"`,
		"  urls = " + hclList(urls),
		fmt.Sprintf("  username = %q", username),
	}
	vault := []string{
		"vault write nitrokey/devices/" + name, "type=nethsm", "urls=" + shellWord(strings.Join(urls, ",")), "username=" + shellWord(username),
	}
	switch {
	case v.operatorPassword.env != "":
		hcl = append(hcl, fmt.Sprintf("  password_env = %q", v.operatorPassword.env))
	default:
		hcl = append(hcl, fmt.Sprintf("  password_file = %q%s", v.passwordFile(name), v.passwordHint()))
	}
	vault = append(vault, "password_file="+shellWord(v.passwordFile(name)))
	caCert := absolute(v.target.caCertFile)
	switch {
	case caCert != "":
		hcl = append(hcl, fmt.Sprintf("  ca_cert_file = %q", caCert))
		vault = append(vault, "ca_cert="+shellWord("@"+caCert))
	case v.target.configured.CACert != "":
		hcl = append(hcl, "  # ca_cert_file as it is")
		vault = append(vault, "ca_cert=@CA.pem")
	}
	if pins != nil {
		hcl = append(hcl, "  tls_pins = "+hclList(pins))
		vault = append(vault, "tls_pins="+strings.Join(pins, ","))
	}
	if serverName := cmp.Or(v.target.serverName, v.target.configured.TLSServerName); serverName != "" {
		hcl = append(hcl, fmt.Sprintf("  tls_server_name = %q", serverName))
		vault = append(vault, "tls_server_name="+shellWord(serverName))
	}
	if v.target.insecure || v.target.configured.Insecure {
		hcl = append(hcl, "  tls_insecure = true # whoever sits in between reads the password: give a CA or pins instead")
		vault = append(vault, "tls_insecure=true")
	}
	hcl = append(hcl, "  key_tags = "+hclList([]string{v.tag}), "}")
	vault = append(vault, "key_tags="+shellWord(v.tag))
	registration := []string{"-args=-secrets-dir=" + shellWord(filepath.Dir(v.passwordFile(name)))}
	for _, url := range urls {
		registration = append(registration, "-args=-nethsm-url="+shellWord(url))
	}
	return &setupDevice{
		HCL:          strings.Join(hcl, "\n") + "\n",
		Registration: registration,
		Vault: []string{
			strings.Join(vault, " "),
			fmt.Sprintf("vault write nitrokey/keys/%s device=%s key_id=%s", v.key.ID, name, v.key.ID),
		},
	}
}

// pins are those that were given, in the configuration or by a person's word.
func (v *setupVerb) pins() []string {
	switch {
	case v.target.pins != nil:
		return v.target.pins
	case v.target.trusted != nil:
		return v.target.trusted
	default:
		return v.target.configured.TLSPins
	}
}

// passwordFile is where the operator's password lies, or should.
func (v *setupVerb) passwordFile(name string) string {
	if file := v.operatorPassword.file; file != "" && file != "-" {
		return absolute(file)
	}
	return cmp.Or(v.target.configured.PasswordFile, "/etc/nitroseal/secrets/"+name)
}

func (v *setupVerb) passwordHint() string {
	if file := v.operatorPassword.file; file != "" && file != "-" || v.target.configured.PasswordFile != "" {
		return ""
	}
	return " # write the operator's password there"
}

// rows prints the device for people to copy.
func (d *setupDevice) rows(t *table) {
	t.row("")
	t.row("For nitroseal.hcl:")
	for line := range strings.Lines(d.HCL) {
		t.row("  " + strings.TrimSuffix(line, "\n"))
	}
	t.row("")
	t.row("For Vault, where the plugin is registered with these arguments: it reads files of that folder, and sends them to")
	t.row("these NetHSMs alone:")
	t.row("  " + strings.Join(d.Registration, " "))
	t.row("Then:")
	for _, command := range d.Vault {
		t.row("  " + command)
	}
}

func hclList(items []string) string {
	quoted := make([]string, len(items))
	for i, item := range items {
		quoted[i] = fmt.Sprintf("%q", item)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// shellWord quotes what a shell would not leave as it is.
func shellWord(text string) string {
	plain := func(r rune) bool {
		return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("@%+=:,./_-", r)
	}
	if text != "" && strings.IndexFunc(text, func(r rune) bool { return !plain(r) }) < 0 {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

func absolute(path string) string {
	if path == "" {
		return ""
	}
	if full, err := filepath.Abs(path); err == nil {
		return full
	}
	return path
}
