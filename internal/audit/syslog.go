package audit

import (
	"bytes"
	"fmt"
	"log/syslog"
	"path/filepath"
)

// local sends lines to the syslog server of this machine, in the form that every one of them reads from its local socket
// (the one of syslog(3): priority, time, tag; the rest is ours). A server elsewhere is that one's business: over a network
// nobody could say whether a line was taken.
type local struct {
	address string
	conn    *syslog.Writer // nil before Reopen
}

// DefaultSyslog is the socket of the local syslog server.
const DefaultSyslog = "/dev/log"

// Syslog is a sink in the local syslog server, which listens on the datagram socket address, "" for [DefaultSyslog]. Facility
// authpriv, severity notice, warning for an outcome with an error. A line counts as taken when the server has the datagram.
func Syslog(address string) (Sink, error) {
	if address == "" {
		address = DefaultSyslog
	}
	if !filepath.IsAbs(address) {
		return nil, fmt.Errorf("audit syslog %q: its address is the path of a local socket, %s for example; let the local server "+
			"send the lines on to another machine", address, DefaultSyslog)
	}
	return &local{address: address}, nil
}

// Name implements [Sink].
func (s *local) Name() string { return "syslog " + s.address }

// Reopen implements [Sink].
func (s *local) Reopen() error {
	if err := s.Close(); err != nil {
		return err
	}
	conn, err := syslog.Dial("unixgram", s.address, syslog.LOG_AUTHPRIV|syslog.LOG_NOTICE, "nitroseal-audit")
	if err != nil {
		return fmt.Errorf("connecting to syslog: %w", err)
	}
	s.conn = conn
	return nil
}

// Write implements [Sink].
func (s *local) Write(lines []Line) error {
	for i, line := range lines {
		text := string(bytes.TrimSuffix(line.Text, []byte("\n")))
		send := s.conn.Notice
		if line.Failed {
			send = s.conn.Warning
		}
		if err := send(text); err != nil {
			return fmt.Errorf("sending line %d of %d to syslog: %w", i+1, len(lines), err)
		}
	}
	return nil
}

// Close implements [Sink].
func (s *local) Close() error {
	if s.conn == nil {
		return nil
	}
	err := s.conn.Close()
	s.conn = nil
	return err
}
