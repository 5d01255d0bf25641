//go:build race

package node_test

// raceEnabled tells tests that measure memory that the race detector takes its share.
const raceEnabled = true
