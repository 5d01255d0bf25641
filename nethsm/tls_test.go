package nethsm

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// operatorOf is a view of a double over TLS, with its operator.
func operatorOf(t *testing.T, h *nethsmtest.HSM, trust TLS) *Client {
	t.Helper()
	client := reach(t, Options{TLS: trust}, h.URLs()...)
	return client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
}

func TestCertificates(t *testing.T) {
	const keep = nethsmtest.CertificateChange(-1) // the certificate that it has
	tests := []struct {
		name       string
		selfSigned bool
		change     nethsmtest.CertificateChange
		trust      func(h *nethsmtest.HSM, before string) TLS
		problem    CertificateProblem // empty: it is trusted
		speaks     string
	}{
		{"the CA signed it", false, keep, func(h *nethsmtest.HSM, _ string) TLS { return TLS{CA: h.CA()} }, "", ""},
		{"the CA signed another one", false, nethsmtest.Renewed, func(h *nethsmtest.HSM, _ string) TLS { return TLS{CA: h.CA()} }, "", ""},
		{"nobody trusted signed it", false, keep, func(*nethsmtest.HSM, string) TLS { return TLS{} }, CertificateUnknown, "tls_pins"},
		{"another CA signed it", false, nethsmtest.OtherAuthority, func(h *nethsmtest.HSM, _ string) TLS { return TLS{CA: h.CA()} }, CertificateUnknown, "ca_cert"},
		{"it ended", false, nethsmtest.Expired, func(h *nethsmtest.HSM, _ string) TLS { return TLS{CA: h.CA()} }, CertificateExpired, "ended on 2"},
		{"it is for another name", false, nethsmtest.OtherName, func(h *nethsmtest.HSM, _ string) TLS { return TLS{CA: h.CA()} }, CertificateWrongName, "other.example"},
		{"it is for the name that it should have", false, nethsmtest.OtherName, func(h *nethsmtest.HSM, _ string) TLS {
			return TLS{CA: h.CA(), ServerName: "other.example"}
		}, "", ""},
		{"it is self-signed and nobody said so", true, keep, func(*nethsmtest.HSM, string) TLS { return TLS{} }, CertificateUnknown, "SHA-256"},
		{"it fell back to a self-signed one", false, nethsmtest.FellBack, func(h *nethsmtest.HSM, _ string) TLS { return TLS{CA: h.CA()} }, CertificateUnknown, "SHA-256"},
		{"it is self-signed and pinned", true, keep, func(_ *nethsmtest.HSM, before string) TLS { return TLS{Pins: []string{before}} }, "", ""},
		{"it is the second of the pins", true, keep, func(_ *nethsmtest.HSM, before string) TLS {
			return TLS{Pins: []string{strings.Repeat("00:", 31) + "00", strings.ToUpper(before)}}
		}, "", ""},
		{"the pinned one was renewed", true, nethsmtest.Renewed, func(_ *nethsmtest.HSM, before string) TLS { return TLS{Pins: []string{before}} }, CertificateNotPinned, "in between"},
		{"the pinned one fell back", false, nethsmtest.FellBack, func(_ *nethsmtest.HSM, before string) TLS { return TLS{Pins: []string{before}} }, CertificateNotPinned, "SHA-256"},
		{"it ended, and is pinned", false, nethsmtest.Expired, func(h *nethsmtest.HSM, _ string) TLS { return TLS{Pins: []string{h.Node(0).Pin()}} }, "", ""},
		{"CA and pin hold", false, keep, func(h *nethsmtest.HSM, before string) TLS { return TLS{CA: h.CA(), Pins: []string{before}} }, "", ""},
		{"the CA holds and the pin does not", false, nethsmtest.Renewed, func(h *nethsmtest.HSM, before string) TLS {
			return TLS{CA: h.CA(), Pins: []string{before}}
		}, CertificateNotPinned, "SHA-256"},
		{"the pin holds and the CA does not", false, nethsmtest.OtherAuthority, func(h *nethsmtest.HSM, _ string) TLS {
			return TLS{CA: h.CA(), Pins: []string{h.Node(0).Pin()}}
		}, CertificateUnknown, "SHA-256"},
		{"CA and pin hold, and it ended", false, nethsmtest.Expired, func(h *nethsmtest.HSM, _ string) TLS {
			return TLS{CA: h.CA(), Pins: []string{h.Node(0).Pin()}}
		}, CertificateExpired, "clock"},
		{"anything goes", true, keep, func(*nethsmtest.HSM, string) TLS { return TLS{Insecure: true} }, "", ""},
		{"anything goes that is pinned", true, nethsmtest.Renewed, func(_ *nethsmtest.HSM, before string) TLS {
			return TLS{Insecure: true, Pins: []string{before}}
		}, CertificateNotPinned, "SHA-256"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true, SelfSigned: test.selfSigned})
			before := h.Node(0).Pin()
			if test.change != keep {
				if err := h.Node(0).ReplaceCertificate(test.change); err != nil {
					t.Fatal(err)
				}
			}
			h.Node(0).ResetCounters()
			client := operatorOf(t, h, test.trust(h, before))
			for name, send := range map[string]func(context.Context, *Client) error{"reading": ask, "creating": create} {
				err := send(t.Context(), client)
				bad, is := errors.AsType[*CertificateError](err)
				if test.problem == "" {
					if is {
						t.Errorf("%s: error = %v, want it trusted", name, err)
					}
					continue
				}
				if !is || bad.Problem != test.problem {
					t.Fatalf("%s: error = %v, want a certificate that is %s", name, err, test.problem)
				}
				if !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrMayHaveHappened) {
					t.Errorf("%s: error = %v, want ErrUnavailable alone: nothing was sent", name, err)
				}
				if bad.Fingerprint != h.Node(0).Pin() || bad.Node != h.Node(0).Address() || bad.NotAfter.IsZero() {
					t.Errorf("%s: %+v", name, bad)
				}
				if !strings.Contains(err.Error(), test.speaks) {
					t.Errorf("%s: error = %v, want it to say %q", name, err, test.speaks)
				}
			}
			if n := len(h.Node(0).Requests()); test.problem != "" && n > 0 {
				t.Errorf("%d requests were sent to a node that is not trusted", n)
			}
		})
	}
}

// A certificate that changes while connections are open is noticed by the next new connection; what the CA signed goes on.
func TestCertificateChangesInUse(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	byCA, byPin := operatorOf(t, h, TLS{CA: h.CA()}), operatorOf(t, h, TLS{Pins: []string{h.Node(0).Pin()}})
	for _, client := range []*Client{byCA, byPin} {
		if err := ask(t.Context(), client); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.Node(0).ReplaceCertificate(nethsmtest.Renewed); err != nil {
		t.Fatal(err)
	}
	if err := ask(t.Context(), byCA); err != nil {
		t.Errorf("by its CA: %v", err)
	}
	if err := ask(t.Context(), byPin); !errors.As(err, new(*CertificateError)) {
		t.Errorf("by its pin: %v, want a CertificateError", err)
	}
}

// One node's bad certificate does not keep the others from serving.
func TestBadCertificateOfOneNode(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	if err := h.Node(1).ReplaceCertificate(nethsmtest.Expired); err != nil {
		t.Fatal(err)
	}
	client := operatorOf(t, h, TLS{CA: h.CA()})
	for range 12 {
		if err := ask(t.Context(), client); err != nil {
			t.Fatal(err)
		}
	}
	nodes := client.Nodes(t.Context())
	if !errors.As(nodes[1].Err, new(*CertificateError)) || nodes[1].State != hsm.StateAbsent || !nodes[1].CertificateEnds.Before(time.Now()) {
		t.Errorf("node 1 = %+v", nodes[1])
	}
}

func TestInsecureWarnsOnEveryConnection(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true, SelfSigned: true})
	var log lines
	options := Options{TLS: TLS{Insecure: true}, Logger: slog.New(slog.NewTextHandler(&log, nil))}
	client := reach(t, options, h.URLs()...).As(Credentials{
		Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase),
	})
	for range 3 {
		if err := create(t.Context(), client); !errors.Is(err, hsm.ErrForbidden) { // each on a connection of its own
			t.Fatal(err)
		}
	}
	if n := strings.Count(log.String(), "level=WARN"); n != 3 || !strings.Contains(log.String(), h.Node(0).Pin()) {
		t.Errorf("%d warnings for 3 connections: %s", n, log.String())
	}
}

func TestOldTLSIsRefused(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(healthy))
	server.TLS = &tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	server.StartTLS()
	defer server.Close()
	client := reach(t, Options{TLS: TLS{Insecure: true}}, server.URL)
	if err := ask(t.Context(), client); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "protocol version") {
		t.Errorf("error = %v, want one that tells of the protocol version", err)
	}
}

// Only HTTP/1.1 is spoken, whatever the node offers, and sessions are not resumed.
func TestHandshakeOffersWhatIsMeant(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(healthy))
	server.EnableHTTP2 = true
	var states []tls.ConnectionState
	server.TLS = &tls.Config{VerifyConnection: func(state tls.ConnectionState) error {
		states = append(states, state)
		return nil
	}}
	server.StartTLS()
	defer server.Close()
	client := reach(t, Options{TLS: TLS{Insecure: true}}, server.URL)
	for range 3 {
		if err := create(t.Context(), client); err != nil {
			t.Fatal(err)
		}
	}
	for _, state := range states {
		if state.NegotiatedProtocol == "h2" || state.DidResume || state.Version < tls.VersionTLS12 {
			t.Errorf("a connection with %q, resumed %v, %s", state.NegotiatedProtocol, state.DidResume, tls.VersionName(state.Version))
		}
	}
}

func TestTrustThatCannotWork(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{})
	ca := string(h.CA())
	lines := strings.SplitAfter(strings.TrimSpace(ca), "\n")
	damaged := strings.Join(append(lines[:len(lines)-2:len(lines)-2], lines[len(lines)-1]), "")
	tests := []struct {
		name  string
		trust TLS
		says  string
	}{
		{"no PEM", TLS{CA: []byte("not a certificate")}, "no certificate in PEM"},
		{"a path instead of a CA", TLS{CA: []byte("/etc/nitroseal/ca.pem")}, "no certificate in PEM"},
		{"a key instead of a CA", TLS{CA: []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")}, "PRIVATE KEY"},
		{"a damaged certificate", TLS{CA: []byte(damaged)}, "cannot be read"},
		{"a good one and half of another", TLS{CA: []byte(ca + ca[:len(ca)/2])}, "damaged"},
		{"a good one and a key", TLS{CA: []byte(ca + "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")}, "PRIVATE KEY"},
		{"a pin that is too short", TLS{Pins: []string{"abcd"}}, "pin 1"},
		{"a pin that is no hexadecimal", TLS{Pins: []string{strings.Repeat("ab", 32), strings.Repeat("zz", 32)}}, "pin 2"},
		{"an empty pin", TLS{Pins: []string{""}}, "pin 1"},
		{"a CA, and no check", TLS{CA: h.CA(), Insecure: true}, "take one of them back"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			client, err := New(Options{URLs: []string{"https://127.0.0.1:1"}, TLS: test.trust})
			if client != nil || !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("New = %v, %v; want ErrConfig that says %q", client, err, test.says)
			}
		})
	}
	two := append(bytes.Clone(h.CA()), h.Node(0).Certificate()...)
	client, err := New(Options{URLs: []string{"https://127.0.0.1:1"}, TLS: TLS{CA: two}})
	if err != nil {
		t.Fatalf("two certificates: %v", err)
	}
	_ = client.Close()
}

// A node that accepts and never shakes hands is one that hangs.
func TestHandshakeThatHangs(t *testing.T) {
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	client := reach(t, Options{TLS: TLS{CA: h.CA()}, Timeout: 3 * time.Second}, "https://"+listener.Addr().String(), h.URLs()[0])
	client = client.As(Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
	for range 2 {
		if err := ask(t.Context(), client); err != nil {
			t.Error(err)
		}
	}
	one, err := client.At("https://" + listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := create(t.Context(), one); !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrMayHaveHappened) {
		t.Errorf("error = %v, want ErrUnavailable alone", err)
	}
	if took := time.Since(began); took > 9*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestProblemsOfCertificates(t *testing.T) {
	leaf := &x509.Certificate{NotBefore: time.Now().Add(time.Hour), NotAfter: time.Now().Add(2 * time.Hour), Raw: []byte("x")}
	tests := []struct {
		err  error
		want CertificateProblem
		says string
	}{
		{x509.CertificateInvalidError{Cert: leaf, Reason: x509.Expired}, CertificateNotYetValid, "begins on"},
		{x509.CertificateInvalidError{Cert: leaf, Reason: x509.IncompatibleUsage}, CertificateUnusable, "cannot be used"},
		{x509.HostnameError{Certificate: leaf, Host: "h"}, CertificateWrongName, "no name at all"},
		{x509.UnknownAuthorityError{Cert: leaf}, CertificateUnknown, "SHA-256"},
	}
	for _, test := range tests {
		t.Run(string(test.want), func(t *testing.T) {
			problem := problemOf(test.err, leaf)
			if err := newCertificateError("h:1", problem, leaf, test.err); problem != test.want || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%s: %v", problem, err)
			}
		})
	}
}
