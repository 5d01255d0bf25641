package backend

import (
	"sync"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

// letters are what an initialisation made for people, encrypted to them. Vault gives them out once, and the answer that has them
// may be an error, or lost on its way: so each later answer of init has them too, while the process lives. They are no secret.
type letters struct {
	mu       sync.Mutex
	clusters map[string]letter
}

type letter struct {
	people []cluster.PersonMessage
	root   []byte
}

// keep takes down the letters of a result that made new keys, and gives those of before to one that made none.
func (l *letters) keep(name string, result *cluster.InitResult) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !result.Initialized && result.People == nil && result.RootPGP == nil {
		result.People, result.RootPGP = l.clusters[name].people, l.clusters[name].root
		return
	}
	if l.clusters == nil {
		l.clusters = map[string]letter{}
	}
	l.clusters[name] = letter{result.People, result.RootPGP}
}

// forget drops the letters of a cluster, whose people have newer ones.
func (l *letters) forget(name string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.clusters, name)
}
