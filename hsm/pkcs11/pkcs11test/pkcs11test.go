// Package pkcs11test makes throw-away PKCS#11 tokens for tests.
//
// [SoftHSM] is a token in a directory of the test's own, [Card] a module of ours over it that behaves as a smart card
// does under OpenSC and whose faults are switched while the test runs, [Unpluggable] a token that can be taken away and
// given back, [Spied] a token whose module counts every call. Each is found by the environment variables in [Token.Env],
// which the test's own process has from t.Setenv on; a module host must be given those names.
//
// What is missing on the machine fails the test and names the package to install. Nothing is skipped: a suite that
// passes because nothing was there proves nothing.
package pkcs11test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Some distributions give users a umask of 002. Then a test's directories are writable by a group, and modules and state
// directories in them are refused, as they should be.
var _ = syscall.Umask(0o022)

// Token is a throw-away token.
type Token struct {
	// Module is the path of the module to load.
	Module string
	// Label is the token's label as it was given at initialisation, Serial its serial number.
	Label, Serial string
	// PIN is the user PIN, SOPIN the security officer's.
	PIN, SOPIN string
	// Env names the environment variables that a process needs to see the token.
	Env []string

	conf string // SoftHSM's configuration file
	lib  string // SoftHSM itself
}

const (
	defaultPIN = "648219"
	// defaultSOPIN has the form that a SmartCard-HSM wants: 16 hexadecimal digits.
	defaultSOPIN = "3537363231383830"
	defaultLabel = "throw-away"
)

// toolPatience bounds a run of a command: key generation on a busy machine included.
const toolPatience = 2 * time.Minute

// SoftHSM makes a token in a directory that vanishes with the test.
func SoftHSM(t testing.TB) *Token {
	t.Helper()
	dir := t.TempDir()
	tokens := filepath.Join(dir, "tokens")
	if err := os.Mkdir(tokens, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "softhsm2.conf")
	content := "directories.tokendir = " + tokens + "\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n"
	if err := os.WriteFile(conf, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", conf)
	t.Setenv("GORACE", "atexit_sleep_ms=20") // a module host with the race detector would end a second late, and who waits for it
	token := &Token{
		lib: softhsmModule(t), conf: conf, Env: []string{"SOFTHSM2_CONF", "GORACE"}, PIN: defaultPIN, SOPIN: defaultSOPIN,
	}
	token.Module = token.lib
	return token.Add(t, defaultLabel)
}

// softhsmModule is the path of SoftHSM: $SOFTHSM2_MODULE, or where a distribution puts it.
func softhsmModule(t testing.TB) string {
	t.Helper()
	candidates := []string{
		os.Getenv("SOFTHSM2_MODULE"),
		"/usr/lib/softhsm/libsofthsm2.so",                      // Debian, Ubuntu, Alpine
		"/usr/lib64/pkcs11/libsofthsm2.so",                     // Fedora, RHEL
		"/usr/lib/pkcs11/libsofthsm2.so",                       // Arch
		"/usr/lib64/softhsm/libsofthsm2.so",                    // openSUSE
		"/usr/local/lib/softhsm/libsofthsm2.so",                // from source
		"/opt/homebrew/opt/softhsm/lib/softhsm/libsofthsm2.so", // Homebrew
	}
	return firstFile(t, "SoftHSM (apt-get install softhsm2 opensc, or name libsofthsm2.so in $SOFTHSM2_MODULE)", candidates)
}

// firstFile returns the first path that leads to a file.
func firstFile(t testing.TB, what string, candidates []string) string {
	t.Helper()
	for _, path := range candidates {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path
		}
	}
	t.Fatalf("this test needs %s; none of %q is there", what, candidates)
	return ""
}

// libraryDirs are where distributions put PKCS#11 modules.
func libraryDirs(names ...string) []string {
	var paths []string
	for _, dir := range []string{
		"/usr/lib/x86_64-linux-gnu/", "/usr/lib/aarch64-linux-gnu/", "/usr/lib64/", "/usr/lib/",
		"/usr/lib/x86_64-linux-gnu/pkcs11/", "/usr/lib/aarch64-linux-gnu/pkcs11/", "/usr/lib64/pkcs11/", "/usr/lib/pkcs11/",
	} {
		for _, name := range names {
			paths = append(paths, dir+name)
		}
	}
	return paths
}

// Add initialises one more token beside this one, under the same module and PINs. The label may be taken.
func (k *Token) Add(t testing.TB, label string) *Token {
	t.Helper()
	before := k.serials(t)
	run(t, k.environment(), "softhsm2-util", "--module", k.lib, "--init-token", "--free", "--label", label,
		"--pin", k.PIN, "--so-pin", k.SOPIN)
	added := *k
	added.Label = label
	for serial := range k.serials(t) {
		if !before[serial] {
			added.Serial = serial
		}
	}
	if added.Serial == "" {
		t.Fatal("softhsm2-util made a token and shows no new serial number")
	}
	return &added
}

var (
	slotLine   = regexp.MustCompile(`(?m)^Slot (\d+)\s*$`)
	serialLine = regexp.MustCompile(`(?m)^\s*Serial number:\s*(\S*)\s*$`)
)

// serials returns the serial numbers of the initialised tokens.
func (k *Token) serials(t testing.TB) map[string]bool {
	t.Helper()
	shown := run(t, k.environment(), "softhsm2-util", "--module", k.lib, "--show-slots")
	serials := map[string]bool{}
	for _, match := range serialLine.FindAllStringSubmatch(shown, -1) {
		if match[1] != "" {
			serials[match[1]] = true
		}
	}
	return serials
}

// Slot returns the slot that the token is in now.
func (k *Token) Slot(t testing.TB) uint {
	t.Helper()
	shown := run(t, k.environment(), "softhsm2-util", "--module", k.lib, "--show-slots")
	starts := slotLine.FindAllStringSubmatchIndex(shown, -1)
	for i, start := range starts {
		end := len(shown)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		match := serialLine.FindStringSubmatch(shown[start[0]:end])
		if match == nil || match[1] != k.Serial {
			continue
		}
		slot, err := strconv.ParseUint(shown[start[2]:start[3]], 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		return uint(slot)
	}
	t.Fatalf("softhsm2-util shows no token %q:\n%s", k.Serial, shown)
	return 0
}

// GenerateKey makes a key pair with pkcs11-tool, as an operator would. kind is rsa:2048 or EC:prime256v1 for example.
// Such a key can decrypt, sign and unwrap.
func (k *Token) GenerateKey(t testing.TB, kind, label, id string) {
	t.Helper()
	k.Tool(t, "--keypairgen", "--key-type", kind, "--label", label, "--id", id)
}

// WriteObject makes a private data object with pkcs11-tool.
func (k *Token) WriteObject(t testing.TB, application, label string, value []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(file, value, 0o600); err != nil {
		t.Fatal(err)
	}
	k.Tool(t, "--write-object", file, "--type", "data", "--private",
		"--application-label", application, "--label", label)
}

// WriteForeignObject makes a public data object without an application with pkcs11-tool, as other programs leave them. The
// label may be taken.
func (k *Token) WriteForeignObject(t testing.TB, label string, value []byte) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(file, value, 0o600); err != nil {
		t.Fatal(err)
	}
	k.Tool(t, "--write-object", file, "--type", "data", "--label", label)
}

// Tool runs pkcs11-tool on the token in a process of its own, straight on SoftHSM, logged in. It returns what the tool
// prints.
func (k *Token) Tool(t testing.TB, args ...string) string {
	t.Helper()
	return k.tool(t, k.lib, args)
}

// ToolThrough is Tool through the token's own module.
func (k *Token) ToolThrough(t testing.TB, args ...string) string {
	t.Helper()
	return k.tool(t, k.Module, args)
}

func (k *Token) tool(t testing.TB, module string, args []string) string {
	t.Helper()
	// By slot, because another token may have the same label.
	slot := strconv.FormatUint(uint64(k.Slot(t)), 10)
	whole := append([]string{"--module", module, "--slot", slot, "--login", "--pin", k.PIN}, args...)
	return run(t, k.environment(), "pkcs11-tool", whole...)
}

// environment is this process's, with the token's own configuration: another token of the same test may have set its own.
func (k *Token) environment() []string {
	return append(os.Environ(), "SOFTHSM2_CONF="+k.conf)
}

// untilPatience bounds [Until].
const untilPatience = 30 * time.Second

// Until waits until something is so, and fails the test where it does not come to be.
func Until(t testing.TB, what string, so func() bool) {
	t.Helper()
	late := time.NewTimer(untilPatience)
	defer late.Stop()
	again := time.NewTicker(2 * time.Millisecond)
	defer again.Stop()
	for !so() {
		select {
		case <-again.C:
		case <-late.C:
			t.Fatalf("waited %v in vain until %s", untilPatience, what)
		}
	}
}

// run runs a command to its end and returns its output; a failure is the test's.
func run(t testing.TB, env []string, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("this test needs %s: apt-get install softhsm2 opensc p11-kit gcc: %v", name, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), toolPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out.String())
	}
	return out.String()
}
