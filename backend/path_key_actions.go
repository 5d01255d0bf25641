package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// keyActionPaths are what can be done with one wrapping key besides reading and changing it.
func (b *backend) keyActionPaths() []*framework.Path {
	key := "keys/" + framework.GenericNameRegex("name")
	return []*framework.Path{
		{
			Pattern:      key + "/backup",
			Fields:       map[string]*framework.FieldSchema{"name": nameField("The name of the wrapping key.")},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "key-record"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback: b.keyBackup,
					Summary:  "Read the key record, which holds no secret and brings the key back in another mount.",
					Responses: answer(http.StatusOK, "The key record.", map[string]*framework.FieldSchema{
						"key_record": {Type: framework.TypeString, Description: "The key record, JSON.", Required: true},
						"sha256":     {Type: framework.TypeString, Description: "Its SHA-256 in hexadecimal.", Required: true},
					}),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "The key record of a wrapping key, for safe keeping.",
			HelpDescription: "The record holds public keys, key ids and the authentication key sealed to the HSM keys: no secret. " +
				"With it and one of the HSMs, keys/<name>/restore brings the key back where this mount is lost. Keep it and its " +
				"SHA-256 outside of this Vault, in two places. Reading it is recorded: encrypt/ seals only with versions that are in " +
				"a record that was read.",
		},
		{
			Pattern: key + "/restore",
			Fields: map[string]*framework.FieldSchema{
				"name":       nameField("The name of the wrapping key, the one it had."),
				"key_record": {Type: framework.TypeString, Description: "The key record, as keys/:name/backup answered it.", Required: true},
				"sha256": {
					Type: framework.TypeString, Required: true,
					Description: "The SHA-256 of the record as you noted it when the key was made. It is what keeps a forged record out.",
				},
				"devices": {
					Type: framework.TypeKVPairs,
					Description: "Where a device has another name today than in the record: old=new. Devices that are missing are " +
						"reported and can be configured later.",
				},
				"accept_recipients": {
					Type: framework.TypeBool,
					Description: "Where the key is here already: whether it is to seal to the HSM keys, and to the key encryption keys of leases, " +
						"that the record has more. Without it such a record is refused, and the answer names them.",
				},
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "key"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:                    b.keyRestore,
					Summary:                     "Bring a wrapping key back from its key record, with one operation in one of its HSMs.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "restore"},
					Responses:                   answer(http.StatusOK, "The key as it is now.", keyAnswer()),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "Bring a wrapping key back from its key record.",
			HelpDescription: "Configure a device with one of the key's HSMs first. The record is taken only where its SHA-256 is the " +
				"one that you give, and where the HSM opens the authentication key in it. Where the key is here already, because it was " +
				"rotated or given a recipient elsewhere, it takes on what is new with accept_recipients=true, and nothing is taken away from it: a " +
				"record that has not all that is here is refused. Stored material is sealed anew afterwards. Whoever may write this path with " +
				"that parameter says what the key, and what is stored, is sealed to from then on: a policy can deny it.",
		},
		{
			Pattern: key + "/public\\.pem",
			Fields: map[string]*framework.FieldSchema{
				"name":    nameField("The name of the wrapping key."),
				"version": {Type: framework.TypeInt, Query: true, Description: "The version; the newest one where it is left out."},
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "public-key"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback: b.keyPublic,
					Summary:  "Read the public keys of a version's recipients.",
					Responses: answer(http.StatusOK, "The public keys.", map[string]*framework.FieldSchema{
						"version":    {Type: framework.TypeInt, Description: "The version.", Required: true},
						"public_key": {Type: framework.TypeString, Description: "All recipients' public keys, PEM, in the order of kids.", Required: true},
						"kids":       {Type: framework.TypeStringSlice, Description: "Their RFC 7638 thumbprints.", Required: true},
					}),
				},
			},
			HelpSynopsis: "The public keys of a wrapping key, as PEM.",
			HelpDescription: "What is encrypted with them outside of this mount lacks the authentication key, so unwrap/ refuses it: " +
				"the public keys serve to check an HSM, or a backup of its keys, against this mount.",
		},
		{
			Pattern:      key + "/rotate",
			Fields:       withGenerate(sourceFields()),
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "key"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:                    b.keyRotate,
					Summary:                     "Give a wrapping key a new version with another HSM key.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "rotate"},
					Responses:                   answer(http.StatusOK, "The key as it is now.", keyAnswer()),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "Give a wrapping key a new version.",
			HelpDescription: "The new version seals from now on; older ones open as before. encrypt/ alone goes on with the old version until " +
				"keys/<name>/backup was read and, where the new one is on one HSM, backup_confirmed or accept_single_hsm is set. Adopt an HSM key (device, and key_label or " +
				"key_id) or let the HSM make one (generate=true): device and algorithm are then those of the newest version where " +
				"they are left out. Stored material is sealed anew afterwards, in the background; keys/<name> shows how far that is. " +
				"What you keep yourself goes through rewrap/<name>.",
		},
		{
			Pattern:      key + "/recipients",
			Fields:       sourceFields(),
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "key-recipient"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:                    b.keyAddRecipient,
					Summary:                     "Let one more HSM key open what the newest version seals.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "add"},
					Responses:                   answer(http.StatusOK, "The key as it is now.", keyAnswer()),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "Let a second HSM open what a wrapping key seals.",
			HelpDescription: "Name an HSM key on another device (device, and key_label or key_id). Envelopes made from now on open in " +
				"either HSM. Stored material is sealed anew afterwards, in the background; keys/<name> shows how far that is. The key " +
				"record changes: read keys/<name>/backup again. encrypt/ goes on meanwhile.",
		},
	}
}

func (b *backend) keyBackup(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	record, err := b.keys.Backup(ctx, data.Get("name").(string), by(req))
	if err != nil {
		return nil, err
	}
	return &logical.Response{Data: map[string]any{"key_record": string(record.Record), "sha256": record.SHA256}}, nil
}

func (b *backend) keyRestore(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	if err := checkName("key", name); err != nil {
		return nil, err
	}
	record, sum := data.Get("key_record").(string), strings.ToLower(strings.TrimSpace(data.Get("sha256").(string)))
	switch {
	case record == "":
		return nil, mistake("key_record is missing; give what keys/%s/backup answered, key_record=@FILE for example", name)
	case sum == "":
		return nil, mistake("sha256 is missing; give the SHA-256 of the record that you noted when the key was made, not one that you computed just now")
	}
	before, err := b.keys.Get(ctx, name)
	if err != nil && !errors.Is(err, keyring.ErrKeyNotFound) {
		return nil, err
	}
	key, err := b.keys.Restore(ctx, name, keyring.RestoreRequest{
		Record: []byte(record), SHA256: sum, Devices: data.Get("devices").(map[string]string),
		AcceptRecipients: data.Get("accept_recipients").(bool), By: by(req),
	})
	if errors.Is(err, keyring.ErrRecordMalformed) {
		return nil, mistake("%w", err) // elsewhere it is this mount's own record that is damaged
	}
	if err != nil {
		return nil, adoptionError(err)
	}
	if before != nil && before.RecordSHA256 != key.RecordSHA256 {
		b.startRewrap(ctx, name, by(req))
	}
	return b.keyResponse(ctx, key)
}

func (b *backend) keyPublic(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	key, err := b.keys.Get(ctx, data.Get("name").(string))
	if err != nil {
		return nil, err
	}
	wanted := key.LatestVersion
	if number, given := data.GetOk("version"); given {
		wanted = number.(int)
	}
	for _, version := range key.Versions {
		if version.Number != wanted {
			continue
		}
		var all strings.Builder
		var kids []string
		for _, recipient := range version.Recipients {
			public, err := encodePEM(recipient.Public)
			if err != nil {
				return nil, err
			}
			all.WriteString(public)
			kids = append(kids, recipient.KID)
		}
		return &logical.Response{Data: map[string]any{"version": version.Number, "public_key": all.String(), "kids": kids}}, nil
	}
	return nil, absent("wrapping key %q has no version %d; its newest is %d", key.Name, wanted, key.LatestVersion)
}

func (b *backend) keyRotate(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	current, err := b.keys.Get(ctx, name)
	if err != nil {
		return nil, err
	}
	if data.Get("generate").(bool) {
		inheritSource(data, current)
	}
	source, err := readSource(req, data)
	if err != nil {
		return nil, err
	}
	if source == nil {
		return nil, mistake("say where the new version's HSM key comes from: give device and key_label or key_id to adopt one, or generate=true")
	}
	if isRepeatedRotation(current, source, time.Now()) {
		response, err := b.keyResponse(ctx, current)
		if err == nil {
			response.AddWarning(fmt.Sprintf("version %d was made for you less than a minute ago, and this request was taken for the same one "+
				"sent again; for another version, give a request_id of its own", current.LatestVersion))
		}
		return response, err
	}
	var key *keyring.Key
	if source.Generate != nil {
		if err := b.checkMaker(ctx, *source.Generate); err != nil {
			return nil, err
		}
		key, err = b.beginGeneration(ctx, name, func() (*keyring.Key, error) { return b.keys.Rotate(ctx, name, *source) })
	} else {
		key, err = b.keys.Rotate(ctx, name, *source)
		if errors.Is(err, keyring.ErrSameKey) && current.LatestVersion > 1 && isRecipient(current, *source.Adopt) {
			key, err = current, nil // the request came again
		}
		if err == nil {
			b.startRewrap(ctx, name, by(req))
		}
	}
	if err != nil {
		return nil, adoptionError(err)
	}
	return b.keyResponse(ctx, key)
}

// isRepeatedRotation tells whether a request to make a new version is most likely one whose answer was lost: clients
// repeat by themselves, within seconds, and a fast HSM has made the key by then. Nobody needs two versions in a minute
// without saying so by a request_id.
func isRepeatedRotation(key *keyring.Key, source *keyring.RotateRequest, now time.Time) bool {
	if source.Generate == nil || source.Generate.RequestID != "" || key.Pending != nil || key.LatestVersion < 2 {
		return false
	}
	newest := key.Versions[len(key.Versions)-1]
	made := newest.Recipients[0]
	return made.Generated && made.Device == source.Generate.Device && made.Kind == source.Generate.Algorithm &&
		newest.CreatedBy == source.Generate.By && now.Sub(newest.Created) < time.Minute
}

// inheritSource fills in what a rotation leaves out: the new HSM key is made where, and of the kind that, the newest
// version's first one is.
func inheritSource(data *framework.FieldData, key *keyring.Key) {
	if len(key.Versions) == 0 {
		return
	}
	newest := key.Versions[len(key.Versions)-1].Recipients[0]
	if data.Get("device").(string) == "" {
		data.Raw["device"] = newest.Device
	}
	if data.Get("algorithm").(string) == "" {
		data.Raw["algorithm"] = string(newest.Kind)
	}
}

func (b *backend) keyAddRecipient(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	request, err := requestID(data)
	if err != nil {
		return nil, err
	}
	adopt := keyring.AdoptRequest{
		Device: data.Get("device").(string), Label: data.Get("key_label").(string), ID: data.Get("key_id").(string),
		AcceptWeak: data.Get("accept_weak_key").(bool), RequestID: request, By: by(req),
	}
	key, err := b.keys.AddRecipient(ctx, name, adopt)
	if errors.Is(err, keyring.ErrSameKey) {
		current, failed := b.keys.Get(ctx, name)
		if failed == nil && isRecipient(current, adopt) {
			key, err = current, nil // the request came again
		}
	}
	if err != nil {
		return nil, adoptionError(err)
	}
	b.startRewrap(ctx, name, by(req))
	return b.keyResponse(ctx, key)
}

// isRecipient tells whether the newest version of a key has the HSM key that a request names: the request did its work
// before, and its answer was lost.
func isRecipient(key *keyring.Key, request keyring.AdoptRequest) bool {
	if len(key.Versions) == 0 {
		return false
	}
	newest := key.Versions[len(key.Versions)-1]
	return slices.ContainsFunc(newest.Recipients, func(r keyring.Recipient) bool {
		return r.Device == request.Device && (request.Label == "" || r.Label == request.Label) && (request.ID == "" || r.ID == request.ID)
	})
}
