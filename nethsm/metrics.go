package nethsm

import (
	"context"
	"errors"
	"net/http"
)

// Metrics reads the metrics of a node, to a user of role Metrics. Which there are, and what their texts mean, is the
// NetHSM's to say; with several nodes they are of whichever answers.
func (c *Client) Metrics(ctx context.Context) (map[string]string, error) {
	var got map[string]loose
	_, err := c.do(ctx, call{
		op: "reading metrics", method: http.MethodGet, path: "/metrics",
		into: wanting(&got, func() error {
			if got == nil {
				return errors.New("it is not an object")
			}
			return nil
		}),
	})
	if err != nil {
		return nil, err
	}
	metrics := make(map[string]string, len(got))
	for name, value := range got {
		metrics[name] = string(value)
	}
	return metrics, nil
}
