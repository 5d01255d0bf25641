//go:build cgo && race

package modhost

// raceEnabled: the race detector's shadow memory counts as resident.
const raceEnabled = true
