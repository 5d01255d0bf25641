package nethsm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"os"
	"reflect"
	"strings"
	"testing"

	"vault-plugin-secrets-nitrokey/hsm"
)

// exchange is one request to a real NetHSM and its answer, as recorded.
type exchange struct {
	Section string
	Request struct {
		Method, Path, Body string
	}
	Response struct {
		Status  int
		Headers map[string]string
		Body    string
	}
}

func recording(t testing.TB) []exchange {
	t.Helper()
	file, err := os.Open("nethsmtest/testdata/nethsm-exchanges.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var out []exchange
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e exchange
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			t.Fatal(err)
		}
		out = append(out, e)
	}
	if lines.Err() != nil || len(out) == 0 {
		t.Fatalf("%d exchanges, %v", len(out), lines.Err())
	}
	return out
}

// replay answers as the NetHSM did.
func (e exchange) replay(w http.ResponseWriter, _ *http.Request) {
	for name, value := range e.Response.Headers {
		w.Header().Set(name, value)
	}
	w.WriteHeader(e.Response.Status)
	_, _ = io.WriteString(w, e.Response.Body)
}

// recorded returns the first success for a method and a path.
func recorded(t testing.TB, method, path string) exchange {
	t.Helper()
	for _, e := range recording(t) {
		if e.Request.Method == method && e.Request.Path == apiPath+path && e.Response.Status < 300 {
			return e
		}
	}
	t.Fatalf("the recording has no good answer to %s %s", method, path)
	panic("unreachable")
}

// The client understands what a real NetHSM said.
func TestRecordedAnswersAreUnderstood(t *testing.T) {
	get, put, post, del := http.MethodGet, http.MethodPut, http.MethodPost, http.MethodDelete
	keys := []string{"ab16fc25cc976efb9fe1", "aes1", "ec1", "ed1", "rsa1"}
	for _, c := range []struct {
		method, path string
		call         func(context.Context, *Client) (any, error)
		want         any
	}{
		{get, "/info", func(ctx context.Context, c *Client) (any, error) {
			return c.Info(ctx)
		}, Info{"Nitrokey GmbH", "NetHSM"}},
		{get, "/health/state", func(ctx context.Context, c *Client) (any, error) {
			return c.State(ctx)
		}, StateUnprovisioned},
		{get, "/health/alive", func(ctx context.Context, c *Client) (any, error) { return nil, c.Alive(ctx) }, nil},
		{get, "/health/ready", func(ctx context.Context, c *Client) (any, error) { return nil, c.Ready(ctx) }, nil},
		{post, "/provision", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.Provision(ctx, Provisioning{UnlockPassphrase: passphrase, AdminPassphrase: passphrase})
		}, nil},
		{post, "/users", func(ctx context.Context, c *Client) (any, error) {
			return c.AddUser(ctx, "", NewUser{"Op", RoleOperator, passphrase})
		}, "df9a8610653aa027ffb5"},
		{put, "/users/operator", func(ctx context.Context, c *Client) (any, error) {
			return c.AddUser(ctx, "operator", NewUser{"Op", RoleOperator, passphrase})
		}, "operator"},
		{
			get, "/users", func(ctx context.Context, c *Client) (any, error) { return c.Users(ctx) },
			[]string{"admin", "df9a8610653aa027ffb5", "operator"},
		},
		{get, "/users/operator", func(ctx context.Context, c *Client) (any, error) {
			return c.User(ctx, "operator")
		}, User{"Op", RoleOperator}},
		{get, "/users/operator/tags", func(ctx context.Context, c *Client) (any, error) {
			return c.UserTags(ctx, "operator")
		}, []string{"t1"}},
		{put, "/users/operator/tags/t1", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.AddUserTag(ctx, "operator", "t1")
		}, nil},
		{post, "/keys/generate", func(ctx context.Context, c *Client) (any, error) {
			return c.GenerateKey(ctx, NewKey{ID: "rsa1", Type: TypeRSA, Length: 2048, Mechanisms: []Mechanism{RSADecryptionRAW}})
		}, "rsa1"},
		{get, "/keys", func(ctx context.Context, c *Client) (any, error) { return c.Keys(ctx, KeyFilter{}) }, keys},
		{put, "/keys/rsa1/label", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.SetKeyLabel(ctx, "rsa1", "new")
		}, nil},
		{post, "/keys/aes1/encrypt", func(ctx context.Context, c *Client) (any, error) {
			ciphertext, iv, err := c.Encrypt(ctx, "aes1", []byte("0123456789abcdef"), nil)
			return [][]byte{ciphertext, iv}, err
		}, [][]byte{b64(t, "XDA+MMybznmmExjlRLJRIQ=="), b64(t, "eiomSRc2K8sko+Hx8WMtqw==")}},
		{post, "/keys/aes1/decrypt", func(ctx context.Context, c *Client) (any, error) {
			return c.Decrypt(ctx, "aes1", ModeAESCBC, make([]byte, 16), make([]byte, 16))
		}, []byte("0123456789abcdef")},
		{post, "/keys/rsa1/decrypt", func(ctx context.Context, c *Client) (any, error) {
			return c.Decrypt(ctx, "rsa1", ModeOAEPSHA256, make([]byte, 256), nil)
		}, b64(t, "7OqrN0/6vNk73Vr011HCpXCjyBDN86iqsLNqka64n9A=")},
		{get, "/keys/rsa1/cert", func(ctx context.Context, c *Client) (any, error) {
			return c.KeyCertificate(ctx, "rsa1")
		}, []byte("arbitrary bytes ????")},
		{del, "/keys/rsa1/cert", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.DeleteKeyCertificate(ctx, "rsa1")
		}, nil},
		{put, "/namespaces/ns1", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.AddNamespace(ctx, "ns1")
		}, nil},
		{get, "/namespaces", func(ctx context.Context, c *Client) (any, error) {
			return c.Namespaces(ctx)
		}, []string{"ns1"}},
		{del, "/namespaces/ns1", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.DeleteNamespace(ctx, "ns1")
		}, nil},
		{del, "/keys/ec1", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.DeleteKey(ctx, "ec1")
		}, nil},
		{post, "/lock", func(ctx context.Context, c *Client) (any, error) { return nil, c.Lock(ctx) }, nil},
		{post, "/unlock", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.Unlock(ctx, passphrase)
		}, nil},
		{post, "/random", func(ctx context.Context, c *Client) (any, error) {
			return c.Random(ctx, 16)
		}, b64(t, "26RCf5RZEpeopYXMLZMuYQ==")},
		{get, "/config/unattended-boot", func(ctx context.Context, c *Client) (any, error) {
			return c.UnattendedBoot(ctx)
		}, false},
		{put, "/config/unattended-boot", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.SetUnattendedBoot(ctx, true)
		}, nil},
		{post, "/system/reboot", func(ctx context.Context, c *Client) (any, error) { return nil, c.Reboot(ctx) }, nil},
		{post, "/system/factory-reset", func(ctx context.Context, c *Client) (any, error) {
			return nil, c.FactoryReset(ctx)
		}, nil},
	} {
		t.Run(c.method+" "+c.path, func(t *testing.T) {
			client, _ := startNode(t, recorded(t, c.method, c.path).replay)
			got, err := c.call(t.Context(), client)
			if err != nil || !reflect.DeepEqual(got, c.want) {
				t.Errorf("got %#v, %v, want %#v", got, err, c.want)
			}
		})
	}
	client, _ := startNode(t, recorded(t, get, "/system/info").replay)
	info, err := client.SystemInfo(t.Context())
	if err != nil || info.SoftwareVersion != "5.0" || info.SoftwareBuild != "4e192fb" || !info.Container() {
		t.Errorf("SystemInfo = %+v, %v", info, err)
	}
	client, _ = startNode(t, recorded(t, get, "/config/logging").replay)
	logging, err := client.Logging(t.Context())
	if err != nil || logging.Address.String() != "0.0.0.0" || logging.Port != 514 || logging.Level != LogInfo {
		t.Errorf("Logging = %+v, %v", logging, err)
	}
	client, _ = startNode(t, recorded(t, get, "/config/tls/public.pem").replay)
	if text, err := client.TLSPublicKey(t.Context()); err != nil || !bytes.HasPrefix(text, []byte("-----BEGIN PUBLIC KEY")) {
		t.Errorf("TLSPublicKey = %q, %v", text, err)
	}
}

// The public key that the client makes of a key's description is the one that the NetHSM gives as PEM.
func TestRecordedRSAKeyIsTheOneOfItsPEM(t *testing.T) {
	client, _ := startNode(t, recorded(t, http.MethodGet, "/keys/rsa1").replay)
	key, err := client.Key(t.Context(), "rsa1")
	if err != nil {
		t.Fatal(err)
	}
	want := Key{
		ID: "rsa1", Type: TypeRSA, Public: key.Public,
		Mechanisms: []Mechanism{RSADecryptionRAW, RSADecryptionPKCS1, RSADecryptionOAEPSHA256, RSASignaturePSSSHA256},
	}
	if !reflect.DeepEqual(key, want) {
		t.Errorf("Key = %+v, want %+v", key, want)
	}
	client, _ = startNode(t, recorded(t, http.MethodGet, "/keys/rsa1/public.pem").replay)
	text, err := client.PublicPEM(t.Context(), "rsa1")
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	public, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if !key.Public.(*rsa.PublicKey).Equal(public) {
		t.Errorf("the PEM has %v, the key %v", public, key.Public)
	}
}

// A real NetHSM's signature verifies under the public key that the client made of its description.
func TestRecordedSignatureVerifies(t *testing.T) {
	client, _ := startNode(t, recorded(t, http.MethodGet, "/keys/ed1").replay)
	key, err := client.Key(t.Context(), "ed1")
	if err != nil {
		t.Fatal(err)
	}
	if key.Label != "my label" || !reflect.DeepEqual(key.Tags, []string{"t1"}) {
		t.Errorf("Key = %+v", key)
	}
	client, _ = startNode(t, recorded(t, http.MethodPost, "/keys/ed1/sign").replay)
	signature, err := client.Sign(t.Context(), "ed1", ModeEdDSA, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	if !ed25519.Verify(key.Public.(ed25519.PublicKey), []byte("hello"), signature) {
		t.Error("the signature does not verify")
	}
}

// Every recorded refusal is an *Error with its status and message, and says what it means.
func TestRecordedRefusalsAreUnderstood(t *testing.T) {
	for _, e := range recording(t) {
		status := e.Response.Status
		if status < 300 || status == http.StatusUnauthorized || status == http.StatusTooManyRequests { // these ask for patience
			continue
		}
		t.Run(e.Request.Method+" "+e.Request.Path+" "+e.Section, func(t *testing.T) {
			client, _ := startNode(t, e.replay)
			_, err := client.do(t.Context(), call{op: "doing it", method: http.MethodPost, path: "/x"})
			var no *Error
			if !errors.As(err, &no) || no.Status != status {
				t.Fatalf("error = %v, want an *Error of %d", err, status)
			}
			if !strings.Contains(e.Response.Body, no.Message) || no.Message == "" && strings.HasPrefix(e.Response.Body, "{") {
				var body struct{ Message string }
				if err := json.Unmarshal([]byte(e.Response.Body), &body); err != nil || body.Message != no.Message {
					t.Errorf("message = %q of %q", no.Message, e.Response.Body)
				}
			}
			want := map[int]error{
				403: hsm.ErrForbidden, 404: hsm.ErrNotFound, 405: hsm.ErrUnsupported, 406: ErrRequest, 409: hsm.ErrExists, 412: ErrState,
				501: hsm.ErrUnsupported,
			}[status]
			switch m := no.Message; {
			case status != http.StatusBadRequest:
			case strings.HasSuffix(m, "exists"):
				want = hsm.ErrExists
			case m == "Decryption failure":
				want = hsm.ErrCiphertext
			case strings.HasPrefix(m, "Key mechanisms"), m == "Generic keys have no public key":
				want = hsm.ErrUnsupported
			default:
				want = ErrRequest
			}
			if !errors.Is(err, want) {
				t.Errorf("error = %v, want %v", err, want)
			}
		})
	}
}
