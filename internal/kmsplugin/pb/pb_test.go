package pb

import (
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// files are what the package registers.
func files() []protoreflect.FileDescriptor {
	return []protoreflect.FileDescriptor{File_nitroseal_openbao_messages_proto, File_nitroseal_openbao_wrapper_proto}
}

// TestGeneratedFilesFit compares what was generated with the .proto files. Where it fails, run scripts/proto.
func TestGeneratedFilesFit(t *testing.T) {
	var wanted, got []string
	for _, name := range []string{"messages.proto", "wrapper.proto"} {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		wanted = append(wanted, declared(string(content))...)
	}
	for _, file := range files() {
		got = append(got, described(file)...)
	}
	if diff := cmp.Diff(wanted, got); diff != "" {
		t.Errorf("the Go files do not fit the .proto files; run scripts/proto (-.proto +Go):\n%s", diff)
	}
}

var (
	messageLine = regexp.MustCompile(`^message (\w+) \{`)
	fieldLine   = regexp.MustCompile(`^  (?:(map<string, string>|\w+) )(\w+) = (\d+);`)
	callLine    = regexp.MustCompile(`^  rpc (\w+)\(([\w.]+)\) returns \(([\w.]+)\);`)
)

// declared lists messages, fields and calls of a .proto, as far as ours use the language.
func declared(source string) []string {
	var all []string
	for line := range strings.Lines(source) {
		switch {
		case messageLine.MatchString(line):
			all = append(all, "message "+messageLine.FindStringSubmatch(line)[1])
		case fieldLine.MatchString(line):
			found := fieldLine.FindStringSubmatch(line)
			all = append(all, fmt.Sprintf("%s %s = %s", found[1], found[2], found[3]))
		case callLine.MatchString(line):
			found := callLine.FindStringSubmatch(line)
			all = append(all, fmt.Sprintf("%s(%s) %s", found[1], found[2], found[3]))
		}
	}
	return all
}

// described lists the same of what was generated.
func described(file protoreflect.FileDescriptor) []string {
	var all []string
	messages := file.Messages()
	for i := range messages.Len() {
		message := messages.Get(i)
		all = append(all, "message "+string(message.Name()))
		fields := message.Fields()
		for j := range fields.Len() {
			field := fields.Get(j)
			kind := field.Kind().String()
			switch {
			case field.IsMap():
				kind = fmt.Sprintf("map<%s, %s>", field.MapKey().Kind(), field.MapValue().Kind())
			case field.Kind() == protoreflect.MessageKind:
				kind = string(field.Message().Name())
			}
			all = append(all, fmt.Sprintf("%s %s = %d", kind, field.Name(), field.Number()))
		}
	}
	services := file.Services()
	for i := range services.Len() {
		calls := services.Get(i).Methods()
		for j := range calls.Len() {
			call := calls.Get(j)
			all = append(all, fmt.Sprintf("%s(%s) %s", call.Name(), call.Input().FullName(), call.Output().FullName()))
		}
	}
	return all
}

// TestTheWireIsOpenBaos guards what another program reads: paths of calls, and bytes that were written by hand from the
// numbers of its contract.
func TestTheWireIsOpenBaos(t *testing.T) {
	var calls []string
	for i := range Wrapper_ServiceDesc.Methods {
		calls = append(calls, "/"+Wrapper_ServiceDesc.ServiceName+"/"+Wrapper_ServiceDesc.Methods[i].MethodName)
	}
	want := []string{
		"/pb.Wrapper/SetConfig", "/pb.Wrapper/Type", "/pb.Wrapper/KeyId", "/pb.Wrapper/Encrypt", "/pb.Wrapper/Decrypt", "/pb.Wrapper/Init",
		"/pb.Wrapper/Finalize",
	}
	if diff := cmp.Diff(want, calls); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	// A tag is number<<3 | 2 for what has a length: 0a is 1, 12 is 2, 1a is 3, 2a is 5, 52 is 10, a2 01 is 20, f2 01 is 30.
	options := &Options{KeyId: "k", Aad: []byte("a"), ConfigMap: map[string]string{"n": "v"}, DisallowEnvVars: true}
	const optionsBytes = "52016b" + "a2010161" + "f20106" + "0a016e" + "120176" + "d00501"
	length := fmt.Sprintf("%02x", len(optionsBytes)/2)
	blob := &BlobInfo{Ciphertext: []byte("c"), Iv: []byte("i"), KeyInfo: &KeyInfo{Mechanism: 1, KeyId: "k", WrappedKey: []byte("w")}}
	const blobBytes = "0a0163" + "120169" + "2a08" + "0801" + "1a016b" + "2a0177"
	for name, test := range map[string]struct {
		message proto.Message
		bytes   string
	}{
		"SetConfig":        {&SetConfigRequest{Options: options}, "a201" + length + optionsBytes},
		"its answer":       {&SetConfigResponse{WrapperId: "w", WrapperConfig: &WrapperConfig{Metadata: map[string]string{"n": "v"}}}, "0a0177" + "5208" + "5206" + "0a016e" + "120176"},
		"Type":             {&TypeRequest{WrapperId: "w"}, "0a0177"},
		"Type's answer":    {&TypeResponse{Type: "t"}, "520174"},
		"KeyId":            {&KeyIdRequest{WrapperId: "w"}, "0a0177"},
		"KeyId's answer":   {&KeyIdResponse{KeyId: "k"}, "52016b"},
		"Encrypt":          {&EncryptRequest{WrapperId: "w", Plaintext: []byte("p"), Options: options}, "0a0177" + "520170" + "a201" + length + optionsBytes},
		"Encrypt's answer": {&EncryptResponse{Ciphertext: blob}, "5210" + blobBytes},
		"Decrypt":          {&DecryptRequest{WrapperId: "w", Ciphertext: blob, Options: &Options{}}, "0a0177" + "5210" + blobBytes + "a20100"},
		"Decrypt's answer": {&DecryptResponse{Plaintext: []byte("p")}, "520170"},
		"Init":             {&InitRequest{WrapperId: "w", Options: &Options{}}, "0a0177" + "a20100"},
		"Init's answer":    {&InitResponse{}, ""},
		"Finalize":         {&FinalizeRequest{WrapperId: "w"}, "0a0177"},
		"Finalize's":       {&FinalizeResponse{}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			written, err := proto.MarshalOptions{Deterministic: true}.Marshal(test.message)
			if err != nil {
				t.Fatal(err)
			}
			if got := hex.EncodeToString(written); got != test.bytes {
				t.Errorf("it is written as %s, want %s", got, test.bytes)
			}
			read := test.message.ProtoReflect().New().Interface()
			raw, err := hex.DecodeString(test.bytes)
			if err != nil {
				t.Fatal(err)
			}
			if err := proto.Unmarshal(raw, read); err != nil || !proto.Equal(read, test.message) {
				t.Errorf("read back: %v, %v", read, err)
			}
		})
	}
}

// TestNamesBelongToNobodyElse keeps our messages out of the package "pb", which Vault's sdk fills in the same program.
func TestNamesBelongToNobodyElse(t *testing.T) {
	for _, file := range files() {
		if !strings.HasPrefix(file.Path(), "nitroseal/openbao/") {
			t.Errorf("a file is known as %s", file.Path())
		}
		for i := range file.Messages().Len() {
			if name := file.Messages().Get(i).FullName(); !strings.HasPrefix(string(name), "nitroseal.openbao.") {
				t.Errorf("a message is known as %s", name)
			}
		}
	}
}
