// Package pb is the wire between OpenBao and a seal plugin: the gRPC service pb.Wrapper and its messages.
//
// The .proto files are written to OpenBao's contract (openbao/go-kms-wrapping, plugin v2.3.0), which has no Go module
// that this project could take; scripts/proto makes the .pb.go files of them. A test compares the two.
package pb

//go:generate ../../../scripts/proto
