//go:build !race

package vaulttest

const raceDetector = false
