package nethsm

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

var goldenPassphrase = []byte("BackupPassphrase")

// The key of a backup is made once for all tests of the package.
func init() { keyOfBackup = remembering(backupKey) }

func remembering(derive deriveKey) deriveKey {
	var made sync.Map // of func() ([]byte, error), by passphrase and salt
	return func(passphrase, salt []byte) ([]byte, error) {
		once := sync.OnceValues(func() ([]byte, error) { return derive(passphrase, salt) })
		first, _ := made.LoadOrStore(fmt.Sprintf("%x %x", passphrase, salt), once)
		key, err := first.(func() ([]byte, error))()
		return slices.Clone(key), err
	}
}

func golden(t testing.TB, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("testdata", "backup", name))
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func TestABackupOfAnotherImplementationIsRead(t *testing.T) {
	for name, want := range map[string]BackupInfo{
		"v0.backup": {Format: 0, Size: 73216, Entries: 12, Opened: true, Users: 3, Keys: 2, Namespaces: 1},
		"v1.backup": {Format: 1, Size: 73342, Entries: 12, Opened: true, Users: 3, Keys: 2, Namespaces: 1, DeviceID: "0000000000"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ReadBackup(bytes.NewReader(golden(t, name)), goldenPassphrase)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("with the passphrase (-want +got):\n%s", diff)
			}
			got, err = ReadBackup(bytes.NewReader(golden(t, name)), nil)
			if err != nil {
				t.Fatal(err)
			}
			closed := BackupInfo{Format: want.Format, Size: want.Size, Entries: want.Entries}
			if diff := cmp.Diff(closed, got); diff != "" {
				t.Errorf("without the passphrase (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTheGoldenBackupsAreWhatTheOtherImplementationMakes(t *testing.T) {
	const python = "/usr/bin/python3" // Debian's, which knows Debian's packages
	if err := exec.CommandContext(t.Context(), python, "-c", "import cryptography").Run(); err != nil {
		t.Fatalf("this test needs Debian's package: apt-get install python3-cryptography (%v)", err)
	}
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), python, filepath.Join("testdata", "backup", "make.py"), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{"v0.backup", "v1.backup"} {
		made, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(made, golden(t, name)) {
			t.Errorf("%s differs from what make.py makes", name)
		}
	}
}

func TestAWrongBackupPassphraseIsToldApartFromADamagedFile(t *testing.T) {
	_, err := ReadBackup(bytes.NewReader(golden(t, "v1.backup")), []byte("WrongPassphrase"))
	var wrong *hsm.PINError
	if !errors.As(err, &wrong) || !wrong.Wrong || errors.Is(err, ErrBackup) {
		t.Fatalf("wrong passphrase: %v", err)
	}
	if strings.Contains(err.Error(), "WrongPassphrase") {
		t.Errorf("the passphrase is in the error: %v", err)
	}
}

// TestEveryCutBackupIsRefused cuts the file at every byte of the header, at both ends of every entry and at some
// bytes between.
func TestEveryCutBackupIsRefused(t *testing.T) {
	for _, name := range []string{"v0.backup", "v1.backup"} {
		whole := golden(t, name)
		for size := range whole {
			if size > 700 && size < len(whole)-200 && size%997 != 0 {
				continue
			}
			_, err := ReadBackup(bytes.NewReader(whole[:size]), nil)
			if err == nil && name == "v0.backup" && entryEnds(whole, size) {
				continue // format 0 has no end mark, so a cut between two entries cannot be seen
			}
			if !errors.Is(err, ErrBackup) {
				t.Fatalf("%s cut to %d of %d bytes: %v", name, size, len(whole), err)
			}
		}
	}
}

// entryEnds says whether an entry of the backup ends at this offset.
func entryEnds(backup []byte, offset int) bool {
	at := len(backupMagic) + 1
	for at+3 <= offset {
		at += 3 + fieldSize(backup[at:])
	}
	return at == offset
}

func TestABackupWithAnyByteChangedIsRefused(t *testing.T) {
	whole := golden(t, "v1.backup")
	salt := whole[len(backupMagic)+4:][:16]
	key, err := keyOfBackup(goldenPassphrase, salt)
	if err != nil {
		t.Fatal(err)
	}
	remembered := func(_, wanted []byte) ([]byte, error) {
		if bytes.Equal(wanted, salt) {
			return slices.Clone(key), nil
		}
		return make([]byte, backupKeySize), nil
	}
	if _, err := readBackup(bytes.NewReader(whole), goldenPassphrase, remembered); err != nil {
		t.Fatal(err)
	}
	for offset := range whole {
		if offset > 1500 && offset < len(whole)-1500 && offset%997 != 0 {
			continue
		}
		changed := slices.Clone(whole)
		changed[offset] ^= 0x20
		if info, err := readBackup(bytes.NewReader(changed), goldenPassphrase, remembered); err == nil {
			t.Errorf("byte %d changed, and the backup still reads: %+v", offset, info)
		}
	}
}

func TestWhatIsWrongWithABackupIsSaid(t *testing.T) {
	v0, v1 := golden(t, "v0.backup"), golden(t, "v1.backup")
	header := len(v0) - len(entriesOf(v0))
	for name, test := range map[string]struct {
		backup []byte
		want   string
	}{
		"an empty file":          {nil, "ends after 0 bytes"},
		"a file of another kind": {[]byte("-----BEGIN CERTIFICATE-----"), "is it the right file?"},
		"a newer format":         {append([]byte(backupMagic), 2), "it has format 2, and 0 and 1 are known"},
		"more after the end":     {append(slices.Clone(v1), 'x'), "more after its end mark"},
		"no entry at all":        {v0[:header], "holds no user"},
		"an entry of no bytes":   {append(slices.Clone(v0), 0, 0, 0), "an entry is empty"},
		"an entry of few bytes":  {append(slices.Clone(v0), 0, 0, 3, 1, 2, 3), "an entry has 3 bytes"},
		"a length beyond the end": {
			append(slices.Clone(v0), 0xff, 0xff, 0xff, 1), "in the middle of an entry",
		},
		"a short salt": {append([]byte(backupMagic), 1, 0, 0, 2, 7, 7), "the salt has 2 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ReadBackup(bytes.NewReader(test.backup), nil)
			if !errors.Is(err, ErrBackup) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

// entriesOf is what follows the header of a backup of format 0.
func entriesOf(backup []byte) []byte {
	at := len(backupMagic) + 1
	for range 3 {
		at += 3 + fieldSize(backup[at:])
	}
	return backup[at:]
}

func TestASavedBackupIsWholeOrNotThere(t *testing.T) {
	whole := golden(t, "v1.backup")
	fetch := func(content []byte, err error) func(io.Writer) error {
		return func(w io.Writer) error {
			if _, err := w.Write(content); err != nil {
				return err
			}
			return err
		}
	}
	for name, test := range map[string]struct {
		files      backupFiles
		fetch      func(io.Writer) error
		passphrase []byte
		want       error
	}{
		"whole, with the passphrase":    {osFiles{}, fetch(whole, nil), goldenPassphrase, nil},
		"whole, without one":            {osFiles{}, fetch(whole, nil), nil, nil},
		"the NetHSM goes away":          {osFiles{}, fetch(whole[:500], hsm.ErrUnavailable), nil, hsm.ErrUnavailable},
		"the answer ends early":         {osFiles{}, fetch(whole[:len(whole)-19], nil), nil, ErrBackup},
		"an empty answer":               {osFiles{}, fetch(nil, nil), nil, ErrBackup},
		"the disk is full":              {failingFiles{at: "write"}, fetch(whole, nil), nil, syscall.ENOSPC},
		"the disk is full at the sync":  {failingFiles{at: "sync"}, fetch(whole, nil), nil, syscall.ENOSPC},
		"the disk is full at the close": {failingFiles{at: "close"}, fetch(whole, nil), nil, syscall.ENOSPC},
		"the folder is read-only":       {failingFiles{at: "create"}, fetch(whole, nil), nil, syscall.ENOSPC},
		"the name cannot be given":      {failingFiles{at: "name"}, fetch(whole, nil), nil, syscall.ENOSPC},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "nethsm.backup")
			info, err := saveBackup(path, test.passphrase, test.files, test.fetch)
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			left, readErr := os.ReadDir(dir)
			if readErr != nil {
				t.Fatal(readErr)
			}
			if test.want != nil {
				if len(left) != 0 {
					t.Errorf("the failed backup left %v behind", left)
				}
				return
			}
			if len(left) != 1 || left[0].Name() != "nethsm.backup" {
				t.Fatalf("the folder holds %v", left)
			}
			stat, err := left[0].Info()
			if err != nil {
				t.Fatal(err)
			}
			if stat.Mode() != 0o600 || stat.Size() != int64(len(whole)) || info.Size != stat.Size() {
				t.Errorf("mode %v, %d bytes; %+v", stat.Mode(), stat.Size(), info)
			}
		})
	}
}

func TestASavedBackupThatDoesNotOpenIsNotKept(t *testing.T) {
	dir := t.TempDir()
	_, err := saveBackup(filepath.Join(dir, "b"), []byte("WrongPassphrase"), osFiles{}, func(w io.Writer) error {
		_, err := w.Write(golden(t, "v1.backup"))
		return err
	})
	var wrong *hsm.PINError
	if !errors.As(err, &wrong) {
		t.Errorf("got %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestAnExistingFileIsNeverReplacedByABackup(t *testing.T) {
	whole := golden(t, "v1.backup")
	dir := t.TempDir()
	path := filepath.Join(dir, "nethsm.backup")
	putOld := func() {
		if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, fetch := range map[string]func(io.Writer) error{
		"there before the backup": func(io.Writer) error { t.Error("the NetHSM was asked"); return nil },
		"made during the backup":  func(w io.Writer) error { putOld(); _, err := w.Write(whole); return err },
	} {
		t.Run(name, func(t *testing.T) {
			_ = os.Remove(path)
			if strings.Contains(name, "before") {
				putOld()
			}
			if _, err := saveBackup(path, nil, osFiles{}, fetch); !errors.Is(err, fs.ErrExist) {
				t.Errorf("got %v", err)
			}
			if content, _ := os.ReadFile(path); string(content) != "old" {
				t.Error("the file was replaced")
			}
			if left, _ := os.ReadDir(dir); len(left) != 1 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// failingFiles are files of a disk that is full at one step.
type failingFiles struct{ at string }

func (f failingFiles) create(path string) (backupFile, error) {
	if f.at == "create" {
		return nil, &fs.PathError{Op: "open", Path: path, Err: syscall.ENOSPC}
	}
	file, err := osFiles{}.create(path)
	return failingFile{file, f.at}, err
}

func (f failingFiles) name(temporary, path string) error {
	if f.at == "name" {
		return syscall.ENOSPC
	}
	return osFiles{}.name(temporary, path)
}

type failingFile struct {
	backupFile
	at string
}

func (f failingFile) Write(p []byte) (int, error) {
	if f.at == "write" {
		n, _ := f.backupFile.Write(p[:len(p)/2])
		return n, syscall.ENOSPC
	}
	return f.backupFile.Write(p)
}

func (f failingFile) Sync() error {
	if f.at == "sync" {
		return syscall.ENOSPC
	}
	return f.backupFile.Sync()
}

func (f failingFile) Close() error {
	err := f.backupFile.Close()
	if f.at == "close" {
		return syscall.ENOSPC
	}
	return err
}

// FuzzReadBackup looks for a file that makes the reader panic, take much memory or take a file for whole that is not.
func FuzzReadBackup(f *testing.F) {
	v1 := golden(f, "v1.backup")
	small := v1[:len(backupMagic)+400]
	f.Add(v1[:0])
	f.Add(small)
	f.Add(append(slices.Clone(v1[:len(backupMagic)+230]), append([]byte{0, 0, 0}, backupTrailer...)...))
	f.Add(golden(f, "v0.backup")[:1000])
	f.Fuzz(func(t *testing.T, backup []byte) {
		info, err := ReadBackup(bytes.NewReader(backup), nil)
		if err != nil {
			if !errors.Is(err, ErrBackup) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		if info.Size != int64(len(backup)) || info.Entries == 0 || info.Opened {
			t.Fatalf("taken for whole: %+v of %d bytes", info, len(backup))
		}
		if info.Format == 1 && !bytes.HasSuffix(backup, []byte(backupTrailer)) {
			t.Fatal("taken for whole without its end mark")
		}
	})
}

func TestAFullDiskLeavesNothingOfABackup(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("no small disk can be made here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	_, err := saveBackup(filepath.Join(dir, "b"), nil, osFiles{}, func(w io.Writer) error {
		_, err := w.Write(golden(t, "v1.backup"))
		return err
	})
	if !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestABackupIsBegunToSeeWhetherThePassphraseOpensIt(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	for i := range 40 { // so that the backup is far longer than what is read of it
		if err := h.AddUser(fmt.Sprintf("user-%d", i), "Operator", "SomePassphrase"); err != nil {
			t.Fatal(err)
		}
	}
	client := setupClient(t, h)
	admin := client.As(Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)})
	if err := admin.SetBackupPassphrase(t.Context(), nil, []byte(nethsmtest.BackupFilePassphrase)); err != nil {
		t.Fatal(err)
	}
	saver := client.As(Credentials{Username: nethsmtest.BackupUser, Password: []byte(nethsmtest.BackupPassphrase)})
	if size, err := saver.Backup(t.Context(), io.Discard); err != nil || size < 2*beginningSize {
		t.Fatalf("the backup has %d bytes, %v", size, err)
	}
	if set, err := saver.backupOpens(t.Context(), []byte(nethsmtest.BackupFilePassphrase)); !set || err != nil {
		t.Errorf("the right passphrase: %v, %v", set, err)
	}
	full := errors.New("the disk is full")
	if err := saver.backupTo(t.Context(), writerFunc(func([]byte) (int, error) { return 0, full })); !errors.Is(err, full) || errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("a full disk: %v", err)
	}
	if nodes := client.Nodes(t.Context()); nodes[0].Resting || nodes[0].Err != nil {
		t.Errorf("breaking off made the node rest: %+v", nodes[0])
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestALostAnswerOfARestoreIsFoundOut: a new node that has become Locked was restored.
func TestALostAnswerOfARestoreIsFoundOut(t *testing.T) {
	source := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	admin := setupClient(t, source).As(Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)})
	if err := admin.SetBackupPassphrase(t.Context(), nil, goldenPassphrase); err != nil {
		t.Fatal(err)
	}
	saver := admin.As(Credentials{Username: nethsmtest.BackupUser, Password: []byte(nethsmtest.BackupPassphrase)})
	path := filepath.Join(t.TempDir(), "backup")
	if _, err := saver.SaveBackup(t.Context(), path, nil); err != nil {
		t.Fatal(err)
	}
	backup, err := LoadBackup(path, nil)
	if err != nil {
		t.Fatal(err)
	}

	target := unprovisioned(t)
	client := setupClient(t, target)
	target.Node(0).Inject(nethsmtest.Fault{Path: "/system/restore", Drop: true, Times: 2})
	if state, err := client.RestoreBackup(t.Context(), backup, goldenPassphrase); err == nil {
		t.Errorf("a restore that never arrived: %s", state)
	}
	target.Node(0).ClearFaults()
	target.Node(0).Inject(nethsmtest.Fault{Path: "/system/restore", Cut: true, After: -1, Times: 1})
	if state, err := client.RestoreBackup(t.Context(), backup, goldenPassphrase); err != nil || state != StateLocked {
		t.Errorf("a restore whose answer was lost: %s, %v", state, err)
	}
	if err := client.Unlock(t.Context(), []byte(nethsmtest.UnlockPassphrase)); err != nil {
		t.Error(err)
	}
}
