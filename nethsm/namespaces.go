package nethsm

import (
	"context"
	"fmt"
	"net/http"
)

// Namespaces lists the namespaces, to an Administrator of the root namespace.
func (c *Client) Namespaces(ctx context.Context) ([]string, error) {
	var (
		got   ids
		names []string
	)
	_, err := c.do(ctx, call{
		op: "listing namespaces", method: http.MethodGet, path: "/namespaces", limit: maxList,
		into: wanting(&got, func() error { return got.take(&names) }),
	})
	return names, err
}

// AddNamespace makes a namespace, as an Administrator of the root namespace. From then on only its own Administrators
// manage its users and keys: make one first, with [Client.AddUser]. One that exists is [hsm.ErrExists].
func (c *Client) AddNamespace(ctx context.Context, name string) error {
	op := fmt.Sprintf("adding namespace %q", name)
	if err := checkID(op, "the namespace", name); err != nil {
		return err
	}
	_, err := c.do(ctx, call{op: op, method: http.MethodPut, path: path("namespaces", name), creates: true})
	return err
}

// DeleteNamespace deletes a namespace with all its keys, as an Administrator of the root namespace.
func (c *Client) DeleteNamespace(ctx context.Context, name string) error {
	op := fmt.Sprintf("deleting namespace %q", name)
	if err := checkID(op, "the namespace", name); err != nil {
		return err
	}
	_, err := c.do(ctx, call{op: op, method: http.MethodDelete, path: path("namespaces", name), creates: true})
	return err
}
