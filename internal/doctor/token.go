package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/device"
)

// token examines a PKCS#11 token.
func (d *doctor) token(ctx context.Context, f chart, configured config.Device) {
	d.module(f, configured.Module)
	if needsPCSC(configured.Module) {
		pcscd(ctx, f)
	}
	handle, err := d.Device(configured.Name)
	if err != nil {
		f.problem("configuration", "mend the device's block in "+d.Config.Path, "%v", err)
		return
	}
	status := handle.Status(ctx)
	var pin *hsm.PINError
	switch {
	case errors.As(status.Err, &pin):
		d.refusedPIN(f, pin)
		return
	case errors.Is(status.Err, hsm.ErrNotFound):
		f.problem("token", fmt.Sprintf("plug it in; \"pkcs11-tool --module %s --list-slots\" shows what is there; a new stick is initialised with "+
			"\"sc-hsm-tool --initialize --dkek-shares …\"", configured.Module), "%v", status.Err)
		return
	case status.Err != nil:
		f.problem("token", "the error says what the HSM or its module answered", "%v", status.Err)
		return
	}
	f.ok("token", "%s %s, serial number %s, label %q, is initialised", status.Info.Vendor, status.Info.Model, status.Info.Serial, status.Info.Label)
	pinCounter(f, status.Info.PIN)
	d.notes(f, status.Info)
	roundTrip(f, configured.Name, status)
	if isSmartCardHSM(status.Info) {
		d.shares(ctx, f, status.Info.Serial)
	}
}

func (d *doctor) refusedPIN(f chart, pin *hsm.PINError) {
	switch {
	case pin.TriesLeft == 0:
		f.problem("PIN", "unblock it with the SO-PIN (sc-hsm-tool, pkcs11-tool --init-pin --so-pin …)", "%v", pin)
	case pin.Barred:
		f.problem("PIN", "put the right PIN in place; then nothing else is needed. If it was right: nitroseal device pin unbar", "%v", pin)
	default:
		f.problem("PIN", "put the right PIN in place: it is not sent again before it changes", "%v", pin)
	}
}

// pinCounter says how many tries are left. PKCS#11 tells only these three steps.
func pinCounter(f chart, pin hsm.PINState) {
	switch {
	case pin.Locked:
		f.problem("PIN", "unblock it with the SO-PIN", "the user PIN is locked")
	case pin.FinalTry:
		f.problem("PIN", "log in once with the right PIN, by hand: it gives the tries back", "one try is left: the next wrong PIN locks the token")
	case pin.CountLow:
		f.warning("PIN", "find out who sent a wrong PIN; one log-in with the right PIN gives the tries back", "a wrong PIN was sent since the last right one")
	default:
		f.ok("PIN", "the PIN is right and all tries are left")
	}
}

// notes passes on what an HSM says about itself.
func (d *doctor) notes(f chart, info hsm.Info) {
	for _, note := range info.Notes {
		f.warning("note", "", "%s", note)
	}
}

// roundTrip says whether a private-key operation worked.
func roundTrip(f chart, name string, status device.Status) {
	switch {
	case status.CanOpen():
		f.ok("round trip", "one of %d keys decrypted what was encrypted to it, in %v", len(status.Keys), status.RoundTrip.Round(100*time.Microsecond))
	case len(status.Keys) == 0:
		f.warning("round trip", fmt.Sprintf("make one: nitroseal key generate NAME --device %s", name), "there is no key that could open an envelope")
	default:
		f.warning("round trip", "make one for decryption", "%d keys were seen, and none of them can decrypt", len(status.Keys))
	}
}

// isSmartCardHSM tells a Nitrokey HSM 2 and its relatives from other tokens.
func isSmartCardHSM(info hsm.Info) bool {
	return strings.Contains(info.Model, "SmartCard-HSM") || strings.Contains(info.Vendor, "CardContact") || strings.Contains(info.Model, "Nitrokey HSM")
}

// shares looks at the device key encryption key (DKEK): only keys of a token with one can ever be backed up. PKCS#11 does
// not tell; OpenSC's own tool does.
func (d *doctor) shares(ctx context.Context, f chart, serial string) {
	const check = "DKEK"
	sticks := 0
	for _, configured := range d.Config.Devices {
		if configured.Type == device.TypePKCS11 && needsPCSC(configured.Module) {
			sticks++
		}
	}
	if sticks > 1 {
		f.skipped(check, "%d sticks are configured, and sc-hsm-tool does not tell them apart by serial number; run \"sc-hsm-tool --reader N\" for each", sticks)
		return
	}
	tool, err := exec.LookPath("sc-hsm-tool")
	if err != nil {
		f.skipped(check, "sc-hsm-tool is not here (Debian: apt-get install opensc), and nothing else tells whether keys can be backed up")
		return
	}
	command := exec.CommandContext(ctx, tool) //nolint:gosec // found on PATH by its fixed name, no arguments
	command.Env = d.toolEnvironment()
	var said bytes.Buffer
	command.Stderr = &said
	output, err := command.Output()
	if err != nil {
		f.skipped(check, "sc-hsm-tool did not answer: %v", err)
		return
	}
	if reader := otherReader(append(said.Bytes(), output...), serial); reader != "" {
		f.subject += fmt.Sprintf(", or whatever is in the reader %q", reader)
	}
	judgeShares(f, parseShares(output))
}

// toolEnvironment is the environment for a tool of OpenSC: no variable of it holds a PIN or a password.
func (d *doctor) toolEnvironment() []string {
	var environment []string
	for _, name := range append([]string{"PATH", "HOME", "OPENSC_CONF", "PCSCLITE_CSOCK_NAME"}, d.Config.PKCS11.Env...) {
		if value, set := os.LookupEnv(name); set {
			environment = append(environment, name+"="+value)
		}
	}
	return environment
}

// otherReader returns the reader that sc-hsm-tool says it took, the first one with a card, unless its name holds the serial
// number of the stick, as those of Nitrokeys do: there may be other sticks than the configured one.
func otherReader(said []byte, serial string) string {
	for line := range strings.Lines(string(said)) {
		if reader, found := strings.CutPrefix(line, "Using reader with a card: "); found && !(serial != "" && strings.Contains(reader, serial)) {
			return strings.TrimSpace(reader)
		}
	}
	return ""
}

// shareState is what sc-hsm-tool says about the DKEK.
type shareState struct {
	known, complete bool
	total, missing  int
}

// parseShares reads the output of sc-hsm-tool: "DKEK shares : 2" and, while some are missing, "DKEK import pending, 1
// share(s) still missing", else "DKEK key check value : …". A token initialised without shares prints none of them.
func parseShares(output []byte) (s shareState) {
	lines := bufio.NewScanner(bytes.NewReader(output))
	for lines.Scan() {
		line := lines.Text()
		name, value, _ := strings.Cut(line, ":")
		switch name = strings.TrimSpace(name); {
		case strings.HasPrefix(line, "Version"):
			s.known = true
		case name == "DKEK shares":
			s.total, _ = strconv.Atoi(strings.TrimSpace(value)) // 0 counts as none
		case name == "DKEK key check value":
			s.complete = true
		case strings.HasPrefix(line, "DKEK import pending"):
			if fields := strings.Fields(line); len(fields) > 3 {
				s.missing, _ = strconv.Atoi(fields[3]) // pending all the same
			}
		}
	}
	return s
}

func judgeShares(f chart, s shareState) {
	const check = "DKEK"
	switch {
	case !s.known:
		f.skipped(check, "sc-hsm-tool's answer is not one that this version reads")
	case s.complete && s.total > 0:
		f.ok(check, "all %d shares are present: keys can be backed up with sc-hsm-tool --wrap-key", s.total)
	case s.total > 0:
		f.problem(check, "import the missing shares: sc-hsm-tool --import-dkek-share FILE", "%d of %d shares are missing: no key can be backed up yet", s.missing, s.total)
	default:
		f.warning(check, "add a second HSM as recipient of every key; only a new initialisation with --dkek-shares, which erases all keys, changes it",
			"the token was initialised without DKEK shares: its keys can never be backed up")
	}
}
