package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/pkcs11"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
	"vault-plugin-secrets-nitrokey/internal/device"
	"vault-plugin-secrets-nitrokey/internal/keyring"
	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/etcd"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// workerVariable names the file with the order of a worker: this test binary, started again to do one verb of custody on
// one cluster and perhaps to die of it.
const workerVariable = "NITROSEAL_TEST_WORKER"

// order is what a worker is to do.
type order struct {
	Verb string // of the verbs below

	// What the command has in its configuration.
	StateDir            string
	Module, Serial, PIN string
	Endpoints           []string
	Prefix              string
	CA, Cert, Key       []byte // of etcd
	Nodes               []string
	NodeCA              []byte

	KeepRoot bool     // root_token = "keep"
	Import   [][]byte // the shares to be imported

	// StepFile gets the names of the steps. The worker dies at step At, or before it, see [steps].
	StepFile string
	At       int
	AtName   string // instead of At: the first step whose name ends in it
	Before   bool
	// Finish makes it go on after the verb: every node is tended until it is unsealed, then the material is looked at.
	Finish bool
	// TendFirst tends before the verb, as a daemon would that was started meanwhile.
	TendFirst bool
}

// outcome is what a worker tells at its end, on standard output.
type outcome struct {
	Error string // of the verb; "" where it went well
	Empty bool   // the error is cluster.ErrEmpty
	Done  bool   // the error is cluster.ErrExists

	// The rest is filled in by Finish.
	Tend  string                   // why a node is not unsealed
	Items map[string]custody.State // after each was opened
	Facts json.RawMessage          // of the item "unseal"
	Field map[string][]byte        // all other fields of the item "unseal"
	Key   map[string]int           // by item: version of the wrapping key
	Lag   []string                 // records of the keyring or of material that are not at rest
}

const (
	crashCluster = "eu" // the name of every cluster here
	crashKey     = "prod"
	crashStore   = "etcd"
	crashShares  = 5
	crashNeeded  = 3

	verbPrepare = "prepare" // makes the wrapping key; every state directory is a copy of what it leaves
	verbRotate  = "rotate"  // a new version of the wrapping key
	verbInit    = "init"
	verbRekey   = "rekey"
	verbRewrap  = "rewrap"
	verbImport  = "import"
	verbLook    = "look" // no verb: to tend and to look only

	verbLimit = 90 * time.Second
	tendLimit = 60 * time.Second
)

// work is the main function of a worker. It returns the exit code.
func work(path string) int {
	told, err := obey(path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 1
	}
	if err := json.NewEncoder(os.Stdout).Encode(told); err != nil {
		return 1
	}
	return 0
}

func obey(path string) (*outcome, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var o order
	if err := json.Unmarshal(raw, &o); err != nil {
		return nil, err
	}
	w, err := o.worker()
	if err != nil {
		return nil, err
	}
	defer w.close()
	ctx, cancel := context.WithTimeout(context.Background(), verbLimit+tendLimit)
	defer cancel()
	return w.obey(ctx)
}

// worker has what the command has: all of it is built as cmd/nitroseal does, with counters in between.
type worker struct {
	order
	cluster   *cluster.Cluster
	custodian *cluster.Custodian
	keeper    *custody.Keeper
	keys      *keyring.Keyring
	records   store.Store // of the keeper
	wrapping  store.Store // records of the keyring
	closers   []func() error
}

func (w *worker) close() {
	for _, closer := range slices.Backward(w.closers) {
		_ = closer() // the process ends
	}
}

// devices is the one device of a worker.
type devices struct{ handle *device.Handle }

// Device implements [keyring.Devices].
func (d devices) Device(ctx context.Context, name string) (hsm.Device, error) {
	if name != "hsm" {
		return nil, keyring.ErrNoDevice
	}
	return d.handle.Device(ctx)
}

func (o order) worker() (*worker, error) {
	w := &worker{order: o}
	log, err := os.OpenFile(o.StepFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	counter := &steps{log: log, at: o.At, atName: o.AtName, before: o.Before}
	logger := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))

	tokens := pkcs11.New(pkcs11.Options{Modules: []string{o.Module}, StateDir: o.StateDir, Env: []string{"SOFTHSM2_CONF", "GORACE"}, Logger: logger})
	w.closers = append(w.closers, tokens.Close)
	registry := device.New(device.Options{Openers: map[string]device.Opener{device.TypePKCS11: device.PKCS11(tokens)}, Logger: logger})
	handle, err := registry.Open("nitroseal", "hsm", device.Config{
		Type: device.TypePKCS11, Module: o.Module, Serial: o.Serial, PIN: o.PIN,
	})
	if err != nil {
		return nil, err
	}
	w.closers = append(w.closers, handle.Close)

	folder := func(name string) (*file.Store, error) { return file.Open(filepath.Join(o.StateDir, name)) }
	wrapping, err := folder("keyring")
	if err != nil {
		return nil, err
	}
	records, err := folder("material")
	if err != nil {
		return nil, err
	}
	local, err := folder("custody")
	if err != nil {
		return nil, err
	}
	remote, err := etcd.Open(etcd.Config{Endpoints: o.Endpoints, Prefix: o.Prefix, CACert: o.CA, ClientCert: o.Cert, ClientKey: o.Key})
	if err != nil {
		return nil, err
	}
	w.closers = append(w.closers, remote.Close)
	w.records, w.wrapping = records, wrapping

	w.keys = keyring.New(keyring.Config{
		Records: countedStore{wrapping, "keyring", counter}, Devices: devices{handle}, Logger: logger, SealAuthKeys: true,
		Lock: func(ctx context.Context, name string) (func(), error) { return wrapping.Lock(ctx, name) },
	})
	stores := countedStores{crashStore: countedStore{remote, "etcd", counter}}
	w.keeper = custody.New(custody.Config{
		Keys: w.keys, Stores: stores, Records: countedStore{records, "records", counter}, Logger: logger, Shared: true,
	})
	w.custodian = cluster.New(cluster.Config{
		Keeper: w.keeper, Keys: w.keys, Stores: stores,
		Local:  countedLocal{countedStore{local, "local", counter}, local},
		Logger: logger, Host: "here", UserAgent: "nitroseal/test",
		Transport: func(under http.RoundTripper) http.RoundTripper { return countedTransport{under, o.Nodes, counter} },
	})
	w.closers = append(w.closers, w.custodian.Close)
	w.cluster = &cluster.Cluster{
		Name: crashCluster, Nodes: o.Nodes, TLS: node.TLS{CA: o.NodeCA}, Key: crashKey, Store: crashStore,
		Shares: crashShares, Threshold: crashNeeded,
	}
	if o.KeepRoot {
		w.cluster.RootToken = cluster.RootKeep
	}
	return w, w.cluster.Check()
}

func (w *worker) obey(ctx context.Context) (*outcome, error) {
	told := &outcome{}
	if w.TendFirst {
		w.tend(ctx, told)
	}
	if err := w.verb(ctx); err != nil {
		told.Error, told.Empty, told.Done = err.Error(), errors.Is(err, cluster.ErrEmpty), errors.Is(err, cluster.ErrExists)
	}
	if !w.Finish || told.Error != "" && !told.Done {
		return told, nil
	}
	w.tend(ctx, told)
	return told, w.look(ctx, told)
}

// verb does the verb. What is unavailable for a moment is asked again, as an operator would: a SoftHSM is not to be seen
// while another process logs in.
func (w *worker) verb(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, verbLimit)
	defer cancel()
	var err error
	_ = poll(ctx, verbLimit, func() error {
		err = w.once(ctx)
		if errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, node.ErrUnavailable) || errors.Is(err, cluster.ErrBusy) {
			return err
		}
		return nil
	})
	return err
}

func (w *worker) once(ctx context.Context) error {
	yes := true
	switch w.Verb {
	case verbLook:
		return nil
	case verbPrepare:
		if _, err := w.keys.Begin(ctx, crashKey, keyring.GenerateRequest{Device: "hsm", Algorithm: hsm.ECDHP256}); err != nil {
			return err
		}
		return w.settle(ctx, &yes)
	case verbRotate:
		if _, err := w.keys.Rotate(ctx, crashKey, keyring.RotateRequest{
			Generate: &keyring.GenerateRequest{Device: "hsm", Algorithm: hsm.ECDHP256},
		}); err != nil {
			return err
		}
		return w.settle(ctx, &yes)
	case verbInit:
		_, err := w.custodian.Init(ctx, w.cluster, cluster.InitOptions{By: "test"})
		return err
	case verbRekey:
		_, err := w.custodian.Rekey(ctx, w.cluster, cluster.RekeyOptions{By: "test"})
		return err
	case verbRewrap:
		return w.rewrap(ctx)
	case verbImport:
		_, err := w.custodian.Import(ctx, w.cluster, cluster.ImportRequest{By: "test", Shares: w.Import})
		return err
	default:
		return fmt.Errorf("no such verb: %q", w.Verb)
	}
}

// rewrap seals the material anew.
func (w *worker) rewrap(ctx context.Context) error {
	report, err := w.keeper.Rewrap(ctx, crashKey, "test", nil)
	for _, failed := range report.Failed {
		err = errors.Join(err, failed.Err)
	}
	return err
}

// settle makes the newest version of the wrapping key fit for clusters.
func (w *worker) settle(ctx context.Context, yes *bool) error {
	if _, err := w.keys.Finish(ctx, crashKey); err != nil {
		return err
	}
	if _, err := w.keys.Backup(ctx, crashKey, "test"); err != nil {
		return err
	}
	_, err := w.keys.Configure(ctx, crashKey, keyring.Settings{AcceptSingleHSM: yes, By: "test"})
	return err
}

// tend looks after the nodes until each is unsealed.
func (w *worker) tend(ctx context.Context, told *outcome) {
	err := poll(ctx, tendLimit, func() error {
		var problems []error
		for _, one := range w.custodian.TendAll(ctx, w.cluster) {
			if one.Err != nil {
				problems = append(problems, fmt.Errorf("%s: %w", one.Address, one.Err))
			}
		}
		for _, address := range w.cluster.Nodes {
			seen, err := w.custodian.Look(ctx, w.cluster, address)
			if err = errors.Join(err, seen.Err); err == nil && (seen.Seal.Sealed || !seen.Seal.Initialized) {
				err = fmt.Errorf("%s is sealed", address)
			}
			problems = append(problems, err)
		}
		return errors.Join(problems...)
	})
	if err != nil {
		told.Tend = err.Error()
	}
}

// look opens all that is kept of the cluster.
func (w *worker) look(ctx context.Context, told *outcome) error {
	told.Items, told.Key, told.Field = map[string]custody.State{}, map[string]int{}, map[string][]byte{}
	refs, warnings, err := w.keeper.List(ctx, crashCluster)
	if err != nil {
		return err
	}
	told.Lag = append(told.Lag, warnings...)
	for _, ref := range refs {
		fields, _, err := w.keeper.Open(ctx, ref.Cluster, ref.Name, custody.ReadOptions{})
		if err != nil {
			return err
		}
		opened, err := w.keeper.Get(ctx, ref.Cluster, ref.Name, custody.ReadOptions{})
		if err != nil {
			return err
		}
		told.Items[ref.Name], told.Key[ref.Name] = opened.State, opened.Version
		if ref.Name == "unseal" {
			told.Facts = fields["facts"]
			maps.Copy(told.Field, fields)
			delete(told.Field, "facts")
		}
	}
	key, err := w.keys.Get(ctx, crashKey)
	if err != nil {
		return err
	}
	if key.State != keyring.StateReady {
		told.Lag = append(told.Lag, "the wrapping key is "+string(key.State))
	}
	return nil
}

// order writes an order and returns its file.
func (o order) write(dir string) (string, error) {
	raw, err := json.Marshal(o)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "order.json")
	return path, os.WriteFile(path, raw, 0o600)
}

// stepsDone are the names of the steps that a worker wrote down.
func (o order) stepsDone() ([]string, error) {
	content, err := os.ReadFile(o.StepFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.Split(strings.TrimSuffix(string(content), "\n"), "\n"), err
}
