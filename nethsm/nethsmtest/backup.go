package nethsmtest

import (
	"crypto/hmac"
	"net/http"

	"golang.org/x/crypto/scrypt"
)

// backupKey derives the key of backup files; its cost is part of their format.
func backupKey(salt, passphrase []byte) ([]byte, error) {
	return scrypt.Key(passphrase, salt, scryptN, scryptR, scryptP, 32)
}

func putBackupPassphrase(x *exchange) answer {
	fresh, current, refused := x.twoPassphrases()
	if refused != nil {
		return *refused
	}
	var old *backupRecord
	x.hsm.store.read(func(r *record) { old = r.Backup })
	if !old.opens(current) {
		return refuse(http.StatusForbidden, "backup passphrase is incorrect.")
	}
	made := &backupRecord{Salt: random(16)}
	var err error
	if made.Key, err = backupKey(made.Salt, []byte(fresh)); err != nil {
		return crash(err.Error())
	}
	return x.configure(func(r *record, _ *nodeRecord) { r.Backup = made })
}

// opens says whether a passphrase is the one that was set; before one is set it is the empty one.
func (b *backupRecord) opens(passphrase string) bool {
	if b == nil {
		return passphrase == ""
	}
	key, err := backupKey(b.Salt, []byte(passphrase))
	return err == nil && hmac.Equal(key, b.Key)
}
