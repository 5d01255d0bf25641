package backend

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"strings"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func contextField() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type: framework.TypeString,
		Description: "What the value belongs to, in your own words; it is bound to the envelope, in clear, and must be the same " +
			"at every use. At most 4096 bytes.",
	}
}

func ciphertextField() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type:        framework.TypeString,
		Description: "The envelope, as wrap/ answered it.",
		Required:    true,
	}
}

// sealedAnswer describes a new envelope.
func sealedAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"ciphertext":  {Type: framework.TypeString, Description: "The envelope: a JWE in JSON.", Required: true},
		"key_version": {Type: framework.TypeInt, Description: "The version of the wrapping key that sealed it.", Required: true},
		"recipients":  {Type: framework.TypeInt, Description: "How many HSM keys can open it.", Required: true},
	}
}

func (b *backend) wrapPaths() []*framework.Path {
	name := framework.GenericNameRegex("name")
	nameSchema := nameField("The name of the wrapping key.")
	rewrapped := sealedAnswer()
	rewrapped["changed"] = &framework.FieldSchema{
		Type: framework.TypeBool, Description: "False where the envelope was up to date and is given back as it came.", Required: true,
	}
	return []*framework.Path{
		{
			Pattern: "wrap/" + name,
			Fields: map[string]*framework.FieldSchema{
				"name":      nameSchema,
				"plaintext": {Type: framework.TypeString, Description: "The value, base64; at most 64 KiB of it.", Required: true},
				"context":   contextField(),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationVerb: "wrap"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:  b.wrap,
					Summary:   "Seal a value to the HSM keys of a wrapping key, in software.",
					Responses: answer(http.StatusOK, "The envelope.", sealedAnswer()),
				},
			},
			HelpSynopsis: "Seal a value to a wrapping key.",
			HelpDescription: "The answer is an envelope that you keep; unwrap/<key> opens it. No HSM is needed to seal. Write " +
				"plaintext as base64; context, if given, must be given again to open.",
		},
		{
			Pattern: "unwrap/" + name,
			Fields: map[string]*framework.FieldSchema{
				"name": nameSchema, "ciphertext": ciphertextField(), "context": contextField(),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationVerb: "unwrap"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback: b.unwrap,
					Summary:  "Open an envelope with one operation in an HSM.",
					Responses: answer(http.StatusOK, "The value.", map[string]*framework.FieldSchema{
						"plaintext": {
							Type: framework.TypeString, Description: "The value, base64.", Required: true,
							DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
						},
						"key_version": {Type: framework.TypeInt, Description: "The version of the wrapping key that sealed it.", Required: true},
						"rewrap_due": {
							Type: framework.TypeBool, Required: true,
							Description: "Whether a newer version exists; rewrap/ then makes an envelope of it.",
						},
					}),
				},
			},
			HelpSynopsis: "Open an envelope that wrap/ made.",
			HelpDescription: "It opens with the wrapping key and the context that it was made with, and nowhere else: what encrypt/ or " +
				"material/ made does not open here. It costs one private-key operation in one HSM; where one is away, the next " +
				"recipient is tried.",
		},
		{
			Pattern: "rewrap/" + name,
			Fields: map[string]*framework.FieldSchema{
				"name": nameSchema, "ciphertext": ciphertextField(), "context": contextField(),
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationVerb: "rewrap"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:  b.rewrap,
					Summary:   "Seal the value of an envelope anew to the newest version of its wrapping key.",
					Responses: answer(http.StatusOK, "The new envelope.", rewrapped),
				},
			},
			HelpSynopsis: "Bring an envelope to the newest version of its wrapping key.",
			HelpDescription: "The value is opened and sealed anew with the same context, and is not in the answer. An envelope that is " +
				"up to date comes back unchanged, without an operation in the HSM.",
		},
	}
}

func (b *backend) wrap(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	plaintext, err := readPlaintext(data, "missing plaintext to wrap")
	if err != nil {
		return nil, err
	}
	defer clear(plaintext)
	sealed, err := b.keys.Wrap(ctx, data.Get("name").(string), envelope.UseWrap, plaintext, callerContext(data))
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{
		"ciphertext": string(sealed.Envelope), "key_version": sealed.Version, "recipients": sealed.Recipients,
	}}, nil
}

func (b *backend) unwrap(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	raw, err := readCiphertext(data, "missing ciphertext to unwrap")
	if err != nil {
		return nil, err
	}
	opened, err := b.keys.Unwrap(ctx, data.Get("name").(string), envelope.UseWrap, raw, callerContext(data))
	if err != nil {
		return nil, err
	}
	defer clear(opened.Payload)
	return &logical.Response{Data: map[string]any{
		"plaintext":   base64.StdEncoding.EncodeToString(opened.Payload),
		"key_version": opened.Version,
		"rewrap_due":  opened.Version < opened.LatestVersion,
	}}, nil
}

func (b *backend) rewrap(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	raw, err := readCiphertext(data, "missing ciphertext to rewrap")
	if err != nil {
		return nil, err
	}
	want := envelope.Context{Use: envelope.UseWrap, Caller: callerContext(data)}
	sealed, err := b.keys.Rewrap(ctx, data.Get("name").(string), raw, want)
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{
		"ciphertext": string(sealed.Envelope), "key_version": sealed.Version, "recipients": sealed.Recipients, "changed": sealed.Changed,
	}}, nil
}

// callerContext is the context that the request gives, nil for none.
func callerContext(data *framework.FieldData) []byte {
	if text := data.Get("context").(string); text != "" {
		return []byte(text)
	}
	return nil
}

// readPlaintext decodes the field "plaintext"; the caller wipes it. An empty value may be sealed, a missing one not.
func readPlaintext(data *framework.FieldData, missing string) ([]byte, error) {
	encoded, given := data.GetOk("plaintext")
	if !given {
		return nil, mistake("%s; give plaintext as base64: plaintext=$(base64 < FILE)", missing)
	}
	return decodeValue("plaintext", encoded.(string))
}

// decodeValue decodes base64 of at most the size of an envelope's payload. Line breaks, which base64(1) writes, are
// skipped. The error quotes nothing of it.
func decodeValue(field, encoded string) ([]byte, error) {
	tooLarge := mistake("%s is too large: at most %d bytes can be sealed; encrypt larger values with a key of your own, and wrap that",
		field, envelope.MaxPayload)
	if len(encoded) > 2*envelope.MaxPayload {
		return nil, tooLarge
	}
	decoded, err := base64.StdEncoding.DecodeString(strings.TrimSpace(encoded))
	if err != nil {
		return nil, mistake("%s is not base64 (standard alphabet, with padding); encode it: $(base64 < FILE)", field)
	}
	if len(decoded) > envelope.MaxPayload {
		clear(decoded)
		return nil, tooLarge
	}
	return decoded, nil
}

// readCiphertext reads an envelope. White space around it is what editors and shells add.
func readCiphertext(data *framework.FieldData, missing string) ([]byte, error) {
	text := strings.TrimSpace(data.Get("ciphertext").(string))
	if text == "" {
		return nil, mistake("%s; give the envelope that wrap/ answered: ciphertext=@FILE", missing)
	}
	if len(text) > envelope.MaxSize {
		return nil, fmt.Errorf("%w: it has %d bytes, and an envelope has at most %d", envelope.ErrMalformed, len(text), envelope.MaxSize)
	}
	return []byte(text), nil
}
