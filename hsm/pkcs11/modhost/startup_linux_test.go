package modhost

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOnlyWhatEqualsTheFileIsDropped(t *testing.T) {
	smaps := `00400000-00402000 r--p 00000000 fe:00 99                            /opt/plugin
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
00402000-00e83000 r-xp 00002000 fe:00 99                                    /opt/plugin
Rss:               10756 kB
Anonymous:             0 kB
AnonHugePages:         0 kB
01b92000-01b93000 r--p 01792000 fe:00 99                                    /opt/plugin
Anonymous:             4 kB
01b93000-01c4a000 rw-p 01792000 fe:00 99                                    /opt/plugin
Anonymous:             0 kB
01c4a000-01c9a000 rw-p 00000000 00:00 0 
Anonymous:             0 kB
7f1388000000-7f1388064000 r-xp 00000000 fe:00 99                            /opt/plugin (deleted)
Anonymous:             0 kB
7f139aac5000-7f139ad42000 r-xp 000c5000 fe:00 32                            /usr/lib/libcrypto.so.3
Anonymous:             0 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                     [vsyscall]
Anonymous:             0 kB
`
	want := []mapping{{0x400000, 0x402000}, {0x402000, 0xe83000}}
	if diff := cmp.Diff(want, untouched([]byte(smaps), "/opt/plugin"), cmp.AllowUnexported(mapping{})); diff != "" {
		t.Errorf("dropped (-want +got):\n%s", diff)
	}
	for _, odd := range []string{"", "\n", "Anonymous: 0 kB\n", "nonsense\nAnonymous: 0 kB\n"} {
		if got := untouched([]byte(odd), "/opt/plugin"); len(got) != 0 {
			t.Errorf("%q: %v", odd, got)
		}
	}
}

func TestAProgramRunsOnAfterItForgotItsStart(t *testing.T) {
	if err := forgetStart(); err != nil {
		t.Error(err)
	}
}
