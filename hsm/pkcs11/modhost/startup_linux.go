package modhost

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// forgetStart gives back the pages of the program's own file that its start has touched: the plugin's packages
// initialise themselves in a host too, which is 30 MB of code and tables of which the host needs a tenth, and which
// locking would keep. What is needed again comes back from the file. A failure costs memory and nothing else.
func forgetStart() error {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return err
	}
	for _, m := range untouched(smaps, program) {
		// A system call of its own: unix.Madvise takes memory as a slice, and this is not Go's.
		if _, _, errno := syscall.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED); errno != 0 {
			return errno
		}
	}
	return nil
}

// mapping is a range of addresses.
type mapping struct{ start, end uintptr }

// untouched returns the mappings of a file that cannot be written and of which no page was ever: only those equal the
// file, and can be dropped. A table that the loader has relocated and then protected is none of them.
func untouched(smaps []byte, file string) []mapping {
	var found []mapping
	var candidate mapping // the one that the lines belong to, where it is of interest
	for line := range strings.Lines(string(smaps)) {
		if line[0] >= 'A' && line[0] <= 'Z' { // an attribute; a mapping begins with its address in small hexadecimal digits
			if name, value, _ := strings.Cut(line, ":"); name == "Anonymous" && strings.TrimSpace(value) == "0 kB" && candidate.end != 0 {
				found = append(found, candidate)
			}
			continue
		}
		var access, offset, device, inode string
		candidate = mapping{}
		_, err := fmt.Sscanf(line, "%x-%x %s %s %s %s", &candidate.start, &candidate.end, &access, &offset, &device, &inode)
		if err != nil || !strings.HasPrefix(access, "r-") || !strings.HasSuffix(strings.TrimSuffix(line, "\n"), " "+file) {
			candidate = mapping{}
		}
	}
	return found
}
