// Package hsmtest is what every [hsm.Device] must pass, and a device for the tests of everybody else.
//
// [TestDevice] is the conformance suite: one reading of the contract in package hsm, run alike against the in-memory
// device, a PKCS#11 token and a NetHSM, so that what works with one works with the others. It makes the keys and
// objects that it needs under names nobody else uses and removes them, so a token with keys of its own can be given.
//
// [Memory] is an in-memory device whose faults are switched at run time. It counts private-key operations, because one
// operation for each open is a promise of this project.
package hsmtest
