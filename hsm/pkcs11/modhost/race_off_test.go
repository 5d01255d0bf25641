//go:build !race

package modhost

const raceEnabled = false
