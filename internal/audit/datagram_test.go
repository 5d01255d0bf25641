package audit

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/journal"
)

func TestTheJournalGetsFieldsToSearchBy(t *testing.T) {
	type message struct {
		text     string
		priority journal.Priority
		fields   map[string]string
	}
	var sent []message
	there := true
	sink := &journald{
		enabled: func() bool { return there },
		send: func(text string, priority journal.Priority, fields map[string]string) error {
			sent = append(sent, message{text, priority, fields})
			return nil
		},
	}
	l := open(t, Options{}, sink)
	end, err := l.Begin(t.Context(), unseal)
	must(t, err)
	end(errors.New("the node hung up"))
	must(t, l.Close())
	if len(sent) != 2 || sent[0].priority != journal.PriNotice || sent[1].priority != journal.PriWarning {
		t.Fatalf("sent %+v", sent)
	}
	for i, event := range []string{EventIntent, EventOutcome} {
		fields := sent[i].fields
		if fields["NITROSEAL_AUDIT_EVENT"] != event || !strings.Contains(sent[i].text, fields["NITROSEAL_AUDIT_ID"]) || strings.Contains(sent[i].text, "\n") {
			t.Errorf("message %d: %+v", i, sent[i])
		}
	}

	there = false
	l = open(t, Options{}, sink)
	if _, err := l.Begin(t.Context(), unseal); !errors.Is(err, ErrNoSink) || !errors.Is(err, errNoJournal) {
		t.Errorf("without a journal: %v", err)
	}
	must(t, l.Close())
}

// syslogd listens as a local syslog server does.
func syslogd(t *testing.T, path string) *net.UnixConn {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func receive(t *testing.T, conn *net.UnixConn) string {
	t.Helper()
	must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	buffer := make([]byte, MaxLine+512)
	n, err := conn.Read(buffer)
	must(t, err)
	return string(buffer[:n])
}

func TestTheLocalSyslogServerGetsEveryLineAlsoAfterItsRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	server := syslogd(t, path)
	sink, err := Syslog(path)
	must(t, err)
	l := open(t, Options{}, sink)
	end, err := l.Begin(t.Context(), unseal)
	must(t, err)
	got := receive(t, server)
	// authpriv (10) and notice (5): 10*8+5
	if !regexp.MustCompile(`^<85>[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d nitroseal-audit\[\d+\]: \{"time":.*"event":"intent".*\}$`).MatchString(got) {
		t.Errorf("got %q", got)
	}
	end(errors.New("no"))
	if got := receive(t, server); !strings.HasPrefix(got, "<84>") || !strings.Contains(got, `"result":"failed"`) { // warning
		t.Errorf("got %q", got)
	}

	must(t, server.Close())
	must(t, os.RemoveAll(path))
	server = syslogd(t, path) // it was restarted: nothing is missed
	end, err = l.Begin(t.Context(), unseal)
	must(t, err)
	if got := receive(t, server); !strings.Contains(got, `"event":"intent"`) || strings.Contains(got, "missed") {
		t.Errorf("got %q", got)
	}
	end(nil)
	receive(t, server)

	must(t, server.Close())
	must(t, os.RemoveAll(path))
	if _, err := l.Begin(t.Context(), unseal); !errors.Is(err, ErrNoSink) {
		t.Errorf("without a server: %v", err)
	}
	server = syslogd(t, path)
	end, err = l.Begin(t.Context(), unseal)
	must(t, err)
	if got := receive(t, server); !strings.Contains(got, `"missed":{"lines":1,`) {
		t.Errorf("after its restart: %q", got)
	}
	end(nil)
	must(t, l.Close())
}

func TestASyslogServerThatDoesNotReadStopsNoAct(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	syslogd(t, path)
	sink, err := Syslog(path)
	must(t, err)
	good := &fakeSink{name: "good"}
	l := open(t, Options{Patience: 50 * time.Millisecond}, sink, good)
	detail := map[string]string{"what": strings.Repeat("x", maxDetail)}
	for range 2000 { // many more than a socket keeps
		end, err := l.Begin(t.Context(), Act{Verb: "unseal", Detail: detail})
		must(t, err)
		end(nil)
		if l.Sinks()[0].Err != nil {
			break
		}
	}
	if err := l.Sinks()[0].Err; err == nil {
		t.Error("the server took everything")
	}
	_ = l.Close() // without waiting for it
	<-l.writers[0].ended
}

func TestASyslogServerElsewhereGetsACopy(t *testing.T) {
	for _, address := range []string{"log.example:514", "tcp://log.example", "http://log.example:514", "relative/socket"} {
		if _, err := Syslog(address); err == nil || !strings.Contains(err.Error(), "tcp://host:601") {
			t.Errorf("%s: %v", address, err)
		}
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // a test on loopback
	must(t, err)
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0") //nolint:noctx // a test on loopback
	must(t, err)
	defer func() { must(t, udp.Close()) }()
	overTCP, err := Syslog("tcp://" + tcp.Addr().String())
	must(t, err)
	overUDP, err := Syslog("udp://" + udp.LocalAddr().String())
	must(t, err)
	if _, err := Open(Options{Sinks: []Sink{overTCP, overUDP}}); !errors.Is(err, ErrNoSink) {
		t.Errorf("a log on the network alone: %v", err)
	}
	kept := &fakeSink{name: "kept"}
	l := open(t, Options{}, overTCP, overUDP, kept)
	end, err := l.Begin(t.Context(), unseal)
	must(t, err)
	end(nil)

	conn, err := tcp.Accept()
	must(t, err)
	defer conn.Close()
	must(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	must(t, udp.SetReadDeadline(time.Now().Add(10*time.Second)))
	reader := bufio.NewReader(conn)
	buffer := make([]byte, MaxLine+512)
	for _, event := range []string{EventIntent, EventOutcome} {
		var size int
		_, err := fmt.Fscanf(reader, "%d ", &size)
		must(t, err)
		counted := make([]byte, size)
		_, err = io.ReadFull(reader, counted)
		must(t, err)
		n, _, err := udp.ReadFrom(buffer)
		must(t, err)
		for _, got := range []string{string(counted), string(buffer[:n])} {
			if !regexp.MustCompile(`^<85>1 \d{4}-\d\d-\d\dT[\d:.]+Z \S+ nitroseal-audit \d+ ` + event + ` - \{"time".*\}$`).MatchString(got) {
				t.Errorf("got %q", got)
			}
		}
	}

	kept.fails(syscall.ENOSPC)
	if _, err := l.Begin(t.Context(), unseal); !errors.Is(err, ErrNoSink) {
		t.Errorf("with the network alone: %v", err)
	}
	must(t, l.Close())
}
