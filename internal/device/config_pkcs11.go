package device

import (
	"strconv"
	"strings"
	"time"
)

// Bounds of what a configuration may ask for. The limits are bounded because a token is shared: one mount's hanging
// operation keeps its place in the queue for as long as that mount allows.
const (
	maxParallel      = 64
	minDecryptLimit  = 2 * time.Second
	maxDecryptLimit  = 2 * time.Minute
	minGenerateLimit = 10 * time.Second
	maxGenerateLimit = 15 * time.Minute // an RSA-4096 key takes a card minutes
)

func (c Config) validatePKCS11() error {
	switch {
	case c.Module == "":
		return complain(`"module" is missing; name the vendor's PKCS#11 module, /usr/lib/x86_64-linux-gnu/opensc-pkcs11.so for example`)
	case !strings.HasPrefix(c.Module, "/"):
		return complain(`module %q is not an absolute path`, c.Module)
	}
	chosen := 0
	for _, given := range []bool{c.Serial != "", c.TokenLabel != "", c.Slot != nil} {
		if given {
			chosen++
		}
	}
	switch {
	case chosen == 0:
		return complain(`no token is chosen; give one of "serial", "token_label" and "slot" (pkcs11-tool --list-slots shows them)`)
	case chosen > 1:
		return complain(`more than one of "serial", "token_label" and "slot" is given; keep one`)
	case c.PIN == "" && c.PINFile == "":
		return complain(`no PIN is given; set "pin", or "pin_file" to a file under the secrets directory`)
	case c.Parallel < 0 || c.Parallel > maxParallel:
		return complain(`parallel %d is out of range; use 1 for a card, 8 for SoftHSM, at most %d`, c.Parallel, maxParallel)
	}
	if err := between("decrypt_timeout", c.DecryptTimeout, minDecryptLimit, maxDecryptLimit); err != nil {
		return err
	}
	return between("generate_timeout", c.GenerateTimeout, minGenerateLimit, maxGenerateLimit)
}

func (c Config) fieldsPKCS11() []field {
	slot := field{name: "slot"}
	if c.Slot != nil {
		slot = field{name: "slot", set: true, shown: *c.Slot, destination: strconv.FormatUint(uint64(*c.Slot), 10)}
	}
	fields := []field{
		{name: "module", set: c.Module != "", shown: c.Module, destination: c.Module},
		{name: "serial", set: c.Serial != "", shown: c.Serial, destination: c.Serial},
		{name: "token_label", set: c.TokenLabel != "", shown: c.TokenLabel, destination: c.TokenLabel},
		slot,
		{name: "parallel", set: c.Parallel != 0, shown: max(c.Parallel, 1)},
		{name: "decrypt_timeout", set: c.DecryptTimeout != 0, shown: seconds(c.DecryptTimeout)},
		{name: "generate_timeout", set: c.GenerateTimeout != 0, shown: seconds(c.GenerateTimeout)},
	}
	for i := range fields {
		fields[i].kind = TypePKCS11
	}
	return fields
}
