package backend

import (
	"github.com/hashicorp/vault/sdk/framework"

	"vault-plugin-secrets-nitrokey/internal/device"
)

// deviceFields are what a device is configured with. Which of them go together, internal/device knows.
func deviceFields() map[string]*framework.FieldSchema {
	fields := map[string]*framework.FieldSchema{
		"name": nameField("The name of the device."),
		"type": {
			Type:          framework.TypeString,
			Description:   "The kind of HSM: pkcs11 (a token behind a PKCS#11 module) or nethsm. It stays what it was when the device was made.",
			AllowedValues: []any{device.TypePKCS11, device.TypeNetHSM},
			Default:       device.TypePKCS11,
		},
	}
	for field, schema := range tokenFields() {
		schema.Description = "pkcs11: " + schema.Description
		fields[field] = schema
	}
	for field, schema := range netHSMFields() {
		schema.Description = "nethsm: " + schema.Description
		fields[field] = schema
	}
	return fields
}

func tokenFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"module": {
			Type: framework.TypeString,
			Description: "the path of the vendor's PKCS#11 module, one that the plugin was registered with " +
				"(-args=-pkcs11-module=PATH).",
		},
		"serial": {
			Type:        framework.TypeString,
			Description: "the serial number of the token. One of serial, token_label and slot chooses the token.",
		},
		"token_label": {Type: framework.TypeString, Description: "the label of the token; exactly one token must have it."},
		"slot":        {Type: framework.TypeInt, Description: "the slot that the token is in. Slots may change when a token is pulled."},
		"pin": {
			Type:         framework.TypeString,
			Description:  "the user PIN. It is never shown. A write that chooses another module or token must carry it again.",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"pin_file": {
			Type: framework.TypeString,
			Description: "a file that holds the user PIN, under the plugin's -secrets-dir on every node that serves this mount. " +
				"It is read anew when it changes.",
		},
		"parallel": {
			Type:        framework.TypeInt,
			Description: "how many operations the token takes at one time: 1 for a card, the default; 8 suits SoftHSM.",
			Default:     1,
		},
		"decrypt_timeout": {
			Type: framework.TypeDurationSecond,
			Description: "how long one operation may stay inside the module before its process is killed. 0 means the default, " +
				"20 seconds.",
		},
		"generate_timeout": {
			Type:        framework.TypeDurationSecond,
			Description: "the same for the making of a key. 0 means the default, 5 minutes.",
		},
	}
}

func netHSMFields() map[string]*framework.FieldSchema {
	fields := map[string]*framework.FieldSchema{
		"urls": {
			Type: framework.TypeCommaStringSlice,
			Description: "the nodes of one NetHSM or cluster, https://host:port; any of them may serve a request. http:// is for this " +
				"machine only. Where the plugin was registered with -nethsm-url, each is one of those.",
		},
		"username": {
			Type:        framework.TypeString,
			Description: "a user with the role Operator, namespace~user for one in a namespace.",
		},
		"admin_username": {
			Type: framework.TypeString,
			Description: "a user of the same namespace with the role Administrator. Needed only to make and delete keys, to lock, and for " +
				"object_store.",
		},
		"ca_cert": {
			Type: framework.TypeString,
			Description: "PEM of the authorities that sign the nodes' certificates. Where it is left out, those of the system " +
				"are trusted.",
		},
		"tls_pins": {
			Type: framework.TypeCommaStringSlice,
			Description: "SHA-256 of the certificates that nodes may show, in hexadecimal, for NetHSMs that sign their own. Give the " +
				"next one as well before a certificate is replaced.",
		},
		"tls_server_name": {
			Type:        framework.TypeString,
			Description: "the name in the nodes' certificates, where it is not the host of the URL.",
		},
		"tls_insecure": {
			Type:        framework.TypeBool,
			Description: "accept any certificate. Whoever is on the way then gets the passwords and what is opened; each use is warned of.",
		},
		"request_timeout": {
			Type:        framework.TypeDurationSecond,
			Description: "how long one call may take, 1 to 60 seconds. 0 means the default, 10 seconds.",
		},
		"object_store": {
			Type: framework.TypeBool,
			Description: "let stores of type object keep values in the certificate slots of keys on the NetHSM. Every Operator of the " +
				"namespace can read them, sealed as they are.",
		},
		"key_tags": {
			Type: framework.TypeCommaStringSlice,
			Description: "tags that restrict the keys that are made: only users with one of them may use such a key. Give one to " +
				"the user as well.",
		},
	}
	for secret, what := range map[string]string{
		"password": "the password of username", "admin_password": "the password of admin_username",
		"unlock_passphrase": "the passphrase that unlocks a node. With it, a node that is found locked, after a restart for example, is unlocked",
	} {
		fields[secret] = &framework.FieldSchema{
			Type:         framework.TypeString,
			Description:  what + ". It is never shown. A write that changes nodes, users or trust must carry it again.",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		}
		fields[secret+"_file"] = &framework.FieldSchema{
			Type: framework.TypeString,
			Description: "a file that holds " + secret + ", under the plugin's -secrets-dir on every node that serves this mount; for plugins " +
				"registered with -nethsm-url only. It is read anew when it changes.",
		}
	}
	return fields
}

// deviceAnswer is what a read shows: everything but secrets.
func deviceAnswer() map[string]*framework.FieldSchema {
	fields := deviceFields()
	delete(fields, "name")
	for _, secret := range new(device.Config).SecretFields() {
		delete(fields, secret.Name)
		fields[secret.Name+"_set"] = &framework.FieldSchema{
			Type: framework.TypeBool, Description: "Whether a value of " + secret.Name + " is stored here.",
		}
	}
	for _, field := range fields {
		field.Default = nil
	}
	fields["type"].Required = true
	fields["pin_change_pending"] = &framework.FieldSchema{
		Type:        framework.TypeBool,
		Description: "pkcs11: whether a change of the PIN was cut short; the next use of the device finds out which PIN the token took.",
	}
	return fields
}
