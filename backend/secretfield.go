package backend

import (
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
)

// secretField reads a PIN, passphrase or password. "vault write pin=-" and pin=@FILE send the line break at the end of
// what they read: it is taken off, as it is of a secret file, else a PIN would be set that no other tool can send. Any
// other control character, and a secret of blanks alone, is an accident of the same kind. Where the field is not given
// the result is empty.
func secretField(data *framework.FieldData, field string) (string, error) {
	secret := data.Get(field).(string)
	if secret == "" {
		return "", nil
	}
	secret = strings.TrimSuffix(strings.TrimSuffix(secret, "\n"), "\r")
	switch {
	case strings.TrimSpace(secret) == "":
		return "", mistake("%s holds nothing but blanks; was the file empty, or nothing typed?", field)
	case strings.ContainsFunc(secret, isControl):
		return "", mistake("%s holds a control character, a line break or a tab for example, that other programs could not send; give it "+
			"without (one line break at the end is taken off, as of a file)", field)
	}
	return secret, nil
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }
