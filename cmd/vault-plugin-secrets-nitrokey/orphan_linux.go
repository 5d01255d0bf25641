package main

import (
	"errors"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// endWithVault ends this process when Vault dies without having ended it. Otherwise a Vault that was killed would leave
// behind a plugin whose module host stays logged in to the token, beside those of the Vault that is started next.
//
// The kernel's parent-death signal is no way to learn of it: it belongs to the thread of Vault that started us, and Go
// ends threads. The module hosts end by themselves when our end of their pipes closes.
func endWithVault(log *slog.Logger) {
	vault := os.Getppid()
	fd, err := unix.PidfdOpen(vault, 0)
	if err != nil {
		log.Warn("Vault's process cannot be watched; should Vault be killed, end this process by hand", "pid", vault, "error", err)
		return
	}
	go func() { // for the life of the process
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1) //nolint:gosec // a descriptor fits
			if err == nil {
				os.Exit(1)
			}
			if !errors.Is(err, unix.EINTR) {
				log.Warn("Vault's process cannot be watched any more", "pid", vault, "error", err)
				return
			}
		}
	}()
}
