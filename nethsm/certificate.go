package nethsm

import (
	"context"
	"fmt"
	"net/http"
)

// MaxKeyCertificate is the largest value that this client puts into a key's certificate slot, in bytes. A NetHSM takes
// more of some values; how much depends on the bytes, because it keeps them as escaped JSON.
const MaxKeyCertificate = 64<<10 - 1

// KeyCertificate reads the certificate of a key, to an Administrator or an Operator: the bytes that were put there. Where
// there is none, or no key, it is [hsm.ErrNotFound]. The tags of the key do not guard it.
func (c *Client) KeyCertificate(ctx context.Context, id string) ([]byte, error) {
	op := fmt.Sprintf("reading the certificate of key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return nil, err
	}
	got, err := c.do(ctx, call{op: op, method: http.MethodGet, path: path("keys", id, "cert"), ok: []int{http.StatusOK}})
	return got.body, err
}

// PutKeyCertificate puts any bytes, up to [MaxKeyCertificate], into the certificate slot of a key, as an Administrator. It
// never replaces: a slot that is taken is [hsm.ErrExists].
func (c *Client) PutKeyCertificate(ctx context.Context, id string, value []byte) error {
	op := fmt.Sprintf("storing a certificate for key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return err
	}
	if len(value) > MaxKeyCertificate {
		return fmt.Errorf("%s: %w: it has %d bytes; up to %d are sure to fit", op, ErrRequest, len(value), MaxKeyCertificate)
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPut, path: path("keys", id, "cert"), creates: true,
		raw: value, contentType: "application/octet-stream",
	})
	return err
}

// DeleteKeyCertificate empties the certificate slot of a key, as an Administrator. An empty one is [hsm.ErrNotFound].
func (c *Client) DeleteKeyCertificate(ctx context.Context, id string) error {
	op := fmt.Sprintf("deleting the certificate of key %q", id)
	if err := checkID(op, "the key", id); err != nil {
		return err
	}
	_, err := c.do(ctx, call{op: op, method: http.MethodDelete, path: path("keys", id, "cert"), creates: true})
	return err
}
