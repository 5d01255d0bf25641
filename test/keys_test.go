package test

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/hsm/pkcs11/pkcs11test"
	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestEveryAlgorithmWrapsAndUnwraps(t *testing.T) {
	site := vaulttest.StartSite(t, vaulttest.SiteOptions{})
	site.AddDevice(t, "hsm")
	for _, algorithm := range []string{"rsa-2048", "rsa-3072", "rsa-4096", "ecdh-p256", "ecdh-p384"} {
		t.Run(algorithm, func(t *testing.T) {
			site.AddKey(t, algorithm, "hsm", algorithm)
			wrapped := site.Wrap(t, algorithm, secret)
			site.MustUnwrap(t, algorithm, wrapped, secret)
		})
	}
	t.Run("a key made by pkcs11-tool is adopted, and warned about", func(t *testing.T) {
		site.Token.GenerateKey(t, "rsa:2048", "by-hand", "42")
		answer, err := site.Client(t).Logical().Write("nitrokey/keys/adopted", vaulttest.Fields{"device": "hsm", "key_label": "by-hand"})
		if err != nil {
			t.Fatal(err)
		}
		if len(answer.Warnings) == 0 {
			t.Errorf("a key that also signs was adopted without a warning: %v", answer.Data)
		}
		site.MustUnwrap(t, "adopted", site.Wrap(t, "adopted", secret), secret)
	})
}

func TestRotationAndRewrap(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	site.Write(t, "nitrokey/keys/prod/rotate", vaulttest.Fields{"generate": true})
	site.WaitKey(t, "prod", 2)
	site.MustUnwrap(t, "prod", wrapped, secret)

	answer := site.Write(t, "nitrokey/rewrap/prod", vaulttest.Fields{"ciphertext": wrapped})
	rewrapped := answer["ciphertext"].(string)
	if fmt.Sprint(answer["key_version"]) != "2" {
		t.Errorf("rewrapped with version %v", answer["key_version"])
	}
	site.MustUnwrap(t, "prod", rewrapped, secret)

	site.Write(t, "nitrokey/keys/prod", vaulttest.Fields{"min_decryption_version": 2})
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusBadRequest, "version")
	site.MustUnwrap(t, "prod", rewrapped, secret)
}

// A client of Vault's own library sends a write three times where it is answered with 5xx, and an operator who got no
// answer sends it again. That must not make three keys.
func TestARotationSentThreeTimesMakesOneHSMKey(t *testing.T) {
	cluster := etcdtest.Start(t, 1)
	site, _ := newSite(t, vaulttest.SiteOptions{})
	addEtcd(t, site, "etcd", cluster)
	putMaterial(t, site, "etcd", "eu", "shares")
	before := hsmKeys(t, site)

	cluster.Kill(t, 0)
	client := site.Client(t)
	client.SetMaxRetries(2) // as in api.DefaultConfig
	for range 3 {
		// The store may be needed or not: what counts is what the HSM holds in the end.
		_, err := client.Logical().Write("nitrokey/keys/prod/rotate", map[string]any{"generate": true, "request_id": "sunday"})
		if err != nil {
			t.Logf("rotating while the store is down: %v", err)
		}
	}
	site.WaitKey(t, "prod", 2)
	if made := hsmKeys(t, site) - before; made != 1 {
		t.Errorf("three sends made %d HSM keys", made)
	}
	cluster.Restart(t, 0)
	openMaterial(t, site, "eu", "shares")
	if versions := site.Read(t, "nitrokey/keys/prod")["versions"].([]any); len(versions) != 2 {
		t.Errorf("three sends made %d versions", len(versions)-1)
	}
}

// The same without an operator who gives a request_id, and with a client that repeats by itself because something between
// it and Vault lost the answers. The HSM takes its time meanwhile, as a card does.
func TestARotationThatTheClientRepeatsMakesOneHSMKey(t *testing.T) {
	card := pkcs11test.Card(t)
	site, wrapped := newSite(t, vaulttest.SiteOptions{Token: &card.Token})
	before := hsmKeys(t, site)
	target, err := url.Parse(site.Address)
	must(t, err)
	lost := 0 // answers; the client sends one request at a time
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport: site.Client(t).CloneConfig().HttpClient.Transport,
		ModifyResponse: func(answer *http.Response) error {
			if answer.StatusCode != http.StatusOK {
				t.Errorf("Vault answered %s", answer.Status)
			}
			if lost < 2 {
				lost++
				return errors.New("lost")
			}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	server := httptest.NewServer(proxy)
	defer server.Close()
	client := site.Client(t)
	must(t, client.SetAddress(server.URL))
	client.SetMaxRetries(2) // as in api.DefaultConfig

	card.Fault(t, pkcs11test.Freezes("C_GenerateKeyPair"))
	if _, err := client.Logical().Write("nitrokey/keys/prod/rotate", map[string]any{"generate": true}); err != nil || lost != 2 {
		t.Fatalf("rotating: %v, after %d lost answers", err, lost)
	}
	card.Mend(t, pkcs11test.Freezes("C_GenerateKeyPair"))
	site.WaitKey(t, "prod", 2)
	if made := hsmKeys(t, site) - before; made != 1 {
		t.Errorf("three sends made %d HSM keys", made)
	}
	site.MustUnwrap(t, "prod", wrapped, secret)
}

// hsmKeys counts the private keys on the token with a tool that is not ours.
func hsmKeys(t *testing.T, site *vaulttest.Site) int {
	t.Helper()
	return strings.Count(site.Token.Tool(t, "--list-objects", "--type", "privkey"), "Private Key Object")
}

func TestAKeyRecordBringsAKeyBackIntoANewMount(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	backup := site.Read(t, "nitrokey/keys/prod/backup")
	record, sum := backup["key_record"].(string), backup["sha256"].(string)
	if strings.Contains(record, site.Token.PIN) {
		t.Error("the key record holds the PIN")
	}

	must(t, site.Client(t).Sys().Unmount("nitrokey"))
	site.Enable(t, "nitrokey", "")
	site.AddDevice(t, "hsm")
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusNotFound)
	site.Refused(t, "nitrokey/keys/prod/restore", vaulttest.Fields{"key_record": record}, http.StatusBadRequest, "sha256")
	site.Refused(t, "nitrokey/keys/prod/restore",
		vaulttest.Fields{"key_record": record, "sha256": strings.Repeat("0", 64)}, http.StatusBadRequest)
	site.Write(t, "nitrokey/keys/prod/restore", vaulttest.Fields{"key_record": record, "sha256": sum})
	site.MustUnwrap(t, "prod", wrapped, secret)
}

func TestBadRequestsAreAnsweredWithWhatToDo(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	damaged := strings.Replace(wrapped, `"tag":"`, `"tag":"A`, 1)
	for name, test := range map[string]struct {
		path   string
		fields vaulttest.Fields
		code   int
		words  []string
	}{
		"an unknown field": {
			"wrap/prod",
			vaulttest.Fields{"plaintext": "aGk=", "plain_text": "aGk="},
			http.StatusBadRequest,
			[]string{"plain_text"},
		},
		"no base64":               {"wrap/prod", vaulttest.Fields{"plaintext": "no base64"}, http.StatusBadRequest, []string{"base64"}},
		"no plaintext":            {"wrap/prod", nil, http.StatusBadRequest, []string{"plaintext"}},
		"too much plaintext":      {"wrap/prod", vaulttest.Fields{"plaintext": vaulttest.Base64(strings.Repeat("x", 64<<10+1))}, http.StatusBadRequest, []string{"too large"}},
		"a key that is not there": {"wrap/other", vaulttest.Fields{"plaintext": "aGk="}, http.StatusNotFound, []string{"other"}},
		"a damaged envelope":      {"unwrap/prod", vaulttest.Fields{"ciphertext": damaged}, http.StatusBadRequest, nil},
		"half an envelope":        {"unwrap/prod", vaulttest.Fields{"ciphertext": wrapped[:len(wrapped)/2]}, http.StatusBadRequest, nil},
		"another context":         {"unwrap/prod", vaulttest.Fields{"ciphertext": wrapped, "context": "b3RoZXI="}, http.StatusBadRequest, []string{"context"}},
		"the wrong entrance":      {"decrypt/prod", vaulttest.Fields{"ciphertext": "vault:v1:" + vaulttest.Base64(wrapped)}, http.StatusBadRequest, nil},
		"no such path":            {"wrapp/prod", vaulttest.Fields{"plaintext": "aGk="}, http.StatusNotFound, []string{"wrap"}},
		"a PIN file outside":      {"devices/other", vaulttest.Fields{"type": "pkcs11", "module": site.Token.Module, "token_label": "x", "pin_file": "/etc/passwd"}, http.StatusBadRequest, []string{"secrets directory"}},
		"another module, no PIN":  {"devices/hsm", vaulttest.Fields{"token_label": "elsewhere"}, http.StatusBadRequest, []string{"token_label"}},
		"an HSM key not there":    {"keys/other", vaulttest.Fields{"device": "hsm", "key_label": "nowhere"}, http.StatusBadRequest, []string{"nowhere"}},
		"a module not allowed": {
			"devices/other",
			vaulttest.Fields{"type": "pkcs11", "module": "/usr/lib/other.so", "token_label": "x", "pin": "123456"},
			http.StatusBadRequest,
			[]string{"-pkcs11-module"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			site.Refused(t, "nitrokey/"+test.path, test.fields, test.code, test.words...)
		})
	}
	site.MustUnwrap(t, "prod", wrapped, secret)
}

func TestAPolicyMayAllowMaterialToBeKeptButNotOpened(t *testing.T) {
	site, _ := newSite(t, vaulttest.SiteOptions{})
	site.Write(t, "nitrokey/stores/own", vaulttest.Fields{"type": "vault"})
	putMaterial(t, site, "own", "eu", "shares")
	must(t, site.Client(t).Sys().PutPolicy("keeper", `
		path "nitrokey/material/*"      { capabilities = ["create", "read", "update", "list"] }
		path "nitrokey/material/+/+/open" { capabilities = ["deny"] }
		path "nitrokey/wrap/*"          { capabilities = ["update"] }`))
	token, err := site.Client(t).Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{"keeper"}})
	must(t, err)
	keeper := site.ClientWithToken(t, token.Auth.ClientToken).Logical()

	if _, err := keeper.Read("nitrokey/material/eu/shares"); err != nil {
		t.Errorf("reading the metadata: %v", err)
	}
	if _, err := keeper.Write("nitrokey/wrap/prod", map[string]any{"plaintext": "aGk="}); err != nil {
		t.Errorf("wrapping: %v", err)
	}
	for path, fields := range map[string]map[string]any{
		"nitrokey/material/eu/shares/open": nil,
		"nitrokey/unwrap/prod":             {"ciphertext": "{}"},
	} {
		if _, err := keeper.Write(path, fields); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("%s with the keeper's token: %v", path, err)
		}
	}
	openMaterial(t, site, "eu", "shares")
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// materialFields are what putMaterial keeps: values that stand nowhere by chance.
var materialFields = map[string]string{
	"key_1": "first share 5f1c", "key_2": "second share 08aa", "key_3": "third share e7d2", "key_4": "fourth share 61b9", "key_5": "fifth share c330",
}

func putMaterial(t *testing.T, site *vaulttest.Site, store, cluster, name string) {
	t.Helper()
	encoded := map[string]string{}
	for field, value := range materialFields {
		encoded[field] = vaulttest.Base64(value)
	}
	site.Write(t, "nitrokey/material/"+cluster+"/"+name, vaulttest.Fields{"key": "prod", "store": store, "fields": encoded})
}

// openMaterial opens what putMaterial kept and compares it.
func openMaterial(t *testing.T, site *vaulttest.Site, cluster, name string) {
	t.Helper()
	answer := site.Write(t, "nitrokey/material/"+cluster+"/"+name+"/open", nil)
	compareMaterial(t, answer)
}

func compareMaterial(t *testing.T, answer vaulttest.Fields) {
	t.Helper()
	got, _ := answer["fields"].(map[string]any)
	for _, field := range slices.Sorted(maps.Keys(materialFields)) {
		if got[field] != vaulttest.Base64(materialFields[field]) {
			t.Errorf("field %s opened as %v", field, got[field])
		}
	}
	if len(got) != len(materialFields) {
		t.Errorf("opened %d fields: %v", len(got), got)
	}
}
