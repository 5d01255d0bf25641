package pkcs11test

import (
	_ "embed"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// SmartCard is a token behind a module of ours that plays a SmartCard-HSM under OpenSC: three tries for a PIN of 6 to 15
// characters, a length query that costs an operation, a failed decryption that leaves its session unusable, a label
// with " (UserPIN)" after it. Its faults are switched while processes have the module loaded.
type SmartCard struct {
	Token
	control string

	mu       sync.Mutex
	commands map[string]string
	epoch    int
	deauth   int
}

// Fault is something that a card does wrong, or does in another way than the usual one. testdata/card.c describes each.
type Fault struct{ name, value string }

// The faults. A function is named as PKCS#11 does: C_Decrypt.
var (
	// FreeLengthQuery makes the length query of C_Decrypt cost nothing.
	FreeLengthQuery = Fault{"length_query", "0"}
	// NoWedge lets a session go on after a failed decryption.
	NoWedge = Fault{"wedge", "0"}
	// PlainLabel leaves " (UserPIN)" away.
	PlainLabel = Fault{"suffix", "0"}
	// RawOnly takes OAEP away: RSA is CKM_RSA_X_509 and CKM_RSA_PKCS.
	RawOnly = Fault{"mechanisms", "raw"}
	// RawNumbers makes CKM_RSA_X_509 give numbers without leading zeros.
	RawNumbers = Fault{"raw", "number"}
	// SHA1Only takes OAEP with SHA-256 away, as SoftHSM does although it announces OAEP.
	SHA1Only = Fault{"oaep", "sha1"}
	// LostWrites makes C_CreateObject say OK for objects that no other process will see.
	LostWrites = Fault{"lost_write", "1"}
	// LostAfterDeauthentication makes writes lost, instead of refused, after Deauthenticate.
	LostAfterDeauthentication = Fault{"deauth_writes", "lost"}
)

// Fails makes a function return a CKR_ code and do nothing. "C_GetFunctionList" is one.
func Fails(function string, code uint) Fault {
	return Fault{"fail." + function, "0x" + strconv.FormatUint(uint64(code), 16)}
}

// Freezes makes a function not return until the fault is mended. "card" stands for all that talk to the card;
// "C_Login_answer" for a C_Login that did its work and does not return.
func Freezes(function string) Fault { return Fault{"freeze." + function, "1"} }

// Crashes makes a function abort its process.
func Crashes(function string) Fault { return Fault{"crash." + function, "1"} }

// CrashesOnce makes the first call of a function abort its process; what other processes call later works.
func CrashesOnce(function string) Fault { return Fault{"crash_once." + function, "1"} }

// Slow makes each private-key operation take d, rounded to milliseconds.
func Slow(d time.Duration) Fault { return Fault{"delay_ms", strconv.FormatInt(d.Milliseconds(), 10)} }

// Loss is a manner of going away.
type Loss string

// The losses. What mends each is in testdata/card.c.
const (
	CardRemoved    Loss = "card"    // out of its reader
	ReaderRemoved  Loss = "reader"  // the whole stick
	DaemonRestart  Loss = "pcscd"   // pcscd was started anew
	LostInACommand Loss = "command" // in the middle of a command
)

// Card makes a token behind the card module.
func Card(t testing.TB, faults ...Fault) *SmartCard {
	t.Helper()
	token := SoftHSM(t)
	dir := t.TempDir()
	module := filepath.Join(dir, "card.so")
	if err := os.WriteFile(module, cardModule(t), 0o700); err != nil {
		t.Fatal(err)
	}
	card := &SmartCard{Token: *token, control: filepath.Join(dir, "control"), commands: map[string]string{"backing": token.lib}}
	card.Module = module
	card.Env = append(slices.Clone(token.Env), "CARD_CONTROL")
	t.Setenv("CARD_CONTROL", card.control)
	card.Fault(t, faults...)
	// A frozen call outlives its test's patience, not its test.
	t.Cleanup(func() {
		for name := range card.commands {
			if strings.HasPrefix(name, "freeze.") {
				card.Mend(t, Fault{name: name})
			}
		}
	})
	return card
}

// Fault switches faults on.
func (c *SmartCard) Fault(t testing.TB, faults ...Fault) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, fault := range faults {
		c.commands[fault.name] = fault.value
	}
	c.write(t)
}

// Mend switches faults off.
func (c *SmartCard) Mend(t testing.TB, faults ...Fault) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, fault := range faults {
		delete(c.commands, fault.name)
	}
	c.write(t)
}

// Remove takes the token away. For [DaemonRestart] and [LostInACommand] it comes back at once.
func (c *SmartCard) Remove(t testing.TB, loss Loss) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch++
	c.commands["epoch"] = strconv.Itoa(c.epoch)
	c.commands["loss"] = string(loss)
	if loss == CardRemoved || loss == ReaderRemoved {
		c.commands["present"] = "0"
	}
	c.write(t)
}

// Return gives the token back.
func (c *SmartCard) Return(t testing.TB) {
	t.Helper()
	c.Mend(t, Fault{name: "present"})
}

// Deauthenticate ends the card's log-in behind its processes' backs, as another program that connects does.
func (c *SmartCard) Deauthenticate(t testing.TB) {
	t.Helper()
	c.deauth++
	c.Fault(t, Fault{"deauth", strconv.Itoa(c.deauth)})
}

// write replaces the control file. The caller holds mu.
func (c *SmartCard) write(t testing.TB) {
	t.Helper()
	var content strings.Builder
	for _, name := range slices.Sorted(maps.Keys(c.commands)) {
		content.WriteString(name + "=" + c.commands[name] + "\n")
	}
	if err := os.WriteFile(c.control+".new", []byte(content.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(c.control+".new", c.control); err != nil {
		t.Fatal(err)
	}
}

// Calls returns how often processes have called a function of the module so far; card.c says which are counted.
func (c *SmartCard) Calls(t testing.TB, function string) int {
	t.Helper()
	content, err := os.ReadFile(c.control + ".calls")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	count := 0
	for line := range strings.Lines(string(content)) {
		if strings.TrimSuffix(line, "\n") == function {
			count++
		}
	}
	return count
}

// Operations returns how many private-key operations the card has performed so far, length queries included.
func (c *SmartCard) Operations(t testing.TB) int {
	t.Helper()
	return c.Calls(t, "operation")
}

// WrongPINs returns how many wrong PINs the card was sent so far.
func (c *SmartCard) WrongPINs(t testing.TB) int {
	t.Helper()
	return c.Calls(t, "wrong PIN")
}

// Tries returns how many wrong PINs the card would still take: three at first.
func (c *SmartCard) Tries(t testing.TB) int {
	t.Helper()
	content, err := os.ReadFile(c.control + ".tries")
	if os.IsNotExist(err) {
		return 3
	}
	if err != nil {
		t.Fatal(err)
	}
	tries, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		t.Fatal(err)
	}
	return tries
}

// SetTries makes the card show that wrong PINs were sent: 2 is CKF_USER_PIN_COUNT_LOW, 1 _FINAL_TRY, 0 _LOCKED, 3 none.
func (c *SmartCard) SetTries(t testing.TB, tries int) {
	t.Helper()
	if err := os.WriteFile(c.control+".tries", []byte(strconv.Itoa(tries)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

//go:embed testdata/card.c
var cardSource []byte

// builtCard is the module, compiled once in a process.
var builtCard struct {
	sync.Mutex
	module []byte
}

// cardModule compiles the card module.
func cardModule(t testing.TB) []byte {
	t.Helper()
	builtCard.Lock()
	defer builtCard.Unlock()
	if builtCard.module != nil {
		return builtCard.module
	}
	// The PKCS#11 headers come with the Go binding that the module host is built with.
	headers := strings.TrimSpace(run(t, os.Environ(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11"))
	dir := t.TempDir()
	source, module := filepath.Join(dir, "card.c"), filepath.Join(dir, "card.so")
	if err := os.WriteFile(source, cardSource, 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, os.Environ(), "gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-I", headers, source,
		"-o", module, "-ldl", "-lpthread")
	content, err := os.ReadFile(module)
	if err != nil {
		t.Fatal(err)
	}
	builtCard.module = content
	return content
}
