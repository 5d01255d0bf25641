//go:build race

package vaulttest

// raceDetector is on where the tests were built with it: the plugin is then built with it as well.
const raceDetector = true
