package nethsmtest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

func TestConfigurationIsKept(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/config/"
	for path, value := range map[string]string{
		"network":         `{"ipAddress":"192.0.2.7","netmask":"255.255.255.0","gateway":"192.0.2.1"}`,
		"logging":         `{"ipAddress":"192.0.2.9","port":515,"logLevel":"debug"}`,
		"unattended-boot": `{"status":"on"}`,
	} {
		c.must(204, "PUT", url+path, adminLogin, value)
		if got := c.must(200, "GET", url+path, adminLogin, ""); got != value {
			t.Errorf("%s is %s, set to %s", path, got, value)
		}
		c.must(400, "PUT", url+path, adminLogin, `{"what":"is this"}`)
		c.must(403, "GET", url+path, operatorLogin, "")
	}
	six := `{"ipAddress":"192.0.2.7","netmask":"255.255.255.0","gateway":"192.0.2.1","ipv6":{"cidr":"2001:db8::7/64","gateway":null}}`
	c.must(204, "PUT", url+"network", adminLogin, six)
	if got := c.must(200, "GET", url+"network", adminLogin, ""); got != six {
		t.Errorf("network is %s, set to %s", got, six)
	}
	c.must(204, "PUT", url+"time", adminLogin, `{"time":"2030-05-06T07:08:09Z"}`)
	if got := c.must(200, "GET", url+"time", adminLogin, ""); !strings.HasPrefix(got, `{"time":"2030-05-06T07:0`) {
		t.Errorf("the time is %s", got)
	}
	if got := c.must(400, "PUT", url+"time", adminLogin, `{"time":"2030-05-06T07:08:09+02:00"}`); got !=
		`{"message":"Error while parsing timestamp. Offset must be 0."}` {
		t.Errorf("a time of another zone: %s", got)
	}
	for _, bad := range []string{
		`{"newPassphrase":"short","currentPassphrase":"` + UnlockPassphrase + `"}`,
		`{"newPassphrase":"AnotherPassphrase","currentPassphrase":"short"}`,
	} {
		c.must(400, "PUT", url+"unlock-passphrase", adminLogin, bad)
	}
}

func TestATLSCertificateIsRequestedAndSet(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	n, c := h.Node(0), newCaller(t, h)
	url := n.URL() + "/api/v1/config/tls/"
	c.must(404, "GET", url+"cluster-ca.pem", adminLogin, "")
	block, _ := pem.Decode([]byte(c.must(200, "POST", url+"csr.pem", adminLogin, `{"commonName":"hsm.example","subjectAltNames":["127.0.0.1"]}`)))
	request, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil || request.CheckSignature() != nil || request.Subject.CommonName != "hsm.example" || len(request.IPAddresses) != 1 {
		t.Fatalf("the signing request: %+v (%v)", request, err)
	}
	public, ok := request.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		t.Fatalf("it asks for a %T", request.PublicKey)
	}
	template := certificate("hsm.example", time.Now())
	template.SerialNumber = big.NewInt(42)
	der, err := x509.CreateCertificate(rand.Reader, template, h.ca.certificate, public, h.ca.key)
	if err != nil {
		t.Fatal(err)
	}
	set := func(status int, body []byte) string {
		t.Helper()
		got, text := putPEM(t, c, url+"cert.pem", body)
		if got != status {
			t.Fatalf("setting a certificate: %d %s, want %d", got, text, status)
		}
		return text
	}
	set(400, []byte("no certificate"))
	if got := set(400, h.CA()); got != `{"message":"public key in certificate does not match private key."}` {
		t.Errorf("a certificate of another key: %s", got)
	}
	chain := encodePEM("CERTIFICATE", der)
	set(201, chain)
	if got := c.must(200, "GET", url+"cert.pem", adminLogin, ""); got != string(chain) {
		t.Error("another certificate came back")
	}
	if !bytes.Equal(n.Certificate(), chain) {
		t.Error("the listener shows another certificate")
	}
	if status, body := putPEM(t, c, url+"cluster-ca.pem", h.CA()); status != 201 {
		t.Errorf("setting the cluster's CA: %d %s", status, body)
	}
	c.must(204, "POST", url+"generate", adminLogin, `{"type":"EC_P384"}`)
	if _, _, err := newCaller(t, h).try("GET", n.URL()+"/api/v1/info", "", ""); err == nil {
		t.Error("after a new key the certificate is still one of the CA")
	}
}

func putPEM(t *testing.T, c *caller, url string, body []byte) (int, string) {
	t.Helper()
	return put(t, c, url, typePEM, bytes.NewReader(body))
}

func TestAContainerHasNoMachineToCommand(t *testing.T) {
	h := Start(t, Options{Provisioned: true, Container: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/"
	for _, path := range []string{"system/reboot", "system/shutdown", "system/factory-reset", "system/update"} {
		c.must(500, "POST", url+path, adminLogin, "")
	}
	c.must(500, "PUT", url+"config/network", adminLogin,
		`{"ipAddress":"192.0.2.7","netmask":"255.255.255.0","gateway":"192.0.2.1"}`)
	if got := h.Node(0).State(); got != Operational {
		t.Errorf("it is %s now", got)
	}
}

func TestAShutdownEndsTheNodeAndNotItsData(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	n, c := h.Node(0), newCaller(t, h)
	c.must(204, "POST", n.URL()+"/api/v1/system/shutdown", adminLogin, "")
	until(t, func() bool {
		_, _, err := c.try("GET", n.URL()+"/api/v1/info", "", "")
		return err != nil
	})
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	if got := n.State(); got != Locked {
		t.Errorf("switched on again it is %s", got)
	}
}

func TestAnUpdateIsUploadedAndInstalledOrDropped(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/system/"
	image := func(version string) string {
		return updateHeader + string(lengthField([]byte("signature"))) + string(lengthField([]byte("what is new"))) +
			string(lengthField([]byte(version))) + "image"
	}
	c.must(412, "POST", url+"commit-update", adminLogin, "")
	c.must(400, "POST", url+"update", adminLogin, "no image")
	c.must(409, "POST", url+"update", adminLogin, image("4.0"))
	if got := c.must(200, "POST", url+"update", adminLogin, image("5.1")); got != `{"releaseNotes":"what is new"}` {
		t.Errorf("uploading answered %s", got)
	}
	c.must(204, "POST", url+"cancel-update", adminLogin, "")
	c.must(412, "POST", url+"cancel-update", adminLogin, "")
	c.must(200, "POST", url+"update", adminLogin, image("5.1"))
	c.must(204, "POST", url+"commit-update", adminLogin, "")
	if got := h.Node(0).State(); got != Locked {
		t.Errorf("after an update it is %s", got)
	}
}

func TestEachRoleMayWhatItMay(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/"
	addRSA(t, h, "one")
	if err := h.AddUser("ns~admin", roleAdministrator, "NamespacePassphrase"); err != nil {
		t.Fatal(err)
	}
	logins := map[string]string{
		"admin": adminLogin, "operator": operatorLogin, "metrics": MetricsUser + ":" + MetricsPassphrase,
		"backup": backupLogin, "ns~admin": "ns~admin:NamespacePassphrase",
	}
	for _, test := range []struct{ method, path, may string }{
		{"GET", "keys", "admin operator ns~admin"},
		{"GET", "keys/one", "admin operator"},
		{"GET", "keys/one/public.pem", "admin operator"},
		{"GET", "keys/one/cert", "admin operator"},
		{"GET", "users", "admin ns~admin"},
		{"GET", "namespaces", "admin"},
		{"GET", "metrics", "metrics"},
		{"GET", "system/info", "admin"},
		{"GET", "config/time", "admin"},
		{"GET", "cluster/members", "admin"},
		{"POST", "random", "operator"},
		{"POST", "keys/one/sign", "operator"},
		{"POST", "system/backup", "backup"},
		{"DELETE", "keys/nothing", "admin ns~admin"},
	} {
		for name, login := range logins {
			status, _, err := c.try(test.method, url+test.path, login, "{}")
			if err != nil {
				t.Fatal(err)
			}
			allowed := strings.Contains(" "+test.may+" ", " "+name+" ")
			if name == "ns~admin" && status == 404 {
				continue // the key is of another namespace
			}
			if allowed == (status == 403) {
				t.Errorf("%s %s as %s: %d", test.method, test.path, name, status)
			}
		}
	}
}

func TestMetricsAreTexts(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c := newCaller(t, h)
	var metrics map[string]string
	body := c.must(200, "GET", h.URLs()[0]+"/api/v1/metrics", MetricsUser+":"+MetricsPassphrase, "")
	if err := json.Unmarshal([]byte(body), &metrics); err != nil || metrics["uptime"] == "" {
		t.Errorf("metrics are %s (%v)", body, err)
	}
}

func TestUsersLookAfterThemselves(t *testing.T) {
	h := Start(t, Options{Provisioned: true})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/users"
	c.must(400, "DELETE", url+"/admin", adminLogin, "")
	c.must(204, "POST", url+"/operator/passphrase", operatorLogin, `{"passphrase":"AnotherPassphrase"}`)
	c.must(200, "GET", url+"/operator", "operator:AnotherPassphrase", "")
	c.must(403, "POST", url+"/admin/passphrase", "operator:AnotherPassphrase", `{"passphrase":"AnotherPassphrase"}`)
	c.must(400, "PUT", url+"/admin/tags/t1", adminLogin, `{}`)
	c.must(404, "GET", url+"/admin/tags", adminLogin, "")
	c.must(204, "PUT", url+"/operator/tags/t1", adminLogin, `{}`)
	c.must(304, "PUT", url+"/operator/tags/t1", adminLogin, `{}`)
	c.must(204, "DELETE", url+"/operator/tags/t1", adminLogin, "")
	c.must(404, "DELETE", url+"/operator/tags/t1", adminLogin, "")
	var made idItem
	body := c.must(201, "POST", url+"/new~", adminLogin, `{"realName":"n","role":"Administrator","passphrase":"NamespacePassphrase"}`)
	if err := json.Unmarshal([]byte(body), &made); err != nil || !strings.HasPrefix(made.ID, "new~") {
		t.Errorf("a user of a new namespace: %s", body)
	}
	c.must(403, "GET", url+"/"+made.ID, made.ID+":NamespacePassphrase", "")
	c.must(204, "PUT", h.URLs()[0]+"/api/v1/namespaces/new", adminLogin, `{}`)
	c.must(200, "GET", url+"/"+made.ID, made.ID+":NamespacePassphrase", "")
	c.must(403, "DELETE", url+"/"+made.ID, adminLogin, "")
}
