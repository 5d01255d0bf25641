package node

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

const (
	dialTimeout  = 10 * time.Second // of TCP and of TLS each; a call's own deadline is shorter most of the time
	idleTimeout  = 90 * time.Second // a watcher looks more often than that
	keepAliveTCP = 30 * time.Second
	bufferSize   = 2 << 10 // hundreds of nodes are watched, each with one connection and two buffers
	headerLimit  = 16 << 10

	// keptFor is how long a connection may be kept: a watcher shall see in good time, and not at the next unsealing, that the
	// node has a certificate that we refuse, or that its name leads elsewhere by now.
	keptFor = 5 * time.Minute
)

// lines are the connections to a node: one that is kept, for reading, and fresh ones for all that changes something. A kept
// connection may have died unnoticed. A read is then sent again by net/http; anything else would fail, and nobody could say
// whether the node saw it.
type lines struct {
	kept, fresh *http.Transport

	mu    sync.Mutex
	renew time.Time // when the kept connection is to be made anew
}

// newLines makes no connection yet. identity is nil for plain http on loopback.
func newLines(identity *trust) *lines {
	dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: keepAliveTCP}
	var config *tls.Config
	if identity != nil {
		config = identity.config()
	} else {
		dialer.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error { return onlyLoopback(address) }
	}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	kept := &http.Transport{
		DialContext:            dialer.DialContext,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    dialTimeout,
		MaxIdleConnsPerHost:    1,
		IdleConnTimeout:        idleTimeout,
		DisableCompression:     true,
		MaxResponseHeaderBytes: headerLimit,
		ReadBufferSize:         bufferSize,
		WriteBufferSize:        bufferSize,
		Protocols:              &protocols,
	}
	fresh := kept.Clone()
	fresh.DisableKeepAlives = true
	return &lines{kept: kept, fresh: fresh}
}

// RoundTrip implements http.RoundTripper.
func (l *lines) RoundTrip(request *http.Request) (*http.Response, error) {
	if request.Method == http.MethodGet {
		l.mu.Lock()
		if now := time.Now(); now.After(l.renew) {
			l.kept.CloseIdleConnections()
			l.renew = now.Add(keptFor)
		}
		l.mu.Unlock()
		return l.kept.RoundTrip(request)
	}
	return l.fresh.RoundTrip(request)
}

func (l *lines) closeIdle() {
	l.kept.CloseIdleConnections()
	l.fresh.CloseIdleConnections()
}
