package test

import (
	"net/http"
	"testing"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// TestMountsOfOnePluginDoNotHarmEachOther: who may configure one mount has the PIN of the token, and no more.
func TestMountsOfOnePluginDoNotHarmEachOther(t *testing.T) {
	site, wrapped := newSite(t, vaulttest.SiteOptions{})
	kinds := map[string]vaulttest.Fields{"disk": {"type": "file", "dir": "prod"}, "token": {"type": "object", "device": "hsm"}}
	for name, fields := range kinds {
		site.Write(t, "nitrokey/stores/"+name, fields)
		putMaterial(t, site, name, "eu", "in-"+name)
	}
	backup := site.Read(t, "nitrokey/keys/prod/backup")

	site.Enable(t, "neighbour", "")
	site.Write(t, "neighbour/devices/hsm", vaulttest.Fields{
		"type": "pkcs11", "module": site.Token.Module, "token_label": site.Token.Label, "pin": site.Token.PIN,
	})
	site.Write(t, "neighbour/keys/mine", vaulttest.Fields{"device": "hsm", "key_label": "nitroseal-prod-v1"})
	site.Write(t, "neighbour/keys/mine", vaulttest.Fields{"deletion_allowed": true})
	if _, err := site.Client(t).Logical().DeleteWithData("neighbour/keys/mine", map[string][]string{"delete_hsm_keys": {"true"}}); err == nil {
		t.Error("the neighbour destroyed an HSM key that it had adopted")
	}
	site.Refused(t, "neighbour/stores/disk", kinds["disk"], http.StatusBadRequest, "belongs to another mount", "take_over=true")
	site.Write(t, "neighbour/stores/token", kinds["token"])
	site.Refused(t, "neighbour/material/eu/in-token/open", vaulttest.Fields{"store": "token"}, http.StatusBadRequest, "belongs to another mount")

	site.Restart(t)
	site.MustUnwrap(t, "prod", wrapped, secret)
	for name := range kinds {
		openMaterial(t, site, "eu", "in-"+name)
		putMaterial(t, site, name, "eu", "in-"+name)
	}

	must(t, site.Client(t).Sys().Unmount("nitrokey"))
	site.Enable(t, "nitrokey", "")
	site.AddDevice(t, "hsm")
	site.Write(t, "nitrokey/keys/prod/restore", vaulttest.Fields{"key_record": backup["key_record"], "sha256": backup["sha256"]})
	for name, fields := range kinds {
		fields["take_over"] = true
		site.Write(t, "nitrokey/stores/"+name, fields)
		site.Write(t, "nitrokey/material/eu/in-"+name+"/open", vaulttest.Fields{"store": name})
		openMaterial(t, site, "eu", "in-"+name)
	}
}
