package nethsm

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

func TestNodesTellHowTheyFare(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 4, Provisioned: true})
	h.Node(1).SetState(nethsmtest.Locked)
	h.Node(2).SetState(nethsmtest.Failed)
	h.Node(3).Stop()
	client := reach(t, Options{TLS: TLS{CA: h.CA()}}, h.URLs()...)
	views := map[string]*Client{
		"nobody": client,
		"admin":  client.As(Credentials{Username: nethsmtest.AdminUser, Password: []byte(nethsmtest.AdminPassphrase)}),
		"operator": client.As(Credentials{
			Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase),
		}),
		"metrics": client.As(Credentials{Username: nethsmtest.MetricsUser, Password: []byte(nethsmtest.MetricsPassphrase)}),
		"a wrong password": client.As(Credentials{
			Username: nethsmtest.AdminUser, Password: []byte("not the password"),
		}),
	}
	client.login = nil
	for name, view := range views {
		t.Run(name, func(t *testing.T) {
			nodes := view.Nodes(t.Context())
			if len(nodes) != 4 {
				t.Fatalf("%d nodes", len(nodes))
			}
			for i, want := range []hsm.State{hsm.StateOperational, hsm.StateLocked, hsm.StateFailed, hsm.StateAbsent} {
				n := nodes[i]
				if n.URL != h.URLs()[i] || n.State != want {
					t.Errorf("node %d = %+v, want it %s", i, n, want)
				}
				if there := want != hsm.StateAbsent; there && (n.RoundTrip <= 0 || n.RoundTrip > nodesTimeout || !n.CertificateEnds.After(time.Now())) {
					t.Errorf("node %d = %+v", i, n)
				}
				if i > 0 && n.Err == nil {
					t.Errorf("node %d says that it can serve", i)
				}
			}
			if !errors.Is(nodes[1].Err, hsm.ErrLocked) || !errors.Is(nodes[3].Err, hsm.ErrUnavailable) {
				t.Errorf("errors: %v; %v", nodes[1].Err, nodes[3].Err)
			}
			serial := nodes[0].Serial != "" && nodes[0].Firmware != ""
			if serial != (name == "admin") {
				t.Errorf("serial %q, firmware %q", nodes[0].Serial, nodes[0].Firmware)
			}
			if (nodes[0].Err == nil) != (name != "a wrong password") {
				t.Errorf("node 0: %v", nodes[0].Err)
			}
		})
	}
	// Nobody spends a 403 on each look.
	for _, view := range views {
		_ = view.Nodes(t.Context())
	}
	forbidden := 0
	for _, request := range h.Node(0).Requests() {
		if request.Status == http.StatusForbidden {
			forbidden++
		}
	}
	if forbidden > 1 {
		t.Errorf("%d requests were forbidden, want 1 at most, of the first look", forbidden)
	}
	if alone, err := client.At(h.URLs()[1]); err != nil || len(alone.Nodes(t.Context())) != 1 {
		t.Error("a view of one node lists others")
	}
}

// Nodes that hang do not keep those waiting that answer, nor the caller longer than he says.
func TestNodesThatHang(t *testing.T) {
	within(t, Options{}, handlers(healthy, hanging, hanging), func(s *scene) {
		t := s.T
		began := time.Now()
		nodes := s.client.Nodes(t.Context())
		if took := time.Since(began); took > nodesTimeout {
			t.Errorf("it took %v", took)
		}
		if nodes[0].Err != nil || nodes[1].Err == nil || nodes[2].State != hsm.StateAbsent {
			t.Errorf("nodes = %+v", nodes)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		_ = s.client.Nodes(ctx)
		if took := time.Since(began); took > time.Second {
			t.Errorf("with a deadline of 1 s it took %v", took)
		}
	})
}

// A node that rests although it says that it is Operational shows why.
func TestRestingNodeShowsItsCause(t *testing.T) {
	within(t, Options{}, handlers(saying(500), healthy), func(s *scene) {
		t := s.T
		for range 2 {
			if err := ask(t.Context(), s.client); err != nil {
				t.Fatal(err)
			}
		}
		nodes := s.client.Nodes(t.Context())
		if !nodes[0].Resting || nodes[0].State != hsm.StateOperational || nodes[0].Err == nil || !strings.Contains(nodes[0].Err.Error(), "HTTP 500") {
			t.Errorf("node 0 = %+v", nodes[0])
		}
		if nodes[1].Resting || nodes[1].Err != nil {
			t.Errorf("node 1 = %+v", nodes[1])
		}
	})
}
