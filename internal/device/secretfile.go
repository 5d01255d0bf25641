package device

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// maxSecretFile is the size of the largest secret file in bytes. A PIN has 15 characters, a passphrase 200.
const maxSecretFile = 4096

// maxPEMFile is the same for a private key of TLS. One of RSA 4096 has 3.3 kB.
const maxPEMFile = 64 << 10

// SecretFiles is the directory under which files named in a configuration must lie. Whoever may write a mount's
// configuration must not be able to read another file of the machine by naming it as a PIN file, nor to learn from an
// error what it holds. The zero value allows no file at all.
type SecretFiles struct {
	// Dir is given by the plugin's own arguments, -secrets-dir.
	Dir string
	// Credentials lets "credential:NAME" stand for a file that systemd hands over (LoadCredential), whatever Dir is. The
	// command and OpenBao's seal set it, never a mount: whoever may write a mount's configuration must not reach the
	// credentials of Vault's own unit.
	Credentials bool
}

// CredentialPrefix begins the name of a credential where a path could stand.
const CredentialPrefix = "credential:" //nolint:gosec // the name of a place, no credential

// IsCredential tells whether a path names a credential that can exist.
func IsCredential(path string) bool {
	name, credential := strings.CutPrefix(path, CredentialPrefix)
	return credential && name != "" && name != "." && name != ".." && !strings.ContainsRune(name, '/')
}

// ErrNoCredentials says that systemd did not start this program, so it has none of the credentials that it would have as a service.
var ErrNoCredentials = errors.New("this program was not started by systemd")

// credentialsVariable holds the folder in which systemd puts the credentials of a service.
const credentialsVariable = "CREDENTIALS_DIRECTORY"

// place resolves the name of a credential: the file, and the rules of the folder that it lies in. Any other path comes back
// as it is.
func (s SecretFiles) place(path string) (SecretFiles, string, error) {
	if !s.Credentials || !strings.HasPrefix(path, CredentialPrefix) {
		return s, path, nil
	}
	name := strings.TrimPrefix(path, CredentialPrefix)
	dir := os.Getenv(credentialsVariable)
	switch {
	case !IsCredential(path):
		return s, "", complain(`the credential %q is no file name`, name)
	case dir == "" || !filepath.IsAbs(dir):
		return s, "", complain(`the credential %q is handed over to a service (LoadCredential=%s:FILE in its unit), and %w: the environment variable %s is not set`,
			name, name, ErrNoCredentials, credentialsVariable)
	}
	return SecretFiles{Dir: dir}, filepath.Join(dir, name), nil
}

// Read returns the content of the file without a final line break. Symbolic links are followed as long as they stay
// inside the directory, as those of a mounted Kubernetes secret do. An unreadable or empty file is an error: an empty
// PIN would cost a try. The caller wipes the result.
func (s SecretFiles) Read(path string) ([]byte, error) {
	s, path, err := s.place(path)
	if err != nil {
		return nil, err
	}
	file, err := s.open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return readSecret(file, path)
}

// ReadPEM is [SecretFiles.Read] for a private key of TLS, which has lines. What lies in the file is not looked at.
func (s SecretFiles) ReadPEM(path string) ([]byte, error) {
	s, path, err := s.place(path)
	if err != nil {
		return nil, err
	}
	file, err := s.open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return readAll(file, path, maxPEMFile)
}

// open opens a file by the rules for secret files.
func (s SecretFiles) open(path string) (*os.File, error) {
	if s.Dir == "" {
		return nil, complain(`the file %s may not be read: the plugin was registered without -secrets-dir, so no file is; register it with -args=-secrets-dir=DIR, or give the secret itself`, path)
	}
	relative, err := s.relative(path)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(s.Dir)
	if err != nil {
		return nil, complain(`the secrets directory %s cannot be opened (%v); it must exist and be readable by the user of this program`, s.Dir, pathless(err))
	}
	defer root.Close()
	file, err := root.Open(relative)
	if err != nil {
		return nil, complain(`the secret file %s cannot be read (%v); it must exist, be readable by the user of this program and lie, with what its links point to, under %s`, path, pathless(err), s.Dir)
	}
	info, err := file.Stat()
	switch {
	case err != nil:
		err = fmt.Errorf("reading the secret file %s: %w", path, pathless(err))
	case !info.Mode().IsRegular():
		err = complain(`%s is not a regular file`, path)
	case info.Mode().Perm()&0o022 != 0:
		err = complain(`%s may be written by others than its owner; chmod go-w it`, path)
	default:
		return file, nil
	}
	file.Close()
	return nil, err
}

// readAll reads a file that may not be larger than limit. The caller wipes the result.
func readAll(r io.Reader, path string, limit int) ([]byte, error) {
	buf := make([]byte, limit+1)
	n, err := io.ReadFull(r, buf)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		clear(buf)
		return nil, fmt.Errorf("reading the secret file %s: %w", path, pathless(err))
	}
	if n > limit {
		clear(buf)
		return nil, complain(`the secret file %s is larger than %d bytes; is it the right one?`, path, limit)
	}
	return buf[:n:n], nil
}

func readSecret(r io.Reader, path string) ([]byte, error) {
	buf, err := readAll(r, path, maxSecretFile)
	if err != nil {
		return nil, err
	}
	secret, trouble := CutSecret(buf)
	if trouble != "" {
		clear(buf)
		return nil, complain(`the secret file %s %s; nothing was sent to the HSM`, path, trouble)
	}
	return secret, nil
}

// CutSecret cuts the line break off that files, pipes and variables may end with. What cannot be meant as a secret would
// cost a try: trouble then says why, as "is empty" does, and shows nothing of it.
func CutSecret(secret []byte) (cut []byte, trouble string) {
	cut = bytes.TrimRight(secret, "\r\n")
	switch {
	case len(cut) == 0:
		return nil, "is empty"
	case len(bytes.TrimSpace(cut)) == 0:
		return nil, "holds nothing but blanks"
	case bytes.ContainsFunc(cut, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return nil, "holds a control character, a line break or a tab for example"
	}
	return cut[:len(cut):len(cut)], ""
}

// relative makes path relative to the directory, by name only: os.Root keeps what follows inside.
func (s SecretFiles) relative(path string) (string, error) {
	if !filepath.IsAbs(path) {
		path = filepath.Join(s.Dir, path)
	}
	dirs := []string{s.Dir}
	if resolved, err := filepath.EvalSymlinks(s.Dir); err == nil && resolved != s.Dir {
		dirs = append(dirs, resolved)
	}
	for _, dir := range dirs {
		relative, err := filepath.Rel(dir, filepath.Clean(path))
		if err == nil && relative != "." && relative != ".." && !strings.HasPrefix(relative, "../") {
			return relative, nil
		}
	}
	return "", complain(`the file %s does not lie under the secrets directory %s`, path, s.Dir)
}

// pathless drops the path that os errors carry: the sentence around it names the one that the user gave.
func pathless(err error) error {
	var pathError *os.PathError
	if errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}
