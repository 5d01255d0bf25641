package cluster

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"

	"vault-plugin-secrets-nitrokey/internal/custody"
)

// ExportRequest says to whom the keys of a cluster are given. They leave encrypted or not at all.
type ExportRequest struct {
	By string
	// Recipients are OpenPGP keys, armored or binary, any of which opens what comes.
	Recipients [][]byte
	// Each gives a message for each share, in hexadecimal, as Vault does. Else one message holds all of them, as
	// `vault operator init -format=json` writes them, which an import reads.
	Each bool
	// Former gives the keys from before the last rekey in their place: an old snapshot of the cluster may want them.
	Former bool
	// RootToken gives the root token as well, where it is kept.
	RootToken bool
}

// Exported is a message.
type Exported struct {
	// Name says what is in it: "unseal-1", "unseal-5.alice" for a share that only Alice opens, "root-token", or "prod" for all
	// keys of that cluster. It can be the name of a file.
	Name string
	// Recipients are those who can open it.
	Recipients []string
	Message    []byte // armored OpenPGP
}

// Export gives out the keys in custody, encrypted to people. Where they are spread, as many HSMs have to take part as are needed, and the
// shares of those that are away are not among them. Shares that
// Vault encrypted to people come as they are.
func (k *Custodian) Export(ctx context.Context, c *Cluster, request ExportRequest) (exported []Exported, err error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	e := &export{k: k, c: c, request: request}
	detail := map[string]string{}
	if request.Former {
		detail["former"] = "true"
	}
	if len(request.Recipients) == 0 {
		return nil, fmt.Errorf("exporting cluster %q: %w: nobody is named; keys leave encrypted to an OpenPGP key or not at all", c.Name, ErrInvalid)
	}
	for i, raw := range request.Recipients {
		key, err := ReadPGPKey(raw)
		if err == nil {
			_, err = key.recipient(k.now())
		}
		if err != nil {
			return nil, fmt.Errorf("exporting cluster %q: recipient %d: %w", c.Name, i+1, err)
		}
		e.keys = append(e.keys, key)
		detail["recipient."+strconv.Itoa(i+1)] = key.String()
	}
	kind, err := k.kindOf(ctx, c, "")
	if err != nil {
		return nil, err
	}
	if request.RootToken {
		detail["root_token"] = "true"
	}
	end, err := k.act(ctx, "export", c, "", request.By, detail)
	if err != nil {
		return nil, err
	}
	defer func() { end(err) }()
	if err := e.open(ctx, kind); err != nil {
		return nil, err
	}
	defer e.m.wipe()
	if request.RootToken {
		if e.root, err = k.openRoot(ctx, c); err != nil {
			if errors.Is(err, custody.ErrNotFound) {
				err = fmt.Errorf("no root token is kept; `nitroseal root %s` makes one for the moment: %w", c.Name, err)
			}
			return nil, fmt.Errorf("exporting cluster %q: %w", c.Name, err)
		}
		defer e.root.wipe()
	}
	if request.Each {
		err = e.each()
	} else {
		err = e.whole()
	}
	if err == nil {
		err = e.ofPeople()
	}
	if err != nil {
		return nil, fmt.Errorf("exporting cluster %q: %w", c.Name, err)
	}
	return e.messages, nil
}

// export is one call of Export.
type export struct {
	k        *Custodian
	c        *Cluster
	request  ExportRequest
	keys     []*PGPKey
	m        *material
	set      *Set      // of it, that is given
	root     *rootItem // nil where it is not asked for
	messages []Exported
}

// open opens as many items as open, or the former ones.
func (e *export) open(ctx context.Context, kind Kind) (err error) {
	if !e.request.Former {
		if e.m, err = e.k.loadMost(ctx, e.c, kind); err == nil {
			e.set = e.m.active()
		}
		return err
	}
	e.m, err = e.k.loadFormer(ctx, e.c, kind)
	switch {
	case err != nil:
		return err
	case e.m == nil:
		return fmt.Errorf("exporting cluster %q: %w from before the last rekey: it was not rekeyed since its keys came here", e.c.Name, ErrNoMaterial)
	}
	e.set = e.m.formerSet()
	return nil
}

func (e *export) add(name string, plaintext []byte) error {
	message, err := encryptTo(e.keys, plaintext, e.k.now())
	if err != nil {
		return err
	}
	var recipients []string
	for _, key := range e.keys {
		recipients = append(recipients, key.String())
	}
	e.messages = append(e.messages, Exported{Name: name, Recipients: recipients, Message: message})
	return nil
}

// shareName names a share from 1, as people count.
func (e *export) shareName(index int) string {
	return string(e.m.Kind) + "-" + strconv.Itoa(index+1)
}

// each makes a message for each share.
func (e *export) each() error {
	active := e.set
	for _, index := range active.Indices {
		text := hex.AppendEncode(nil, e.m.shares[shareName{active.ID, index}])
		err := e.add(e.shareName(index), text)
		clear(text)
		if err != nil {
			return err
		}
	}
	if e.root == nil {
		return nil
	}
	if e.root.token == nil {
		return e.armored("root-token", e.root.message, e.root.Fingerprint)
	}
	return e.add("root-token", e.root.token)
}

// whole makes one message of all shares.
func (e *export) whole() error {
	active := e.set
	numbers, list := [2]string{"unseal_shares", "unseal_threshold"}, "unseal_keys_b64"
	if e.m.Kind == KindRecovery {
		numbers, list = [2]string{"recovery_keys_shares", "recovery_keys_threshold"}, "recovery_keys_b64"
	}
	text := make([]byte, 0, 512+64*len(active.Indices)+maxRootToken) // never grows, which would leave a copy behind
	text = fmt.Appendf(text, "{\n  %q: %d,\n  %q: %d,\n  %q: [", numbers[0], active.Shares, numbers[1], active.Threshold, list)
	for i, index := range active.Indices {
		if i > 0 {
			text = append(text, ',')
		}
		text = append(text, "\n    \""...)
		text = base64.StdEncoding.AppendEncode(text, e.m.shares[shareName{active.ID, index}])
		text = append(text, '"')
	}
	text = append(text, "\n  ]"...)
	if e.root != nil && e.root.token != nil && len(e.root.token) <= maxRootToken && !bytes.ContainsAny(e.root.token, "\"\\") {
		text = append(append(append(text, ",\n  \"root_token\": \""...), e.root.token...), '"')
	}
	text = append(text, "\n}\n"...)
	defer clear(text)
	if err := e.add(e.c.Name, text); err != nil {
		return err
	}
	if e.root != nil && e.root.message != nil {
		return e.armored("root-token", e.root.message, e.root.Fingerprint)
	}
	return nil
}

// ofPeople adds the messages that Vault encrypted to people.
func (e *export) ofPeople() error {
	active := e.set
	for _, person := range active.People {
		message := e.m.messages[shareName{active.ID, person.Index}]
		if message == nil {
			continue
		}
		if err := e.armored(e.shareName(person.Index)+"."+fileName(person.Name), message, person.Fingerprint); err != nil {
			return err
		}
	}
	return nil
}

func (e *export) armored(name string, message []byte, fingerprint string) error {
	text, err := armorMessage(message)
	if err != nil {
		return err
	}
	e.messages = append(e.messages, Exported{Name: name, Recipients: []string{fingerprint}, Message: text})
	return nil
}

// fileName makes a person's name fit for the name of a file.
func fileName(name string) string {
	safe := []byte(name)
	for i, c := range safe {
		if ok := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_'; !ok {
			safe[i] = '_'
		}
	}
	return string(safe)
}
