package doctor

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// findings collects what is reported.
type findings []Finding

func (all *findings) add(f Finding) { *all = append(*all, f) }

// want fails unless there is exactly one finding of that check, with that verdict, whose sentences contain the words.
func (all *findings) want(t *testing.T, check string, verdict Verdict, words ...string) {
	t.Helper()
	var matching []Finding
	for _, f := range *all {
		if f.Check == check {
			matching = append(matching, f)
		}
	}
	if len(matching) != 1 || matching[0].Verdict != verdict {
		t.Fatalf("check %q: %+v, want one finding that is %q", check, matching, verdict)
	}
	found := matching[0]
	for _, word := range words {
		if !strings.Contains(found.Seen+" "+found.Remedy, word) {
			t.Errorf("check %q: %q, remedy %q: want it to speak of %q", check, found.Seen, found.Remedy, word)
		}
	}
	if verdict == Problem && found.Remedy == "" {
		t.Errorf("check %q is a problem (%q) and says not how to mend it", check, found.Seen)
	}
}

func collect() (*findings, chart) {
	all := new(findings)
	return all, chart{subject: "test", report: all.add}
}

func TestModuleIsComparedWithTheProgramThatLoadsIt(t *testing.T) {
	dir := t.TempDir()
	build := func(name string, args ...string) string {
		t.Helper()
		source := filepath.Join(dir, name+".c")
		if err := os.WriteFile(source, []byte("int answer(void) { return 42; }\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		library := filepath.Join(dir, name)
		output, err := exec.CommandContext(t.Context(), "gcc", append([]string{"-shared", "-nostdlib", "-o", library, source}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("gcc: %v\n%s", err, output)
		}
		return library
	}
	glibc := build("libglibc.so", "-Wl,--no-as-needed", "-lc")
	musl := build("libmusl.so", "-Wl,--no-as-needed", build("libc.musl-x86_64.so.1", "-Wl,-soname,libc.musl-x86_64.so.1"))
	static := build("libplain.so")
	text := filepath.Join(dir, "text.so")
	if err := os.WriteFile(text, []byte("not a library"), 0o600); err != nil {
		t.Fatal(err)
	}

	for name, c := range map[string]struct {
		module, program string
		says            string // empty: no error
	}{
		"a module for the same C library":     {glibc, glibc, ""},
		"a module that needs no C library":    {static, glibc, ""},
		"a musl module in a glibc program":    {musl, glibc, "for musl, and this program is for glibc"},
		"a glibc module in a musl program":    {glibc, musl, "for glibc, and this program is for musl"},
		"any module in a program without cgo": {glibc, static, "built without cgo"},
		"a file that is no library":           {text, glibc, "no shared library"},
		"a module that is not there":          {filepath.Join(dir, "none.so"), glibc, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			err := compatible(c.module, c.program)
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("%v, want %q", err, c.says)
			}
		})
	}
}

func TestModuleThatMayNotBeLoadedOrIsMissingIsAProblem(t *testing.T) {
	for name, c := range map[string]struct {
		path    string
		modules []string
		says    string
	}{
		"missing":             {"/usr/lib/nothing.so", []string{"/usr/lib/nothing.so"}, "not there"},
		"a folder, no module": {t.TempDir(), nil, "cannot be loaded"},
	} {
		t.Run(name, func(t *testing.T) {
			all, f := collect()
			d := &doctor{Patient: Patient{Config: &config.Config{PKCS11: config.PKCS11{Modules: c.modules}}}}
			d.module(f, c.path)
			all.want(t, "module", Problem, c.says)
		})
	}
}

func TestPCSCDIsTriedAtItsSocket(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "pcscd.comm")
	t.Setenv("PCSCLITE_CSOCK_NAME", socket)

	all, f := collect()
	pcscd(t.Context(), f)
	all.want(t, "pcscd", Problem, "does not run", "systemctl enable")

	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	all, f = collect()
	pcscd(t.Context(), f)
	all.want(t, "pcscd", OK, socket)

	// Closing by hand leaves the socket file behind, as a daemon that was killed does.
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = listener.Close()
	all, f = collect()
	pcscd(t.Context(), f)
	all.want(t, "pcscd", Problem, "does not answer", "restart")
}

func TestSharesAreReadFromWhatSCHSMToolPrints(t *testing.T) {
	const head = "Using reader with a card: Nitrokey Nitrokey HSM (DENK01) 00 00\nVersion              : 3.5\nConfig options       :\n" +
		"  User PIN reset with SO-PIN enabled\nSO-PIN tries left    : 15\nUser PIN tries left  : 3\n"
	for name, c := range map[string]struct {
		output  string
		verdict Verdict
		says    string
	}{
		"all shares are there":    {head + "DKEK shares          : 2\nDKEK key check value : 4B7DA256ACD4EF62\n", OK, "all 2 shares"},
		"a share is missing":      {head + "DKEK shares          : 3\nDKEK import pending, 1 share(s) still missing\n", Problem, "1 of 3"},
		"initialised without any": {head, Warning, "never be backed up"},
		"nothing that we know":    {"Failed to connect to card\n", Skipped, "not one that this version reads"},
	} {
		t.Run(name, func(t *testing.T) {
			all, f := collect()
			judgeShares(f, parseShares([]byte(c.output)))
			all.want(t, "DKEK", c.verdict, c.says)
		})
	}
}

// TestSharesAreThoseOfTheStickInQuestion runs a tool of OpenSC's that is made up: whose stick it asked shows in what it says, and
// it gets none of the secrets that lie in the environment.
func TestSharesAreThoseOfTheStickInQuestion(t *testing.T) {
	dir := t.TempDir()
	tool := "#!/bin/sh\necho 'Using reader with a card: Nitrokey Nitrokey HSM (DENK01) 00 00' >&2\necho 'Version : 3.5'\n" +
		"echo 'DKEK shares : 1'\necho 'DKEK key check value : 4B'\nenv > " + filepath.Join(dir, "env") + "\n"
	if err := os.WriteFile(filepath.Join(dir, "sc-hsm-tool"), []byte(tool), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("STICK_PIN", "648219")
	t.Setenv("MODULE_ENV", "kept")
	for serial, subject := range map[string]string{
		"DENK01": "test", "DENK02": `test, or whatever is in the reader "Nitrokey Nitrokey HSM (DENK01) 00 00"`,
	} {
		all, f := collect()
		d := &doctor{Patient: Patient{Config: &config.Config{PKCS11: config.PKCS11{Env: []string{"MODULE_ENV"}}}}}
		d.shares(t.Context(), f, serial)
		all.want(t, "DKEK", OK, "all 1 shares")
		if got := (*all)[0].Subject; got != subject {
			t.Errorf("the finding is about %s, want %s", got, subject)
		}
	}
	seen, err := os.ReadFile(filepath.Join(dir, "env"))
	if err != nil || strings.Contains(string(seen), "648219") || !strings.Contains(string(seen), "MODULE_ENV=kept") {
		t.Errorf("the tool had this environment (%v):\n%s", err, seen)
	}
}

func TestARefusedPINNamesTheVerbThatLiftsItsBar(t *testing.T) {
	all, f := collect()
	new(doctor).refusedPIN(f, &hsm.PINError{TriesLeft: -1, Barred: true})
	all.want(t, "PIN", Problem, "nitroseal device pin unbar")
}

func FuzzParseShares(f *testing.F) {
	f.Add([]byte("Version : 3.5\nDKEK shares          : 2\nDKEK import pending, 1 share(s) still missing\n"))
	f.Fuzz(func(t *testing.T, output []byte) {
		s := parseShares(output)
		all, chart := collect()
		judgeShares(chart, s)
		if len(*all) != 1 {
			t.Fatalf("%d findings, want one", len(*all))
		}
	})
}

func TestPINCounterIsToldInSteps(t *testing.T) {
	for name, c := range map[string]struct {
		pin     hsm.PINState
		verdict Verdict
	}{
		"all tries are left":        {hsm.PINState{}, OK},
		"a wrong PIN was sent":      {hsm.PINState{CountLow: true}, Warning},
		"one try is left":           {hsm.PINState{CountLow: true, FinalTry: true}, Problem},
		"the PIN is locked for all": {hsm.PINState{Locked: true}, Problem},
	} {
		t.Run(name, func(t *testing.T) {
			all, f := collect()
			pinCounter(f, c.pin)
			all.want(t, "PIN", c.verdict)
		})
	}
}

func TestCertificatesAndClocksAreWarnedAboutInTime(t *testing.T) {
	for name, c := range map[string]struct {
		left    time.Duration
		verdict Verdict
	}{
		"a year left": {365 * 24 * time.Hour, OK}, "a week left": {7 * 24 * time.Hour, Warning}, "over": {-time.Hour, Problem},
	} {
		t.Run("certificate with "+name, func(t *testing.T) {
			all, f := collect()
			f.certificate("the node", time.Now().Add(c.left), "renew it")
			all.want(t, "certificate", c.verdict)
		})
	}
	for name, c := range map[string]struct {
		skew    time.Duration
		verdict Verdict
	}{
		"agrees": {-2 * time.Second, OK}, "a minute behind": {-time.Minute, Warning}, "an hour ahead": {time.Hour, Problem},
	} {
		t.Run("clock that "+name, func(t *testing.T) {
			all, f := collect()
			f.clock("Vault", c.skew, "run NTP")
			all.want(t, "clock", c.verdict)
		})
	}
}

func TestStateDirectoryMustBeOursAndWritable(t *testing.T) {
	open := filepath.Join(t.TempDir(), "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		dir     string
		verdict Verdict
		says    string
	}{
		"ours":                {t.TempDir(), OK, "can be written"},
		"not there":           {filepath.Join(t.TempDir(), "none"), Problem, "install -d -m 700"},
		"writable by anybody": {open, Problem, "chmod 0700"},
		"a file":              {plain, Problem, "no folder"},
	} {
		t.Run(name, func(t *testing.T) {
			all, f := collect()
			d := &doctor{Patient: Patient{Config: &config.Config{StateDir: c.dir}}}
			d.stateDir(f)
			all.want(t, "state directory", c.verdict, c.says)
		})
	}
}

func TestStoreIsTriedAndLeftAsItWas(t *testing.T) {
	opened, err := file.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		store   store.Store
		openErr error
		verdict Verdict
	}{
		"one that works":             {opened, nil, OK},
		"one that cannot be opened":  {nil, errors.New("no such folder"), Problem},
		"one that forgets":           {forgetful{opened}, nil, Problem},
		"one that is out of reach":   {failing{opened, store.ErrUnavailable}, nil, Problem},
		"one that lets us write not": {failing{opened, store.ErrDenied}, nil, Problem},
	} {
		t.Run(name, func(t *testing.T) {
			all := new(findings)
			d := &doctor{report: all.add, Patient: Patient{
				Config: &config.Config{Stores: []config.Store{{Name: "s", Type: config.StoreFile}}},
				Store:  func(context.Context, string) (store.Store, error) { return c.store, c.openErr },
			}}
			d.stores(t.Context())
			all.want(t, "write, read, delete", c.verdict)
		})
	}
	left, err := opened.List(t.Context(), "")
	if err != nil || len(left) != 0 {
		t.Errorf("the doctor left %v, %v", left, err)
	}
}

// forgetful answers with another value than was written.
type forgetful struct{ store.Store }

func (s forgetful) Get(ctx context.Context, name string) (store.Entry, error) {
	entry, err := s.Store.Get(ctx, name)
	entry.Value = []byte("something else")
	return entry, err
}

// failing refuses writes.
type failing struct {
	store.Store
	err error
}

func (s failing) Put(context.Context, string, []byte, store.Revision) (store.Revision, error) {
	return store.NoRevision, s.err
}

func TestKeyThatSurvivesTheLossOfAnHSMIsSaidToDoSo(t *testing.T) {
	two := []keyring.Recipient{{Device: "a", Serial: "1"}, {Device: "b", Serial: "2"}}
	confirmed := &keyring.Acknowledgement{By: "alice"}
	for name, c := range map[string]struct {
		version  keyring.Version
		accepted *keyring.Acknowledgement
		safe     bool
	}{
		"two HSMs":                        {keyring.Version{Recipients: two}, nil, true},
		"one HSM":                         {keyring.Version{Recipients: two[:1]}, nil, false},
		"one HSM with a confirmed backup": {keyring.Version{Recipients: two[:1], BackupConfirmed: confirmed}, nil, true},
		"one HSM, which was accepted":     {keyring.Version{Recipients: two[:1]}, confirmed, true},
	} {
		t.Run(name, func(t *testing.T) {
			all, f := collect()
			redundancy(f, &keyring.Key{Versions: []keyring.Version{c.version}, AcceptSingleHSM: c.accepted})
			if safe := len(*all) == 1 && (*all)[0].Verdict == OK; safe != c.safe {
				t.Errorf("%+v", *all)
			}
		})
	}
}
