package test

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/internal/store/etcd/etcdtest"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// Users of the NetHSMs here, with secrets that stand nowhere by chance.
const (
	netOperator      = "seal-operator"
	netAdmin         = "seal-admin"
	netPassword      = "planted operator password"
	netAdminPassword = "planted admin password"
	netPassphrase    = nethsmtest.UnlockPassphrase
)

// startNetHSM runs a NetHSM of some nodes, with our users.
func startNetHSM(t *testing.T, nodes int) *nethsmtest.HSM {
	t.Helper()
	netHSM := nethsmtest.Start(t, nethsmtest.Options{Nodes: nodes, Provisioned: true})
	must(t, netHSM.AddUser(netOperator, "Operator", netPassword))
	must(t, netHSM.AddUser(netAdmin, "Administrator", netAdminPassword))
	return netHSM
}

// netFields configure a NetHSM as a device, with changes; nil leaves a field out.
func netFields(netHSM *nethsmtest.HSM, changes vaulttest.Fields) vaulttest.Fields {
	fields := vaulttest.Fields{
		"type": "nethsm", "urls": strings.Join(netHSM.URLs(), ","), "ca_cert": string(netHSM.CA()),
		"username": netOperator, "password": netPassword, "admin_username": netAdmin, "admin_password": netAdminPassword,
		"request_timeout": "5s",
	}
	for field, value := range changes {
		if value == nil {
			delete(fields, field)
		} else {
			fields[field] = value
		}
	}
	return fields
}

// newNetSite is newSite with a NetHSM, for a plugin that knows of no PKCS#11 module.
func newNetSite(
	t *testing.T, build vaulttest.Build, netHSM *nethsmtest.HSM, changes vaulttest.Fields,
) (site *vaulttest.Site, wrapped string) {
	t.Helper()
	site = vaulttest.StartSite(t, vaulttest.SiteOptions{Build: build, NoToken: true})
	site.Write(t, "nitrokey/devices/hsm", netFields(netHSM, changes))
	site.AddKey(t, "prod", "hsm", "rsa-2048")
	wrapped = site.Wrap(t, "prod", secret)
	site.MustUnwrap(t, "prod", wrapped, secret)
	return site, wrapped
}

// TestNetHSMDoesTheMainJob: wrap, unwrap, serve a seal, keep in etcd and on the NetHSM, restart, open. The plugin has no
// cgo, no PKCS#11 module and starts no process.
func TestNetHSMDoesTheMainJob(t *testing.T) {
	cluster, netHSM := etcdtest.Start(t, 1), startNetHSM(t, 3)
	site, wrapped := newNetSite(t, vaulttest.Build{NoCGO: true}, netHSM, vaulttest.Fields{"object_store": true, "unlock_passphrase": netPassphrase})
	addEtcd(t, site, "etcd", cluster)
	site.Write(t, "nitrokey/stores/netHSM", vaulttest.Fields{"type": "object", "device": "hsm", "check": true})
	stores := map[string]string{"etcd": "in-etcd", "netHSM": "on-nethsm"}
	for store, item := range stores {
		putMaterial(t, site, store, "eu", item)
		openMaterial(t, site, "eu", item)
		putMaterial(t, site, store, "eu", item) // a second generation
		openMaterial(t, site, "eu", item)
	}
	sealed := site.Write(t, "nitrokey/encrypt/prod", vaulttest.Fields{"plaintext": vaulttest.Base64(secret)})["ciphertext"]
	if opened := site.Write(t, "nitrokey/decrypt/prod", vaulttest.Fields{"ciphertext": sealed})["plaintext"]; opened != vaulttest.Base64(secret) {
		t.Errorf("decrypt answered %v", opened)
	}
	if random := site.Write(t, "nitrokey/random", vaulttest.Fields{"bytes": 16, "format": "hex"})["random_bytes"].(string); len(random) != 32 {
		t.Errorf("random = %q", random)
	}
	if hosts := site.Hosts(); len(hosts) != 0 {
		t.Errorf("module hosts run: %v", hosts)
	}

	status := site.Read(t, "nitrokey/devices/hsm/status")
	nodes, _ := status["nodes"].([]any)
	if status["usable"] != true || status["state"] != "operational" || len(nodes) != 3 {
		t.Errorf("status = %v", status)
	}
	for i, node := range nodes {
		shown := vaulttest.Fields(node.(map[string]any))
		if shown["url"] != netHSM.URLs()[i] || shown["state"] != "operational" || shown["error"] != "" || shown["firmware"] == "" ||
			shown["certificate_ends"] == "" || fmt.Sprint(shown["round_trip_ms"]) == "0" {
			t.Errorf("node %d is shown as %v", i, shown)
		}
	}
	health := site.Read(t, "nitrokey/health")
	if shown := health["devices"].(map[string]any)["hsm"].(map[string]any); shown["usable"] != true || len(shown["nodes"].([]any)) != 3 {
		t.Errorf("health = %v", shown)
	}
	for _, path := range []string{"devices/hsm", "devices/hsm/status", "stores/netHSM", "keys/prod", "health"} {
		shown := fmt.Sprint(site.Read(t, "nitrokey/"+path))
		for _, never := range []string{netPassword, netAdminPassword, netPassphrase} {
			if strings.Contains(shown, never) {
				t.Errorf("%s shows %q", path, never)
			}
		}
	}

	site.Restart(t)
	site.MustUnwrap(t, "prod", wrapped, secret)
	for _, item := range stores {
		openMaterial(t, site, "eu", item)
	}
	before := netHSM.DecryptCount()
	site.MustUnwrap(t, "prod", wrapped, secret)
	site.Wrap(t, "prod", secret)
	if spent := netHSM.DecryptCount() - before; spent != 1 {
		t.Errorf("opening once and sealing once cost %d operations", spent)
	}
	nowhereOnDisk(t, site, netPassword, netAdminPassword, netPassphrase)
}

func TestNetHSMOnABadDay(t *testing.T) {
	netHSM := startNetHSM(t, 3)
	site, wrapped := newNetSite(t, vaulttest.Build{}, netHSM, nil)
	refused := func(words ...string) {
		t.Helper()
		site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusServiceUnavailable, words...)
	}

	t.Run("one node of three is down", func(t *testing.T) {
		netHSM.Node(0).Stop()
		defer func() { must(t, netHSM.Node(0).Start()) }()
		for range 4 {
			site.MustUnwrap(t, "prod", wrapped, secret)
		}
		status := freshStatus(t, site)
		if first := status["nodes"].([]any)[0].(map[string]any); status["usable"] != true || first["state"] != "absent" || first["error"] == "" {
			t.Errorf("status = %v", status)
		}
	})
	t.Run("one hangs", func(t *testing.T) {
		netHSM.Node(1).SetHang(true)
		defer netHSM.Node(1).SetHang(false)
		site.MustUnwrap(t, "prod", wrapped, secret)
	})
	t.Run("one has lost its database, and calls the right password wrong", func(t *testing.T) {
		netHSM.Node(2).LoseEtcd()
		defer netHSM.Node(2).ReturnEtcd()
		for range 6 {
			site.MustUnwrap(t, "prod", wrapped, secret)
		}
	})
	t.Run("all are down, and return", func(t *testing.T) {
		for _, node := range netHSM.Nodes() {
			node.Stop()
		}
		refused()
		if status := freshStatus(t, site); status["usable"] != false || !strings.Contains(fmt.Sprint(status["error"]), "all 3 nodes are out of reach") {
			t.Errorf("status = %v", status)
		}
		site.Wrap(t, "prod", secret) // needs no HSM
		for _, node := range netHSM.Nodes() {
			must(t, node.Start())
		}
		eventuallyUnwraps(t, site, wrapped)
	})
	t.Run("all are locked, and a person unlocks them", func(t *testing.T) {
		for _, node := range netHSM.Nodes() {
			must(t, node.Restart())
		}
		vaulttest.Eventually(t, limit, "every node to be seen locked", func() error {
			_, err := site.Try(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped})
			if err == nil || !strings.Contains(strings.ToLower(err.Error()), "locked") {
				return fmt.Errorf("unwrap: %w", err)
			}
			return nil
		})
		refused("ocked", "unlock")
		status := freshStatus(t, site)
		if status["state"] != "locked" || !strings.Contains(fmt.Sprint(status["error"]), "all 3 nodes are locked") {
			t.Errorf("status = %v", status)
		}
		site.Refused(t, "nitrokey/devices/hsm/unlock", nil, http.StatusBadRequest, "passphrase is missing")
		site.Refused(t, "nitrokey/devices/hsm/unlock", vaulttest.Fields{"passphrase": "short"}, http.StatusBadRequest, "10 to 200")
		site.Refused(t, "nitrokey/devices/hsm/unlock", vaulttest.Fields{"passphrase": "not the passphrase"}, http.StatusBadRequest, "wrong")
		vaulttest.Eventually(t, limit, "the right passphrase to be taken", func() error { // the wrong one costs a second
			_, err := site.Try(t, "nitrokey/devices/hsm/unlock", vaulttest.Fields{"passphrase": netPassphrase})
			return err
		})
		eventuallyUnwraps(t, site, wrapped)
		for i, node := range netHSM.Nodes() {
			if node.State() != nethsmtest.Operational {
				t.Errorf("node %d is %s", i, node.State())
			}
		}
	})
	t.Run("an administrator locks it", func(t *testing.T) {
		site.Write(t, "nitrokey/devices/hsm/lock", nil)
		for i, node := range netHSM.Nodes() {
			if node.State() != nethsmtest.Locked {
				t.Errorf("node %d is %s", i, node.State())
			}
		}
		refused("ocked")
		site.Write(t, "nitrokey/devices/hsm/unlock", vaulttest.Fields{"passphrase": netPassphrase})
		eventuallyUnwraps(t, site, wrapped)
	})
	t.Run("it has a passphrase, restarts and opens by itself", func(t *testing.T) {
		site.Write(t, "nitrokey/devices/hsm", vaulttest.Fields{"unlock_passphrase": netPassphrase})
		for _, node := range netHSM.Nodes() {
			must(t, node.Restart())
		}
		eventuallyUnwraps(t, site, wrapped)
	})
	t.Run("the answer to the making of a key is lost", func(t *testing.T) {
		for _, node := range netHSM.Nodes() {
			node.Inject(nethsmtest.Fault{Method: http.MethodPost, Path: "/keys/generate", Cut: true, After: -1, Times: 1})
		}
		before := len(netHSM.KeyIDs())
		vaulttest.Eventually(t, limit, "the key to be made by repeated requests", func() error {
			answer, err := site.Try(t, "nitrokey/keys/lost", vaulttest.Fields{"device": "hsm", "generate": true, "algorithm": "rsa-2048"})
			if err == nil && answer["state"] != "ready" {
				err = fmt.Errorf("state %v, pending %v", answer["state"], answer["pending"])
			}
			return err
		})
		if made := len(netHSM.KeyIDs()) - before; made != 1 {
			t.Errorf("%d keys were made", made)
		}
		for _, node := range netHSM.Nodes() {
			node.ClearFaults()
		}
	})
	t.Run("the key is deleted", func(t *testing.T) {
		_, _, err := netHSM.AddKey(nethsmtest.Key{ID: "doomed"})
		must(t, err)
		site.Write(t, "nitrokey/keys/doomed", vaulttest.Fields{"device": "hsm", "key_id": "doomed"})
		sealed := site.Wrap(t, "doomed", secret)
		must(t, netHSM.DeleteKey("doomed"))
		site.Refused(t, "nitrokey/unwrap/doomed", vaulttest.Fields{"ciphertext": sealed}, http.StatusServiceUnavailable, "not found")
	})
	t.Run("a key does more than decrypt", func(t *testing.T) {
		_, _, err := netHSM.AddKey(nethsmtest.Key{ID: "both", Mechanisms: []string{"RSA_Decryption_OAEP_SHA256", "RSA_Signature_PSS_SHA256"}})
		must(t, err)
		adopt := vaulttest.Fields{"device": "hsm", "key_id": "both"}
		site.Refused(t, "nitrokey/keys/both", adopt, http.StatusBadRequest, "RSA_Signature_PSS_SHA256", "accept_weak_key")
		adopt["accept_weak_key"] = true
		site.Write(t, "nitrokey/keys/both", adopt)
		site.MustUnwrap(t, "both", site.Wrap(t, "both", secret), secret)
	})
	t.Run("a key does something else", func(t *testing.T) {
		_, _, err := netHSM.AddKey(nethsmtest.Key{ID: "signs", Mechanisms: []string{"RSA_Signature_PSS_SHA256"}})
		must(t, err)
		site.Refused(t, "nitrokey/keys/signs", vaulttest.Fields{"device": "hsm", "key_id": "signs", "accept_weak_key": true},
			http.StatusBadRequest, "mechanism")
	})
	t.Run("a key is for other operators", func(t *testing.T) {
		_, _, err := netHSM.AddKey(nethsmtest.Key{ID: "tagged", Tags: []string{"others"}})
		must(t, err)
		site.Refused(t, "nitrokey/keys/tagged", vaulttest.Fields{"device": "hsm", "key_id": "tagged"}, http.StatusBadRequest, "others")
	})
	t.Run("the user has another role", func(t *testing.T) {
		site.Write(t, "nitrokey/devices/weak", netFields(netHSM, vaulttest.Fields{
			"username": netAdmin, "password": netAdminPassword, "admin_username": nil, "admin_password": nil,
		}))
		status := site.Read(t, "nitrokey/devices/weak/status")
		if status["usable"] != false || !strings.Contains(fmt.Sprint(status["error"]), "role Operator") {
			t.Errorf("status = %v", status)
		}
	})
	t.Run("the password is wrong, and a person gives the right one", func(t *testing.T) {
		must(t, netHSM.SetUserPassphrase(netOperator, "another planted password"))
		refused()
		if shown := fmt.Sprint(freshStatus(t, site)); strings.Contains(shown, netPassword) {
			t.Errorf("the status shows the password: %s", shown)
		}
		site.Write(t, "nitrokey/devices/hsm", vaulttest.Fields{"password": "another planted password"})
		eventuallyUnwraps(t, site, wrapped)
	})
	t.Run("a certificate is replaced", func(t *testing.T) {
		must(t, netHSM.Node(0).ReplaceCertificate(nethsmtest.OtherAuthority))
		must(t, netHSM.Node(1).ReplaceCertificate(nethsmtest.Expired))
		site.MustUnwrap(t, "prod", wrapped, secret)
		must(t, netHSM.Node(2).ReplaceCertificate(nethsmtest.OtherName))
		refused("certificate")
		must(t, netHSM.Node(0).ReplaceCertificate(nethsmtest.Renewed))
		eventuallyUnwraps(t, site, wrapped)
	})
	if strings.Contains(site.Log(t), netPassword) || strings.Contains(site.Log(t), netPassphrase) {
		t.Error("the log shows a secret")
	}
}

// freshStatus reads the status of the device, which is given again for five seconds.
func freshStatus(t *testing.T, site *vaulttest.Site) vaulttest.Fields {
	t.Helper()
	// Writing the device as it is forgets what was known of it.
	site.Write(t, "nitrokey/devices/hsm", vaulttest.Fields{"request_timeout": "5s"})
	return site.Read(t, "nitrokey/devices/hsm/status")
}

// Whoever may write the configuration must not learn what is in it: no secret goes to a server that it was not given for.
func TestNetHSMsSecretsGoNowhereElse(t *testing.T) {
	netHSM, evil := startNetHSM(t, 1), startNetHSM(t, 1)
	site, wrapped := newNetSite(t, vaulttest.Build{}, netHSM, vaulttest.Fields{"unlock_passphrase": netPassphrase})
	file := filepath.Join(site.SecretsDir, "password")
	must(t, os.WriteFile(file, []byte("planted in a file"), 0o600))
	unseen := func() {
		t.Helper()
		if requests := evil.Node(0).Requests(); len(requests) != 0 || evil.Node(0).Handshakes() != 0 {
			t.Errorf("the other server saw %v, %d handshakes", requests, evil.Node(0).Handshakes())
		}
	}
	before := fmt.Sprint(site.Read(t, "nitrokey/devices/hsm"))
	for name, change := range map[string]vaulttest.Fields{
		"one more node":         {"urls": netHSM.URLs()[0] + "," + evil.URLs()[0]},
		"another node":          {"urls": evil.URLs()[0]},
		"another CA":            {"ca_cert": string(evil.CA())},
		"a pin":                 {"tls_pins": evil.Node(0).Pin()},
		"another name":          {"tls_server_name": "other.example"},
		"any certificate":       {"tls_insecure": true, "ca_cert": ""},
		"another user":          {"username": nethsmtest.OperatorUser},
		"another Administrator": {"admin_username": nethsmtest.AdminUser},
		"everything at once":    {"urls": evil.URLs()[0], "ca_cert": string(evil.CA()), "tls_insecure": false},
	} {
		for _, secrets := range []vaulttest.Fields{
			{},
			{"password": netPassword},
			{"password": netPassword, "admin_password": netAdminPassword},
			{"admin_password": netAdminPassword, "unlock_passphrase": netPassphrase},
		} {
			t.Run(fmt.Sprintf("%s with %d secrets", name, len(secrets)), func(t *testing.T) {
				fields := vaulttest.Fields{}
				for _, some := range []vaulttest.Fields{change, secrets} {
					for field, value := range some {
						fields[field] = value
					}
				}
				site.Refused(t, "nitrokey/devices/hsm", fields, http.StatusBadRequest, "in the same write", "nothing was changed")
				site.Refused(t, "nitrokey/devices/hsm", vaulttest.Fields{"password_file": file, "urls": evil.URLs()[0]}, http.StatusBadRequest)
			})
		}
	}
	if after := fmt.Sprint(site.Read(t, "nitrokey/devices/hsm")); after != before {
		t.Errorf("the refused writes changed the device:\n%s\n%s", before, after)
	}
	// Naming a file is no proof of knowing it, also for a device that is new.
	site.Refused(t, "nitrokey/devices/evil", netFields(evil, vaulttest.Fields{"password": nil, "password_file": file}),
		http.StatusBadRequest, "password_file", "-nethsm-url")
	site.MustUnwrap(t, "prod", wrapped, secret)
	site.Read(t, "nitrokey/devices/hsm/status")
	unseen()

	// With all of them it is allowed: who knows the secrets learns nothing.
	site.Write(t, "nitrokey/devices/hsm", netFields(evil, vaulttest.Fields{"unlock_passphrase": netPassphrase}))
	site.Refused(t, "nitrokey/unwrap/prod", vaulttest.Fields{"ciphertext": wrapped}, http.StatusServiceUnavailable)
	if len(evil.Node(0).Requests()) == 0 {
		t.Error("the new server was not asked")
	}
}

func TestTwoMountsShareANetHSM(t *testing.T) {
	netHSM := startNetHSM(t, 2)
	site, wrapped := newNetSite(t, vaulttest.Build{}, netHSM, nil)
	site.Enable(t, "second", "")
	site.Write(t, "second/devices/hsm", netFields(netHSM, nil))
	label := site.Read(t, "nitrokey/keys/prod")["versions"].([]any)[0].(map[string]any)["recipients"].([]any)[0].(map[string]any)["key_label"]
	site.Write(t, "second/keys/prod", vaulttest.Fields{"device": "hsm", "key_label": label})
	sealed := site.Write(t, "second/wrap/prod", vaulttest.Fields{"plaintext": vaulttest.Base64(secret)})["ciphertext"]
	opens := func(mount string, ciphertext any) error {
		answer, err := site.Try(t, mount+"/unwrap/prod", vaulttest.Fields{"ciphertext": ciphertext})
		if err == nil && answer["plaintext"] != vaulttest.Base64(secret) {
			err = fmt.Errorf("%s opened %v", mount, answer)
		}
		return err
	}
	for _, node := range netHSM.Nodes() {
		node.ResetCounters()
	}
	for range 10 {
		must(t, errors.Join(opens("nitrokey", wrapped), opens("second", sealed)))
	}
	if plugins, shaken := len(site.Plugins()), netHSM.Node(0).Handshakes()+netHSM.Node(1).Handshakes(); plugins != 1 || shaken > 1 {
		t.Errorf("two mounts run %d plugins, and made %d connections more", plugins, shaken)
	}

	// A wrong password at one mount harms that mount alone.
	site.Write(t, "second/devices/hsm", vaulttest.Fields{"password": "not the password"})
	if opens("second", sealed) == nil {
		t.Error("a mount with a wrong password used the other mount's connections")
	}
	vaulttest.Eventually(t, limit, "the mount with the right password", func() error { return opens("nitrokey", wrapped) })
	must(t, site.Client(t).Sys().Unmount("second"))
	must(t, opens("nitrokey", wrapped))
}

// A password that is rotated in its file needs no write to Vault.
func TestNetHSMsPasswordMayComeFromAFile(t *testing.T) {
	netHSM, evil := startNetHSM(t, 1), startNetHSM(t, 1)
	site := vaulttest.StartSite(t, vaulttest.SiteOptions{NoToken: true, Args: []string{"-nethsm-url=" + netHSM.URLs()[0]}})
	file := filepath.Join(site.SecretsDir, "password")
	must(t, os.WriteFile(file, []byte(netPassword+"\n"), 0o600))
	site.Write(t, "nitrokey/devices/hsm", netFields(netHSM, vaulttest.Fields{
		"password": nil, "password_file": "password", "ca_cert": nil, "tls_pins": netHSM.Node(0).Pin(),
	}))
	site.AddKey(t, "prod", "hsm", "rsa-2048")
	wrapped := site.Wrap(t, "prod", secret)
	site.MustUnwrap(t, "prod", wrapped, secret)

	const rotated = "planted and rotated password"
	must(t, netHSM.SetUserPassphrase(netOperator, rotated))
	must(t, os.WriteFile(file, []byte(rotated), 0o600))
	eventuallyUnwraps(t, site, wrapped)
	site.Refused(t, "nitrokey/devices/hsm", vaulttest.Fields{"urls": "https://127.0.0.1:1"}, http.StatusBadRequest,
		"password or password_file", "admin_password or admin_password_file")

	// The plugin's own arguments say where files may be sent.
	site.Refused(t, "nitrokey/devices/evil", netFields(evil, vaulttest.Fields{"password": nil, "password_file": "password"}),
		http.StatusBadRequest, "-nethsm-url")
	if evil.Node(0).Handshakes() != 0 {
		t.Error("a server that was not allowed was spoken to")
	}
}
