//go:build !cgo

package main

// loadsModules tells whether this build can be the process that loads PKCS#11 modules. Without cgo it cannot; another
// program can be that for it (module_host in the configuration).
const loadsModules = false
