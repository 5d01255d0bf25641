// Package filelock serialises work among the goroutines and processes of one machine by a lock file.
//
// flock(2) belongs to an open file, is given back by the kernel when its holder dies, and does not time out. It cannot
// be waited for and abandoned, so a waiter tries again at short intervals until its ctx ends; goroutines of one
// process first queue among themselves, so that at most one of them does so.
package filelock

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	firstPause = time.Millisecond
	longPause  = 25 * time.Millisecond
)

// queues holds a token for each lock file in use by this process, by its absolute path. They are few and long-lived.
var queues struct {
	sync.Mutex

	of map[string]chan struct{}
}

func queueFor(path string) chan struct{} {
	queues.Lock()
	defer queues.Unlock()
	if queues.of == nil {
		queues.of = map[string]chan struct{}{}
	}
	if queues.of[path] == nil {
		queues.of[path] = make(chan struct{}, 1)
	}
	return queues.of[path]
}

// Lock waits for the exclusive lock on the file at path, which is made with mode 0600 where it is missing and stays
// there. The caller calls unlock once. When ctx ends first, its error is returned.
func Lock(ctx context.Context, path string) (unlock func(), err error) {
	path, err = filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	queue := queueFor(path)
	select {
	case queue <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for the lock %s: %w", path, context.Cause(ctx))
	}
	file, err := lockFile(ctx, path)
	if err != nil {
		<-queue
		return nil, err
	}
	return func() {
		file.Close() // gives the lock back; nothing was written
		<-queue
	}, nil
}

func lockFile(ctx context.Context, path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock file: %w", err)
	}
	for pause := firstPause; ; pause = min(2*pause, longPause) {
		err := ctx.Err()
		if err == nil {
			err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			file.Close()
			return nil, fmt.Errorf("waiting for the lock %s: %w", path, err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}
