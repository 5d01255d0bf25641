package pkcs11

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"

	"vault-plugin-secrets-nitrokey/hsm"
)

// stampFile lies in the state directory, which all our processes on a machine share. Its content changes with every
// write to a token by one of them. OpenSC reads a card's directory once and does not see what other processes write
// afterwards: a host that is older than the newest write must not be asked what there is.
const stampFile = "writes.stamp"

// stamp returns the content of the stamp file, empty where there is none.
func (m *Manager) stamp() string {
	content, err := os.ReadFile(filepath.Join(m.options.StateDir, stampFile))
	if err != nil {
		return ""
	}
	return string(content)
}

// wrote changes the stamp. The host that wrote, where there is one to name, knows what it wrote and stays up to date.
// Where this fails other processes see the write later: with their next host.
func (m *Manager) wrote(by *host) {
	before := m.stamp()
	name := filepath.Join(m.options.StateDir, stampFile)
	random := make([]byte, 8)
	_, _ = rand.Read(random) // never fails (crypto/rand)
	content := hex.EncodeToString(random)
	unique := name + "." + content // two processes may write at the same moment
	err := os.WriteFile(unique, []byte(content), 0o600)
	if err == nil {
		err = os.Rename(unique, name)
	}
	if err != nil {
		_ = os.Remove(unique)
		m.logger.Warn("other processes may not see at once what was written to a token", "error", err)
		return
	}
	if by != nil {
		by.mu.Lock()
		defer by.mu.Unlock()
		if by.stamp == before {
			by.stamp = content
		}
	}
}

// mayHaveWritten reports whether an operation with that result may have changed what is on the token.
func mayHaveWritten(err error) bool {
	return err == nil || errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrFull)
}
