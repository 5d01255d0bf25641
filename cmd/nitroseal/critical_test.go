package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// catcher is an app whose stderr can be read.
func catcher(t *testing.T) (a *app, said func() string) {
	t.Helper()
	stderr, err := os.Create(filepath.Join(t.TempDir(), "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stderr.Close() })
	return newApp(os.Stdin, os.Stdout, stderr), func() string {
		content, err := os.ReadFile(stderr.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(content)
	}
}

func raise(t *testing.T, signal syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(os.Getpid(), signal); err != nil {
		t.Fatal(err)
	}
}

func TestNoSignalEndsWhatCannotBeLeftAsItIs(t *testing.T) {
	a, said := catcher(t)
	var cause error
	a.cancel = func(err error) { cause = err }
	outer := a.critical.enter("the keys of cluster \"prod\" are not stored yet")
	inner := a.critical.enter("those of \"test\" neither")
	for _, signal := range []struct {
		is   syscall.Signal
		name string
	}{{syscall.SIGINT, "Ctrl-C"}, {syscall.SIGTERM, "SIGTERM"}, {syscall.SIGHUP, "SIGHUP"}} {
		for range 2 { // the second one does not end it either
			before := strings.Count(said(), signal.name+" came")
			raise(t, signal.is)
			until(t, signal.name, func() bool { return strings.Count(said(), signal.name+" came") > before })
		}
	}
	raise(t, syscall.SIGPIPE)
	if !strings.Contains(said(), "the keys of cluster \"prod\" are not stored yet; those of \"test\" neither") {
		t.Errorf("it said\n%s", said())
	}
	inner()
	inner() // again, by mistake
	before := strings.Count(said(), "SIGTERM came")
	raise(t, syscall.SIGTERM)
	until(t, "the last signal", func() bool { return strings.Count(said(), "SIGTERM came") > before }) // later it would end the tests
	if cause != nil {
		t.Errorf("it was ended within: %v", cause)
	}
	outer()
	if !errors.Is(cause, errHungUp) {
		t.Errorf("after it the command goes on without a terminal: %v", cause)
	}
	// Once more, from the beginning.
	a.critical.enter("more")()
}

func TestAHangUpDoesNotEndTheDaemon(t *testing.T) {
	a, said := catcher(t)
	a.cancel = func(err error) { t.Errorf("it was ended: %v", err) }
	a.critical.reloads = true
	leave := a.critical.enter("work")
	raise(t, syscall.SIGHUP)
	raise(t, syscall.SIGTERM)
	until(t, "SIGTERM", func() bool { return strings.Contains(said(), "SIGTERM came") })
	leave()
	if strings.Contains(said(), "SIGHUP") {
		t.Errorf("it said\n%s", said())
	}
}
