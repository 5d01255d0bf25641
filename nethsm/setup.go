package nethsm

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"vault-plugin-secrets-nitrokey/hsm"
)

// Setup takes a provisioned NetHSM to where wrapping keys can live on it: an Operator, a key that can do the one
// thing that is wanted of it, a tag that lets this Operator alone use it, and on request a namespace, unattended boot
// and backups.
//
// [Setup.Plan] reads what is there and changes nothing. [Setup.Apply] does what is still to do, one step after the
// other, and stops where one fails. Running it again goes on from there: a step is known by what it leaves on the
// NetHSM, not by a record of ours, so it does not matter how the last run ended. What is there and differs is
// reported, never changed.
type Setup struct {
	// Administrator is one of the root namespace. Where all of it happens in a namespace that exists, one of that will do:
	// then Namespace is his, and NamespaceAdministrator, UnattendedBoot and Backup stay empty.
	Administrator Credentials
	// Namespace is where operator and key live; empty: the root namespace. Only its own administrators manage a namespace,
	// so it gets one first.
	Namespace              string
	NamespaceAdministrator Account
	// Operator uses the key.
	Operator Account
	// Key is the wrapping key; Tag restricts it to operators that have the tag.
	Key WantedKey
	Tag string
	// UnattendedBoot makes every node start without its unlock passphrase, or not; nil leaves it as it is.
	UnattendedBoot *bool
	// Backup is a user that makes backups, and BackupPassphrase what encrypts them; both or none.
	Backup           Account
	BackupPassphrase Secret
}

// Account is a user that a setup makes, or finds.
type Account struct {
	// Username has no namespace: the setup knows where the user lives. Empty: no such user is wanted.
	Username string
	// Passphrase is that of the user. Where the user exists it is proved by a log-in; where none is known it is not.
	Passphrase Secret
	// NewPassphrase is asked where the user has to be made and Passphrase is empty. What it returns must be safe from a crash
	// already: the next run finds the user there and needs the same passphrase. Who gives it wipes what it returned.
	NewPassphrase func() ([]byte, error)
}

func (a *Account) passwordless() bool { return len(a.Passphrase) == 0 && a.NewPassphrase == nil }

// WantedKey is an RSA key for OAEP with SHA-256 and nothing else.
type WantedKey struct {
	ID     string
	Length int    // of the modulus in bits
	Label  string // needs a NetHSM of version 5; empty: none
}

// StepState says what is to be done about a step.
type StepState string

// The states of a step.
const (
	// StepDone: it is there as wanted.
	StepDone StepState = "done"
	// StepToDo: it is not there.
	StepToDo StepState = "to do"
	// StepDiffers: something else is there. A person has to decide.
	StepDiffers StepState = "differs"
	// StepUnknown: a NetHSM tells only when it is asked to do it, so the run will find out.
	StepUnknown StepState = "unknown"
)

// Step is one part of a setup.
type Step struct {
	// What names it: `operator "vault"`.
	What  string
	State StepState
	// Found is what is there, and for a step that differs what to do about it.
	Found string
	// Changed is true where this run did it.
	Changed bool
}

// mechanism is the one that a wrapping key has.
const mechanism = RSADecryptionOAEPSHA256

// Keys of these lengths can be made. Shorter ones are weak, longer ones no wrapping key can use.
var keyLengths = []int{2048, 3072, 4096}

// SetupError says how far a setup came.
type SetupError struct {
	// Done and Remaining name the steps that are there and those that are not, the failed one first.
	Done, Remaining []string
	// Err is why it stopped.
	Err error
}

func (e *SetupError) Error() string {
	done := "nothing was done before"
	if len(e.Done) > 0 {
		done = "there already: " + strings.Join(e.Done, ", ")
	}
	return fmt.Sprintf("setting up the NetHSM: %v; %s; still to do: %s; run it again to go on from there",
		e.Err, done, strings.Join(e.Remaining, ", "))
}

func (e *SetupError) Unwrap() error { return e.Err }

// ErrDiffers is wrapped where a setup stops because something on the NetHSM is not as it should be. What is there is left
// as it is.
var ErrDiffers = errors.New("something else is there already, and it was left as it is")

// check says what is wrong with the setup itself.
func (s *Setup) check() error {
	const op = "setting up the NetHSM"
	complain := func(format string, args ...any) error {
		return fmt.Errorf("%s: %w: %s", op, ErrRequest, fmt.Sprintf(format, args...))
	}
	namespace, _, namespaced := strings.Cut(s.Administrator.Username, "~")
	switch {
	case s.Operator.Username == "":
		return complain("the operator has no name")
	case !slices.Contains(keyLengths, s.Key.Length):
		return complain("a key of %d bits cannot be a wrapping key; take 2048, 3072 or 4096", s.Key.Length)
	case namespaced && namespace != s.Namespace:
		return complain("%s is an administrator of the namespace %s and cannot set up another one",
			s.Administrator.Username, namespace)
	case namespaced && s.NamespaceAdministrator.Username != "":
		return complain("only an administrator of the root namespace makes one for a namespace; give his credentials, " +
			"or leave the namespace's out")
	case namespaced && (s.UnattendedBoot != nil || s.Backup.Username != ""):
		return complain("unattended boot and backups belong to the root namespace; an administrator of that is needed for them")
	case s.Namespace != "" && !namespaced && s.NamespaceAdministrator.Username == "":
		return complain("the namespace %s needs an administrator of its own; give a name and a passphrase for one", s.Namespace)
	case s.Namespace == "" && s.NamespaceAdministrator.Username != "":
		return complain("an administrator of a namespace is given, and no namespace")
	case s.Backup.Username == "" && len(s.BackupPassphrase) > 0:
		return complain("a backup passphrase is given, and no user who makes backups")
	}
	ids := []error{checkID(op, "the key", s.Key.ID), checkID(op, "the tag", s.Tag)}
	for _, account := range []Account{s.NamespaceAdministrator, s.Operator, s.Backup} {
		if account.Username != "" {
			ids = append(ids, checkID(op, "the user", account.Username))
		}
	}
	if s.Namespace != "" {
		ids = append(ids, checkID(op, "the namespace", s.Namespace))
	}
	return errors.Join(ids...)
}

// checkSecrets says which secret a run needs that a plan can do without.
func (s *Setup) checkSecrets() error {
	var missing string
	switch {
	case s.NamespaceAdministrator.Username != "" && s.NamespaceAdministrator.passwordless():
		missing = "the password of the namespace's administrator"
	case s.Backup.Username != "" && s.Backup.passwordless():
		missing = "the password of the backup user"
	case s.Backup.Username != "" && len(s.BackupPassphrase) == 0:
		missing = "the backup passphrase"
	default:
		return nil
	}
	return fmt.Errorf("setting up the NetHSM: %w: %s is missing", ErrRequest, missing)
}

// step is a step that can be looked at and done.
type step struct {
	what string
	// look reads what is there. It changes nothing.
	look func(context.Context) (StepState, string, error)
	do   func(context.Context) error
	// account is set where the steps after it can only be looked at as this user.
	account *Account
}

// Plan says what is there and what is to do, by reading only: it sends nothing but GET. The client is one without
// credentials, of all nodes.
func (s *Setup) Plan(ctx context.Context, client *Client) ([]Step, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	if err := operational(ctx, client); err != nil {
		return nil, err
	}
	var plan []Step
	shut := ""
	for _, step := range s.steps(client) {
		if shut != "" {
			plan = append(plan, Step{What: step.what, State: StepUnknown, Found: "not looked at " + shut})
			continue
		}
		state, found, err := step.look(ctx)
		if err != nil {
			return nil, fmt.Errorf("planning the setup: %s: %w", step.what, err)
		}
		switch {
		case step.account == nil || state == StepToDo:
		case state == StepDiffers:
			shut = "because of the " + step.what
		case len(step.account.Passphrase) == 0:
			shut = "without the password of the " + step.what
		}
		plan = append(plan, Step{What: step.what, State: state, Found: found})
	}
	return plan, nil
}

// Apply does what [Setup.Plan] finds to do, and returns what is there afterwards; each step is reported as soon as it
// is known to be there. Where anything differs it changes nothing and the error is [ErrDiffers]. Otherwise it stops
// at the first step that fails, with a [*SetupError].
func (s *Setup) Apply(ctx context.Context, client *Client, report func(Step)) ([]Step, error) {
	if err := s.checkSecrets(); err != nil {
		return nil, err
	}
	plan, err := s.Plan(ctx, client)
	if err != nil {
		return nil, err
	}
	if err := Differing(plan); err != nil {
		return plan, err
	}
	for i, step := range s.steps(client) {
		if plan[i].State != StepDone {
			if plan[i].Changed, err = step.run(ctx); err != nil {
				return plan, stopped(plan, i, err)
			}
			plan[i].State, plan[i].Found = StepDone, ""
		}
		report(plan[i])
	}
	return plan, nil
}

// Differing is what [Setup.Apply] answers to a plan before it changes anything: [ErrDiffers] where something differs, else
// nil.
func Differing(plan []Step) error {
	var differs []error
	for _, step := range plan {
		if step.State == StepDiffers {
			differs = append(differs, fmt.Errorf("%s: %s", step.What, step.Found))
		}
	}
	if differs == nil {
		return nil
	}
	return fmt.Errorf("setting up the NetHSM, before any change: %w: %w", ErrDiffers, errors.Join(differs...))
}

// stopped is the error of a setup that ended at step at.
func stopped(plan []Step, at int, err error) error {
	out := &SetupError{Err: fmt.Errorf("%s: %w", plan[at].What, err)}
	for i, step := range plan {
		switch {
		case i < at || step.State == StepDone:
			out.Done = append(out.Done, step.What)
		default:
			out.Remaining = append(out.Remaining, step.What)
		}
	}
	return out
}

// errUnchanged is what a do returns that found everything as it should be.
var errUnchanged = errors.New("it was there already")

// run does a step and makes sure that it is there afterwards: a NetHSM whose answer was lost may have done it, and another
// run at the same time as well. It tells whether this run did it.
func (s *step) run(ctx context.Context) (changed bool, err error) {
	err = s.do(ctx)
	switch {
	case errors.Is(err, errUnchanged):
		return false, nil
	case err != nil && !errors.Is(err, hsm.ErrExists) && !errors.Is(err, hsm.ErrMayHaveHappened):
		return false, err
	}
	state, found, lookErr := s.look(ctx)
	switch {
	case lookErr != nil:
		return false, errors.Join(err, lookErr)
	case state == StepDone, state == StepUnknown && err == nil:
		return err == nil, nil
	case state == StepDiffers:
		return false, fmt.Errorf("%w: %s", ErrDiffers, found)
	case err != nil:
		return false, err
	default:
		return false, fmt.Errorf("the NetHSM said that it is done, and it is not there: %w", hsm.ErrUnavailable)
	}
}

// operational makes sure that every node can be set up, and says what has to happen first where one cannot.
func operational(ctx context.Context, client *Client) error {
	for _, url := range client.URLs() {
		node, err := client.At(url)
		if err != nil {
			return err
		}
		state, err := node.State(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("setting up the NetHSM: %w", err)
		case state == StateUnprovisioned:
			return fmt.Errorf("setting up the NetHSM: %w: %s is Unprovisioned; provision it first, or restore a backup",
				ErrState, url)
		case state == StateLocked:
			return fmt.Errorf("setting up the NetHSM: %w: %s is Locked; unlock it first: %w", ErrState, url, hsm.ErrLocked)
		case state != StateOperational:
			return fmt.Errorf("setting up the NetHSM: %w: %s is %s; look at its log and its database (etcd): %w",
				ErrState, url, state, hsm.ErrUnavailable)
		}
	}
	return nil
}

// steps lists the steps in the order in which they have to happen.
func (s *Setup) steps(client *Client) []*step {
	views := s.views(client)
	var out []*step
	if s.NamespaceAdministrator.Username != "" {
		out = append(out, s.namespaceAdministrator(views), s.namespace(views))
	}
	out = append(out, s.operator(views), s.operatorTag(views), s.key(views))
	if s.UnattendedBoot != nil {
		for _, url := range client.URLs() {
			out = append(out, s.unattendedBoot(views, url))
		}
	}
	if s.Backup.Username != "" {
		out = append(out, s.backupUser(views), s.backupPassphrase(views))
	}
	return out
}

// setupViews are the logins of a setup.
type setupViews struct {
	client *Client // no login
	admin  *Client // the administrator that was given
	// local manages the namespace that is set up. Its passphrase may become known only while the setup runs.
	local func() *Client
}

func (s *Setup) views(client *Client) setupViews {
	v := setupViews{client: client, admin: client.As(s.Administrator)}
	v.local = func() *Client {
		if s.NamespaceAdministrator.Username == "" {
			return v.admin
		}
		return client.As(Credentials{Username: s.nid(s.NamespaceAdministrator.Username), Password: s.NamespaceAdministrator.Passphrase})
	}
	return v
}

// nid is the name of a user of the namespace that is set up, as a NetHSM writes it.
func (s *Setup) nid(username string) string {
	if s.Namespace == "" {
		return username
	}
	return s.Namespace + "~" + username
}

// namespaceAdministrator is made by an administrator of the root namespace, before there is a namespace.
func (s *Setup) namespaceAdministrator(v setupViews) *step {
	account := &s.NamespaceAdministrator
	id := s.nid(account.Username)
	return &step{
		what:    fmt.Sprintf("namespace administrator %q", id),
		account: account,
		look: func(ctx context.Context) (StepState, string, error) {
			state, found, err := lookAtUser(ctx, v, id, RoleAdministrator, account)
			if err != nil || state != StepToDo {
				return state, found, err
			}
			exists, err := s.namespaceExists(ctx, v)
			if err == nil && exists {
				state, found = StepDiffers, fmt.Sprintf(
					"the namespace %s exists and this user does not, and only its own administrators can make one; give "+
						"the name and passphrase of one that it has", s.Namespace)
			}
			return state, found, err
		},
		do: func(ctx context.Context) error { return makeUser(ctx, v.admin, id, RoleAdministrator, account) },
	}
}

func (s *Setup) namespace(v setupViews) *step {
	return &step{
		what: fmt.Sprintf("namespace %q", s.Namespace),
		look: func(ctx context.Context) (StepState, string, error) {
			exists, err := s.namespaceExists(ctx, v)
			if err != nil || !exists {
				return StepToDo, "", err
			}
			return StepDone, "", nil
		},
		do: func(ctx context.Context) error { return v.admin.AddNamespace(ctx, s.Namespace) },
	}
}

// namespaceExists is true for the root namespace, and where an administrator of the namespace himself does the setup.
func (s *Setup) namespaceExists(ctx context.Context, v setupViews) (bool, error) {
	if s.NamespaceAdministrator.Username == "" {
		return true, nil
	}
	names, err := v.admin.Namespaces(ctx)
	return slices.Contains(names, s.Namespace), err
}

func (s *Setup) operator(v setupViews) *step {
	id := s.nid(s.Operator.Username)
	return &step{
		what: fmt.Sprintf("operator %q", id),
		look: func(ctx context.Context) (StepState, string, error) {
			return lookAtUser(ctx, v, id, RoleOperator, &s.Operator)
		},
		do: func(ctx context.Context) error { return makeUser(ctx, v.local(), id, RoleOperator, &s.Operator) },
	}
}

func (s *Setup) operatorTag(v setupViews) *step {
	id := s.nid(s.Operator.Username)
	return &step{
		what: fmt.Sprintf("tag %q of operator %q", s.Tag, id),
		look: func(ctx context.Context) (StepState, string, error) {
			tags, err := v.admin.UserTags(ctx, id)
			switch {
			case errors.Is(err, hsm.ErrNotFound):
				return StepToDo, "", nil
			case err != nil:
				return "", "", err
			case slices.Contains(tags, s.Tag):
				return StepDone, "", nil
			default:
				return StepToDo, "", nil
			}
		},
		do: func(ctx context.Context) error { return v.local().AddUserTag(ctx, id, s.Tag) },
	}
}

func (s *Setup) key(v setupViews) *step {
	return &step{
		what: fmt.Sprintf("key %q", s.Key.ID),
		look: func(ctx context.Context) (StepState, string, error) {
			exists, err := s.namespaceExists(ctx, v)
			if err != nil || !exists {
				return StepToDo, "", err
			}
			key, err := v.local().Key(ctx, s.Key.ID)
			switch {
			case errors.Is(err, hsm.ErrNotFound):
				return StepToDo, fmt.Sprintf("RSA-%d, %s only, restricted to the tag %q", s.Key.Length, mechanism, s.Tag), nil
			case err != nil:
				return "", "", err
			}
			if differs := s.differs(key); differs != "" {
				return StepDiffers, differs, nil
			}
			return StepDone, "", nil
		},
		do: func(ctx context.Context) error {
			_, err := v.local().GenerateKey(ctx, NewKey{
				ID: s.Key.ID, Type: TypeRSA, Length: s.Key.Length, Label: s.Key.Label,
				Mechanisms: []Mechanism{mechanism}, Tags: []string{s.Tag},
			})
			return err
		},
	}
}

// differs says in which way a key is not the wanted one, and what to do about it; empty where it is.
func (s *Setup) differs(key Key) string {
	var foreign []string
	for _, m := range key.Mechanisms {
		if m != mechanism {
			foreign = append(foreign, string(m))
		}
	}
	bits := 0
	if public, ok := key.Public.(*rsa.PublicKey); ok {
		bits = public.N.BitLen()
	}
	const another = "choose another key id: what a key can do is fixed when it is made"
	switch {
	case key.Type != TypeRSA:
		return fmt.Sprintf("it is a key of type %s; %s", key.Type, another)
	case !slices.Contains(key.Mechanisms, mechanism):
		return fmt.Sprintf("it cannot do %s; %s", mechanism, another)
	case len(foreign) > 0:
		return fmt.Sprintf("it can also do %s, and another use of the same RSA key can give away what is sealed to it; %s",
			strings.Join(foreign, ", "), another)
	case bits != s.Key.Length:
		return fmt.Sprintf("it has %d bits, and %d are wanted; ask for %[1]d, or choose another key id", bits, s.Key.Length)
	case len(key.Tags) == 0:
		return fmt.Sprintf("it has no tag, so that every operator may use it; PUT /keys/%s/restrictions/tags/%s "+
			"restricts it", s.Key.ID, s.Tag)
	case !slices.Contains(key.Tags, s.Tag):
		return fmt.Sprintf("its tags are %s and %s is not among them; PUT /keys/%s/restrictions/tags/%[2]s adds it, or "+
			"choose another key id",
			strings.Join(key.Tags, ", "), s.Tag, s.Key.ID)
	case len(key.Tags) > 1:
		return fmt.Sprintf("its tags are %s, so that operators with another one of them may use it too; delete those "+
			"with DELETE /keys/%s/restrictions/tags/…, or choose another key id",
			strings.Join(key.Tags, ", "), s.Key.ID)
	case s.Key.Label != "" && key.Label != s.Key.Label:
		return fmt.Sprintf("its label is %q, and %q is wanted; ask for that one, or PUT /keys/%s/label",
			key.Label, s.Key.Label, s.Key.ID)
	default:
		return ""
	}
}

func (s *Setup) unattendedBoot(v setupViews, url string) *step {
	wanted, word := *s.UnattendedBoot, "off"
	if wanted {
		word = "on"
	}
	at := func() (*Client, error) { return v.admin.At(url) }
	return &step{
		what: fmt.Sprintf("unattended boot %s at %s", word, url),
		look: func(ctx context.Context) (StepState, string, error) {
			node, err := at()
			if err != nil {
				return "", "", err
			}
			on, err := node.UnattendedBoot(ctx)
			if err != nil || on != wanted {
				return StepToDo, "", err
			}
			return StepDone, "", nil
		},
		do: func(ctx context.Context) error {
			node, err := at()
			if err != nil {
				return err
			}
			return node.SetUnattendedBoot(ctx, wanted)
		},
	}
}

func (s *Setup) backupUser(v setupViews) *step {
	return &step{
		what: fmt.Sprintf("backup user %q", s.Backup.Username),
		look: func(ctx context.Context) (StepState, string, error) {
			return lookAtUser(ctx, v, s.Backup.Username, RoleBackup, &s.Backup)
		},
		do: func(ctx context.Context) error {
			return makeUser(ctx, v.admin, s.Backup.Username, RoleBackup, &s.Backup)
		},
	}
}

// backupPassphrase cannot be read. What a NetHSM shows of it is whether it makes a backup, and whether the passphrase opens
// that one's first bytes; this is how the step is looked at when it runs.
func (s *Setup) backupPassphrase(v setupViews) *step {
	return &step{
		what: "backup passphrase",
		look: func(context.Context) (StepState, string, error) {
			return StepUnknown, "a NetHSM does not tell whether it has one; the run begins a backup to see", nil
		},
		do: func(ctx context.Context) error {
			backup := v.client.As(Credentials{Username: s.Backup.Username, Password: s.Backup.Passphrase})
			switch set, err := backup.backupOpens(ctx, s.BackupPassphrase); {
			case err != nil:
				if _, wrong := errors.AsType[*hsm.PINError](err); wrong && set {
					return fmt.Errorf("%w: the NetHSM has another backup passphrase; give that one, or change it with "+
						"PUT /config/backup-passphrase", ErrDiffers)
				}
				return err
			case set:
				return errUnchanged
			default:
				return v.admin.SetBackupPassphrase(ctx, nil, s.BackupPassphrase)
			}
		},
	}
}

// lookAtUser says whether a user is there with that role and that passphrase.
func lookAtUser(ctx context.Context, v setupViews, id string, role Role, account *Account) (StepState, string, error) {
	user, err := v.admin.User(ctx, id)
	switch {
	case errors.Is(err, hsm.ErrNotFound):
		return StepToDo, "", nil
	case err != nil:
		return "", "", err
	case user.Role != role:
		return StepDiffers, fmt.Sprintf("it is a user with the role %s, and a user has one role; choose another name",
			user.Role), nil
	case len(account.Passphrase) == 0 && account.NewPassphrase != nil:
		return StepDiffers, "the user exists, and its password is not known here; give the one that it has, or delete " +
			"the user and run this again", nil
	case len(account.Passphrase) == 0:
		return StepDone, "its password was not given, so it was not checked", nil
	}
	err = v.client.As(Credentials{Username: id, Password: account.Passphrase}).LogIn(ctx)
	if _, wrong := errors.AsType[*hsm.PINError](err); wrong {
		return StepDiffers, "the user exists with another password than the one given; give the one that it has", nil
	}
	return StepDone, "", err
}

// makeUser makes a user, as an administrator.
func makeUser(ctx context.Context, admin *Client, id string, role Role, account *Account) error {
	if len(account.Passphrase) == 0 {
		if account.NewPassphrase == nil {
			return fmt.Errorf("%w: the user does not exist, and no passphrase for it was given", ErrRequest)
		}
		passphrase, err := account.NewPassphrase()
		if err != nil {
			return err
		}
		account.Passphrase = passphrase
	}
	name := "nitroseal " + strings.ToLower(string(role))
	_, err := admin.AddUser(ctx, id, NewUser{RealName: name, Role: role, Passphrase: account.Passphrase})
	return err
}

// Prove lets the operator open what was sealed to the key in software: then all of it fits together. It costs one
// private-key operation and changes nothing but the key's count of uses. The operator's passphrase must be known.
func (s *Setup) Prove(ctx context.Context, client *Client) error {
	const op = "proving the setup"
	operator := client.As(Credentials{Username: s.nid(s.Operator.Username), Password: s.Operator.Passphrase})
	key, err := operator.Key(ctx, s.Key.ID)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	public, ok := key.Public.(*rsa.PublicKey)
	if !ok {
		return fmt.Errorf("%s: the key %q is of type %s: %w", op, s.Key.ID, key.Type, hsm.ErrUnsupported)
	}
	message := make([]byte, 32)
	defer clear(message)
	_, _ = rand.Read(message) // never fails: crypto/rand ends the program where it cannot
	sealed, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, message, nil)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	opened, err := operator.Decrypt(ctx, s.Key.ID, ModeOAEPSHA256, sealed, nil)
	defer clear(opened)
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", op, err)
	case !bytes.Equal(opened, message):
		return fmt.Errorf("%s: the key %q opens what was sealed to it to something else: %w", op, s.Key.ID, hsm.ErrKeyChanged)
	default:
		return nil
	}
}
