package nethsm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net/http"
	"slices"
	"time"
)

// The deadlines of what moves much data.
const (
	backingUp = 15 * time.Minute
	restoring = 15 * time.Minute
	updating  = 30 * time.Minute
)

// MaxBackup is the largest backup that this client reads or sends, in bytes.
const MaxBackup = 256 << 20

// Backup writes a backup of the whole NetHSM to w, as a user of role Backup, and returns how many bytes. It is encrypted
// with the backup passphrase; where none was set it is [ErrState]. What was written before an error is no backup.
func (c *Client) Backup(ctx context.Context, w io.Writer) (int64, error) {
	counter := &counter{w: w}
	_, err := c.do(ctx, call{
		op: "making a backup", method: http.MethodPost, path: "/system/backup", sink: counter, limit: MaxBackup, timeout: backingUp,
		ok: []int{http.StatusOK},
	})
	return counter.n, err
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// Restoration is a backup to be restored.
type Restoration struct {
	Backup io.Reader // up to [MaxBackup]; read whole into memory
	// Passphrase is the backup passphrase of the time of the backup. A NetHSM that has it still needs none.
	Passphrase Secret
	// Time is set as the node's clock; zero means now.
	Time time.Time
}

// Restore restores a backup to a node. An Unprovisioned one takes it from anybody, becomes what the backup was made of and
// is Locked, with the unlock passphrase of the time of the backup. An Operational one takes it from an Administrator of the
// root namespace, gets the keys and users of the backup and keeps its own settings; it may end Locked and lose unattended
// boot.
func (c *Client) Restore(ctx context.Context, r Restoration) error {
	const op = "restoring a backup"
	one, err := c.alone(op)
	if err != nil {
		return err
	}
	if r.Backup == nil {
		return fmt.Errorf("%s: %w: there is none", op, ErrRequest)
	}
	if err := checkCurrent(op, "the backup passphrase", r.Passphrase); err != nil {
		return err
	}
	body, contentType, err := r.multipart()
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	defer clear(body)
	_, err = one.do(ctx, call{
		op: op, method: http.MethodPost, path: "/system/restore", creates: true, raw: body, contentType: contentType,
		timeout: restoring,
	})
	return err
}

// formSize is more than what a form adds to its two parts.
const formSize = 2048

// multipart is the body of a restoration, in memory because its length must be known beforehand.
func (r *Restoration) multipart() (body []byte, contentType string, err error) {
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	arguments, err := encodeJSON(struct {
		Passphrase secret `json:"backupPassphrase,omitempty"`
		Time       string `json:"systemTime"`
	}{secret(r.Passphrase), timestamp(r.Time)})
	if err != nil {
		return nil, "", err
	}
	defer clear(arguments)
	backup, err := io.ReadAll(io.LimitReader(r.Backup, MaxBackup+1))
	switch {
	case err != nil:
		return nil, "", fmt.Errorf("reading it: %w", err)
	case len(backup) > MaxBackup:
		return nil, "", fmt.Errorf("%w: it is larger than %d bytes", ErrRequest, MaxBackup)
	case len(backup) == 0:
		return nil, "", fmt.Errorf("%w: it is empty", ErrRequest)
	}
	var out bytes.Buffer
	out.Grow(len(arguments) + len(backup) + formSize) // so that it never moves and leaves a copy of the passphrase behind
	form := multipart.NewWriter(&out)
	field, err := form.CreateFormField("arguments")
	if err != nil {
		return nil, "", err
	}
	if _, err := field.Write(arguments); err != nil {
		return nil, "", err
	}
	file, err := form.CreateFormFile("backup_file", "backup")
	if err != nil {
		return nil, "", err
	}
	if _, err := file.Write(backup); err != nil {
		return nil, "", err
	}
	if err := form.Close(); err != nil {
		return nil, "", err
	}
	return out.Bytes(), form.FormDataContentType(), nil
}

// Reboot restarts an appliance. Afterwards it is Locked, unless unattended boot is on.
func (c *Client) Reboot(ctx context.Context) error {
	return c.system(ctx, "rebooting", "reboot")
}

// Shutdown switches an appliance off. Somebody has to press its button to have it back.
func (c *Client) Shutdown(ctx context.Context) error {
	return c.system(ctx, "shutting down", "shutdown")
}

// FactoryReset destroys all that is on an appliance. It becomes Unprovisioned.
func (c *Client) FactoryReset(ctx context.Context) error {
	return c.system(ctx, "resetting to factory settings", "factory-reset")
}

// Update gives an appliance a new software image, which it checks and keeps until [Client.CommitUpdate], and returns its
// release notes. An image older than the software that runs is [hsm.ErrExists].
func (c *Client) Update(ctx context.Context, image []byte) (releaseNotes string, err error) {
	var got struct {
		ReleaseNotes string `json:"releaseNotes"`
	}
	err = c.doAppliance(ctx, call{
		op: "uploading an update", method: http.MethodPost, path: "/system/update", raw: image,
		contentType: "application/octet-stream", timeout: updating, creates: true, into: &got,
	})
	return got.ReleaseNotes, err
}

// CommitUpdate installs the image and reboots. Without an image it is [ErrState].
func (c *Client) CommitUpdate(ctx context.Context) error {
	return c.system(ctx, "installing the update", "commit-update")
}

// CancelUpdate drops the image.
func (c *Client) CancelUpdate(ctx context.Context) error {
	return c.system(ctx, "dropping the update", "cancel-update")
}

// system sends a command to an appliance, as an Administrator of the root namespace; a Failed one needs no credentials for
// reboot, shutdown and reset. A container gives [ErrContainer].
func (c *Client) system(ctx context.Context, op, command string) error {
	return c.doAppliance(ctx, call{
		op: op, method: http.MethodPost, path: "/system/" + command, creates: true, timeout: slowly,
	})
}

// doAppliance sends a call that only an appliance can serve. What exactly a container answers is not written down anywhere:
// one of these, and then its device id tells.
func (c *Client) doAppliance(ctx context.Context, in call) error {
	one, err := c.alone(in.op)
	if err != nil {
		return err
	}
	_, err = one.do(ctx, in)
	var no *Error
	if !errors.As(err, &no) || !slices.Contains(notInContainer, no.Status) {
		return err
	}
	if info, failed := one.SystemInfo(ctx); failed == nil && info.Container() {
		return fmt.Errorf("%s at %s (HTTP %d): %w", no.Op, no.Node, no.Status, ErrContainer)
	}
	return err
}

var notInContainer = []int{
	http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusInternalServerError, http.StatusNotImplemented,
	http.StatusServiceUnavailable,
}
