package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// syslog sends lines to a syslog server. log/syslog of the standard library has no time limit and writes an old format only.
type syslog struct {
	network, address string
	conn             net.Conn // nil before Reopen
	host             string
}

// DefaultSyslog is the socket of this machine's syslog server.
const DefaultSyslog = "/dev/log"

const (
	authpriv, notice, warning = 10 << 3, 5, 4 // RFC 5424, 6.2.1
	syslogTag                 = "nitroseal-audit"
	syslogLimit               = time.Second // of one message, or of a connection
)

// Syslog is a sink in a syslog server: facility authpriv, severity notice, and warning for an outcome with an error.
//
// The address is the path of a local datagram socket, "" for [DefaultSyslog]. The lines have the form that every local
// server reads there, that of syslog(3), and one counts as taken when the server has the datagram.
//
// Or it is a server elsewhere, "tcp://host:601" or "udp://host:514", which gets RFC 5424 (counted octets, RFC 6587, over TCP;
// nothing is encrypted). Nobody can say of a line on a network whether it was taken, so one there never allows an act:
// such a sink is for a copy, beside another.
func Syslog(address string) (Sink, error) {
	if address == "" {
		address = DefaultSyslog
	}
	if filepath.IsAbs(address) {
		return &syslog{network: "unixgram", address: address}, nil
	}
	server, err := url.Parse(address)
	if err != nil || server.Scheme != "tcp" && server.Scheme != "udp" || server.Hostname() == "" || server.Port() == "" || server.Path != "" {
		return nil, fmt.Errorf("audit syslog: the address %q is none; write the path of a local socket, %s for example, or tcp://host:601 or "+
			"udp://host:514", address, DefaultSyslog)
	}
	s := &syslog{network: server.Scheme, address: server.Host}
	if s.host, _ = os.Hostname(); s.host == "" {
		s.host = "-" // RFC 5424's word for nothing
	}
	return s, nil
}

// Name implements [Sink].
func (s *syslog) Name() string {
	if s.local() {
		return "syslog " + s.address
	}
	return "syslog " + s.network + "://" + s.address
}

func (s *syslog) local() bool { return s.network == "unixgram" }

// Uncertain tells that a line which was sent is not thereby taken.
func (s *syslog) Uncertain() bool { return !s.local() }

// Reopen implements [Sink].
func (s *syslog) Reopen() error {
	if err := s.Close(); err != nil {
		return err
	}
	conn, err := (&net.Dialer{Timeout: syslogLimit}).DialContext(context.Background(), s.network, s.address)
	if err != nil {
		return fmt.Errorf("connecting to syslog: %w", err)
	}
	s.conn = conn
	return nil
}

// Write implements [Sink]. A connection that broke is made anew once: the server was restarted since the last line.
func (s *syslog) Write(lines []Line) error {
	again := true
	for i, line := range lines {
		err := s.send(s.message(line, time.Now()))
		if err != nil && again && !errors.Is(err, os.ErrDeadlineExceeded) {
			again = false
			if err = s.Reopen(); err == nil {
				err = s.send(s.message(line, time.Now()))
			}
		}
		if err != nil {
			return fmt.Errorf("sending line %d of %d to syslog: %w", i+1, len(lines), err)
		}
	}
	return nil
}

func (s *syslog) send(message []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(syslogLimit)); err != nil {
		return err
	}
	_, err := s.conn.Write(message)
	return err
}

// message is a line as it is sent.
func (s *syslog) message(line Line, now time.Time) []byte {
	priority := authpriv + notice
	if line.Failed {
		priority = authpriv + warning
	}
	text := bytes.TrimSuffix(line.Text, []byte("\n"))
	if s.local() {
		return fmt.Appendf(nil, "<%d>%s %s[%d]: %s", priority, now.Format(time.Stamp), syslogTag, os.Getpid(), text)
	}
	message := fmt.Appendf(nil, "<%d>1 %s %s %s %d %s - %s", priority, now.UTC().Format("2006-01-02T15:04:05.000000Z"),
		strings.ReplaceAll(s.host, " ", "-"), syslogTag, os.Getpid(), line.Event, text)
	if s.network == "tcp" {
		return append(fmt.Appendf(nil, "%d ", len(message)), message...)
	}
	return message
}

// Close implements [Sink].
func (s *syslog) Close() error {
	if s.conn == nil {
		return nil
	}
	err := s.conn.Close()
	s.conn = nil
	return err
}
