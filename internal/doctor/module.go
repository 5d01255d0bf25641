package doctor

import (
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// ownProgram is the program that loads a module, unless the configuration names another.
const ownProgram = "/proc/self/exe"

// module looks at a vendor's PKCS#11 module as the dynamic loader would, before anything loads it.
func (d *doctor) module(f chart, path string) {
	const check = "module"
	loader := cmp.Or(d.Config.PKCS11.ModuleHost, ownProgram)
	switch err := compatible(path, loader); {
	case errors.Is(err, fs.ErrNotExist):
		f.problem(check, "install it (Debian: apt-get install opensc-pkcs11), or mend the path in pkcs11 { modules = … }", "%s is not there", path)
	case err != nil:
		f.problem(check, "install the module for this system and processor", "%s cannot be loaded: %v", path, err)
	case !slices.Contains(d.Config.PKCS11.Modules, path):
		f.problem(check, "add it to pkcs11 { modules = … }", "%s is not among the modules that may be loaded", path)
	default:
		f.ok(check, "%s is made for this system", path)
	}
}

// errForeign is wrapped by errors about modules for other systems.
var errForeign = errors.New("it is made for another system")

// compatible tells whether a program could load a module: same processor, same C library. glibc and musl do not mix, and
// the loader's own words about that ("Error relocating … symbol not found") help nobody.
func compatible(module, program string) error {
	library, err := readELF(module)
	if err != nil {
		return err
	}
	host, err := readELF(program)
	if err != nil {
		return err
	}
	switch {
	case library.machine != host.machine:
		return fmt.Errorf("%w: for %v, and this program is for %v", errForeign, library.machine, host.machine)
	case host.libc == "":
		return fmt.Errorf("%w: this program was built without cgo and loads no module; name one that does: pkcs11 { module_host = … }", errForeign)
	case library.libc != "" && library.libc != host.libc:
		return fmt.Errorf("%w: for %s, and this program is for %s", errForeign, library.libc, host.libc)
	}
	return nil
}

// binary is what a program or a library says about where it runs.
type binary struct {
	machine elf.Machine
	libc    string // "glibc", "musl"; empty for a file that needs neither
}

func readELF(path string) (binary, error) {
	opened, err := elf.Open(path)
	if unread := (*fs.PathError)(nil); errors.As(err, &unread) {
		return binary{}, err
	}
	if err != nil {
		return binary{}, fmt.Errorf("%w: it is no shared library (ELF)", errForeign)
	}
	defer func() { _ = opened.Close() }()
	needed, err := opened.ImportedLibraries()
	if err != nil {
		return binary{}, fmt.Errorf("%w: it is damaged: %w", errForeign, err)
	}
	found := binary{machine: opened.Machine}
	for _, name := range needed {
		switch {
		case strings.HasPrefix(name, "libc.musl-"), strings.HasPrefix(name, "ld-musl-"):
			found.libc = "musl"
		case strings.HasPrefix(name, "libc.so."):
			found.libc = "glibc"
		}
	}
	return found, nil
}

// defaultPCSCSocket is where pcscd listens, unless PCSCLITE_CSOCK_NAME says otherwise.
const defaultPCSCSocket = "/run/pcscd/pcscd.comm"

// needsPCSC tells whether a module speaks to its card through pcscd, as OpenSC and the vendor's own do.
func needsPCSC(module string) bool {
	name := filepath.Base(module)
	return strings.Contains(name, "opensc") || strings.Contains(name, "sc-hsm")
}

// pcscd looks at the daemon between the module and the stick.
func pcscd(ctx context.Context, f chart) {
	const check = "pcscd"
	socket := cmp.Or(os.Getenv("PCSCLITE_CSOCK_NAME"), defaultPCSCSocket)
	connection, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	switch {
	case err == nil:
		_ = connection.Close()
		f.ok(check, "pcscd answers at %s", socket)
	case errors.Is(err, fs.ErrNotExist):
		f.problem(check, "apt-get install pcscd, then systemctl enable --now pcscd.socket; in a container, mount the host's "+filepath.Dir(socket),
			"pcscd does not run: there is no %s", socket)
	case errors.Is(err, fs.ErrPermission):
		f.problem(check, "run as a user that may, or allow this one; pcscd also asks polkit about users without a seat",
			"this user may not speak to pcscd at %s", socket)
	default:
		f.problem(check, "systemctl restart pcscd.socket pcscd", "pcscd does not answer at %s: %v", socket, err)
	}
}
