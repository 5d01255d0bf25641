package nethsmtest

import (
	"encoding/json"
	"strings"
	"testing"
)

func TestNodesShareTheirDataAndNothingElse(t *testing.T) {
	h := Start(t, Options{Provisioned: true, Nodes: 3})
	c := newCaller(t, h)
	at := func(i int, path string) string { return h.URLs()[i] + "/api/v1/" + path }
	c.must(201, "POST", at(0, "keys/generate"), adminLogin,
		`{"mechanisms":["EdDSA_Signature"],"type":"Curve25519","id":"shared"}`)
	c.must(200, "GET", at(2, "keys/shared"), operatorLogin, "")
	c.must(204, "POST", at(1, "lock"), adminLogin, "")
	if h.Node(0).State() != Operational || h.Node(1).State() != Locked {
		t.Fatalf("after locking the second: %s, %s", h.Node(0).State(), h.Node(1).State())
	}
	c.must(401, "GET", at(0, "keys"), "operator:WrongPassphrase", "")
	c.must(429, "GET", at(0, "keys"), operatorLogin, "")
	c.must(200, "GET", at(2, "keys"), operatorLogin, "")
	// The unlock passphrase belongs to a node.
	c.must(204, "PUT", at(2, "config/unlock-passphrase"), adminLogin,
		`{"newPassphrase":"AnotherPassphrase","currentPassphrase":"`+UnlockPassphrase+`"}`)
	if got := c.must(403, "PUT", at(2, "config/unlock-passphrase"), adminLogin,
		`{"newPassphrase":"AnotherPassphrase","currentPassphrase":"`+UnlockPassphrase+`"}`); got !=
		`{"message":"unlock passphrase is incorrect."}` {
		t.Errorf("with the former passphrase: %s", got)
	}
	c.must(204, "POST", at(1, "unlock"), "", `{"passphrase":"`+UnlockPassphrase+`"}`)
	c.must(204, "POST", at(2, "lock"), adminLogin, "")
	c.must(403, "POST", at(2, "unlock"), "", `{"passphrase":"`+UnlockPassphrase+`"}`)
	if h.Node(0).Pin() == h.Node(1).Pin() {
		t.Error("two nodes show the same certificate")
	}
}

func TestProvisioningANodeProvisionsTheCluster(t *testing.T) {
	h := Start(t, Options{Nodes: 2})
	c := newCaller(t, h)
	body := `{"unlockPassphrase":"` + UnlockPassphrase + `","adminPassphrase":"` + AdminPassphrase +
		`","systemTime":"2026-01-01T00:00:00Z"}`
	c.must(204, "POST", h.URLs()[0]+"/api/v1/provision", "", body)
	c.must(412, "POST", h.URLs()[1]+"/api/v1/provision", "", body)
	if h.Node(0).State() != Operational || h.Node(1).State() != Locked {
		t.Fatalf("after provisioning the first: %s, %s", h.Node(0).State(), h.Node(1).State())
	}
}

func TestMembers(t *testing.T) {
	h := Start(t, Options{Provisioned: true, Nodes: 2})
	c, url := newCaller(t, h), h.URLs()[0]+"/api/v1/"
	list := func() (members []memberItem) {
		t.Helper()
		if err := json.Unmarshal([]byte(c.must(200, "GET", url+"cluster/members", adminLogin, "")), &members); err != nil {
			t.Fatal(err)
		}
		return members
	}
	if got := list(); len(got) != 2 || got[0].ID == got[1].ID || got[0].Learner {
		t.Fatalf("at first: %+v", got)
	}
	add := `{"urls":["https://192.168.1.9:2380"]}`
	c.must(412, "POST", url+"cluster/members", adminLogin, add)
	err := h.store.update(func(r *record) error { // over the API it would cost a second
		r.Backup = &backupRecord{Salt: random(16), Key: random(32)}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if body := c.must(201, "POST", url+"cluster/members", adminLogin, add); !strings.Contains(body, `"joinerKit":"`) {
		t.Fatalf("adding a member answered %s", body)
	}
	c.must(409, "POST", url+"cluster/members", adminLogin, add)
	learner := list()[2]
	c.must(412, "POST", url+"cluster/members/"+learner.ID+"/promote", adminLogin, "")
	if err := h.CatchUp("node3"); err != nil {
		t.Fatal(err)
	}
	c.must(204, "POST", url+"cluster/members/"+learner.ID+"/promote", adminLogin, "")
	c.must(204, "PUT", url+"cluster/members/"+learner.ID, adminLogin, `{"urls":["https://192.168.1.10:2380"]}`)
	if got := list()[2]; got.Learner || got.Name != "node3" || got.URLs[0] != "https://192.168.1.10:2380" {
		t.Fatalf("after promoting: %+v", got)
	}
	c.must(204, "DELETE", url+"cluster/members/"+learner.ID, adminLogin, "")
	c.must(404, "DELETE", url+"cluster/members/"+learner.ID, adminLogin, "")
	c.must(404, "PUT", url+"cluster/members/"+learner.ID, adminLogin, `{"urls":["https://192.168.1.10:2380"]}`)
	c.must(400, "DELETE", url+"cluster/members/nothing", adminLogin, "")
}
