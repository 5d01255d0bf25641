package main

import (
	"errors"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// errHungUp is why a command ends whose terminal went away.
var errHungUp = errors.New("the terminal was hung up")

// criticalWork keeps signals from ending the process while what cannot be had again lies in its memory alone: the answer of
// sys/init, for example, until it is written down. A second signal does not end it either, nor a reader of its output that
// went away. What is waited for is said on stderr at each signal.
type criticalWork struct {
	app *app
	// reloads is set by the daemon, for which SIGHUP is no end.
	reloads bool

	mu      sync.Mutex
	whats   []string       // under way
	signals chan os.Signal // nil where nothing is
	ended   chan struct{}  // closed when the goroutine that reads signals has ended
	hungUp  bool
}

// enter begins such work; whoever began it calls leave once, when it is over.
func (c *criticalWork) enter(what string) (leave func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.whats) == 0 {
		c.begin()
	}
	c.whats = append(c.whats, what)
	return sync.OnceFunc(func() { c.leave(what) })
}

func (c *criticalWork) begin() {
	caught := []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGPIPE}
	if !signal.Ignored(syscall.SIGHUP) { // nohup
		caught = append(caught, syscall.SIGHUP)
	}
	signals, ended := make(chan os.Signal, len(caught)), make(chan struct{})
	c.signals, c.ended = signals, ended
	signal.Notify(signals, caught...)
	go func() { // ends in leave
		defer close(ended)
		for caught := range signals {
			c.tell(caught)
		}
	}()
}

// tell answers a signal.
func (c *criticalWork) tell(caught os.Signal) {
	if caught == syscall.SIGPIPE { // telling would bring the next one
		return
	}
	c.mu.Lock()
	c.hungUp = c.hungUp || caught == syscall.SIGHUP
	what := strings.Join(c.whats, "; ")
	c.mu.Unlock()
	if what == "" || caught == syscall.SIGHUP && c.reloads {
		return
	}
	if c.app.log != nil {
		c.app.log.Warn("a signal has to wait for what cannot be left as it is; to kill the process now loses what is in its memory",
			"signal", name(caught), "what", what)
		return
	}
	c.app.say("nitroseal: %s came, and this cannot be left as it is: %s. The command ends after that; to kill it now loses what is in its memory",
		name(caught), what)
}

func (c *criticalWork) leave(what string) {
	c.mu.Lock()
	if i := slices.Index(c.whats, what); i >= 0 {
		c.whats = slices.Delete(c.whats, i, i+1)
	}
	var signals chan os.Signal
	var ended chan struct{}
	if len(c.whats) == 0 {
		signals, ended = c.signals, c.ended
		signal.Stop(signals) // nothing is sent to it from here on
		close(signals)
	}
	c.mu.Unlock()
	if signals == nil {
		return
	}
	<-ended
	c.mu.Lock()
	hungUp := c.hungUp && !c.reloads
	c.hungUp = false
	c.mu.Unlock()
	if hungUp && c.app.cancel != nil {
		c.app.cancel(errHungUp)
	}
}

// name is a signal as people know it.
func name(caught os.Signal) string {
	switch caught {
	case os.Interrupt:
		return "Ctrl-C"
	case syscall.SIGTERM:
		return "SIGTERM"
	case syscall.SIGHUP:
		return "SIGHUP"
	}
	return caught.String()
}
