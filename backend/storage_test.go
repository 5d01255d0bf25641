package backend

import (
	"context"
	"errors"
	"testing"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/logical"
)

// A standby forwards what its storage refuses, if it learns of it: the storage's error crosses from Vault as text, and
// Vault compares what the plugin answers with ==.
func TestRequestsThatWriteAreForwardedByANodeThatMayNot(t *testing.T) {
	for name, refusal := range map[string]error{
		"in the plugin's own process": logical.ErrReadOnly,
		"from Vault's process":        errors.New(logical.ErrReadOnly.Error()), // what its gRPC client makes of it
	} {
		t.Run(name, func(t *testing.T) {
			m := newMount(t)
			m.addKey("prod").AddRSA(t, "second", "02", 2048)
			m.write("stores/s", fields{"type": "vault"}).ok(t)
			m.write("keys/prod", fields{"deletion_allowed": true}).ok(t)
			m.write("keys/other", fields{"device": "prod-hsm", "key_id": "02"}).ok(t)
			m.write("devices/unused", fields{"module": testModule, "serial": "SN-unused", "pin": rightPIN}).ok(t)
			m.storage.readOnly = refusal
			for _, request := range []logical.Request{
				{Path: "config", Data: fields{"default_key": "prod"}},
				{Path: "devices/card", Data: fields{"module": testModule, "serial": "SN", "pin": rightPIN}},
				{Path: "devices/unused", Operation: logical.DeleteOperation},
				{Path: "devices/prod-hsm/pin", Data: fields{"new_pin": "735591"}},
				{Path: "devices/prod-hsm/pin", Data: fields{"new_pin": rightPIN, "on_token": false}},
				{Path: "stores/another", Data: fields{"type": "vault"}},
				{Path: "stores/s", Operation: logical.DeleteOperation},
				{Path: "keys/made", Data: fields{"device": "prod-hsm", "generate": true, "algorithm": "rsa-2048"}},
				{Path: "keys/adopted", Data: fields{"device": "prod-hsm", "key_id": "01"}},
				{Path: "keys/prod", Data: fields{"accept_single_hsm": true}},
				{Path: "keys/prod", Operation: logical.DeleteOperation},
				{Path: "keys/prod/rotate", Data: fields{"device": "prod-hsm", "generate": true, "algorithm": "rsa-2048"}},
				{Path: "keys/prod/backup", Operation: logical.ReadOperation},
				{Path: "material/c/x", Data: fields{"fields": fields{"k": "aGk="}, "key": "prod", "store": "s"}},
			} {
				if request.Operation == "" {
					request.Operation = logical.UpdateOperation
				}
				request.Storage = m.storage
				if _, err := m.HandleRequest(context.Background(), &request); err != logical.ErrReadOnly { //nolint:errorlint // as Vault
					t.Errorf("%s %s: error = %v, want the bare ErrReadOnly", request.Operation, request.Path, err)
				}
			}
		})
	}
}

// Finding out which PIN a token took may cost a try, and its result must be recorded.
func TestPINChangeThatWasCutShortIsLeftToANodeThatMayWrite(t *testing.T) {
	m := newMount(t)
	token := m.addKey("prod")
	record, err := m.readDevice(t.Context(), "prod-hsm")
	if err != nil {
		t.Fatal(err)
	}
	record.NextPIN = "735591"
	if err := m.putDevice(t.Context(), "prod-hsm", record); err != nil {
		t.Fatal(err)
	}
	m = m.remount()
	m.System().(*logical.StaticSystemView).ReplicationStateVal = consts.ReplicationPerformanceStandby
	_, err = m.HandleRequest(t.Context(), &logical.Request{
		Operation: logical.ListOperation, Path: "devices/prod-hsm/keys/", Storage: m.storage,
	})
	if err != logical.ErrReadOnly { //nolint:errorlint // as Vault
		t.Errorf("error = %v, want the bare ErrReadOnly", err)
	}
	if token.wrong != 0 {
		t.Errorf("%d wrong PINs were sent, want none", token.wrong)
	}
}
