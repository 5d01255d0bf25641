//go:build cgo && !race

package modhost

const raceEnabled = false
