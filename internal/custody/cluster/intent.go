package cluster

import "time"

// Intent says that a host is about to initialise a cluster. It lies in the store, where only one host can create it, and on
// that host's own disk. It holds no secret.
type Intent struct {
	Format  int       `json:"format"`
	ID      string    `json:"id"` // random, hexadecimal
	Cluster string    `json:"cluster"`
	Node    string    `json:"node"`
	Host    string    `json:"host"`
	HostID  string    `json:"host_id"` // random, of the host's local disk
	By      string    `json:"by,omitempty"`
	At      time.Time `json:"at"`
	// Before are earlier attempts that this one took over from, the newest first. Each may have initialised the cluster
	// without anybody having its answer.
	Before []Attempt `json:"before,omitempty"`
}

// Attempt is an initialisation whose end nobody knows.
type Attempt struct {
	ID   string    `json:"id"`
	Host string    `json:"host"`
	At   time.Time `json:"at"`
}
