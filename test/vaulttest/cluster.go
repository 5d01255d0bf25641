package vaulttest

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
)

// Cluster is several Vaults that shall become one raft cluster: bare ones, each with a certificate of the same CA.
type Cluster struct {
	*Authority
	CAFile  string
	Servers []*Server
}

// StartCluster runs nodes that nobody has initialised. With retryJoin they look for each other by themselves, else somebody
// must join them. The seals are those of each.
func StartCluster(t testing.TB, nodes int, retryJoin bool, seals ...Seal) *Cluster {
	t.Helper()
	c := &Cluster{Authority: NewAuthority(t)}
	ports := FreePorts(t, 2*nodes)
	var addresses []string
	for i := range nodes {
		addresses = append(addresses, "https://"+ports[2*i])
	}
	for i, address := range addresses {
		options := Options{Bare: true, Authority: c.Authority, Seals: seals}
		for j, other := range addresses {
			if retryJoin && i != j {
				options.RetryJoin = append(options.RetryJoin, other)
			}
		}
		s := prepare(t, options)
		s.Address, s.cluster = address, ports[2*i+1]
		c.Servers = append(c.Servers, s)
	}
	c.CAFile = c.Servers[0].CAFile
	c.Up(t)
	return c
}

// Addresses are the addresses of the nodes.
func (c *Cluster) Addresses() []string {
	var all []string
	for _, s := range c.Servers {
		all = append(all, s.Address)
	}
	return all
}

// Kill ends all nodes at once with SIGKILL.
func (c *Cluster) Kill(t testing.TB) {
	t.Helper()
	for _, s := range c.Servers {
		_ = s.process.cmd.Process.Signal(syscall.SIGKILL) // before anyone is waited for
	}
	for _, s := range c.Servers {
		s.Kill(t)
	}
}

// Up starts all nodes, sealed.
func (c *Cluster) Up(t testing.TB) {
	t.Helper()
	for _, s := range c.Servers {
		s.Up(t)
	}
}

// WaitUnsealed waits until all nodes are unsealed and one of them is active.
func (c *Cluster) WaitUnsealed(t testing.TB, limit time.Duration) {
	t.Helper()
	for _, s := range c.Servers {
		s.WaitUnsealed(t, limit)
	}
	Eventually(t, limit, "an active node", func() error {
		_, err := c.Leader(t)
		return err
	})
}

// Up starts a server that [Server.Kill] or [Server.Stop] ended, as it is: sealed.
func (s *Server) Up(t testing.TB) {
	t.Helper()
	s.run(t)
}

// Launch is Up without waiting for anything. A Vault that unseals itself serves its API when its first attempt at that has ended.
func (s *Server) Launch(t testing.TB) {
	t.Helper()
	s.launch(t)
}

// Restarted ends the server with SIGKILL and starts it anew, sealed.
func (s *Server) Restarted(t testing.TB) {
	t.Helper()
	s.Kill(t)
	s.Up(t)
}

// Anew is Restarted with nothing in its storage: not initialised any more.
func (s *Server) Anew(t testing.TB) {
	t.Helper()
	s.Kill(t)
	data := filepath.Join(s.Dir, "data")
	must(t, os.RemoveAll(data))
	must(t, os.Mkdir(data, 0o700))
	s.Up(t)
}

// Freeze stops the server's process without ending it: it takes connections and answers nothing. Thaw lets it go on.
func (s *Server) Freeze(t testing.TB) {
	t.Helper()
	must(t, s.process.cmd.Process.Signal(syscall.SIGSTOP))
}

// Thaw undoes Freeze.
func (s *Server) Thaw(t testing.TB) {
	t.Helper()
	must(t, s.process.cmd.Process.Signal(syscall.SIGCONT))
}

// Anonymous talks to the server without a token, and never repeats a request.
func (s *Server) Anonymous(t testing.TB) *api.Client {
	t.Helper()
	return s.client(t, "")
}

// WaitUnsealed waits until the server is initialised and unsealed.
func (s *Server) WaitUnsealed(t testing.TB, limit time.Duration) {
	t.Helper()
	Eventually(t, limit, "Vault to be unsealed", func() error {
		status, err := s.Anonymous(t).Sys().SealStatus()
		if err == nil && (status.Sealed || !status.Initialized) {
			err = fmt.Errorf("initialised %t, sealed %t, progress %d of %d", status.Initialized, status.Sealed, status.Progress, status.T)
		}
		return err
	})
}

// Renew gives the running server a new certificate of an authority, or of its own one again.
func (s *Server) Renew(t testing.TB, authority *Authority) {
	t.Helper()
	before := pin(t, s.certs.cert)
	certificate, key := authority.Issue(t)
	must(t, os.WriteFile(s.certs.cert, certificate, 0o600))
	must(t, os.WriteFile(s.certs.key, key, 0o600))
	must(t, s.process.cmd.Process.Signal(syscall.SIGHUP))
	now := s.Pin(t)
	if now == before {
		t.Fatal("the new certificate has the old key")
	}
	Eventually(t, Patience, "Vault to show its new certificate", func() error {
		shown, err := shownPin(t, s.Address)
		if err == nil && shown != now {
			err = fmt.Errorf("it shows %s", shown)
		}
		return err
	})
}

// Pin is the SHA-256 of the public key in the server's certificate, in hexadecimal.
func (s *Server) Pin(t testing.TB) string {
	t.Helper()
	return pin(t, s.certs.cert)
}

// Leader is the active node.
func (c *Cluster) Leader(t testing.TB) (*Server, error) {
	t.Helper()
	for _, s := range c.Servers {
		if leader, err := s.Anonymous(t).Sys().Leader(); err == nil && leader.IsSelf {
			return s, nil
		}
	}
	return nil, fmt.Errorf("none of %v is active", c.Addresses())
}

// Active waits for the active node.
func (c *Cluster) Active(t testing.TB) (active *Server) {
	t.Helper()
	Eventually(t, Patience, "an active node", func() (err error) {
		active, err = c.Leader(t)
		return err
	})
	return active
}

// StepDown makes an active node give up its office.
func (s *Server) StepDown(t testing.TB) {
	t.Helper()
	must(t, s.Client(t).Sys().StepDown())
}

// WaitVoters waits until any of the nodes could become the active one: one second after it is well, not ten.
func (c *Cluster) WaitVoters(t testing.TB) {
	t.Helper()
	_, err := c.Active(t).Client(t).Logical().Write("sys/storage/raft/autopilot/configuration", map[string]any{"server_stabilization_time": "1s"})
	must(t, err)
	Eventually(t, time.Minute, "all nodes to have a vote", func() error {
		leader, err := c.Leader(t)
		if err != nil {
			return err
		}
		state, err := leader.Client(t).Sys().RaftAutopilotState()
		if err == nil && len(state.Voters) != len(c.Servers) {
			err = fmt.Errorf("only %v of %d nodes have one", state.Voters, len(c.Servers))
		}
		return err
	})
}
