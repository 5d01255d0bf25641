package backend

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
)

// sourceFields say where the HSM key of a new version comes from.
func sourceFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"name":   nameField("The name of the wrapping key."),
		"device": {Type: framework.TypeString, Description: "The device whose HSM holds, or is to make, the HSM key."},
		"key_label": {
			Type:        framework.TypeString,
			Description: "Adopt the HSM key with this label. With generate=true, the label that the new one gets.",
		},
		"key_id": {
			Type:        framework.TypeString,
			Description: "Adopt the HSM key with this id: CKA_ID in hexadecimal, or a NetHSM's key id. With key_label, both must match.",
		},
		"accept_weak_key": {
			Type: framework.TypeBool,
			Description: "Adopt an HSM key although it is extractable, not sensitive, or may by the device's own rules be used " +
				"for something else. What was accepted is recorded.",
		},
		"request_id": requestIDField(),
	}
}

// withGenerate adds the fields of making an HSM key instead of adopting one.
func withGenerate(fields map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
	fields["generate"] = &framework.FieldSchema{
		Type: framework.TypeBool,
		Description: "Make the HSM key in the HSM instead of adopting one. The answer comes at once with state \"generating\"; " +
			"read the key until it is \"ready\", which takes a card half a minute and more.",
	}
	fields["algorithm"] = &framework.FieldSchema{
		Type:          framework.TypeString,
		Description:   "What kind of HSM key is made.",
		AllowedValues: algorithms(),
	}
	return fields
}

func algorithms() []any {
	var all []any
	for _, algorithm := range hsm.Algorithms() {
		all = append(all, string(algorithm))
	}
	return all
}

func keyFields() map[string]*framework.FieldSchema {
	fields := withGenerate(sourceFields())
	fields["min_decryption_version"] = &framework.FieldSchema{
		Type:        framework.TypeInt,
		Description: "Envelopes of older versions do not open any more. Refused above the version that serves encrypt/.",
	}
	fields["deletion_allowed"] = &framework.FieldSchema{Type: framework.TypeBool, Description: "Whether the key may be deleted."}
	fields["backup_confirmed"] = &framework.FieldSchema{
		Type: framework.TypeBool,
		Description: "Record that the HSM keys of the newest version are backed up outside this HSM. A key with one recipient " +
			"serves encrypt/ only with this or accept_single_hsm.",
	}
	fields["accept_single_hsm"] = &framework.FieldSchema{
		Type:        framework.TypeBool,
		Description: "Record that the loss of one HSM may lose everything that this key sealed.",
	}
	fields["lease"] = leaseField()
	fields["delete_hsm_keys"] = &framework.FieldSchema{
		Type: framework.TypeBool, Query: true,
		Description: "For a deletion: destroy the HSM keys as well, where all of them were made for this wrapping key (generated) and none " +
			"served encrypt/. Nothing that they sealed opens ever after, neither here nor from a backup.",
	}
	fields["force"] = &framework.FieldSchema{
		Type: framework.TypeBool, Query: true,
		Description: "For a deletion: delete the key although stored material is sealed with it.",
	}
	return fields
}

// keyAnswer describes a wrapping key as it is shown.
func keyAnswer() map[string]*framework.FieldSchema {
	acknowledged := func(what string) *framework.FieldSchema {
		return &framework.FieldSchema{Type: framework.TypeMap, Description: "Who " + what + ", and when; empty where nobody did."}
	}
	return map[string]*framework.FieldSchema{
		"name":           {Type: framework.TypeString, Description: "The name of the key.", Required: true},
		"state":          {Type: framework.TypeString, Description: "ready, generating, abandoning or deleting.", Required: true},
		"created":        {Type: framework.TypeString, Description: "When the key was made, RFC 3339."},
		"created_by":     {Type: framework.TypeString, Description: "Who made it."},
		"latest_version": {Type: framework.TypeInt, Description: "The version that seals; 0 while the first is being made.", Required: true},
		"encrypt_version": {
			Type: framework.TypeInt,
			Description: "The version that encrypt/ seals with: the newest one that is ready for it. 0 while none is; a warning says what " +
				"a newer one waits for.",
		},
		"min_decryption_version": {Type: framework.TypeInt, Description: "The oldest version that opens."},
		"deletion_allowed":       {Type: framework.TypeBool, Description: "Whether the key may be deleted."},
		"lease":                  {Type: framework.TypeInt, Description: "How long an opened key encryption key is held, in seconds; 0 for strict mode."},
		"leases":                 leasesField(),
		"versions": {
			Type: framework.TypeSlice,
			Description: "The versions, oldest first, each with its recipients (device, HSM key, generated for this wrapping key or " +
				"adopted, algorithm, public key, weaknesses accepted), the id of its key encryption key (kek), empty where it has none, and what was " +
				"acknowledged about it.",
		},
		"record_sha256": {
			Type:        framework.TypeString,
			Description: "The SHA-256 of the key record that keys/:name/backup answers. Note it down: restoring asks for it.",
		},
		"record_read":       acknowledged("read the key record of the newest state"),
		"backup_confirmed":  acknowledged("confirmed that the newest version's HSM keys are backed up"),
		"accept_single_hsm": acknowledged("accepted that one HSM alone can open what this key seals"),
		"accept_weak_key":   acknowledged("accepted a weak HSM key"),
		"pending":           {Type: framework.TypeMap, Description: "The HSM key that is being made, and why the last attempt failed; empty where none is."},
		"rewrap":            {Type: framework.TypeMap, Description: "How the sealing anew of stored material goes that followed the last rotation: running, waiting (for the key to be ready for clusters), incomplete or done; empty where none did."},
	}
}

func (b *backend) keyPaths() []*framework.Path {
	write := func() *framework.PathOperation {
		return &framework.PathOperation{
			Callback:                    b.keyWrite,
			Summary:                     "Make a wrapping key by adopting or making an HSM key, or change its settings.",
			Responses:                   answer(http.StatusOK, "The key as it is now.", keyAnswer()),
			ForwardPerformanceStandby:   true,
			ForwardPerformanceSecondary: true,
		}
	}
	return []*framework.Path{
		listPath("keys/?$", "keys", "List the wrapping keys.", b.keyList),
		{
			Pattern:        "keys/" + framework.GenericNameRegex("name"),
			Fields:         keyFields(),
			ExistenceCheck: b.keyExists,
			DisplayAttrs:   &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "key"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:  b.keyRead,
					Summary:   "Read a wrapping key: state, versions, recipients, public keys.",
					Responses: answer(http.StatusOK, "The key. It holds no secret.", keyAnswer()),
				},
				logical.CreateOperation: write(),
				logical.UpdateOperation: write(),
				logical.DeleteOperation: &framework.PathOperation{
					Callback:                    b.keyDelete,
					Summary:                     "Delete a wrapping key whose deletion_allowed is set, or undo one that is being made.",
					Responses:                   noContent("The key was deleted."),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "A wrapping key: a name, its versions, and the HSM keys that can open what they seal.",
			HelpDescription: "Adopt an HSM key that exists (device, and key_label or key_id) or let the HSM make one (device, " +
				"generate=true, algorithm). Sealing then happens in software with the public key, opening in the HSM. The answer " +
				"shows record_sha256: read keys/<name>/backup once and keep both outside of this Vault. With lease, a fleet of Vaults that " +
				"encrypt/ and decrypt/ unseal costs the HSM one operation in that time instead of one for each opening; read what that gives up " +
				"in docs/threat-model.md. To delete a key, write deletion_allowed=true first.",
		},
	}
}

func (b *backend) keyList(ctx context.Context, _ *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := b.keys.List(ctx)
	if err != nil {
		return nil, err
	}
	return logical.ListResponse(names), nil
}

func (b *backend) keyExists(ctx context.Context, _ *logical.Request, data *framework.FieldData) (bool, error) {
	return b.exists(ctx, keysPrefix+data.Get("name").(string))
}

func (b *backend) keyRead(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	key, err := b.keys.Get(ctx, data.Get("name").(string))
	if errors.Is(err, keyring.ErrKeyNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return b.keyResponse(ctx, key)
}

func (b *backend) keyWrite(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	if err := checkName("key", name); err != nil {
		return nil, err
	}
	key, err := b.keyMake(ctx, req, data, name)
	if err != nil {
		return nil, err
	}
	changes, some := keySettings(req, data)
	switch {
	case some:
		if key, err = b.keys.Configure(ctx, name, changes); err != nil {
			return nil, err
		}
	case key == nil:
		return nil, mistake("nothing to do: give device and key_label or key_id to adopt an HSM key, device, generate=true and algorithm to " +
			"make one, or a setting to change")
	}
	return b.keyResponse(ctx, key)
}

// keyMake makes a wrapping key where the request says how, and returns nil where it does not.
func (b *backend) keyMake(ctx context.Context, req *logical.Request, data *framework.FieldData, name string) (*keyring.Key, error) {
	source, err := readSource(req, data)
	switch {
	case err != nil:
		return nil, err
	case source == nil:
		return nil, nil
	case source.Generate != nil:
		if _, settings := keySettings(req, data); settings {
			return nil, mistake("generate=true takes no settings: write them when the key's state is \"ready\"")
		}
		if err := b.checkMaker(ctx, *source.Generate); err != nil {
			return nil, err
		}
		key, err := b.beginGeneration(ctx, name, func() (*keyring.Key, error) { return b.keys.Begin(ctx, name, *source.Generate) })
		if errors.Is(err, keyring.ErrKeyExists) {
			if made, failed := b.keys.Get(ctx, name); failed == nil && wasMadeBy(made, *source.Generate) {
				return made, nil // the request came again
			}
		}
		return key, err
	default:
		key, err := b.keys.Adopt(ctx, name, *source.Adopt)
		return key, adoptionError(err)
	}
}

// wasMadeBy tells whether a key is what a request to make one made: the answer to that was lost.
func wasMadeBy(key *keyring.Key, request keyring.GenerateRequest) bool {
	if len(key.Versions) != 1 || len(key.Versions[0].Recipients) != 1 {
		return false
	}
	made := key.Versions[0].Recipients[0]
	return made.Generated && made.Device == request.Device && made.Kind == request.Algorithm && (request.Label == "" || request.Label == made.Label)
}

// readSource reads where an HSM key is to come from; nil where the request does not say.
func readSource(req *logical.Request, data *framework.FieldData) (*keyring.RotateRequest, error) {
	device, label, id := data.Get("device").(string), data.Get("key_label").(string), data.Get("key_id").(string)
	generate, algorithm := data.Get("generate").(bool), data.Get("algorithm").(string)
	request, err := requestID(data)
	switch {
	case err != nil:
		return nil, err
	case generate && id != "":
		return nil, mistake("key_id names an HSM key that exists, and generate=true makes a new one; keep one of the two")
	case generate && data.Get("accept_weak_key").(bool):
		return nil, mistake("accept_weak_key is for adopted HSM keys; one that is made here is not weak; leave it out")
	case !generate && algorithm != "":
		return nil, mistake("algorithm says what generate=true makes; an adopted HSM key has its own; leave it out or add generate=true")
	case generate && algorithm == "":
		return nil, mistake("generate=true wants to know what to make; give algorithm, one of %v", algorithms())
	case generate:
		return &keyring.RotateRequest{Generate: &keyring.GenerateRequest{
			Device: device, Algorithm: hsm.Algorithm(algorithm), Label: label, RequestID: request, By: by(req),
		}}, nil
	case device == "" && label == "" && id == "":
		return nil, nil
	default:
		return &keyring.RotateRequest{Adopt: &keyring.AdoptRequest{
			Device: device, Label: label, ID: id, AcceptWeak: data.Get("accept_weak_key").(bool), RequestID: request, By: by(req),
		}}, nil
	}
}

// adoptionError makes a mistake of the user what elsewhere is trouble with an HSM: no such key, two of that name, or one
// that the device's user may not use or delete.
func adoptionError(err error) error {
	for _, sentinel := range []error{
		hsm.ErrNotFound, hsm.ErrAmbiguous, hsm.ErrUnsupported, hsm.ErrForbidden, keyring.ErrNoDevice, device.ErrRequest,
	} {
		if errors.Is(err, sentinel) && status(err) == http.StatusServiceUnavailable && !errors.Is(err, hsm.ErrUnavailable) {
			return &statusError{http.StatusBadRequest, err}
		}
	}
	return err
}

// keySettings reads the settings that a request gives, and whether it gives any.
func keySettings(req *logical.Request, data *framework.FieldData) (settings keyring.Settings, some bool) {
	settings.By = by(req)
	if value, given := data.GetOk("min_decryption_version"); given {
		version := value.(int)
		settings.MinDecryptionVersion, some = &version, true
	}
	if lease, given := duration(data, "lease"); given {
		settings.Lease, some = &lease, true
	}
	for field, target := range map[string]**bool{
		"deletion_allowed":  &settings.DeletionAllowed,
		"backup_confirmed":  &settings.BackupConfirmed,
		"accept_single_hsm": &settings.AcceptSingleHSM,
	} {
		if value, given := data.GetOk(field); given {
			flag := value.(bool)
			*target, some = &flag, true
		}
	}
	return settings, some
}

func (b *backend) keyDelete(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	key, err := b.keys.Get(ctx, name)
	if errors.Is(err, keyring.ErrKeyNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if key.LatestVersion == 0 && (key.State == keyring.StateGenerating || key.State == keyring.StateAbandoning) {
		return nil, b.keys.Abandon(ctx, name)
	}
	err = b.keys.Delete(ctx, name, keyring.DeleteRequest{
		DeleteHSMKeys: data.Get("delete_hsm_keys").(bool), Force: data.Get("force").(bool), By: by(req),
	})
	if errors.Is(err, hsm.ErrForbidden) {
		err = mistake("%w; configure a user of the device that may delete keys", err)
	}
	if err != nil {
		return nil, err
	}
	if err := b.storage.Delete(ctx, rewrapsPrefix+name); err != nil {
		b.logger.Warn("forgetting how sealing stored material anew went", "key", name, "error", err)
	}
	return nil, nil
}

// keyUser tells the keyring whether stored material is sealed with a wrapping key, or is to be. What cannot be looked at may
// be; where that may pass, as a store that is down, it is an error, so that the client tries again.
func (b *backend) keyUser(ctx context.Context, name string) (string, error) {
	clusters, err := b.clustersUsing(ctx, func(record *clusterRecord) bool { return slices.Contains(record.keys(), name) })
	if err != nil {
		return "", err
	}
	if len(clusters) > 0 {
		return fmt.Sprintf("what unseals %s is, or is to be, sealed with it", summarise(clusters)), nil
	}
	survey, err := b.keeper.Survey(ctx, name)
	if err != nil {
		return "", err
	}
	if survey.Items > 0 {
		return fmt.Sprintf("%d items of material are sealed with it", survey.Items), nil
	}
	if at := slices.IndexFunc(survey.Unseen, passes); at >= 0 {
		return "", survey.Unseen[at]
	}
	switch unseen := append(survey.Problems, survey.Warnings...); {
	case len(unseen) > 0:
		return fmt.Sprintf("it is not known whether material is sealed with it (%s)", unseen[0]), nil
	default:
		return "", nil
	}
}

// keyResponse shows a key.
func (b *backend) keyResponse(ctx context.Context, key *keyring.Key) (*logical.Response, error) {
	versions := []any{}
	for _, version := range key.Versions {
		shown, err := showVersion(version)
		if err != nil {
			return nil, err
		}
		versions = append(versions, shown)
	}
	rewrap, err := b.showRewrap(ctx, key.Name)
	if err != nil {
		return nil, err
	}
	response := &logical.Response{Data: map[string]any{
		"name":                   key.Name,
		"state":                  string(key.State),
		"created":                stamp(key.Created),
		"created_by":             key.CreatedBy,
		"latest_version":         key.LatestVersion,
		"encrypt_version":        key.EncryptVersion,
		"min_decryption_version": key.MinDecryptionVersion,
		"deletion_allowed":       key.DeletionAllowed,
		"lease":                  seconds(key.Lease),
		"leases":                 b.showLeases(key.Name),
		"versions":               versions,
		"record_sha256":          key.RecordSHA256,
		"record_read":            showAcknowledgement(key.RecordRead),
		"backup_confirmed":       showAcknowledgement(key.BackupConfirmed),
		"accept_single_hsm":      showAcknowledgement(key.AcceptSingleHSM),
		"accept_weak_key":        showAcknowledgement(key.AcceptWeakKey),
		"pending":                showPending(key.Pending),
		"rewrap":                 rewrap,
	}}
	for _, warning := range key.Warnings {
		response.AddWarning(warning)
	}
	return response, nil
}

func showVersion(version keyring.Version) (map[string]any, error) {
	var recipients []any
	for _, recipient := range version.Recipients {
		public, err := encodePEM(recipient.Public)
		if err != nil {
			return nil, err
		}
		recipients = append(recipients, map[string]any{
			"device":              recipient.Device,
			"key_label":           recipient.Label,
			"key_id":              recipient.ID,
			"kid":                 recipient.KID,
			"algorithm":           string(recipient.Algorithm),
			"kind":                string(recipient.Kind),
			"public_key":          public,
			"weaknesses_accepted": present(recipient.WeaknessesAccepted),
			"also_usable_for":     present(recipient.AlsoUsableFor),
			"generated":           recipient.Generated,
			"added":               stamp(recipient.Added),
			"added_by":            recipient.AddedBy,
		})
	}
	return map[string]any{
		"version":        version.Number,
		"created":        stamp(version.Created),
		"created_by":     version.CreatedBy,
		"recipients":     recipients,
		"served_encrypt": version.ServedEncrypt,
		"locked":         version.Locked,
		"kek":            version.KEK,

		"record_read":      showAcknowledgement(version.RecordRead),
		"backup_confirmed": showAcknowledgement(version.BackupConfirmed),
	}, nil
}

func showAcknowledgement(given *keyring.Acknowledgement) map[string]any {
	if given == nil {
		return map[string]any{}
	}
	return map[string]any{"by": given.By, "at": stamp(given.At)}
}

func showPending(pending *keyring.Pending) map[string]any {
	if pending == nil {
		return map[string]any{}
	}
	return map[string]any{
		"device":     pending.Device,
		"algorithm":  string(pending.Algorithm),
		"key_label":  pending.Label,
		"key_id":     pending.ID,
		"request_id": pending.RequestID,
		"version":    pending.Version,
		"since":      stamp(pending.Since),
		"by":         pending.By,
		"last_error": pending.LastError,
	}
}

// encodePEM returns a public key as PEM, type "PUBLIC KEY" (RFC 7468, 13).
func encodePEM(public crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", fmt.Errorf("encoding a public key: %w", err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})), nil
}

// stamp writes a time in UTC, to the second, and nothing for none.
func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
