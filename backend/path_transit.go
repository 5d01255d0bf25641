package backend

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/envelope"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/transit"
)

// transitPaths are the two endpoints that the seal "transit" of other Vaults and OpenBaos calls. They have no existence
// check: policies written for that seal grant "update" only.
func (b *backend) transitPaths() []*framework.Path {
	name := framework.GenericNameRegex("name")
	nameSchema := nameField("The name of the wrapping key, what the seal calls key_name.")
	return []*framework.Path{
		{
			Pattern: "encrypt/" + name,
			Fields: map[string]*framework.FieldSchema{
				"name":      nameSchema,
				"plaintext": {Type: framework.TypeString, Description: "The value, base64; at most 64 KiB of it.", Required: true},
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationVerb: "encrypt"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback: b.transitEncrypt,
					Summary:  "Seal a value on the wire of Vault's transit engine.",
					Responses: answer(http.StatusOK, "The ciphertext.", map[string]*framework.FieldSchema{
						"ciphertext":  {Type: framework.TypeString, Description: "vault:v<version>:<base64 of an envelope>", Required: true},
						"key_version": {Type: framework.TypeInt, Description: "The version of the wrapping key.", Required: true},
					}),
				},
			},
			HelpSynopsis: "Seal for the seal \"transit\" of another Vault.",
			HelpDescription: "Point another Vault's seal \"transit\" at this mount: mount_path is this mount, key_name the wrapping key, " +
				"and the token's policy grants update on encrypt/<key> and decrypt/<key>. The newest version that is ready for it " +
				"seals: its record read (keys/<key>/backup), and a second HSM, a confirmed backup or accept_single_hsm. Never point the Vault that " +
				"this mount lives in at it: it could not unseal itself.",
		},
		{
			Pattern: "decrypt/" + name,
			Fields: map[string]*framework.FieldSchema{
				"name":       nameSchema,
				"ciphertext": {Type: framework.TypeString, Description: "The ciphertext, as encrypt/ answered it.", Required: true},
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationVerb: "decrypt"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback: b.transitDecrypt,
					Summary:  "Open a value on the wire of Vault's transit engine, with one operation in an HSM or by an open lease.",
					Responses: answer(http.StatusOK, "The value.", map[string]*framework.FieldSchema{
						"plaintext": {
							Type: framework.TypeString, Description: "The value, base64.", Required: true,
							DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
						},
					}),
				},
			},
			HelpSynopsis: "Open what encrypt/ sealed.",
			HelpDescription: "Only what encrypt/ sealed opens here, not what wrap/ or material/ made. Versions down to " +
				"min_decryption_version open: keep old ones as long as snapshots and backups of the other Vault exist. Each opening is an " +
				"operation in an HSM, unless the key has a lease (keys/<key>, lease=10m): then the first one serves all in that time.",
		},
	}
}

func (b *backend) transitEncrypt(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	encoded, given := data.GetOk("plaintext")
	if !given {
		return nil, mistake("missing plaintext to encrypt")
	}
	plaintext, err := decodeValue("plaintext", encoded.(string))
	if err != nil {
		return nil, err
	}
	defer clear(plaintext)
	sealed, err := b.keys.Wrap(ctx, data.Get("name").(string), envelope.UseTransit, plaintext, nil)
	if err != nil {
		return nil, transitError(err)
	}
	return &logical.Response{Data: map[string]any{
		"ciphertext": transit.Format(sealed.Version, sealed.Envelope), "key_version": sealed.Version,
	}}, nil
}

func (b *backend) transitDecrypt(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	ciphertext := strings.TrimSpace(data.Get("ciphertext").(string))
	if ciphertext == "" {
		return nil, mistake("missing ciphertext to decrypt")
	}
	version, raw, err := transit.Parse(ciphertext)
	if err != nil {
		return nil, err
	}
	// The version outside must be the one inside: clients take it for the id of the key.
	opened, err := b.keys.Open(ctx, data.Get("name").(string), raw, envelope.Context{Use: envelope.UseTransit, Version: version})
	if err != nil {
		return nil, transitError(err)
	}
	defer clear(opened.Payload)
	return &logical.Response{Data: map[string]any{"plaintext": base64.StdEncoding.EncodeToString(opened.Payload)}}, nil
}

// transitError answers as Vault's transit does where clients and scripts may look for its words.
func transitError(err error) error {
	switch {
	case errors.Is(err, keyring.ErrKeyNotFound):
		return &statusError{http.StatusBadRequest, fmt.Errorf("encryption key not found: %w", err)}
	case errors.Is(err, envelope.ErrMalformed), errors.Is(err, envelope.ErrContext):
		return &statusError{http.StatusBadRequest, fmt.Errorf("%w: %w", transit.ErrMalformed, err)}
	default:
		return err
	}
}
