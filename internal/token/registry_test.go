package token

import (
	"bytes"
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"vault-plugin-secrets-nitrokey/internal/store"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// shelf is a store that can be away.
type shelf struct {
	store.Store
	mu   sync.Mutex
	away func(operation, name string) error // nil: it is there
	gets atomic.Int64

	hangs atomic.Bool
}

func newShelf(t testing.TB) *shelf {
	t.Helper()
	opened, err := file.Open(filepath.Join(t.TempDir(), "serve"))
	if err != nil {
		t.Fatal(err)
	}
	return &shelf{Store: opened}
}

func (s *shelf) fail(with func(operation, name string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = with
}

func (s *shelf) leave() {
	s.fail(func(string, string) error { return fmt.Errorf("etcd: %w", store.ErrUnavailable) })
}

func (s *shelf) ask(operation, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away == nil {
		return nil
	}
	return s.away(operation, name)
}

func (s *shelf) Get(ctx context.Context, name string) (store.Entry, error) {
	s.gets.Add(1)
	if err := s.ask("get", name); err != nil {
		return store.Entry{}, err
	}
	return s.Store.Get(ctx, name)
}

// hang lets nobody have an answer.
func (s *shelf) hang(hangs bool) { s.hangs.Store(hangs) }

func (s *shelf) List(ctx context.Context, prefix string) ([]string, error) {
	if s.hangs.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if err := s.ask("list", prefix); err != nil {
		return nil, err
	}
	return s.Store.List(ctx, prefix)
}

func (s *shelf) Put(ctx context.Context, name string, value []byte, expected store.Revision) (store.Revision, error) {
	if err := s.ask("put", name); err != nil {
		return store.NoRevision, err
	}
	return s.Store.Put(ctx, name, value, expected)
}

func (s *shelf) Delete(ctx context.Context, name string, expected store.Revision) error {
	if err := s.ask("delete", name); err != nil {
		return err
	}
	return s.Store.Delete(ctx, name, expected)
}

func create(t testing.TB, in store.Store, spec Spec) (Token, string) {
	t.Helper()
	made, text, err := Create(t.Context(), in, spec, nil)
	if err != nil {
		t.Fatal(err)
	}
	return made, string(text)
}

func prod(t testing.TB, in store.Store) (Token, string) {
	t.Helper()
	return create(t, in, Spec{Name: "prod", Keys: []string{"prod"}, By: "alice"})
}

func refreshed(t testing.TB, in store.Store) *Registry {
	t.Helper()
	r := NewRegistry(RegistryOptions{Store: in})
	if err := r.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r
}

var here = Peer{Address: netip.MustParseAddr("192.0.2.7")}

func takes(t testing.TB, r *Registry, text string) bool {
	t.Helper()
	grant, err := r.Authenticate(text, here)
	if err != nil {
		if !errors.Is(err, ErrDenied) || grant != nil {
			t.Fatalf("refused with %v, %v", grant, err)
		}
		return false
	}
	return true
}

func TestATokenIsTakenForWhatItIsAndNothingLikeItIs(t *testing.T) {
	shelf := newShelf(t)
	made, text := prod(t, shelf)
	other, _ := create(t, shelf, Spec{Name: "other", Keys: []string{"lab", "stage"}, Limit: &Limit{Rate: 5, Burst: 50}})
	r := refreshed(t, shelf)

	grant, err := r.Authenticate(text, here)
	if err != nil || grant.ID != made.ID || grant.Name != "prod" || !grant.Allows("prod") || grant.Allows("lab") || grant.Limit != nil {
		t.Fatalf("granted %+v, %v", grant, err)
	}
	if keys := r.Keys(); !slices.Equal(keys, []string{"lab", "prod", "stage"}) {
		t.Errorf("keys %q", keys)
	}
	if ids := r.IDs(); len(ids) != 2 || !slices.IsSorted(ids) || !slices.Contains(ids, made.ID) {
		t.Errorf("ids %q", ids)
	}
	secret := text[len(text)-secretChars:]
	for sentence, wrong := range map[string]string{
		"nothing":                   "",
		"another secret":            text[:len(text)-1] + map[bool]string{true: "B", false: "A"}[strings.HasSuffix(text, "A")],
		"the secret under other id": "ns." + other.ID + "." + secret,
		"an unknown id":             "ns.aaaaaaaaaa." + secret,
		"the secret alone":          secret,
		"the id alone":              "ns." + made.ID,
		"more behind it":            text + "A",
		"capitals":                  strings.ToUpper(text),
		"a token of Vault":          "hvs.CAESIJ",
		"a stored hash":             "ns." + made.ID + "." + strings.Repeat("A", secretChars),
		"a megabyte":                strings.Repeat("n", 1<<20),
	} {
		if takes(t, r, wrong) {
			t.Errorf("%s is taken", sentence)
		}
	}
	if _, err := r.Authenticate(text[:len(text)-1]+"!", here); err == nil || strings.Contains(err.Error(), secret[:20]) {
		t.Errorf("the error shows the secret: %v", err)
	}
}

// The comparison must not end before the hash was made: an unknown id would be told by its speed.
// BenchmarkRefusal shows that an unknown id costs what a wrong secret costs, so that nobody finds out ids by the time of an answer.
func BenchmarkRefusal(b *testing.B) {
	shelf := newShelf(b)
	made, text := prod(b, shelf)
	r := refreshed(b, shelf)
	secret := text[len(text)-secretChars:]
	for sentence, text := range map[string]string{
		"an unknown id":  "ns.aaaaaaaaaa." + secret,
		"a wrong secret": "ns." + made.ID + "." + strings.Repeat("A", secretChars),
	} {
		b.Run(sentence, func(b *testing.B) {
			for b.Loop() {
				if _, err := r.Authenticate(text, here); !errors.Is(err, ErrDenied) {
					b.Fatal(err)
				}
			}
		})
	}
}

func TestABoundTokenIsTakenFromItsAddressesAndWithItsCertificates(t *testing.T) {
	shelf := newShelf(t)
	_, bound := create(t, shelf, Spec{
		Name: "a", Keys: []string{"a"}, Addresses: []string{"192.0.2.0/24", "2001:db8::7"},
		CertificateNames: []string{"Vault-1.example.org", "spiffe://example.org/Vault"},
	})
	_, free := prod(t, shelf)
	r := refreshed(t, shelf)
	named := func(names ...string) *x509.Certificate { return &x509.Certificate{DNSNames: names} }
	uri := func(text string) *x509.Certificate {
		parsed, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		return &x509.Certificate{URIs: []*url.URL{parsed}}
	}
	common := func(name string, dns ...string) *x509.Certificate {
		return &x509.Certificate{Subject: pkix.Name{CommonName: name}, DNSNames: dns}
	}
	for sentence, test := range map[string]struct {
		address     string
		certificate *x509.Certificate
		want        bool
	}{
		"its network and a name":                     {"192.0.2.99", named("vault-1.example.org"), true},
		"a mapped address of its network":            {"::ffff:192.0.2.99", named("vault-1.example.org"), true},
		"its single address":                         {"2001:db8::7", named("vault-1.example.org"), true},
		"one of several names":                       {"192.0.2.99", named("other.example.org", "VAULT-1.example.org"), true},
		"a URI":                                      {"192.0.2.99", uri("spiffe://example.org/Vault"), true},
		"a URI in other letters":                     {"192.0.2.99", uri("spiffe://example.org/vault"), false},
		"a common name where there is no other name": {"192.0.2.99", common("vault-1.example.org"), true},
		"a common name beside other names":           {"192.0.2.99", common("vault-1.example.org", "other.example.org"), false},
		"a wildcard":                                 {"192.0.2.99", named("*.example.org"), false},
		"another name":                               {"192.0.2.99", named("vault-1.example.org.evil.org"), false},
		"no certificate":                             {"192.0.2.99", nil, false},
		"another network":                            {"198.51.100.1", named("vault-1.example.org"), false},
		"the neighbour of its single address":        {"2001:db8::8", named("vault-1.example.org"), false},
		"no address":                                 {"", named("vault-1.example.org"), false},
	} {
		peer := Peer{Certificate: test.certificate}
		if test.address != "" {
			peer.Address = netip.MustParseAddr(test.address)
		}
		if _, err := r.Authenticate(bound, peer); (err == nil) != test.want || err != nil && !errors.Is(err, ErrDenied) {
			t.Errorf("%s: %v", sentence, err)
		}
		if _, err := r.Authenticate(free, peer); err != nil {
			t.Errorf("%s: a token that is not bound: %v", sentence, err)
		}
	}
}

func TestARevokedTokenIsRefusedWithinFiveSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf(t)
		revoked, text := prod(t, shelf)
		_, kept := prod(t, shelf)
		r := refreshed(t, shelf)
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { r.Run(ctx) })
		defer running.Wait()
		defer stop()

		before := shelf.gets.Load()
		<-time.After(30 * time.Second)
		if asked := shelf.gets.Load() - before; asked != 0 {
			t.Errorf("%d items were read although none was new", asked)
		}
		if _, err := Revoke(t.Context(), shelf, revoked.ID); err != nil {
			t.Fatal(err)
		}
		<-time.After(5 * time.Second)
		if takes(t, r, text) || !takes(t, r, kept) {
			t.Error("the revoked one is taken, or the other one is not")
		}
		_, late := prod(t, shelf)
		<-time.After(5 * time.Second)
		if !takes(t, r, late) {
			t.Error("a new one is not taken")
		}
	})
}

func TestAStoreThatIsAwayTakesNothingAway(t *testing.T) {
	shelf := newShelf(t)
	_, text := prod(t, shelf)
	r := refreshed(t, shelf)
	shelf.leave()
	if err := r.Refresh(t.Context()); !errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("refreshed with %v", err)
	}
	if s := r.Status(); !takes(t, r, text) || s.Source != SourceStore || !errors.Is(s.Err, store.ErrUnavailable) || s.Tokens != 1 {
		t.Errorf("status %+v", s)
	}
	shelf.fail(nil)
	if err := r.Refresh(t.Context()); err != nil || r.Status().Err != nil {
		t.Errorf("afterwards: %v, %+v", err, r.Status())
	}
}

// A store that tells the names and not all items: what is not listed any more is revoked in any case.
func TestARevocationCountsAlthoughOtherItemsCannotBeRead(t *testing.T) {
	shelf := newShelf(t)
	gone, text := prod(t, shelf)
	_, kept := prod(t, shelf)
	r := refreshed(t, shelf)
	if _, err := Revoke(t.Context(), shelf, gone.ID); err != nil {
		t.Fatal(err)
	}
	late, lateText := prod(t, shelf)
	shelf.fail(func(operation, name string) error {
		if operation == "get" && name == folder+late.ID {
			return store.ErrUnavailable
		}
		return nil
	})
	if err := r.Refresh(t.Context()); !errors.Is(err, store.ErrUnavailable) {
		t.Fatalf("refreshed with %v", err)
	}
	if takes(t, r, text) || !takes(t, r, kept) || takes(t, r, lateText) {
		t.Error("the revoked one is taken, the kept one is not, or the one that nobody has read is")
	}
	shelf.fail(nil)
	if err := r.Refresh(t.Context()); err != nil || !takes(t, r, lateText) {
		t.Errorf("afterwards: %v", err)
	}
}

func TestARestartWithoutTheStoreKnowsTheTokens(t *testing.T) {
	shelf := newShelf(t)
	_, text := prod(t, shelf)
	path := filepath.Join(t.TempDir(), "tokens.cache")
	options := RegistryOptions{Store: shelf, Cache: path, Origin: "etcd one"}
	first := NewRegistry(options)
	if err := first.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(path)
	if err != nil || strings.Contains(string(raw), text[len(text)-secretChars:]) {
		t.Fatalf("the copy %s, %v", raw, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	shelf.leave()
	again := func(options RegistryOptions) *Registry {
		r := NewRegistry(options)
		if err := r.Refresh(t.Context()); !errors.Is(err, store.ErrUnavailable) {
			t.Fatal(err)
		}
		return r
	}
	second := again(options)
	if s := second.Status(); !takes(t, second, text) || s.Source != SourceCache || s.Tokens != 1 || s.Read.IsZero() {
		t.Errorf("status %+v", s)
	}
	for sentence, spoil := range map[string]func() RegistryOptions{
		"of another store": func() RegistryOptions { o := options; o.Origin = "etcd two"; return o },
		"that others may write": func() RegistryOptions {
			if err := os.Chmod(path, 0o620); err != nil {
				t.Fatal(err)
			}
			return options
		},
		"of another user": func() RegistryOptions {
			give := func() error { return os.Chown(path, 65534, -1) }
			if os.Geteuid() != 0 { // nobody else gives files away
				give = func() error { return os.Chmod(path, 0o620) }
			}
			if err := give(); err != nil {
				t.Fatal(err)
			}
			return options
		},
		"that nobody writes": func() RegistryOptions {
			if err := errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)); err != nil {
				t.Fatal(err)
			}
			return options
		},
		"that was changed": func() RegistryOptions {
			if err := os.WriteFile(path, []byte(strings.Replace(string(raw), `"prod"`, `"root"`, 1)+"x"), 0o600); err != nil {
				t.Fatal(err)
			}
			return options
		},
	} {
		if err := errors.Join(os.Remove(path), os.WriteFile(path, raw, 0o600)); err != nil {
			t.Fatal(err)
		}
		var said strings.Builder
		spoiled := spoil()
		spoiled.Logger = slog.New(slog.NewTextHandler(&said, nil))
		r := again(spoiled)
		_ = r.Refresh(t.Context())
		if n := strings.Count(said.String(), "the copy of the tokens on this disk is not used"); n != 1 {
			t.Errorf("of a copy %s the log tells %d times:\n%s", sentence, n, said.String())
		}
		if takes(t, r, text) || r.Status().Source != SourceNone {
			t.Errorf("a copy %s is used: %+v", sentence, r.Status())
		}
	}
	if err := errors.Join(os.Remove(path), os.WriteFile(path, raw, 0o600)); err != nil {
		t.Fatal(err)
	}
	shelf.fail(func(operation, _ string) error { // it tells the ids and no more
		if operation == "get" {
			return store.ErrUnavailable
		}
		return nil
	})
	if third := again(options); !takes(t, third, text) {
		t.Errorf("a store that tells the ids alone: %+v", third.Status())
	}
	shelf.fail(nil) // it comes back: nothing is left of the copy's word
	if _, err := Revoke(t.Context(), shelf, split(text)); err != nil {
		t.Fatal(err)
	}
	if err := second.Refresh(t.Context()); err != nil || takes(t, second, text) || second.Status().Source != SourceStore {
		t.Errorf("afterwards %v, %+v", err, second.Status())
	}
}

// A store that goes away in the middle of the first list: a good token that was not told yet is no wrong one.
func TestUntilAllTokensWereToldNobodyKnowsThemAll(t *testing.T) {
	shelf := newShelf(t)
	texts := map[string]string{}
	for range 3 {
		made, text := prod(t, shelf)
		texts[made.ID] = text
	}
	ids := slices.Sorted(maps.Keys(texts))
	for name, cache := range map[string]string{"with an old copy": filepath.Join(t.TempDir(), "tokens.cache"), "without": ""} {
		t.Run(name, func(t *testing.T) {
			old, _, err := encodeCopy(nil, "", time.Now())
			if cache != "" {
				err = errors.Join(err, os.WriteFile(cache, old, 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
			var said strings.Builder
			r := NewRegistry(RegistryOptions{Store: shelf, Cache: cache, Logger: slog.New(slog.NewTextHandler(&said, nil))})
			for told := range ids { // each time it tells one more
				shelf.fail(func(operation, name string) error {
					if operation == "get" && name != folder+ids[told] {
						return store.ErrUnavailable
					}
					return nil
				})
				err := r.Refresh(t.Context())
				for i, id := range ids {
					if takes(t, r, texts[id]) != (i <= told) {
						t.Errorf("after %d items it is wrong about number %d", told+1, i)
					}
				}
				complete := told == len(ids)-1
				if (err == nil) != complete || (r.Status().Source == SourceNone) == complete {
					t.Errorf("after %d of %d items: %v, %+v", told+1, len(ids), err, r.Status())
				}
				if now, err := os.ReadFile(cache); cache != "" && bytes.Equal(now, old) == complete {
					t.Errorf("after %d of %d items the copy is %s, %v", told+1, len(ids), now, err)
				}
			}
			if strings.Count(said.String(), "the tokens were read") != 1 {
				t.Errorf("the log:\n%s", &said)
			}
			shelf.fail(nil)
		})
	}
}

// A file that root has put back from a backup, for example.
func TestAnItemThatMayNotBeReadHarmsNoOther(t *testing.T) {
	shelf := newShelf(t)
	texts := map[string]string{}
	for range 3 {
		made, text := prod(t, shelf)
		texts[made.ID] = text
	}
	ids := slices.Sorted(maps.Keys(texts))
	shelf.fail(func(operation, name string) error {
		if operation == "get" && name == folder+ids[0] {
			return store.ErrDenied
		}
		return nil
	})
	cache := filepath.Join(t.TempDir(), "tokens.cache")
	r := NewRegistry(RegistryOptions{Store: shelf, Cache: cache})
	for range 2 {
		if err := r.Refresh(t.Context()); !errors.Is(err, store.ErrDenied) || r.Status().Source != SourceStore {
			t.Errorf("%v, %+v: nobody waits for what a person has to mend", err, r.Status())
		}
		if takes(t, r, texts[ids[0]]) || !takes(t, r, texts[ids[1]]) || !takes(t, r, texts[ids[2]]) {
			t.Errorf("of %v the tokens %v are known", ids, r.IDs())
		}
	}
	if _, err := Revoke(t.Context(), shelf, ids[2]); err != nil {
		t.Fatal(err)
	}
	_ = r.Refresh(t.Context())
	if copied, _, err := readCopy(cache, ""); err != nil || len(copied) != 1 || copied[ids[1]].ID == "" {
		t.Errorf("the copy has %v, %v", slices.Collect(maps.Keys(copied)), err)
	}
}

// The store told which tokens there are before it went away: the copy knows no better.
func TestACopyDoesNotBringBackWhatTheStoreSaidIsGone(t *testing.T) {
	shelf := newShelf(t)
	gone, text := prod(t, shelf)
	options := RegistryOptions{Store: shelf, Cache: filepath.Join(t.TempDir(), "tokens.cache")}
	if err := NewRegistry(options).Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := Revoke(t.Context(), shelf, gone.ID); err != nil {
		t.Fatal(err)
	}
	prod(t, shelf)
	shelf.fail(func(operation, _ string) error {
		if operation == "get" {
			return store.ErrUnavailable
		}
		return nil
	})
	r := NewRegistry(options)
	for range 2 {
		if err := r.Refresh(t.Context()); !errors.Is(err, store.ErrUnavailable) || takes(t, r, text) {
			t.Errorf("a token that was revoked is taken (%v)", err)
		}
		shelf.leave()
	}
}

func TestAStoreThatHangsDelaysNoStartForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf(t)
		_, text := prod(t, shelf)
		options := RegistryOptions{Store: shelf, Cache: filepath.Join(t.TempDir(), "tokens.cache")}
		if err := NewRegistry(options).Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		shelf.hang(true)
		r := NewRegistry(options)
		from := time.Now()
		if err := r.Refresh(t.Context()); !errors.Is(err, context.DeadlineExceeded) || !takes(t, r, text) {
			t.Errorf("refreshed with %v", err)
		}
		if took := time.Since(from); took > 5*time.Second {
			t.Errorf("it took %v", took)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.Refresh(ctx); !errors.Is(err, context.Canceled) || !takes(t, r, text) {
			t.Errorf("refreshed with %v although nobody waits", err)
		}
		if errors.Is(r.Status().Err, context.Canceled) {
			t.Error("that somebody gave up is told as the store's failure")
		}
	})
}

func TestACopyThatCannotBeWrittenHarmsNobody(t *testing.T) {
	shelf := newShelf(t)
	_, text := prod(t, shelf)
	r := NewRegistry(RegistryOptions{Store: shelf, Cache: filepath.Join(t.TempDir(), "none", "tokens.cache")})
	if err := r.Refresh(t.Context()); err != nil || !takes(t, r, text) {
		t.Fatal(err)
	}
	if err := r.Status().Cache; err == nil || !strings.Contains(err.Error(), "tokens.cache") {
		t.Errorf("the status says %v", err)
	}
}

func TestAnItemThatIsNoTokenIsToldOnceAndHarmsNoOther(t *testing.T) {
	shelf := newShelf(t)
	_, text := prod(t, shelf)
	for name, value := range map[string]string{
		folder + "aaaaaaaaaa": `{"format":9}`,
		folder + "bbbbbbbbbb": string(goldenItem(t, "token.json")), // under another id
		folder + "notes":      "not an item at all",
		"serve/other":         "nor this",
	} {
		if _, err := shelf.Put(t.Context(), name, []byte(value), store.NoRevision); err != nil {
			t.Fatal(err)
		}
	}
	var said strings.Builder
	r := NewRegistry(RegistryOptions{Store: shelf, Logger: slog.New(slog.NewTextHandler(&said, nil))})
	for range 3 {
		if err := r.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if s := r.Status(); !takes(t, r, text) || s.Tokens != 1 || s.Damaged != 2 {
		t.Errorf("status %+v", s)
	}
	if n := strings.Count(said.String(), "is no token"); n != 2 {
		t.Errorf("told %d times:\n%s", n, said.String())
	}
	listed, err := List(t.Context(), shelf)
	if err != nil || len(listed) != 3 {
		t.Fatalf("%+v, %v", listed, err)
	}
	if _, err := Revoke(t.Context(), shelf, "aaaaaaaaaa", "bbbbbbbbbb"); err != nil {
		t.Fatal(err)
	}
	if listed, err = List(t.Context(), shelf); err != nil || len(listed) != 1 {
		t.Errorf("%+v, %v", listed, err)
	}
}

func TestATokenThatIsGoneBetweenTheListAndItsReadingIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf(t)
		made, text := prod(t, shelf)
		r := refreshed(t, shelf)
		<-time.After(2 * againAfter) // it is read again
		shelf.fail(func(operation, name string) error {
			if operation == "get" && name == folder+made.ID {
				return store.ErrNotFound
			}
			return nil
		})
		if err := r.Refresh(t.Context()); err != nil || takes(t, r, text) || len(r.IDs()) != 0 {
			t.Errorf("%v, %+v", err, r.Status())
		}
	})
}

func TestTheCopyTellsHowOldItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		shelf := newShelf(t)
		prod(t, shelf)
		path := filepath.Join(t.TempDir(), "tokens.cache")
		r := NewRegistry(RegistryOptions{Store: shelf, Cache: path})
		written := func() time.Time {
			t.Helper()
			if err := r.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			_, read, err := readCopy(path, "")
			if err != nil {
				t.Fatal(err)
			}
			return read
		}
		first := written()
		<-time.After(time.Minute)
		if again := written(); !again.Equal(first) {
			t.Error("it is written although nothing changed")
		}
		<-time.After(2 * copyAfter)
		if last := written(); time.Since(last) > time.Minute {
			t.Errorf("it says %v at %v", last, time.Now())
		}
	})
}

func TestManyAskWhileTheListChanges(t *testing.T) {
	shelf := newShelf(t)
	_, text := prod(t, shelf)
	r := refreshed(t, shelf)
	var asking sync.WaitGroup
	stop := make(chan struct{})
	for range 4 {
		asking.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if !takes(t, r, text) {
					t.Error("refused")
					return
				}
				_, _ = r.Keys(), r.Status()
			}
		})
	}
	for range 20 {
		made, _ := create(t, shelf, Spec{Name: "b", Keys: []string{"b"}})
		err := r.Refresh(t.Context())
		_, revoking := Revoke(t.Context(), shelf, made.ID)
		if err := errors.Join(err, revoking, r.Refresh(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	asking.Wait()
}

func BenchmarkAuthenticate(b *testing.B) {
	shelf := newShelf(b)
	_, text := create(b, shelf, Spec{Name: "prod", Keys: []string{"prod"}})
	r := refreshed(b, shelf)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.Authenticate(text, here); err != nil {
			b.Fatal(err)
		}
	}
}
