package nethsm

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// Whatever prints a value that holds a secret prints none.
func TestSecretsAreNeverPrinted(t *testing.T) {
	const word = "correct horse"
	secret := Secret(word)
	values := map[string]any{
		"Secret":       secret,
		"*Secret":      &secret,
		"Credentials":  Credentials{"operator", secret},
		"*Credentials": &Credentials{"operator", secret},
		"a list":       []Credentials{{"operator", secret}},
		"a map":        map[string]Credentials{"a": {"operator", secret}},
		"Provisioning": Provisioning{UnlockPassphrase: secret, AdminPassphrase: secret},
		"NewUser":      NewUser{"Op", RoleOperator, secret},
		"Restoration":  Restoration{Passphrase: secret},
		"JoinKit":      JoinKit{Kit: secret},
		"ImportedKey":  ImportedKey{Private: secret},
	}
	printed := func(t *testing.T, how, text string) {
		t.Helper()
		for _, form := range []string{
			word, fmt.Sprintf("%x", word), fmt.Sprintf("%X", word), fmt.Sprintf("% x", word), fmt.Sprintf("%v", []byte(word)),
			strings.Trim(fmt.Sprintf("%v", []byte(word)), "[]"), strings.Trim(fmt.Sprintf("%#v", []byte(word)), "[]byte{}"),
			fmt.Sprintf("%o", []byte(word)), fmt.Sprintf("%b", []byte(word)), "Y29ycmVjdCBob3JzZQ",
		} {
			if strings.Contains(text, form) {
				t.Errorf("%s prints %q", how, text)
			}
		}
	}
	for name, value := range values {
		t.Run(name, func(t *testing.T) {
			for _, verb := range []string{ // but for %p, which asks no method
				"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "% x", "%#x", "%d", "%o", "%b", "%c", "%U", "%t", "%e", "%10.3s",
			} {
				printed(t, verb, fmt.Sprintf(verb, value))
			}
			printed(t, "Sprint", fmt.Sprint(value))
			for how, handler := range map[string]func(*bytes.Buffer) slog.Handler{
				"slog's text": func(out *bytes.Buffer) slog.Handler { return slog.NewTextHandler(out, nil) },
				"slog's JSON": func(out *bytes.Buffer) slog.Handler { return slog.NewJSONHandler(out, nil) },
			} {
				var out bytes.Buffer
				slog.New(handler(&out)).InfoContext(t.Context(), "message", "value", value, slog.Group("group", "value", value))
				printed(t, how, out.String())
			}
			if text, err := json.Marshal(value); err == nil {
				printed(t, "json", string(text))
			}
			if text, err := xml.Marshal(value); err == nil {
				printed(t, "xml", string(text))
			}
		})
	}
}

// A secret is a slice of bytes to those who ask.
func TestSecretIsItsBytes(t *testing.T) {
	secret := Secret("correct horse")
	if string(secret) != "correct horse" || fmt.Sprint(secret) != "[secret]" {
		t.Errorf("string(secret) = %q, printed %v", string(secret), secret)
	}
	clear(secret)
	if !bytes.Equal(secret, make([]byte, 13)) {
		t.Errorf("cleared, it is %q", string(secret))
	}
}
