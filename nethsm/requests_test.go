package nethsm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"io"
	"math/big"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

func TestRestoreSendsArgumentsAndBackup(t *testing.T) {
	client, node := startNode(t, replying(204, ""))
	err := client.Restore(t.Context(), Restoration{Backup: strings.NewReader("a backup"), Passphrase: passphrase, Time: someTime})
	if err != nil {
		t.Fatal(err)
	}
	_, parameters, err := mime.ParseMediaType(node.requests[0].contentType)
	if err != nil {
		t.Fatal(err)
	}
	form := multipart.NewReader(strings.NewReader(node.requests[0].body), parameters["boundary"])
	for _, want := range []struct{ name, content string }{
		{"arguments", `{"backupPassphrase":` + passphraseOut + `,"systemTime":"2026-11-22T00:03:15Z"}`},
		{"backup_file", "a backup"},
	} {
		part, err := form.NextPart()
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(part)
		if err != nil {
			t.Fatal(err)
		}
		if part.FormName() != want.name || string(content) != want.content {
			t.Errorf("part %q = %q, want %q = %q", part.FormName(), content, want.name, want.content)
		}
	}
	if _, err := form.NextPart(); !errors.Is(err, io.EOF) {
		t.Errorf("another part, or %v", err)
	}
	if forms := len(node.requests[0].body) - len("a backup"); forms > formSize {
		t.Errorf("the form is %d bytes larger than the backup, so that it moved while it was made", forms)
	}
	if n := node.requests[0].length; n != int64(len(node.requests[0].body)) {
		t.Errorf("Content-Length = %d for %d bytes", n, len(node.requests[0].body))
	}
}

// What the client can see to be wrong is refused before anything is sent.
func TestWrongRequestsAreNotSent(t *testing.T) {
	long := strings.Repeat("x", 129)
	for sentence, call := range map[string]func(context.Context, *Client) error{
		"an empty key id":      func(ctx context.Context, c *Client) error { return c.DeleteKey(ctx, "") },
		"a key id with dots":   func(ctx context.Context, c *Client) error { return c.DeleteKey(ctx, "..") },
		"a key id with a path": func(ctx context.Context, c *Client) error { return c.DeleteKey(ctx, "a/cert") },
		"a key id with a star": func(ctx context.Context, c *Client) error { return c.DeleteKey(ctx, "a*") },
		"a long key id":        func(ctx context.Context, c *Client) error { return c.DeleteKey(ctx, long) },
		"a key id that is not ASCII": func(ctx context.Context, c *Client) error {
			_, err := c.Key(ctx, "schlüssel")
			return err
		},
		"a key id that is not UTF-8": func(ctx context.Context, c *Client) error {
			_, err := c.Decrypt(ctx, "a\xff", ModeRAW, nil, nil)
			return err
		},
		"a bad prefix": func(ctx context.Context, c *Client) error {
			_, err := c.Keys(ctx, KeyFilter{Prefix: "*"})
			return err
		},
		"a bad new id":               func(ctx context.Context, c *Client) error { return c.MoveKey(ctx, "a", "-b") },
		"a bad tag of a key":         func(ctx context.Context, c *Client) error { return c.AddKeyTag(ctx, "a", "t 1") },
		"a bad tag of a user":        func(ctx context.Context, c *Client) error { return c.AddUserTag(ctx, "a", "_t") },
		"a bad namespace":            func(ctx context.Context, c *Client) error { return c.AddNamespace(ctx, "a~b") },
		"a user with two namespaces": func(ctx context.Context, c *Client) error { return c.DeleteUser(ctx, "a~b~c") },
		"a user with no namespace":   func(ctx context.Context, c *Client) error { return c.DeleteUser(ctx, "~c") },
		"a bad namespace of a user":  func(ctx context.Context, c *Client) error { return c.addUser(ctx, "_~", passphrase) },
		"a short passphrase":         func(ctx context.Context, c *Client) error { return c.addUser(ctx, "a", []byte("123456789")) },
		"a long passphrase":          func(ctx context.Context, c *Client) error { return c.addUser(ctx, "a", bytes.Repeat([]byte("z"), 201)) },
		"a passphrase not of UTF-8":  func(ctx context.Context, c *Client) error { return c.addUser(ctx, "a", []byte("0123456789\xff")) },
		"a short unlock passphrase":  func(ctx context.Context, c *Client) error { return c.Unlock(ctx, []byte("short")) },
		"a short passphrase to set":  func(ctx context.Context, c *Client) error { return c.SetPassphrase(ctx, "a", nil) },
		"a short one for backups":    func(ctx context.Context, c *Client) error { return c.SetBackupPassphrase(ctx, nil, []byte("short")) },
		"a current one not of UTF-8": func(ctx context.Context, c *Client) error {
			return c.SetUnlockPassphrase(ctx, []byte("\xff"), passphrase)
		},
		"a provision without admin's": func(ctx context.Context, c *Client) error {
			return c.Provision(ctx, Provisioning{UnlockPassphrase: passphrase})
		},
		"an empty label":       func(ctx context.Context, c *Client) error { return c.SetKeyLabel(ctx, "a", "") },
		"a long label":         func(ctx context.Context, c *Client) error { return c.SetKeyLabel(ctx, "a", strings.Repeat("ü", 17)) },
		"a label not of UTF-8": func(ctx context.Context, c *Client) error { return c.SetKeyLabel(ctx, "a", "\xff") },
		"a key without mechanisms": func(ctx context.Context, c *Client) error {
			_, err := c.GenerateKey(ctx, NewKey{Type: TypeRSA, Length: 2048})
			return err
		},
		"an import of nothing": func(ctx context.Context, c *Client) error {
			_, err := c.ImportKey(ctx, ImportedKey{Mechanisms: []Mechanism{ECDSASignature}})
			return err
		},
		"a large certificate": func(ctx context.Context, c *Client) error {
			return c.PutKeyCertificate(ctx, "a", make([]byte, 64<<10))
		},
		"no random bytes": func(ctx context.Context, c *Client) error {
			_, err := c.Random(ctx, 0)
			return err
		},
		"too many random bytes": func(ctx context.Context, c *Client) error {
			_, err := c.Random(ctx, 1025)
			return err
		},
		"a TLS certificate that is none": func(ctx context.Context, c *Client) error { return c.SetTLSCertificate(ctx, []byte(somePEM)) },
		"a CA that is none":              func(ctx context.Context, c *Client) error { return c.SetClusterCA(ctx, nil) },
		"a subject without a name": func(ctx context.Context, c *Client) error {
			_, err := c.TLSCSR(ctx, DistinguishedName{Country: "DE"})
			return err
		},
		"a member without URLs": func(ctx context.Context, c *Client) error {
			_, err := c.AddMember(ctx, nil)
			return err
		},
		"a network without addresses": func(ctx context.Context, c *Client) error { return c.SetNetwork(ctx, Network{}) },
		"a network with an IPv6 address of IPv4": func(ctx context.Context, c *Client) error {
			four := netip.IPv4Unspecified()
			return c.SetNetwork(ctx, Network{four, four, four, &IPv6{Prefix: netip.PrefixFrom(four, 24)}})
		},
		"a log server of IPv6": func(ctx context.Context, c *Client) error {
			return c.SetLogging(ctx, Logging{Address: netip.IPv6Unspecified(), Level: LogInfo})
		},
		"no backup": func(ctx context.Context, c *Client) error { return c.Restore(ctx, Restoration{Passphrase: passphrase}) },
		"an empty backup": func(ctx context.Context, c *Client) error {
			return c.Restore(ctx, Restoration{Backup: strings.NewReader(""), Passphrase: passphrase})
		},
	} {
		t.Run(sentence, func(t *testing.T) {
			client, node := startNode(t, replying(204, ""))
			err := call(t.Context(), client)
			if !errors.Is(err, ErrRequest) {
				t.Errorf("error = %v, want ErrRequest", err)
			}
			for _, secret := range []string{string(passphrase), "0123456789", "short", "zzz"} {
				if err != nil && strings.Contains(err.Error(), secret) {
					t.Errorf("error = %v, which tells a secret", err)
				}
			}
			if len(node.requests) != 0 {
				t.Errorf("the node saw %+v", node.requests)
			}
		})
	}
}

func (c *Client) addUser(ctx context.Context, id string, passphrase []byte) error {
	_, err := c.AddUser(ctx, id, NewUser{"x", RoleOperator, passphrase})
	return err
}

// What a node has for itself is never asked of whichever node comes first.
func TestCallsForOneNodeWantOne(t *testing.T) {
	shared := map[string]bool{
		"Info": true, "SystemInfo": true, "Metrics": true, "Backup": true, "SetBackupPassphrase": true, "ClusterCA": true,
		"SetClusterCA": true, "Members": true, "AddMember": true, "SetMemberURLs": true, "RemoveMember": true, "Promote": true,
	}
	for _, e := range endpoints() {
		path := e.want.path
		if strings.HasPrefix(path, "/keys") || strings.HasPrefix(path, "/users") || strings.HasPrefix(path, "/namespaces") ||
			path == "/random" || shared[e.name] {
			continue
		}
		t.Run(e.name, func(t *testing.T) {
			node := &fakeNode{answer: replying(204, "")}
			one, two := httptest.NewServer(node), httptest.NewServer(node)
			t.Cleanup(one.Close)
			t.Cleanup(two.Close)
			client, err := New(Options{URLs: []string{one.URL, two.URL}})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = client.Close() })
			if _, err := e.call(t.Context(), client); !errors.Is(err, ErrManyNodes) {
				t.Errorf("error = %v, want ErrManyNodes", err)
			}
			if n := len(node.seen()); n != 0 {
				t.Errorf("the nodes saw %d requests", n)
			}
		})
	}
}

// A container is known by its device id, once it refused what an appliance does.
func TestContainerCannotDoWhatAnApplianceDoes(t *testing.T) {
	zero := netip.IPv4Unspecified()
	calls := map[string]func(context.Context, *Client) error{
		"Network": func(ctx context.Context, c *Client) error {
			_, err := c.Network(ctx)
			return err
		},
		"SetNetwork":   func(ctx context.Context, c *Client) error { return c.SetNetwork(ctx, Network{zero, zero, zero, nil}) },
		"Reboot":       func(ctx context.Context, c *Client) error { return c.Reboot(ctx) },
		"Shutdown":     func(ctx context.Context, c *Client) error { return c.Shutdown(ctx) },
		"FactoryReset": func(ctx context.Context, c *Client) error { return c.FactoryReset(ctx) },
		"Update": func(ctx context.Context, c *Client) error {
			_, err := c.Update(ctx, []byte("an image"))
			return err
		},
		"CommitUpdate": func(ctx context.Context, c *Client) error { return c.CommitUpdate(ctx) },
		"CancelUpdate": func(ctx context.Context, c *Client) error { return c.CancelUpdate(ctx) },
	}
	for name, call := range calls {
		for _, status := range []int{404, 405, 500, 501, 503} {
			for device, container := range map[string]bool{containerID: true, "9ZVNM2MNWP": false} {
				t.Run(fmt.Sprintf("%s, %d, %s", name, status, device), func(t *testing.T) {
					client, _ := startNode(t, func(w http.ResponseWriter, r *http.Request) {
						if r.URL.Path == apiPath+"/system/info" {
							replying(200, fmt.Sprintf(`{"deviceId":%q}`, device))(w, r)
							return
						}
						w.WriteHeader(status)
					})
					err := call(t.Context(), client)
					if errors.Is(err, ErrContainer) != container || container && !errors.Is(err, hsm.ErrUnsupported) {
						t.Errorf("error = %v, container: %v", err, container)
					}
					var no *Error
					if !container && !errors.As(err, &no) {
						t.Errorf("error = %v, want an *Error", err)
					}
				})
			}
		}
	}
}

func TestImportedKeysAreTakenApart(t *testing.T) {
	ecdsaKey := func(curve elliptic.Curve) *ecdsa.PrivateKey {
		size := (curve.Params().BitSize + 7) / 8
		octets := make([]byte, size)
		octets[size-1] = 7 // short without its leading zeros
		key, err := ecdsa.ParseRawPrivateKey(curve, octets)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	edKey := ed25519.NewKeyFromSeed(bytes.Repeat([]byte{5}, 32))
	for sentence, want := range map[string]struct {
		private any
		kind    KeyType
		data    []byte
	}{
		"P-256":   {ecdsaKey(elliptic.P256()), TypeECP256, append(make([]byte, 31), 7)},
		"P-384":   {ecdsaKey(elliptic.P384()), TypeECP384, append(make([]byte, 47), 7)},
		"P-521":   {ecdsaKey(elliptic.P521()), TypeECP521, append(make([]byte, 65), 7)},
		"Ed25519": {edKey, TypeCurve25519, edKey.Seed()},
		"secret":  {Secret("0123456789abcdef"), TypeGeneric, []byte("0123456789abcdef")},
	} {
		t.Run(sentence, func(t *testing.T) {
			kind, parts, err := privateParts(want.private)
			if err != nil || kind != want.kind || !bytes.Equal(parts.Data, want.data) {
				t.Errorf("privateParts = %q, %x, %v", kind, parts.Data, err)
			}
			parts.wipe()
			if !bytes.Equal(parts.Data, make([]byte, len(parts.Data))) {
				t.Error("the copy was not wiped")
			}
		})
	}
	for sentence, private := range map[string]any{
		"an RSA key of three primes": &rsa.PrivateKey{Primes: []*big.Int{big.NewInt(3), big.NewInt(5), big.NewInt(7)}},
		"half of an Ed25519 key":     edKey[:32],
		"an empty secret":            Secret{},
		"P-224":                      ecdsaKey(elliptic.P224()),
		"a public key":               &rsa.PublicKey{},
		"nothing":                    nil,
	} {
		t.Run(sentence, func(t *testing.T) {
			if kind, _, err := privateParts(private); err == nil {
				t.Errorf("privateParts = %q", kind)
			}
		})
	}
}
