package device

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

const testPIN = "648219"

func valid() Config {
	return Config{Type: TypePKCS11, Module: "/usr/lib/module.so", TokenLabel: "unseal", PIN: testPIN}
}

func TestSecretFiles(t *testing.T) {
	outside := t.TempDir()
	dir := filepath.Join(t.TempDir(), "secrets")
	must(t, os.Mkdir(dir, 0o700))
	write := func(path, content string, mode os.FileMode) {
		must(t, os.WriteFile(path, []byte(content), 0o600))
		must(t, os.Chmod(path, mode))
	}
	write(filepath.Join(dir, "pin"), testPIN+"\n", 0o400)
	write(filepath.Join(dir, "empty"), "\n", 0o600)
	write(filepath.Join(dir, "large"), strings.Repeat("9", maxSecretFile+1), 0o600)
	write(filepath.Join(dir, "open"), testPIN, 0o666)
	write(filepath.Join(outside, "stolen"), "root:secret-of-the-machine", 0o600)
	must(t, os.Symlink("pin", filepath.Join(dir, "link")))
	must(t, os.Symlink(filepath.Join(outside, "stolen"), filepath.Join(dir, "escape")))
	must(t, os.Mkdir(filepath.Join(dir, "folder"), 0o700))

	tests := map[string]struct {
		dir, path string
		want      string // part of the complaint, "" where the PIN is read
	}{
		"a file under the directory is read":           {dir, filepath.Join(dir, "pin"), ""},
		"a relative name means the directory":          {dir, "pin", ""},
		"a link that stays inside is followed":         {dir, "link", ""},
		"without a directory no file is allowed":       {"", filepath.Join(dir, "pin"), "without -secrets-dir"},
		"a file elsewhere is refused":                  {dir, filepath.Join(outside, "stolen"), "does not lie under"},
		"dots do not climb out":                        {dir, filepath.Join(dir, "..", "pin"), "does not lie under"},
		"a link that leads out is refused":             {dir, "escape", "cannot be read"},
		"a missing file is an error and no empty PIN":  {dir, "absent", "cannot be read"},
		"an empty file is an error and no empty PIN":   {dir, "empty", "is empty"},
		"a folder is no secret":                        {dir, "folder", "not a regular file"},
		"a large file is not a PIN":                    {dir, "large", "larger than"},
		"a file that others may write is not trusted":  {dir, "open", "chmod go-w"},
		"the directory itself is not a file under it":  {dir, dir, "does not lie under"},
		"a sibling with the same beginning is outside": {dir, dir + "-other/pin", "does not lie under"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := SecretFiles{Dir: test.dir}.Read(test.path)
			if test.want == "" {
				if err != nil || string(got) != testPIN {
					t.Fatalf("got %q, %v", got, err)
				}
				return
			}
			if !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("got %v, want a complaint with %q", err, test.want)
			}
			if strings.Contains(err.Error(), "secret-of-the-machine") || strings.Contains(err.Error(), testPIN) {
				t.Fatalf("the complaint shows the content: %v", err)
			}
		})
	}
}

// fakeDevice counts what happens to it.
type fakeDevice struct {
	hsm.Device
	keys   []hsm.Key
	infos  atomic.Int32
	closed atomic.Bool
	delay  time.Duration
}

func (d *fakeDevice) Info(ctx context.Context) (hsm.Info, error) {
	d.infos.Add(1)
	select {
	case <-time.After(d.delay):
		return hsm.Info{Serial: "1"}, nil
	case <-ctx.Done():
		return hsm.Info{}, ctx.Err()
	}
}

func (d *fakeDevice) FindKeys(context.Context, hsm.KeyQuery) ([]hsm.Key, error) { return d.keys, nil }

func (d *fakeDevice) Close() error { d.closed.Store(true); return nil }

func registry(secrets string, open Opener) *Registry {
	return New(Options{Openers: map[string]Opener{TypePKCS11: open}, Secrets: SecretFiles{Dir: secrets}})
}

// The plugin and the command say the same sentences; where there is a directory, they fit both.
func TestSentencesAboutSecretFilesFitEveryProgram(t *testing.T) {
	dir := t.TempDir()
	for _, files := range []SecretFiles{{Dir: dir}, {Dir: filepath.Join(dir, "none")}} {
		for _, path := range []string{"/etc/passwd", "../pin", "missing"} {
			if _, err := files.Read(path); !errors.Is(err, ErrConfig) || strings.Contains(err.Error(), "plugin") {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
}

func TestDeviceIsOpenedOnceByManyCallers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var opens atomic.Int32
		handle, err := registry("", func(_ context.Context, owner string, _ Config, secrets Secrets) (hsm.Device, error) {
			if owner != "mount" || string(secrets.PIN) != testPIN {
				t.Errorf("opened for %q with %q", owner, secrets.PIN)
			}
			opens.Add(1)
			time.Sleep(time.Second)
			return &fakeDevice{}, nil
		}).Open("mount", "stick", valid())
		must(t, err)
		var callers sync.WaitGroup
		for range 20 {
			callers.Go(func() {
				if _, err := handle.Device(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := handle.Device(impatient); !errors.Is(err, context.DeadlineExceeded) && err != nil {
			t.Errorf("an impatient caller got %v", err)
		}
		callers.Wait()
		if opens.Load() != 1 {
			t.Errorf("opened %d times", opens.Load())
		}
		must(t, handle.Close())
		if _, err := handle.Device(t.Context()); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

func TestADeviceThatCouldNotBeOpenedIsTriedAgain(t *testing.T) {
	away := true
	handle, err := registry("", func(context.Context, string, Config, Secrets) (hsm.Device, error) {
		if away {
			return nil, hsm.ErrUnavailable
		}
		return &fakeDevice{}, nil
	}).Open("mount", "stick", valid())
	must(t, err)
	if _, err := handle.Device(t.Context()); !errors.Is(err, hsm.ErrUnavailable) {
		t.Fatalf("got %v", err)
	}
	away = false
	if _, err := handle.Device(t.Context()); err != nil {
		t.Fatalf("the HSM is back, and: %v", err)
	}
	must(t, handle.Close())
}

func TestAChangedPINFileOpensTheDeviceAnew(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "pin")
	must(t, os.WriteFile(path, []byte("111111"), 0o600))
	var pins []string
	var devices []*fakeDevice
	config := valid()
	config.PIN, config.PINFile = "", path
	handle, err := registry(dir, func(_ context.Context, _ string, _ Config, secrets Secrets) (hsm.Device, error) {
		pins = append(pins, string(secrets.PIN))
		devices = append(devices, &fakeDevice{})
		return devices[len(devices)-1], nil
	}).Open("mount", "stick", config)
	must(t, err)
	for _, pin := range []string{"111111", "111111", "2222222"} {
		must(t, os.WriteFile(path, []byte(pin), 0o600))
		must(t, os.Chtimes(path, time.Time{}, time.Unix(int64(len(pin)), 0)))
		if _, err := handle.Device(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := strings.Join(pins, " "); got != "111111 2222222" {
		t.Errorf("opened with %q", got)
	}
	if !devices[0].closed.Load() {
		t.Error("the device with the old PIN was not closed")
	}
	must(t, handle.Close())
}

func TestAPINFileThatIsAwayForAMomentClosesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "pin")
	must(t, os.WriteFile(path, []byte(testPIN), 0o600))
	opens := 0
	config := valid()
	config.PIN, config.PINFile = "", path
	handle, err := registry(dir, func(context.Context, string, Config, Secrets) (hsm.Device, error) {
		opens++
		return &fakeDevice{}, nil
	}).Open("mount", "stick", config)
	must(t, err)
	steps := []struct {
		name   string
		happen func()
	}{
		{"the file is there", func() {}},
		{"it is gone", func() { must(t, os.Remove(path)) }},
		{"it is empty", func() { must(t, os.WriteFile(path, nil, 0o600)) }},
		{"it is written anew with the same PIN", func() { must(t, os.WriteFile(path, []byte(testPIN+"\n"), 0o600)) }},
	}
	for _, step := range steps {
		step.happen()
		device, err := handle.Device(t.Context())
		if err != nil || opens != 1 || device.(*fakeDevice).closed.Load() {
			t.Errorf("%s: %v, opened %d times", step.name, err, opens)
		}
	}
	must(t, handle.Close())
}

func TestStatusIsProbedOnceForManyCallersAndForAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		device := &fakeDevice{delay: time.Second, keys: []hsm.Key{fakeKey{}}}
		handle, err := registry("", func(context.Context, string, Config, Secrets) (hsm.Device, error) {
			return device, nil
		}).Open("mount", "stick", valid())
		must(t, err)
		time.Sleep(time.Hour) // away from the zero time
		var callers sync.WaitGroup
		for range 10 {
			callers.Go(func() {
				if status := handle.Status(t.Context()); status.Err != nil || status.Info.Serial != "1" {
					t.Errorf("got %+v", status)
				}
			})
		}
		callers.Wait()
		if got := device.infos.Load(); got != 1 {
			t.Errorf("probed %d times", got)
		}
		time.Sleep(probeInterval)
		handle.Status(t.Context())
		if got := device.infos.Load(); got != 2 {
			t.Errorf("after a while probed %d times in all", got)
		}
		must(t, handle.Close())
	})
}

// fakeKey proves itself with an error of its choice.
type fakeKey struct {
	hsm.Agreer

	err error
}

func (k fakeKey) Prove(context.Context) error { return k.err }

func TestStatusIsProvedByAKeyThatCanOpen(t *testing.T) {
	sign, open, broken := fakeKey{err: hsm.ErrUnsupported}, fakeKey{}, fakeKey{err: hsm.ErrUnavailable}
	tests := map[string]struct {
		keys    []hsm.Key
		canOpen bool
		err     error
	}{
		"a key that opens proves the device":            {[]hsm.Key{open}, true, nil},
		"a signing key beside it says nothing":          {[]hsm.Key{sign, open}, true, nil},
		"with signing keys only the device cannot open": {[]hsm.Key{sign, sign}, false, nil},
		"a first key counts as soon as it is there":     {nil, false, nil},
		"a key whose operation fails condemns it":       {[]hsm.Key{sign, broken, open}, false, hsm.ErrUnavailable},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			device := &fakeDevice{keys: test.keys}
			handle, err := registry("", func(context.Context, string, Config, Secrets) (hsm.Device, error) {
				return device, nil
			}).Open("mount", "stick", valid())
			must(t, err)
			if handle.Status(t.Context()); len(test.keys) == 0 {
				device.keys = []hsm.Key{open} // made just now: nobody waits for an old answer
				test.canOpen = true
			}
			status := handle.Status(t.Context())
			if status.CanOpen() != test.canOpen || !errors.Is(status.Err, test.err) {
				t.Errorf("got CanOpen %v and %v", status.CanOpen(), status.Err)
			}
			must(t, handle.Close())
		})
	}
}

func TestAnImpatientCallersStatusIsNotRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		handle, err := registry("", func(context.Context, string, Config, Secrets) (hsm.Device, error) {
			return &fakeDevice{delay: time.Second}, nil
		}).Open("mount", "stick", valid())
		must(t, err)
		impatient, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if status := handle.Status(impatient); !errors.Is(status.Err, context.DeadlineExceeded) {
			t.Errorf("got %v", status.Err)
		}
		if status := handle.Status(t.Context()); status.Err != nil {
			t.Errorf("the next caller got %v", status.Err)
		}
		must(t, handle.Close())
	})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestAPINFileThatBecomesReadableServesThoughItLooksTheSame(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "pin")
	must(t, os.WriteFile(path, []byte("111111"), 0o600))
	var pins []string
	var log strings.Builder
	devices := New(Options{
		Openers: map[string]Opener{TypePKCS11: func(_ context.Context, _ string, _ Config, secrets Secrets) (hsm.Device, error) {
			pins = append(pins, string(secrets.PIN))
			return &fakeDevice{}, nil
		}},
		Secrets: SecretFiles{Dir: dir}, Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	config := valid()
	config.PIN, config.PINFile = "", path
	handle, err := devices.Open("mount", "stick", config)
	must(t, err)
	use := func() {
		t.Helper()
		_, err := handle.Device(t.Context())
		must(t, err)
	}
	use()
	must(t, os.WriteFile(path, []byte("2222222"), 0o600))
	must(t, os.Chmod(path, 0o620)) // the mistake that the warning names
	use()
	use()
	if n := strings.Count(log.String(), "chmod go-w"); n != 1 {
		t.Errorf("the warning was written %d times, want once", n)
	}
	must(t, os.Chmod(path, 0o600)) // as the warning says
	use()
	if got := strings.Join(pins, " "); got != "111111 2222222" {
		t.Errorf("opened with %q", got)
	}
	must(t, handle.Close())
}

func TestAStatusThatWasForgottenIsAskedForAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		device := &fakeDevice{delay: time.Second, keys: []hsm.Key{fakeKey{}}}
		handle, err := registry("", func(context.Context, string, Config, Secrets) (hsm.Device, error) {
			return device, nil
		}).Open("mount", "stick", valid())
		must(t, err)
		probes := func(want int32) {
			t.Helper()
			handle.Status(t.Context())
			if got := device.infos.Load(); got != want {
				t.Errorf("probed %d times, want %d", got, want)
			}
		}
		probes(1)
		probes(1)
		handle.ForgetStatus()
		probes(2)
		handle.ForgetStatus()
		var running sync.WaitGroup
		running.Go(func() { handle.Status(t.Context()) })
		synctest.Wait()
		handle.ForgetStatus() // what the running probe says is old already
		running.Wait()
		probes(4)
		must(t, handle.Close())
	})
}
