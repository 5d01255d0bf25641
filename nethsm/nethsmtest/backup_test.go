package nethsmtest

import (
	"bytes"
	"mime/multipart"
	"net/http"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/nethsm"
)

const backupLogin = BackupUser + ":" + BackupPassphrase

// restoring sends a backup file; login may be empty.
func restoring(t *testing.T, c *caller, url, login, arguments string, file []byte) (int, string) {
	t.Helper()
	var form bytes.Buffer
	w := multipart.NewWriter(&form)
	if err := w.WriteField("arguments", arguments); err != nil {
		t.Fatal(err)
	}
	part, err := w.CreateFormFile("backup_file", "backup")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := part.Write(file); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/api/v1/system/restore", &form)
	if err != nil {
		t.Fatal(err)
	}
	if user, passphrase, ok := strings.Cut(login, ":"); ok {
		r.SetBasicAuth(user, passphrase)
	}
	r.Header.Set("Content-Type", w.FormDataContentType())
	answer, err := c.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answer.Body.Close() }()
	var body bytes.Buffer
	if _, err := body.ReadFrom(answer.Body); err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, body.String()
}

func TestABackupIsRestored(t *testing.T) {
	h := Start(t, Options{Provisioned: true, FreshKeys: true})
	c, url := newCaller(t, h), h.URLs()[0]
	key := addRSA(t, h, "kept")
	if err := h.AddUser("ns~op", roleOperator, "NamespacePassphrase"); err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.AddKey(Key{ID: "ns~inside", Type: typeGeneric}); err != nil {
		t.Fatal(err)
	}
	const missing = `{"message":"Please configure backup key before doing a backup."}`
	if body := c.must(412, "POST", url+"/api/v1/system/backup", backupLogin, ""); body != missing {
		t.Errorf("without a passphrase: %s", body)
	}
	c.must(204, "PUT", url+"/api/v1/config/backup-passphrase", adminLogin,
		`{"newPassphrase":"`+BackupFilePassphrase+`","currentPassphrase":""}`)
	c.must(403, "POST", url+"/api/v1/system/backup", adminLogin, "")
	file := []byte(c.must(200, "POST", url+"/api/v1/system/backup", backupLogin, ""))

	t.Run("the client's own reader takes the file", func(t *testing.T) {
		if _, err := nethsm.ReadBackup(bytes.NewReader(file), []byte(BackupFilePassphrase)); err != nil {
			t.Error(err)
		}
	})
	arguments := `{"backupPassphrase":"` + BackupFilePassphrase + `","systemTime":"2026-01-01T00:00:00Z"}`
	secret := []byte("from before")
	request := encrypted(t, key, secret)
	t.Run("on a NetHSM from the factory", func(t *testing.T) {
		other := Start(t, Options{})
		c, url := newCaller(t, other), other.URLs()[0]
		for name, bad := range map[string]struct {
			arguments string
			file      []byte
			want      string
		}{
			"no backup":          {arguments, []byte("no backup at all"), "Not a NetHSM backup file"},
			"a wrong passphrase": {`{"backupPassphrase":"WrongPassphrase"}`, file, "authentication failed"},
			"half a file":        {arguments, file[:len(file)-30], "Unexpected end of data"},
			"no passphrase":      {`{}`, file, "No backupPassphrase provided"},
		} {
			if status, body := restoring(t, c, url, "", bad.arguments, bad.file); status != 400 || !strings.Contains(body, bad.want) {
				t.Errorf("%s: %d %s", name, status, body)
			}
		}
		if got := other.Node(0).State(); got != Unprovisioned {
			t.Fatalf("after attempts that failed: %s", got)
		}
		if status, body := restoring(t, c, url, "", arguments, file); status != 204 {
			t.Fatalf("restoring: %d %s", status, body)
		}
		if got := other.Node(0).State(); got != Locked {
			t.Fatalf("after restoring: %s", got)
		}
		c.must(204, "POST", url+"/api/v1/unlock", "", `{"passphrase":"`+UnlockPassphrase+`"}`)
		body := c.must(200, "POST", url+"/api/v1/keys/kept/decrypt", operatorLogin, request)
		if got := decrypted(t, body); !bytes.Equal(got, secret) {
			t.Errorf("the restored key decrypts %q", got)
		}
		c.must(200, "GET", url+"/api/v1/keys/inside", "ns~op:NamespacePassphrase", "")
	})
	t.Run("on the NetHSM that made it, which forgets what came later", func(t *testing.T) {
		addRSA(t, h, "later")
		if status, _ := restoring(t, c, url, "", arguments, file); status != 401 {
			t.Errorf("nobody may restore on an operational NetHSM: %d", status)
		}
		if status, body := restoring(t, c, url, adminLogin, `{}`, file); status != 204 {
			t.Fatalf("restoring: %d %s", status, body)
		}
		c.must(404, "GET", url+"/api/v1/keys/later", adminLogin, "")
		c.must(200, "POST", url+"/api/v1/keys/kept/decrypt", operatorLogin, request)
	})
	t.Run("on another NetHSM in use, which is then locked with the old passphrase", func(t *testing.T) {
		other := Start(t, Options{Provisioned: true, UnattendedBoot: true})
		c, url := newCaller(t, other), other.URLs()[0]
		addRSA(t, other, "gone")
		if status, body := restoring(t, c, url, adminLogin, arguments, file); status != 204 {
			t.Fatalf("restoring: %d %s", status, body)
		}
		if got := other.Node(0).State(); got != Locked {
			t.Fatalf("after restoring: %s", got)
		}
		c.must(204, "POST", url+"/api/v1/unlock", "", `{"passphrase":"`+UnlockPassphrase+`"}`)
		c.must(404, "GET", url+"/api/v1/keys/gone", adminLogin, "")
		if body := c.must(200, "GET", url+"/api/v1/config/unattended-boot", adminLogin, ""); body != `{"status":"off"}` {
			t.Errorf("unattended boot: %s", body)
		}
	})
}
