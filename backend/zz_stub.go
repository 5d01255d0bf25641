package backend

import (
	"context"
)

func (b *backend) rewrapMaterial(context.Context, string)                      {}
func (b *backend) startRewrap(context.Context, string)                         {}
func (b *backend) rollbackRewrap(context.Context, string) error                { return nil }
func (b *backend) rewrapState(context.Context, string) (map[string]any, error) { return nil, nil }
func (b *backend) checkUnused(context.Context, string) error                   { return nil }
func (b *backend) itemsInStore(context.Context, string) ([]string, error)      { return nil, nil }
