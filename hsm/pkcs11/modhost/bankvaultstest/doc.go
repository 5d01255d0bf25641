//go:build !cgo

// Package bankvaultstest is empty where cgo is off: it loads a PKCS#11 module.
package bankvaultstest
