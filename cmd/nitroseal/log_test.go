package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestAWarningDoesNotWaitForACommandThatGoesOn(t *testing.T) {
	for name, test := range map[string]struct {
		after time.Duration
		cause string
		early bool // whether it is there before the end
		shown int
	}{
		"the command goes on":                        {2 * warningWait, "no connection", true, 1},
		"the command ends, with another error":       {warningWait / 2, "something else", false, 1},
		"the command ends, and its error repeats it": {warningWait / 2, "no connection", false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "stderr")
			stderr, err := os.Create(path)
			if err != nil {
				t.Fatal(err)
			}
			defer stderr.Close()
			shown := func() int {
				content, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				return strings.Count(string(content), "nitroseal: warning: a node rests")
			}
			synctest.Test(t, func(t *testing.T) {
				a := newApp(os.Stdin, os.Stdout, stderr)
				a.logger().Warn("a node rests", "cause", test.cause)
				<-time.After(test.after)
				synctest.Wait()
				if early := shown() > 0; early != test.early {
					t.Errorf("shown before the end: %v", early)
				}
				a.warnings.flush(a, errors.New("no connection"))
			})
			if got := shown(); got != test.shown {
				t.Errorf("shown %d times", got)
			}
		})
	}
}

// The same trouble comes up at each try, for each node and for each item: a person needs to be told of it once.
func TestTheSameCauseIsToldOnceInARun(t *testing.T) {
	path := filepath.Join(t.TempDir(), "stderr")
	stderr, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer stderr.Close()
	a := newApp(os.Stdin, os.Stdout, stderr)
	for range 2 {
		for _, node := range []string{"one", "two"} {
			logger := a.logger().With("node", node)
			logger.Warn("it does not open", "cause", "no token")
			logger.Warn("it does not open", "cause", "wrong PIN")
			logger.Warn("it rests")
			logger.Error("it is lost", "cause", "no token")
		}
		a.warnings.flush(a, nil)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := "nitroseal: error: it is lost (node one, cause no token)\n" +
		"nitroseal: warning: it does not open (node one, cause no token)\n" +
		"nitroseal: warning: it does not open (node one, cause wrong PIN)\n" +
		"nitroseal: warning: it rests (node one)\n" +
		"nitroseal: warning: it rests (node two)\n"
	if string(content) != want {
		t.Errorf("it says:\n%s\nwant:\n%s", content, want)
	}
}
