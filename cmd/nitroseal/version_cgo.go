//go:build cgo

package main

// loadsModules tells whether this build can be the process that loads PKCS#11 modules.
const loadsModules = true
