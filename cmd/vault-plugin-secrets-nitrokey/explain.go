package main

import (
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	"path/filepath"

	"vault-plugin-secrets-nitrokey/backend"
)

const explanation = `This is a plugin for HashiCorp Vault and OpenBao, %[1]s: a secrets engine that keeps unseal keys under an HSM, and for
OpenBao 2.6 and later a seal. Vault or OpenBao starts it; there is nothing to run by hand. To register this very file as a
secrets engine:

  1. Copy it into the plugin_directory of Vault's configuration:

       install -m 755 %[2]s PLUGIN_DIRECTORY/%[3]s

  2. Register it, with the PKCS#11 modules that it may load (for a NetHSM -nethsm-url=URL of each node instead), and
     enable it:

       vault plugin register -sha256=%[4]s \
         -version=%[1]s -command=%[3]s \
         -args=-pkcs11-module=/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so \
         -args=-secrets-dir=/etc/nitroseal -args=-state-dir=/var/lib/nitroseal \
         secret vault-plugin-secrets-nitrokey
       vault secrets enable -path=nitrokey vault-plugin-secrets-nitrokey

     The hash is of this file as it is now: compare it with the published one before you trust it.

  3. vault path-help nitrokey   explains the rest.

With OpenBao say bao for vault. As the seal of OpenBao, declare it in the server's configuration (docs/openbao.md says what
the seal stanza holds):

       plugin "kms" "nitrokey" {
         command   = "%[3]s"
         sha256sum = "%[4]s"
         args      = ["-pkcs11-module=/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so",
                      "-secrets-dir=/etc/nitroseal", "-state-dir=/var/lib/nitroseal"]
       }

-help lists the arguments.
`

// explain tells a person who started the plugin by hand what it is and how to register it, or to declare it as a seal.
func explain(w io.Writer) {
	path, sum := "vault-plugin-secrets-nitrokey", "SHA256_OF_THIS_FILE"
	if own, err := os.Executable(); err == nil {
		path = own
		if hashed, err := hashFile(own); err == nil {
			sum = hashed
		}
	}
	say(w, explanation, backend.Version, path, filepath.Base(path), sum)
}

func hashFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}
