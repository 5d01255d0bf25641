package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/vault/sdk/helper/pluginutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
	"github.com/hashicorp/vault/sdk/plugin/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

func TestMain(m *testing.M) { os.Exit(vaulttest.Main(m)) }

// engine is a process of the plugin that a host started as a secrets engine, as OpenBao's catalog does: with the same
// environment, and with nothing on offer but what OpenBao has. Vault's services for events and observations, and what its
// system view has more, are not there; a call of them is noted and answered as a gRPC server answers it.
type engine struct {
	client  *goplugin.Client
	backend pb.BackendClient
	broker  *goplugin.GRPCBroker
	conn    *grpc.ClientConn

	mu      sync.Mutex
	unknown []string // calls of what OpenBao does not have
}

// engineSide is how go-plugin makes the connection.
type engineSide struct {
	goplugin.NetRPCUnsupportedPlugin

	into *engine
}

func (engineSide) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error {
	return errors.New("this is the host")
}

func (s engineSide) GRPCClient(_ context.Context, broker *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	s.into.backend, s.into.broker, s.into.conn = pb.NewBackendClient(conn), broker, conn
	return s.into, nil
}

// startEngine starts the plugin by one version of the protocol.
func startEngine(t *testing.T, binary vaulttest.Binary, version int, metadataMode bool, args, env []string) *engine {
	t.Helper()
	e := &engine{}
	//nolint:noctx // the test ends it
	cmd := exec.Command(binary.Path, args...)
	cmd.Env = append(slices.Clone(env), "GORACE=atexit_sleep_ms=20")
	for _, prefix := range []string{"BAO_", "VAULT_"} { // OpenBao says everything by both names
		cmd.Env = append(cmd.Env, prefix+"VERSION=2.6.0", prefix+"PLUGIN_AUTOMTLS_ENABLED=true",
			fmt.Sprintf("%sPLUGIN_METADATA_MODE=%t", prefix, metadataMode))
	}
	checksum, err := hex.DecodeString(binary.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	e.client = goplugin.NewClient(&goplugin.ClientConfig{
		Cmd:              cmd,
		HandshakeConfig:  plugin.HandshakeConfig,
		VersionedPlugins: map[int]goplugin.PluginSet{version: {"backend": engineSide{into: e}}},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		AutoMTLS:         true,
		SecureConfig:     &goplugin.SecureConfig{Checksum: checksum, Hash: sha256.New()},
		Logger:           hclog.New(&hclog.LoggerOptions{Output: io.Discard}),
		Stderr:           t.Output(),
	})
	t.Cleanup(e.client.Kill)
	protocol, err := e.client.Client()
	if err != nil {
		t.Fatalf("starting the plugin: %v", err)
	}
	if _, err := protocol.Dispense("backend"); err != nil {
		t.Fatal(err)
	}
	return e
}

// mount is one mount of an engine.
type mount struct {
	*engine

	ctx     context.Context
	storage logical.Storage
}

// mounted sets a mount up, as the catalog and the router do.
func (e *engine) mounted(t *testing.T, id string, storage logical.Storage) *mount {
	t.Helper()
	m := &mount{engine: e, storage: storage, ctx: metadata.AppendToOutgoingContext(t.Context(), pluginutil.MultiplexingCtxKey, id)}
	brokerID := e.broker.NextId()
	go e.broker.AcceptAndServe(brokerID, func(options []grpc.ServerOption) *grpc.Server { // ends with the plugin
		server := grpc.NewServer(append(options, grpc.UnknownServiceHandler(e.noteUnknown))...)
		pb.RegisterStorageServer(server, &openBaoStorage{to: storage})
		pb.RegisterSystemViewServer(server, &openBaoSystem{engine: e})
		return server
	})
	answer, err := e.backend.Setup(m.ctx, &pb.SetupArgs{
		BrokerID: brokerID, Config: map[string]string{"plugin_name": "nitrokey"}, BackendUUID: id,
	})
	if err != nil || answer.GetErr() != "" {
		t.Fatalf("Setup: %v %s", err, answer.GetErr())
	}
	return m
}

// noteUnknown answers calls of services that OpenBao does not have.
func (e *engine) noteUnknown(_ any, stream grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(stream)
	e.note(method)
	return status.Errorf(codes.Unimplemented, "unknown service %s", method)
}

func (e *engine) note(call string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.unknown = append(e.unknown, call)
}

// request sends a request; a data of nil is a read.
func (m *mount) request(operation logical.Operation, path string, data map[string]any) (*logical.Response, error) {
	request, err := pb.LogicalRequestToProtoRequest(&logical.Request{
		ID: "test", Operation: operation, Path: path, Data: data, MountPoint: "nitrokey/", MountType: "vault-plugin-secrets-nitrokey",
		DisplayName: "root", ClientToken: "hidden",
	})
	if err != nil {
		return nil, err
	}
	answer, err := m.backend.HandleRequest(m.ctx, &pb.HandleRequestArgs{Request: request})
	if err != nil {
		return nil, err
	}
	response, err := pb.ProtoResponseToLogicalResponse(answer.GetResponse())
	return response, errors.Join(err, pb.ProtoErrToErr(answer.GetErr()))
}

// must sends a request that succeeds and returns its data.
func (m *mount) must(t *testing.T, operation logical.Operation, path string, data map[string]any) map[string]any {
	t.Helper()
	response, err := m.request(operation, path, data)
	if err == nil && response != nil && response.IsError() {
		err = response.Error()
	}
	if err != nil {
		t.Fatalf("%s %s: %v", operation, path, err)
	}
	if response == nil {
		return nil
	}
	return response.Data
}

// openBaoStorage is a mount's storage. OpenBao's answers carry no write-ahead index.
type openBaoStorage struct {
	pb.UnimplementedStorageServer

	to logical.Storage
}

func (s *openBaoStorage) List(ctx context.Context, args *pb.StorageListArgs) (*pb.StorageListReply, error) {
	keys, err := s.to.List(ctx, args.GetPrefix())
	return &pb.StorageListReply{Keys: keys, Err: pb.ErrToString(err)}, nil
}

func (s *openBaoStorage) Get(ctx context.Context, args *pb.StorageGetArgs) (*pb.StorageGetReply, error) {
	entry, err := s.to.Get(ctx, args.GetKey())
	return &pb.StorageGetReply{Entry: pb.LogicalStorageEntryToProtoStorageEntry(entry), Err: pb.ErrToString(err)}, nil
}

func (s *openBaoStorage) Put(ctx context.Context, args *pb.StoragePutArgs) (*pb.StoragePutReply, error) {
	return &pb.StoragePutReply{Err: pb.ErrToString(s.to.Put(ctx, pb.ProtoStorageEntryToLogicalStorageEntry(args.GetEntry())))}, nil
}

func (s *openBaoStorage) Delete(ctx context.Context, args *pb.StorageDeleteArgs) (*pb.StorageDeleteReply, error) {
	return &pb.StorageDeleteReply{Err: pb.ErrToString(s.to.Delete(ctx, args.GetKey()))}, nil
}

// openBaoSystem is the system view. Vault's calls for identity tokens and rotation are not there.
type openBaoSystem struct {
	pb.UnimplementedSystemViewServer

	engine *engine
}

// openBaoReplication is what OpenBao says of its replication, which it does not have: the two bits for "disabled".
const openBaoReplication = 12288

func (*openBaoSystem) DefaultLeaseTTL(context.Context, *pb.Empty) (*pb.TTLReply, error) {
	return &pb.TTLReply{TTL: 2764800}, nil
}

func (*openBaoSystem) MaxLeaseTTL(context.Context, *pb.Empty) (*pb.TTLReply, error) {
	return &pb.TTLReply{TTL: 2764800}, nil
}

func (*openBaoSystem) Tainted(context.Context, *pb.Empty) (*pb.TaintedReply, error) {
	return &pb.TaintedReply{}, nil
}

func (*openBaoSystem) CachingDisabled(context.Context, *pb.Empty) (*pb.CachingDisabledReply, error) {
	return &pb.CachingDisabledReply{}, nil
}

func (*openBaoSystem) ReplicationState(context.Context, *pb.Empty) (*pb.ReplicationStateReply, error) {
	return &pb.ReplicationStateReply{State: openBaoReplication}, nil
}

func (*openBaoSystem) MlockEnabled(context.Context, *pb.Empty) (*pb.MlockEnabledReply, error) {
	return &pb.MlockEnabledReply{}, nil
}

func (*openBaoSystem) LocalMount(context.Context, *pb.Empty) (*pb.LocalMountReply, error) {
	return &pb.LocalMountReply{}, nil
}

func (*openBaoSystem) EntityInfo(context.Context, *pb.EntityInfoArgs) (*pb.EntityInfoReply, error) {
	return &pb.EntityInfoReply{}, nil
}

func (*openBaoSystem) GroupsForEntity(context.Context, *pb.EntityInfoArgs) (*pb.GroupsForEntityReply, error) {
	return &pb.GroupsForEntityReply{}, nil
}

func (*openBaoSystem) PluginEnv(context.Context, *pb.Empty) (*pb.PluginEnvReply, error) {
	return &pb.PluginEnvReply{PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "2.6.0"}}, nil
}

func (*openBaoSystem) ClusterInfo(context.Context, *pb.Empty) (*pb.ClusterInfoReply, error) {
	return &pb.ClusterInfoReply{ClusterName: "bao", ClusterID: "1f5b0b0f-8d0c-4cf6-b2bb-0c7f0d5f0001"}, nil
}

func (s *openBaoSystem) GenerateIdentityToken(
	ctx context.Context, args *pb.GenerateIdentityTokenRequest,
) (*pb.GenerateIdentityTokenResponse, error) {
	s.engine.note("GenerateIdentityToken")
	return s.UnimplementedSystemViewServer.GenerateIdentityToken(ctx, args)
}

func (s *openBaoSystem) GetRotationInformation(ctx context.Context, args *pb.RotationInfoRequest) (*pb.RotationInfoReply, error) {
	s.engine.note("GetRotationInformation")
	return s.UnimplementedSystemViewServer.GetRotationInformation(ctx, args)
}

func (s *openBaoSystem) RegisterRotationJob(
	ctx context.Context, args *pb.RegisterRotationJobRequest,
) (*pb.RegisterRotationJobResponse, error) {
	s.engine.note("RegisterRotationJob")
	return s.UnimplementedSystemViewServer.RegisterRotationJob(ctx, args)
}

func (s *openBaoSystem) RegisterRotationJobWithResponse(
	ctx context.Context, args *pb.RegisterRotationJobRequest,
) (*pb.RegisterRotationJobWithResponseReply, error) {
	s.engine.note("RegisterRotationJobWithResponse")
	return s.UnimplementedSystemViewServer.RegisterRotationJobWithResponse(ctx, args)
}

func (s *openBaoSystem) DeregisterRotationJob(ctx context.Context, args *pb.DeregisterRotationJobRequest) (*pb.Empty, error) {
	s.engine.note("DeregisterRotationJob")
	return s.UnimplementedSystemViewServer.DeregisterRotationJob(ctx, args)
}
