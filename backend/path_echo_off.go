//go:build !bench

package backend

import "github.com/hashicorp/vault/sdk/framework"

// benchPaths are in builds for benchmarks only.
func (b *backend) benchPaths() []*framework.Path { return nil }
