package nethsm

import (
	"fmt"
	"strings"
)

// Client speaks to the nodes of one NetHSM. It is safe for concurrent use.
//
// A Client that [New] returns sends no credentials: that is enough for what is public, the state, provisioning and
// unlocking. [Client.As] gives a view with credentials and [Client.At] one of a single node. Views share the nodes, their
// connections and what is known about them; only the Client that New returned needs a Close.
type Client struct {
	pool  *pool
	login *login // nil: no credentials are sent
	only  *node  // nil: any node may serve
}

// New checks the options and returns a client. It does no I/O. Every complaint is [ErrConfig].
func New(options Options) (*Client, error) {
	pool, err := newPool(options, nil)
	if err != nil {
		return nil, err
	}
	return &Client{pool: pool}, nil
}

// Close ends what runs in the background and closes the idle connections. Calls in flight are not waited for; they fail.
func (c *Client) Close() error {
	return c.pool.close()
}

// As returns a view that sends these credentials, which are copied.
func (c *Client) As(credentials Credentials) *Client {
	return &Client{pool: c.pool, login: c.pool.login(credentials), only: c.only}
}

// At returns a view of the one node with this URL, as it was given in [Options] or as [Client.URLs] lists it. There is no
// failover: what the node answers is the answer. An unknown URL is [ErrConfig].
func (c *Client) At(url string) (*Client, error) {
	base, err := parseURL(url)
	if err != nil {
		return nil, err
	}
	for _, node := range c.pool.nodes {
		if node.url == base {
			return &Client{pool: c.pool, login: c.login, only: node}, nil
		}
	}
	return nil, fmt.Errorf("%w: %s is not one of the nodes (%s)", ErrConfig, base, strings.Join(c.URLs(), ", "))
}

// URLs lists the nodes of this view in the order of the configuration, each as https://host:port.
func (c *Client) URLs() []string {
	var urls []string
	for _, node := range c.nodes() {
		urls = append(urls, node.url)
	}
	return urls
}

// nodes are those that may serve this view.
func (c *Client) nodes() []*node {
	if c.only != nil {
		return []*node{c.only}
	}
	return c.pool.nodes
}
