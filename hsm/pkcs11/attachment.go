package pkcs11

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/internal/wire"
)

// The flags of CK_TOKEN_INFO that matter here (PKCS#11 2.40, 3.2).
const (
	ckfLoginRequired      uint = 0x4
	ckfUserPINInitialized uint = 0x8
	ckfTokenInitialized   uint = 0x400
	ckfUserPINCountLow    uint = 0x10000
	ckfUserPINFinalTry    uint = 0x20000
	ckfUserPINLocked      uint = 0x40000
)

// attachment is a token as one host sees it. It is shared by all devices on the token and dies with the host.
type attachment struct {
	host  *host
	token *token
	slot  uint
	flags uint // as they were when the token was found; not for decisions about PINs

	mu sync.Mutex // guards what follows
	// loggingIn is closed when the log-in under way has ended, nil where none is.
	loggingIn chan struct{}
	loggedIn  bool
	pinDigest [32]byte // of the PIN that logged in
	// handles of private and public key objects by fingerprint.
	handles map[string]handles
	// mechanisms is nil until asked for.
	mechanisms map[uint]wire.Mechanism
}

type handles struct{ private, public uint }

// attachTo returns the device's token on a host, looking for it where that was not done yet.
func (d *Device) attachTo(ctx context.Context, h *host) (*attachment, error) {
	if known := d.known(); known != nil {
		if a := h.attachment(known.identity); a != nil {
			return a, nil
		}
	}
	found, err := d.look(ctx, h)
	if err != nil {
		return nil, err
	}
	t := d.module.token(identity(found.Token), d.config.Parallel)
	d.mu.Lock()
	d.token = t
	d.name = describeToken(found)
	d.mu.Unlock()
	t.use(d)

	h.mu.Lock()
	defer h.mu.Unlock()
	a := h.attachments[t.identity]
	if a == nil || a.slot != found.ID {
		a = &attachment{host: h, token: t, slot: found.ID, flags: found.Token.Flags, handles: make(map[string]handles)}
		h.attachments[t.identity] = a
	}
	return a, nil
}

// attachment returns what the host knows of a token, nil for nothing.
func (h *host) attachment(identity string) *attachment {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.attachments[identity]
}

// unattached reports whether the host serves no token.
func (h *host) unattached() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.attachments) == 0
}

// look lists the slots and chooses the device's token among them.
func (d *Device) look(ctx context.Context, h *host) (wire.Slot, error) {
	release, err := d.module.listing.acquire(ctx, d.config.Owner)
	if err != nil {
		return wire.Slot{}, err
	}
	frame, err := h.call(ctx, request{op: wire.OpSlots, limit: max(d.config.DecryptLimit, d.manager.listingLimit(d.module)), returned: release})
	if err != nil {
		return wire.Slot{}, err
	}
	var slots wire.Slots
	if err := wire.Decode(frame.Meta, &slots); err != nil {
		return wire.Slot{}, err
	}
	return d.choose(slots.Slots)
}

// choose picks the one token that the configuration means; once found, it is the one with the same identity.
func (d *Device) choose(slots []wire.Slot) (wire.Slot, error) {
	known := d.known()
	var matches []wire.Slot
	var seen []string
	for _, s := range slots {
		if !s.Present {
			continue
		}
		if s.Failure != nil {
			seen = append(seen, fmt.Sprintf("slot %d, which answers %v", s.ID, describe(s.Failure)))
			continue
		}
		s.Token = trimmed(s.Token)
		seen = append(seen, describeToken(s))
		if known != nil && identity(s.Token) == known.identity || known == nil && d.wants(s) {
			matches = append(matches, s)
		}
	}
	switch len(matches) {
	case 1:
		return matches[0], nil
	case 0:
		return wire.Slot{}, &absentError{wanted: d.describeToken(), seen: seen}
	default:
		return wire.Slot{}, fmt.Errorf("%w: %d tokens answer to %s; choose by serial; tokens seen: %s",
			hsm.ErrAmbiguous, len(matches), d.describeToken(), quoteAll(seen))
	}
}

// wants reports whether a token is the one that the configuration means.
func (d *Device) wants(s wire.Slot) bool {
	switch {
	case d.config.Slot != nil:
		return s.ID == *d.config.Slot
	case d.config.Serial != "":
		return s.Token.Serial == trim(d.config.Serial)
	default:
		return plainLabel(s.Token.Label) == plainLabel(d.config.TokenLabel)
	}
}

// plainLabel is a label without padding and without what OpenSC adds to it.
func plainLabel(label string) string { return trim(strings.TrimSuffix(trim(label), "(UserPIN)")) }

// identity is what a token is recognised by after a loss: its serial, and where it has none its label.
func identity(t wire.Token) string {
	if t.Serial != "" {
		return t.Serial
	}
	return "label " + t.Label
}

func trimmed(t wire.Token) wire.Token {
	t.Label, t.Serial, t.Model = trim(t.Label), trim(t.Serial), trim(t.Model)
	t.Manufacturer, t.Firmware = trim(t.Manufacturer), trim(t.Firmware)
	return t
}

func describeToken(s wire.Slot) string {
	return fmt.Sprintf("token %q (serial %q, slot %d)", s.Token.Label, s.Token.Serial, s.ID)
}

// absentError says that the token is not there. It is ErrNotFound for who chose it and ErrUnavailable for who needs it:
// it may come back.
type absentError struct {
	wanted string
	seen   []string
}

func (e *absentError) Error() string {
	return fmt.Sprintf("%s is not there; tokens seen: %s; plug it in, or check serial, label or slot with pkcs11-tool --list-slots",
		e.wanted, quoteAll(e.seen))
}

func (e *absentError) Unwrap() []error { return []error{hsm.ErrNotFound, hsm.ErrUnavailable} }

// pinState translates a token's flags.
func pinState(flags uint) hsm.PINState {
	return hsm.PINState{
		CountLow: flags&ckfUserPINCountLow != 0,
		FinalTry: flags&ckfUserPINFinalTry != 0,
		Locked:   flags&ckfUserPINLocked != 0,
	}
}

// mechanisms returns what the token announces, asked for once for each host.
func (d *Device) mechanisms(ctx context.Context, a *attachment) (map[uint]wire.Mechanism, error) {
	a.mu.Lock()
	known := a.mechanisms
	a.mu.Unlock()
	if known != nil {
		return known, nil
	}
	frame, err := d.exchange(ctx, a, wire.OpMechanisms, wire.SlotRequest{Slot: a.slot}, nil)
	if err != nil {
		return nil, err
	}
	var listed wire.Mechanisms
	if err := wire.Decode(frame.Meta, &listed); err != nil {
		return nil, err
	}
	found := make(map[uint]wire.Mechanism, len(listed.Mechanisms))
	for _, m := range listed.Mechanisms {
		found[m.Type] = m
	}
	a.mu.Lock()
	a.mechanisms = found
	a.mu.Unlock()
	return found, nil
}
