package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin/pb"
	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11/modhost"
	"vault-plugin-secrets-nitrokey/internal/device"
)

func TestMain(m *testing.M) {
	modhost.RunIfStarted() // tests with a real module start this binary as its host
	goleak.VerifyTestMain(m,
		goleak.IgnoreTopFunction("go.opencensus.io/stats/view.(*worker).start"), // started by an import of Vault's sdk
	)
}

const (
	testModule = "/usr/lib/test/module.so"
	rightPIN   = "648219"
	ownCluster = "9f4c1c6e-own-cluster"
)

// rack is the HSMs that exist in a test: what an opener finds by serial. Each checks the PIN as a token would, and counts
// the wrong ones it was sent.
type rack struct {
	mu     sync.Mutex
	tokens map[string]*testToken
	// opening, where it is set, is called before a device is opened.
	opening func(ctx context.Context)
	// changing, where it is set, is called instead of a change of the PIN.
	changing func(ctx context.Context) error
	// refused is an error of every opening that is nobody's sentinel, as of a module that is not allowed.
	refused error
	// barred is a PIN that is not sent to any token.
	barred string
	// locks makes devices that have a lock, as a NetHSM has.
	locks bool
	// netHSMs are found by the first of their URLs.
	netHSMs map[string]*testNetHSM
}

type testToken struct {
	*hsmtest.Memory
	wrong int
	// unnumbered makes a token that tells no serial number.
	unnumbered bool
}

func newRack() *rack { return &rack{tokens: map[string]*testToken{}} }

func (r *rack) add(serial string) *testToken {
	r.mu.Lock()
	defer r.mu.Unlock()
	token := &testToken{Memory: hsmtest.NewMemory()}
	r.tokens[serial] = token
	return token
}

// open is a device.Opener. As the provider does, it logs in with the first operation, not when it is opened.
func (r *rack) open(ctx context.Context, _ string, config device.Config, secrets device.Secrets) (hsm.Device, error) {
	if r.opening != nil {
		r.opening(ctx)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if r.refused != nil {
		return nil, r.refused
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	token := r.tokens[config.Serial]
	if token == nil {
		return nil, fmt.Errorf("no token has the serial number %q: %w", config.Serial, hsm.ErrUnavailable)
	}
	opened := &session{Memory: token.Attach(), rack: r, token: token, pin: string(secrets.PIN)}
	if r.locks {
		return &lockable{opened}, nil
	}
	return opened, nil
}

// lockable is a device that starts locked and wants a passphrase.
type lockable struct{ *session }

func (l *lockable) Unlock(_ context.Context, passphrase []byte) error {
	if string(passphrase) != "open sesame" {
		return &hsm.PINError{TriesLeft: -1, Detail: "the passphrase is wrong (401)"}
	}
	l.token.SetError(nil)
	return nil
}

func (l *lockable) Lock(context.Context) error {
	l.token.SetError(hsm.ErrLocked)
	return nil
}

// session is a device that was opened with a PIN.
type session struct {
	*hsmtest.Memory
	rack  *rack
	token *testToken
	pin   string
}

func (s *session) FindKeys(ctx context.Context, query hsm.KeyQuery) ([]hsm.Key, error) {
	if err := s.try(s.pin); err != nil {
		return nil, err
	}
	return s.Memory.FindKeys(ctx, query)
}

// try sends a PIN to the token.
func (s *session) try(pin string) error {
	if s.rack.barred != "" && pin == s.rack.barred {
		return &hsm.PINError{TriesLeft: -1, Barred: true, Detail: "another mount is logged in with another PIN; nothing was sent"}
	}
	if pin != s.token.PIN() {
		s.rack.mu.Lock()
		defer s.rack.mu.Unlock()
		s.token.wrong++
		return &hsm.PINError{TriesLeft: 2, Wrong: true, Detail: "the PIN is wrong (CKR_PIN_INCORRECT); write the right one"}
	}
	return nil
}

func (s *session) AdoptPIN(ctx context.Context, pin []byte, lastTry bool) error {
	if err := s.try(string(pin)); err != nil {
		return err
	}
	return s.Memory.AdoptPIN(ctx, pin, lastTry)
}

func (s *session) Info(ctx context.Context) (hsm.Info, error) {
	info, err := s.Memory.Info(ctx)
	if s.token.unnumbered {
		info.Serial = ""
	}
	return info, err
}

func (s *session) ChangePIN(ctx context.Context, pin []byte) error {
	if changing := s.rack.changing; changing != nil {
		return changing(ctx)
	}
	if err := s.Memory.ChangePIN(ctx, pin); err != nil {
		return err
	}
	s.pin = string(pin)
	return nil
}

// mount is a backend as Vault sees it: requests and answers go through what carries them between the two processes.
type mount struct {
	*backend
	t       testing.TB
	rack    *rack
	storage *faultyStorage
	secrets string // -secrets-dir
	state   string // -state-dir
}

// newMount makes a mount with storage of its own.
func newMount(t testing.TB) *mount {
	t.Helper()
	return mountOn(t, &faultyStorage{Storage: new(logical.InmemStorage)}, newRack(), t.TempDir(), t.TempDir())
}

// remount is the same mount in a new process: the plugin was restarted.
func (m *mount) remount() *mount {
	m.t.Helper()
	m.Cleanup(context.Background())
	return mountOn(m.t, m.storage, m.rack, m.secrets, m.state)
}

func mountOn(t testing.TB, storage *faultyStorage, tokens *rack, secrets, state string) *mount {
	t.Helper()
	m := mountWith(t, storage, map[string]device.Opener{
		device.TypePKCS11: tokens.open, device.TypeNetHSM: tokens.openNetHSM,
	}, secrets, state)
	m.rack = tokens
	return m
}

// mountWith is a mount whose devices are opened by these openers.
func mountWith(t testing.TB, storage *faultyStorage, openers map[string]device.Opener, secrets, state string) *mount {
	t.Helper()
	m := mountOf(t, storage, device.Options{Openers: openers, Secrets: device.SecretFiles{Dir: secrets}}, state)
	m.secrets = secrets
	return m
}

// mountOf is a mount of a process that opens devices so.
func mountOf(t testing.TB, storage *faultyStorage, devices device.Options, state string) *mount {
	t.Helper()
	b, err := newBackend(context.Background(), Options{Devices: device.New(devices), StateDir: state}, (*mount)(nil).configFor(storage))
	if err != nil {
		t.Fatalf("making the backend: %v", err)
	}
	t.Cleanup(func() { b.Cleanup(context.Background()) })
	if err := b.Initialize(context.Background(), &logical.InitializationRequest{Storage: storage}); err != nil {
		t.Fatalf("initialising the backend: %v", err)
	}
	return &mount{backend: b, t: t, storage: storage, state: state}
}

// configFor is what Vault gives to the factory.
func (*mount) configFor(storage logical.Storage) *logical.BackendConfig {
	config := logical.TestBackendConfig()
	config.StorageView = storage
	config.System = &logical.StaticSystemView{
		PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "1.21.0"}, ClusterUUID: ownCluster,
	}
	config.BackendUUID = fmt.Sprintf("mount-%p", storage) // a mount is its storage
	config.Logger = hclog.NewNullLogger()
	return config
}

// faultyStorage is the mount's storage, which can be made to fail.
type faultyStorage struct {
	logical.Storage

	mu       sync.Mutex
	failPut  error
	failGet  error
	readOnly error // of every write
}

func (s *faultyStorage) fail(put, get error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failPut, s.failGet = put, get
}

func (s *faultyStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	s.mu.Lock()
	err := s.failGet
	s.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return s.Storage.Get(ctx, key)
}

func (s *faultyStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	s.mu.Lock()
	err := s.failPut
	if s.readOnly != nil {
		err = s.readOnly
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.Storage.Put(ctx, entry)
}

func (s *faultyStorage) Delete(ctx context.Context, key string) error {
	s.mu.Lock()
	err := s.readOnly
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.Storage.Delete(ctx, key)
}

// reply is an answer as an HTTP client sees it.
type reply struct {
	status   int
	message  string // of an error
	data     map[string]any
	warnings []string
	headers  map[string][]string
}

type fields = map[string]any

func (m *mount) read(path string) reply { return m.do(logical.ReadOperation, path, nil) }
func (m *mount) list(path string) reply { return m.do(logical.ListOperation, path, nil) }
func (m *mount) delete(path string, data fields) reply {
	return m.do(logical.DeleteOperation, path, data)
}

func (m *mount) write(path string, data fields) reply {
	return m.do(logical.UpdateOperation, path, data)
}

// do sends a request as Vault does: an existence check chooses between create and update, everything crosses the border
// between two processes, and the answer is turned into a status as Vault's HTTP layer does. Successful answers must fit
// the documented schema.
func (m *mount) do(operation logical.Operation, path string, data fields) reply {
	m.t.Helper()
	request := m.carry(&logical.Request{
		ID: "test-request", Operation: operation, Path: path, Data: data, DisplayName: "token-test", EntityID: "e-1",
	})
	if operation == logical.UpdateOperation {
		found, exists, err := m.HandleExistenceCheck(context.Background(), request)
		if user, ok := pb.ProtoErrToErr(pb.ErrToProtoErr(err)).(errutil.UserError); ok { //nolint:errorlint // as Vault does
			return reply{status: http.StatusBadRequest, message: user.Error()}
		}
		if err != nil {
			return reply{status: http.StatusInternalServerError, message: err.Error()}
		}
		if found && !exists {
			request.Operation = logical.CreateOperation
		}
	}
	response, err := m.HandleRequest(context.Background(), request)
	if response != nil && !response.IsError() && err == nil {
		m.checkSchema(request, response)
	}
	received := m.receive(request, response, err)
	m.checkStatus(request, received)
	return received
}

// checkStatus fails where the OpenAPI document does not know an answer. 500 is a fault and in no document; the catch-all
// path is no operation of ours.
func (m *mount) checkStatus(request *logical.Request, received reply) {
	m.t.Helper()
	path := m.Route(request.Path)
	if path == nil || path.Pattern == "^.*$" || received.status == http.StatusInternalServerError {
		return
	}
	handler := path.Operations[request.Operation]
	if handler == nil || handler.Properties().Responses[received.status] != nil {
		return
	}
	m.t.Errorf("%s %s answers %d, which is not documented: %s", request.Operation, request.Path, received.status, received.message)
}

// carry takes a request over to the plugin's process.
func (m *mount) carry(request *logical.Request) *logical.Request {
	m.t.Helper()
	message, err := pb.LogicalRequestToProtoRequest(request)
	if err != nil {
		m.t.Fatalf("encoding the request %s %s: %v", request.Operation, request.Path, err)
	}
	carried, err := pb.ProtoRequestToLogicalRequest(message)
	if err != nil {
		m.t.Fatalf("decoding the request %s %s: %v", request.Operation, request.Path, err)
	}
	carried.Storage = m.storage
	return carried
}

func (m *mount) receive(request *logical.Request, response *logical.Response, failure error) reply {
	m.t.Helper()
	message, err := pb.LogicalResponseToProtoResponse(response)
	if err != nil {
		m.t.Fatalf("encoding the answer to %s %s: %v", request.Operation, request.Path, err)
	}
	if response, err = pb.ProtoResponseToLogicalResponse(message); err != nil {
		m.t.Fatalf("decoding the answer to %s %s: %v", request.Operation, request.Path, err)
	}
	failure = pb.ProtoErrToErr(pb.ErrToProtoErr(failure))

	received := reply{status: http.StatusOK}
	if response != nil {
		received.data, received.warnings, received.headers = response.Data, response.Warnings, response.Headers
	}
	code, failure := logical.RespondErrorCommon(request, response, failure)
	if failure != nil {
		logical.AdjustErrorStatusCode(&code, failure)
		received.message = failure.Error()
		received.data = nil
	}
	switch {
	case code != 0:
		received.status = code
	case response == nil || response.Data == nil && response.Warnings == nil:
		received.status = http.StatusNoContent
	}
	return m.unpack(received)
}

// unpack takes a raw body apart, as a client does.
func (m *mount) unpack(received reply) reply {
	m.t.Helper()
	raw, ok := received.data[logical.HTTPRawBody]
	if !ok {
		return received
	}
	switch code := received.data[logical.HTTPStatusCode].(type) {
	case int:
		received.status = code
	case float64:
		received.status = int(code)
	case json.Number:
		number, _ := code.Int64()
		received.status = int(number)
	default:
		m.t.Fatalf("the status of a raw answer is a %T", code)
	}
	text, ok := raw.(string)
	if !ok {
		m.t.Fatalf("the raw body is a %T", raw)
	}
	var body struct {
		Errors   []string
		Warnings []string
		Data     map[string]any
	}
	if err := json.Unmarshal([]byte(text), &body); err != nil {
		m.t.Fatalf("the raw body is no JSON: %v: %s", err, text)
	}
	received.message, received.warnings, received.data = strings.Join(body.Errors, "; "), body.Warnings, body.Data
	return received
}

func (m *mount) checkSchema(request *logical.Request, response *logical.Response) {
	m.t.Helper()
	path := m.Route(request.Path)
	if path == nil {
		m.t.Fatalf("no route to %s", request.Path)
	}
	if response.Data == nil || path.Pattern == "^.*$" {
		return
	}
	if t, ok := m.t.(*testing.T); ok { // not while a fuzz target sets up
		schema.ValidateResponse(t, schema.GetResponseSchema(t, path, request.Operation), response, true)
	}
}

// want fails where the answer has another status, and returns it.
func (r reply) want(t testing.TB, status int) reply {
	t.Helper()
	if r.status != status {
		t.Fatalf("status %d, want %d; message %q, data %v", r.status, status, r.message, r.data)
	}
	return r
}

// ok fails where the answer is an error.
func (r reply) ok(t testing.TB) reply {
	t.Helper()
	if r.status != http.StatusOK && r.status != http.StatusNoContent {
		t.Fatalf("status %d: %s", r.status, r.message)
	}
	return r
}

// says fails where an error's message lacks a part.
func (r reply) says(t testing.TB, parts ...string) reply {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(r.message, part) {
			t.Errorf("message %q does not say %q", r.message, part)
		}
	}
	return r
}

// text returns a field of the answer as it is printed.
func (r reply) text(field string) string { return fmt.Sprint(r.data[field]) }

// addDevice puts an HSM into the rack and configures it.
func (m *mount) addDevice(name string) *testToken {
	m.t.Helper()
	token := m.rack.add("SN-" + name)
	m.write("devices/"+name, fields{"module": testModule, "serial": "SN-" + name, "pin": rightPIN}).ok(m.t)
	return token
}

// addKey configures a device with one RSA key, and adopts that.
func (m *mount) addKey(name string) *testToken {
	m.t.Helper()
	token := m.addDevice(name + "-hsm")
	token.AddRSA(m.t, "label-"+name, "01", 2048)
	m.write("keys/"+name, fields{"device": name + "-hsm", "key_label": "label-" + name}).ok(m.t)
	return token
}

// awaitState polls a key until it has a state.
func (m *mount) awaitState(name, state string) reply {
	m.t.Helper()
	var last reply
	await(m.t, "key "+name+" to be "+state, func() bool {
		last = m.read("keys/" + name)
		return last.text("state") == state
	})
	return last
}

// await polls until something has come about.
func await(t testing.TB, what string, come func() bool) {
	t.Helper()
	const patience = 2 * time.Minute // an RSA key is made in software, and a busy machine takes long for it
	ticker := time.NewTicker(2 * time.Millisecond)
	defer ticker.Stop()
	for deadline := time.Now().Add(patience); !come(); <-ticker.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

// secretFile writes a file into -secrets-dir.
func (m *mount) secretFile(name, content string) {
	m.t.Helper()
	if err := os.WriteFile(filepath.Join(m.secrets, name), []byte(content), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// stored dumps the mount's whole storage.
func (m *mount) stored() map[string]string {
	m.t.Helper()
	all := map[string]string{}
	err := logical.ScanView(context.Background(), m.storage, func(path string) {
		entry, err := m.storage.Get(context.Background(), path)
		if err == nil && entry != nil {
			all[path] = string(entry.Value)
		}
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return all
}

func keysOf[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

var errStorage = errors.New("storage: the disk is on fire")
