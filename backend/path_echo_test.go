//go:build bench

package backend

import "testing"

func TestEchoGivesBackWhatItGot(t *testing.T) {
	if got := newMount(t).write("echo", fields{"value": "x"}).ok(t); got.text("value") != "x" {
		t.Errorf("echo = %v", got.data)
	}
}
