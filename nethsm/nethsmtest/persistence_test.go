package nethsmtest

import (
	"bytes"
	"crypto/rsa"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWhatWasStoredSurvives(t *testing.T) {
	dir := t.TempDir()
	h, err := Serve(Options{Provisioned: true, Dir: dir, Nodes: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	_, public, err := h.AddKey(Key{ID: "kept", Label: "a label", Tags: []string{"t1"}})
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, ok := public.(*rsa.PublicKey)
	if !ok {
		t.Fatalf("the public key is a %T", public)
	}
	if err := h.AddUser("ns~op", roleOperator, "NamespacePassphrase"); err != nil {
		t.Fatal(err)
	}
	c := newCaller(t, h)
	url := h.URLs()[0] + "/api/v1/"
	c.must(204, "PUT", url+"users/operator/tags/t1", adminLogin, `{}`)
	secret := []byte("kept secret")
	request := encrypted(t, rsaKey, secret)
	decrypts := func(when string) {
		t.Helper()
		body := c.must(200, "POST", url+"keys/kept/decrypt", operatorLogin, request)
		if got := decrypted(t, body); !bytes.Equal(got, secret) {
			t.Fatalf("%s it decrypts %q", when, got)
		}
	}
	decrypts("at first")

	// A restart locks one node and leaves the other alone.
	if err := h.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	if h.Node(0).State() != Locked || h.Node(1).State() != Operational {
		t.Fatalf("after a restart of the first: %s, %s", h.Node(0).State(), h.Node(1).State())
	}
	c.client.CloseIdleConnections() // a POST on a connection that just broke is not sent again
	c.must(412, "POST", url+"keys/kept/decrypt", operatorLogin, request)
	c.must(204, "POST", url+"unlock", "", `{"passphrase":"`+UnlockPassphrase+`"}`)
	decrypts("after a restart")
	c.must(204, "PUT", url+"config/unattended-boot", adminLogin, `{"status":"on"}`)
	pin, ca := h.Node(0).Pin(), h.CA()
	h.Close()

	// So does a new process, but for the node with unattended boot.
	h, err = Serve(Options{Dir: dir, Nodes: 2})
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if h.Node(0).Pin() != pin || !bytes.Equal(h.CA(), ca) {
		t.Error("certificates changed")
	}
	if h.Node(0).State() != Operational || h.Node(1).State() != Locked {
		t.Fatalf("after a new start: %s, %s", h.Node(0).State(), h.Node(1).State())
	}
	c, url = newCaller(t, h), h.URLs()[0]+"/api/v1/"
	decrypts("after a new start")
	body := c.must(200, "GET", url+"keys/kept", operatorLogin, "")
	if !strings.Contains(body, `"operations":3,`) || !strings.Contains(body, `"label":"a label"`) {
		t.Errorf("the key is now %s", body)
	}
	c.must(200, "GET", url+"users/ns~op", "ns~op:NamespacePassphrase", "")
}

func TestNoPassphraseIsWrittenDown(t *testing.T) {
	dir := t.TempDir()
	h := Start(t, Options{Provisioned: true, Dir: dir})
	c := newCaller(t, h)
	c.must(204, "PUT", h.URLs()[0]+"/api/v1/config/backup-passphrase", adminLogin,
		`{"newPassphrase":"`+BackupFilePassphrase+`","currentPassphrase":""}`)
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the directory holds %v (%v)", files, err)
	}
	info, err := os.Stat(files[0])
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the database has mode %v (%v)", info.Mode(), err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, passphrase := range []string{
		OperatorPassphrase, UnlockPassphrase, BackupFilePassphrase, MetricsPassphrase, BackupPassphrase,
	} {
		if bytes.Contains(data, []byte(passphrase)) || bytes.Contains(data, []byte(b64([]byte(passphrase)))) {
			t.Errorf("the database holds %q", passphrase)
		}
	}
}

func TestWhatCannotBeWrittenDownIsNotAcknowledged(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "gone")
	h := Start(t, Options{Provisioned: true, Dir: dir})
	c, url := newCaller(t, h), h.URLs()[0]
	for _, id := range []string{"one", "two", "three"} {
		if _, _, err := h.AddKey(Key{ID: id, Type: typeGeneric}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	user := `{"realName":"x","role":"Operator","passphrase":"OperatorPassphrase"}`
	for _, q := range []asked{
		{method: "POST keys/generate", body: generic + "}"},
		{method: "PUT keys/one/label", body: `{"label":"x"}`},
		{method: "PUT keys/one/restrictions/tags/t"},
		{method: "PUT keys/one/cert", body: "x", header: "Content-Type: " + typeBytes},
		{method: "POST keys/two/move", body: `{"newId":"four"}`},
		{method: "DELETE keys/three"},
		{method: "PUT users/new", body: user},
		{method: "PUT users/operator/tags/t"},
		{method: "POST users/operator/passphrase", body: `{"passphrase":"AnotherPassphrase"}`},
		{method: "DELETE users/metrics"},
		{method: "PUT namespaces/ns"},
		{method: "PUT config/unattended-boot", body: `{"status":"on"}`},
	} {
		q.login, q.status, q.answer = adminLogin, 500, "Could not write to database. Check logs."
		c.holds(url, []asked{q})
	}
}

func TestADamagedDatabaseIsRefused(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, databaseFile), []byte("{half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Options{Dir: dir}); err == nil {
		t.Fatal("it was taken")
	}
}

func TestDoublesThatAreOpenTogetherShareNoKey(t *testing.T) {
	seen := map[string]bool{}
	for range 3 {
		h := Start(t, Options{Provisioned: true})
		for range 2 {
			_, public, err := h.AddKey(Key{})
			if err != nil {
				t.Fatal(err)
			}
			key, ok := public.(*rsa.PublicKey)
			if !ok || seen[key.N.String()] {
				t.Fatalf("a second key is the first one again (%T)", public)
			}
			seen[key.N.String()] = true
		}
	}
}
