package etcd

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-nitrokey/internal/store"
)

// explain gives an error of etcd's client its meaning for users of a store.
func explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	err = rpctypes.Error(err) // a status of gRPC becomes the error of etcd that it stands for
	if err := explainContext(ctx); err != nil {
		return err
	}
	for _, denied := range []error{
		rpctypes.ErrAuthFailed, rpctypes.ErrPermissionDenied, rpctypes.ErrInvalidAuthToken, rpctypes.ErrUserEmpty,
		rpctypes.ErrUserNotFound, rpctypes.ErrInvalidAuthMgmt, rpctypes.ErrAuthOldRevision,
	} {
		if errors.Is(err, denied) {
			return fmt.Errorf("%w: check the user name, the password and the user's roles for the keys under the prefix: %w",
				store.ErrDenied, err)
		}
	}
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("%w: compact and defragment etcd, then disarm its alarm: %w", store.ErrFull, err)
	case errors.Is(err, rpctypes.ErrRequestTooLarge):
		return fmt.Errorf("%w: raise --max-request-bytes of etcd: %w", store.ErrTooLarge, err)
	}
	if c := code(err); c == codes.Unauthenticated || c == codes.PermissionDenied {
		return fmt.Errorf("%w: %w", store.ErrDenied, err)
	}
	return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
}

// explainContext is nil while ctx lives. A caller that went away tells nothing about etcd; a deadline that passed does.
func explainContext(ctx context.Context) error {
	switch err := ctx.Err(); {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		return err
	default:
		return fmt.Errorf("%w: it did not answer in time: %w", store.ErrUnavailable, err)
	}
}

// code is the gRPC code of an error, whichever of the client's types it has.
func code(err error) codes.Code {
	var known rpctypes.EtcdError
	if errors.As(err, &known) {
		return known.Code()
	}
	return status.Code(err)
}
