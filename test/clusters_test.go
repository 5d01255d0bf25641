package test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/armor"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
	"github.com/hashicorp/vault/api"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// sealVault is a seal Vault and the cluster of three that it takes into custody.
type sealVault struct {
	*vaulttest.Site
	others *vaulttest.Cluster
}

// newSealVault is a site with a key and a store, and a cluster that nobody has initialised, configured as clusters/prod.
func newSealVault(t *testing.T) *sealVault {
	t.Helper()
	site, _ := newSite(t, vaulttest.SiteOptions{})
	c := &sealVault{Site: site, others: vaulttest.StartCluster(t, 3, false)}
	c.Write(t, "nitrokey/stores/disk", vaulttest.Fields{"type": "file", "dir": "custody", "check": true})
	c.Write(t, "nitrokey/clusters/prod", vaulttest.Fields{
		"nodes": strings.Join(c.others.Addresses(), ","), "ca_cert": c.ca(t), "key": "prod", "store": "disk",
	})
	return c
}

func (c *sealVault) ca(t *testing.T) string {
	t.Helper()
	pem, err := os.ReadFile(c.others.CAFile)
	must(t, err)
	return string(pem)
}

// act writes a verb until it has ended: what takes longer than a request is asked for again.
func (c *sealVault) act(t *testing.T, verb string, fields vaulttest.Fields) vaulttest.Fields {
	t.Helper()
	var answer vaulttest.Fields
	vaulttest.Eventually(t, 2*time.Minute, verb+" to end", func() (err error) {
		if answer, err = c.Try(t, "nitrokey/clusters/prod/"+verb, fields); err == nil && answer["state"] != "done" {
			err = fmt.Errorf("it is %v", answer["state"])
		}
		return err
	})
	return answer
}

// unsealed waits until all nodes are, asking for it.
func (c *sealVault) unsealed(t *testing.T) {
	t.Helper()
	vaulttest.Eventually(t, 2*time.Minute, "all nodes to be unsealed", func() error {
		answer, err := c.Try(t, "nitrokey/clusters/prod/unseal", nil)
		if err == nil && answer["unsealed"] != true {
			err = fmt.Errorf("nodes: %v", answer["nodes"])
		}
		return err
	})
	c.others.WaitUnsealed(t, time.Minute)
}

// pgpPerson is somebody with an OpenPGP key.
type pgpPerson struct {
	entity *openpgp.Entity
	public string // armored
}

func newPGPPerson(t *testing.T, name string) *pgpPerson {
	t.Helper()
	entity, err := openpgp.NewEntity(name, "", name+"@example.org", nil)
	must(t, err)
	var text bytes.Buffer
	lines, err := armor.Encode(&text, openpgp.PublicKeyType, nil)
	must(t, err)
	must(t, entity.Serialize(lines))
	must(t, lines.Close())
	return &pgpPerson{entity, text.String()}
}

// read decrypts an armored message.
func (p *pgpPerson) read(t *testing.T, message any) string {
	t.Helper()
	text, _ := message.(string)
	block, err := armor.Decode(strings.NewReader(text))
	must(t, err)
	opened, err := openpgp.ReadMessage(block.Body, openpgp.EntityList{p.entity}, nil, nil)
	must(t, err)
	plain, err := io.ReadAll(opened.UnverifiedBody)
	must(t, err)
	return strings.TrimSpace(string(plain))
}

// TestAVaultTakesCustodyOfOthers is the life of three Vaults whose keys lie in a fourth, which is told to by its API only.
func TestAVaultTakesCustodyOfOthers(t *testing.T) {
	c := newSealVault(t)
	var said []any // every answer, none of which may hold a share
	init := c.act(t, "init", nil)
	said = append(said, init)
	if init["initialized"] != true || init["kind"] != "unseal" || init["root_revoked"] != true || init["root_token"] != "" {
		t.Errorf("init = %v", init)
	}
	c.unsealed(t)

	t.Run("init again changes nothing", func(t *testing.T) {
		again := c.act(t, "init", nil)
		said = append(said, again)
		if again["initialized"] != false {
			t.Errorf("init = %v", again)
		}
	})
	t.Run("the Vault that the mount lives in is refused", func(t *testing.T) {
		own, err := os.ReadFile(c.CAFile)
		must(t, err)
		c.Refused(t, "nitrokey/clusters/self", vaulttest.Fields{"nodes": c.Address, "ca_cert": string(own), "key": "prod", "store": "disk"},
			http.StatusBadRequest, "the Vault that this mount lives in")
	})
	t.Run("a node restarts", func(t *testing.T) {
		c.others.Servers[1].Restarted(t)
		c.unsealed(t)
	})
	t.Run("all restart at once", func(t *testing.T) {
		c.others.Kill(t)
		c.others.Up(t)
		c.unsealed(t)
	})
	t.Run("who may unseal may not more", func(t *testing.T) {
		said = append(said, c.policies(t)...)
	})
	t.Run("a root token for one person", func(t *testing.T) {
		officer := newPGPPerson(t, "officer")
		made := c.act(t, "root", vaulttest.Fields{"pgp_key": officer.public})
		said = append(said, made)
		token := officer.read(t, made["root_token"])
		client := c.active(t, token)
		if _, err := client.Sys().ListMounts(); err != nil {
			t.Errorf("the token is of no use: %v", err)
		}
		must(t, client.Auth().Token().RevokeSelf(""))
		c.Refused(t, "nitrokey/clusters/prod/root", vaulttest.Fields{}, http.StatusBadRequest, "pgp_key")
	})
	old := c.shares(t)
	t.Run("rekey, with a share for a person", func(t *testing.T) {
		alice := newPGPPerson(t, "alice")
		c.Refused(t, "nitrokey/clusters/prod", vaulttest.Fields{"pgp_keys": map[string]any{"alice": alice.public}},
			http.StatusBadRequest, "accept_destination=true")
		c.Write(t, "nitrokey/clusters/prod", vaulttest.Fields{"pgp_keys": map[string]any{"alice": alice.public}, "accept_destination": true})
		made := c.act(t, "rekey", vaulttest.Fields{"shares": 4, "threshold": 2})
		said = append(said, made)
		people, _ := made["people"].([]any)
		if fmt.Sprintf("%v of %v", made["threshold"], made["shares"]) != "2 of 4" || len(people) != 1 {
			t.Fatalf("rekey = %v", made)
		}
		message, _ := people[0].(map[string]any)
		hers := alice.read(t, message["message"])
		if _, err := hex.DecodeString(hers); err != nil || len(hers) != 66 {
			t.Errorf("her share has %d characters: %v", len(hers), err)
		}
		for _, share := range c.shares(t) {
			if strings.Contains(share, hers) {
				t.Error("her share is kept")
			}
		}
	})
	t.Run("the watch unseals by itself, with the new keys", func(t *testing.T) {
		c.others.Servers[2].Restarted(t)
		c.others.Servers[2].WaitUnsealed(t, 2*time.Minute) // Vault's timer ticks once a minute
		watch, _ := c.Read(t, "nitrokey/clusters/prod/status")["watch"].(map[string]any)
		if watch["on"] != true || watch["looked"] == "" {
			t.Errorf("the watch tells %v", watch)
		}
	})
	t.Run("a power cut for all four", func(t *testing.T) {
		c.Kill(t)
		c.others.Kill(t)
		c.others.Up(t)
		c.Resume(t)
		c.others.WaitUnsealed(t, 50*time.Second) // the seal Vault does not wait for its timer then
	})
	t.Run("nothing is watched that shall not be", func(t *testing.T) {
		c.Write(t, "nitrokey/clusters/prod", vaulttest.Fields{"watch": false})
		c.others.Servers[0].Restarted(t)
		reload(t, c.Site)
		<-time.After(3 * time.Second) // no event tells that nothing happens
		if status, err := c.others.Servers[0].Anonymous(t).Sys().SealStatus(); err != nil || !status.Sealed {
			t.Errorf("with watch=false the node is %+v, %v", status, err)
		}
		c.unsealed(t)
	})

	for _, path := range []string{"clusters/prod", "clusters/prod/status", "health", "material/prod/unseal"} {
		said = append(said, c.Read(t, "nitrokey/"+path))
	}
	c.keptSecret(t, said, append(old, c.shares(t)...))
}

// active is a client of the active node, which all nodes know.
func (c *sealVault) active(t *testing.T, token string) *api.Client {
	t.Helper()
	var client *api.Client
	vaulttest.Eventually(t, time.Minute, "an active node", func() error {
		for _, server := range c.others.Servers {
			if leader, err := server.Anonymous(t).Sys().Leader(); err == nil && leader.IsSelf {
				client = server.ClientWithToken(t, token)
				return nil
			}
		}
		return fmt.Errorf("there is none")
	})
	return client
}

// shares are those that are kept, in the spellings in which they could be seen: the test may open them.
func (c *sealVault) shares(t *testing.T) []string {
	t.Helper()
	opened := c.Write(t, "nitrokey/material/prod/unseal/open", vaulttest.Fields{"reveal_keys": true})
	var all []string
	for name, value := range opened["fields"].(map[string]any) {
		if name == "facts" || strings.HasSuffix(name, ".pgp") {
			continue
		}
		raw, err := base64.StdEncoding.DecodeString(value.(string))
		must(t, err)
		all = append(all, value.(string), hex.EncodeToString(raw))
	}
	if len(all) < 4 {
		t.Fatalf("%d spellings of shares are kept", len(all))
	}
	return all
}

// keptSecret looks for shares in answers, in the log of the seal Vault and in the store.
func (c *sealVault) keptSecret(t *testing.T, said []any, shares []string) {
	t.Helper()
	answers, err := json.Marshal(said)
	must(t, err)
	for _, share := range shares {
		if bytes.Contains(answers, []byte(share)) {
			t.Error("an answer holds a share")
		}
		if strings.Contains(c.Log(t), share) {
			t.Error("the log holds a share")
		}
	}
}

// policies tries what the documentation lets a policy forbid, and returns the answers.
func (c *sealVault) policies(t *testing.T) []any {
	t.Helper()
	must(t, c.Client(t).Sys().PutPolicy("restarter", `
		path "nitrokey/clusters/+/unseal" { capabilities = ["update"] }
		path "nitrokey/clusters/+/status" { capabilities = ["read"] }
		path "nitrokey/clusters/+" {
		  capabilities      = ["read", "update"]
		  denied_parameters = { "accept_destination" = [] }
		}
		path "nitrokey/material/+/+" { capabilities = ["read", "update"] }
		path "nitrokey/material/+/+/open" {
		  capabilities      = ["update"]
		  denied_parameters = { "reveal_keys" = [] }
		}`))
	token, err := c.Client(t).Auth().Token().CreateOrphan(&api.TokenCreateRequest{Policies: []string{"restarter"}})
	must(t, err)
	client := c.ClientWithToken(t, token.Auth.ClientToken)
	var said []any
	for _, request := range []struct {
		path string
		data map[string]any
		code int // 0 for success
	}{
		{"clusters/prod/unseal", nil, 0},
		{"clusters/prod", map[string]any{"watch": true}, 0},
		{"clusters/prod", map[string]any{"nodes": "https://127.0.0.1:1"}, http.StatusBadRequest},
		{"clusters/prod", map[string]any{"nodes": "https://127.0.0.1:1", "accept_destination": true}, http.StatusForbidden},
		{"clusters/prod/root", map[string]any{"pgp_key": "x"}, http.StatusForbidden},
		{"clusters/prod/rekey", nil, http.StatusForbidden},
		{"clusters/prod/init", nil, http.StatusForbidden},
		{"material/prod/unseal", map[string]any{"fields": map[string]any{"x": "YQ=="}}, http.StatusBadRequest},
		{"material/prod/unseal/open", nil, http.StatusBadRequest},
		{"material/prod/unseal/open", map[string]any{"reveal_keys": true}, http.StatusForbidden},
	} {
		answer, err := client.Logical().WriteWithContext(t.Context(), "nitrokey/"+request.path, request.data)
		code, refused := 0, (*api.ResponseError)(nil)
		if errors.As(err, &refused) {
			code = refused.StatusCode
		} else {
			must(t, err)
		}
		if code != request.code {
			t.Errorf("%s with %v: %d, want %d: %v", request.path, request.data, code, request.code, err)
		}
		said = append(said, answer)
	}
	return said
}
