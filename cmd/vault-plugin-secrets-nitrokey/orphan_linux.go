package main

import (
	"errors"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"
)

// endWithHost ends this process when Vault or OpenBao dies without having ended it. Otherwise a host that was killed would
// leave behind a plugin whose module host stays logged in to the token, beside those of the host that is started next.
//
// The kernel's parent-death signal is no way to learn of it: it belongs to the thread of the host that started us, and Go
// ends threads. The module hosts end by themselves when our end of their pipes closes.
func endWithHost(log *slog.Logger) {
	host := os.Getppid()
	fd, err := unix.PidfdOpen(host, 0)
	if err != nil {
		log.Warn("the process of Vault or OpenBao cannot be watched; should it be killed, end this process by hand", "pid", host, "error", err)
		return
	}
	go func() { // for the life of the process
		for {
			_, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1) //nolint:gosec // a descriptor fits
			if err == nil {
				os.Exit(1)
			}
			if !errors.Is(err, unix.EINTR) {
				log.Warn("the process of Vault or OpenBao cannot be watched any more", "pid", host, "error", err)
				return
			}
		}
	}()
}
