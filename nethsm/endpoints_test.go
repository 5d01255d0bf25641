package nethsm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rsa"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net/http"
	"net/netip"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
)

// endpoint is one method of the client, as a node sees it.
type endpoint struct {
	name   string
	call   func(context.Context, *Client) (any, error)
	want   request // method and path; what the body and its type should be; length and authorization follow from them
	public bool
	// changes is true where the method changes something on the NetHSM.
	changes bool
	status  int // of the answer; 0: 200 with, 204 without a body
	answer  string
	result  any
}

func done(err error) (any, error) { return nil, err }

var (
	someTime      = time.Date(2026, 11, 22, 1, 3, 15, 999, time.FixedZone("", 3600))
	somePEM       = string(pem.EncodeToMemory(&pem.Block{Type: pemPublicKey, Bytes: []byte("key")}))
	someCert      = string(pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: []byte("certificate")}))
	someCSR       = string(pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: []byte("request")}))
	passphrase    = []byte("Pass \"phrase\" Ü")
	passphraseOut = `"Pass \"phrase\" Ü"`
)

func endpoints() []endpoint {
	const (
		get, put, post, del = http.MethodGet, http.MethodPut, http.MethodPost, http.MethodDelete
		octets              = "application/octet-stream"
	)
	asked := func(method, path string) request { return request{method: method, path: path} }
	sent := func(method, path, body string) request {
		return request{method: method, path: path, body: body, contentType: "application/json"}
	}
	ctxOf := func(call func(context.Context, *Client) error) func(context.Context, *Client) (any, error) {
		return func(ctx context.Context, c *Client) (any, error) { return done(call(ctx, c)) }
	}
	errorOf := func(call func(*Client, context.Context) error) func(context.Context, *Client) (any, error) {
		return func(ctx context.Context, c *Client) (any, error) { return done(call(c, ctx)) }
	}
	valueOf := func(call any) func(context.Context, *Client) (any, error) {
		return func(ctx context.Context, c *Client) (any, error) {
			out := reflect.ValueOf(call).Call([]reflect.Value{reflect.ValueOf(c), reflect.ValueOf(ctx)})
			err, _ := out[1].Interface().(error)
			return out[0].Interface(), err
		}
	}
	gateway := netip.MustParseAddr("fc00::1")
	network := Network{
		Address: netip.MustParseAddr("192.168.1.1"), Netmask: netip.MustParseAddr("255.255.255.0"),
		Gateway: netip.MustParseAddr("0.0.0.0"), IPv6: &IPv6{Prefix: netip.MustParsePrefix("fc00:22:1::2/48"), Gateway: &gateway},
	}
	const networkJSON = `{"ipAddress":"192.168.1.1","netmask":"255.255.255.0","gateway":"0.0.0.0",` +
		`"ipv6":{"cidr":"fc00:22:1::2/48","gateway":"fc00::1"}}`
	logging := Logging{Address: netip.MustParseAddr("10.0.0.1"), Port: 514, Level: LogInfo}
	const loggingJSON = `{"ipAddress":"10.0.0.1","port":514,"logLevel":"info"}`
	mechanisms := []Mechanism{RSADecryptionOAEPSHA256}
	return []endpoint{
		{
			name: "Info", call: valueOf((*Client).Info), want: asked(get, "/info"), public: true,
			answer: `{"vendor":"Nitrokey GmbH","product":"NetHSM","new":1}`, result: Info{"Nitrokey GmbH", "NetHSM"},
		},
		{
			name: "State", call: valueOf((*Client).State), want: asked(get, "/health/state"), public: true,
			answer: `{"state":"Locked"}`, result: StateLocked,
		},
		{
			name: "Alive", call: errorOf((*Client).Alive), want: asked(get, "/health/alive"), public: true, status: 200,
		},
		{
			name: "Ready", call: errorOf((*Client).Ready), want: asked(get, "/health/ready"), public: true, status: 200,
		},
		{
			name: "Diagnose", call: valueOf((*Client).Diagnose), want: asked(get, "/health/diagnose"),
			answer: `{"clusterLogs":[{"level":"warn","msg":"slow"}],"clusterState":{"running":false,"exited":1,"signaled":null},` +
				`"clusterSnapshot":{"hash":4026531840,"revision":7,"totalKey":3,"totalSize":24576,"version":"3.6.0"}}`,
			result: Diagnosis{
				Logs: []LogLine{{"warn", "slow"}}, Database: DatabaseState{Exited: "1"},
				Snapshot: DatabaseSnapshot{"4026531840", 7, 3, 24576, "3.6.0"},
			},
		},
		{
			name: "Provision", changes: true, public: true,
			call: ctxOf(func(ctx context.Context, c *Client) error {
				return c.Provision(ctx, Provisioning{UnlockPassphrase: passphrase, AdminPassphrase: []byte("Administrator"), Time: someTime})
			}),
			want: sent(post, "/provision", `{"unlockPassphrase":`+passphraseOut+
				`,"adminPassphrase":"Administrator","systemTime":"2026-11-22T00:03:15Z"}`),
		},
		{
			name: "Unlock", changes: true, public: true,
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.Unlock(ctx, passphrase) }),
			want: sent(post, "/unlock", `{"passphrase":`+passphraseOut+`}`),
		},
		{name: "Lock", changes: true, call: errorOf((*Client).Lock), want: asked(post, "/lock")},
		{
			name: "Users", call: valueOf((*Client).Users), want: asked(get, "/users"),
			answer: `[{"user":"admin"},{"user":"ns1~op"}]`, result: []string{"admin", "ns1~op"},
		},
		{
			name: "User", want: asked(get, "/users/ns1~op"), answer: `{"realName":"Op","role":"Operator"}`, result: User{"Op", RoleOperator},
			call: func(ctx context.Context, c *Client) (any, error) { return c.User(ctx, "ns1~op") },
		},
		{
			name: "AddUser with an id", changes: true, status: 201, result: "ns1~op",
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.AddUser(ctx, "ns1~op", NewUser{"Op", RoleOperator, passphrase})
			},
			want: sent(put, "/users/ns1~op", `{"realName":"Op","role":"Operator","passphrase":`+passphraseOut+`}`),
		},
		{
			name: "AddUser without an id", changes: true, status: 201, answer: `{"id":"df9a8610653aa027ffb5"}`, result: "df9a8610653aa027ffb5",
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.AddUser(ctx, "", NewUser{"Op", RoleBackup, passphrase})
			},
			want: sent(post, "/users", `{"realName":"Op","role":"Backup","passphrase":`+passphraseOut+`}`),
		},
		{
			name: "AddUser with a namespace alone", changes: true, status: 201, answer: `{"id":"ns1~df9a"}`, result: "ns1~df9a",
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.AddUser(ctx, "ns1~", NewUser{"Op", RoleMetrics, passphrase})
			},
			want: sent(post, "/users/ns1~", `{"realName":"Op","role":"Metrics","passphrase":`+passphraseOut+`}`),
		},
		{
			name: "DeleteUser", changes: true, want: asked(del, "/users/op"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.DeleteUser(ctx, "op") }),
		},
		{
			name: "SetPassphrase", changes: true, want: sent(post, "/users/op/passphrase", `{"passphrase":`+passphraseOut+`}`),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetPassphrase(ctx, "op", passphrase) }),
		},
		{
			name: "UserTags", want: asked(get, "/users/op/tags"), answer: `["berlin","t1"]`, result: []string{"berlin", "t1"},
			call: func(ctx context.Context, c *Client) (any, error) { return c.UserTags(ctx, "op") },
		},
		{
			name: "AddUserTag that was there", changes: true, want: asked(put, "/users/op/tags/t.1"), status: 304,
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.AddUserTag(ctx, "op", "t.1") }),
		},
		{
			name: "DeleteUserTag", changes: true, want: asked(del, "/users/op/tags/t1"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.DeleteUserTag(ctx, "op", "t1") }),
		},
		{
			name: "Namespaces", call: valueOf((*Client).Namespaces), want: asked(get, "/namespaces"),
			answer: `[{"id":"ns1"}]`, result: []string{"ns1"},
		},
		{
			name: "AddNamespace", changes: true, want: asked(put, "/namespaces/ns1"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.AddNamespace(ctx, "ns1") }),
		},
		{
			name: "DeleteNamespace", changes: true, want: asked(del, "/namespaces/ns1"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.DeleteNamespace(ctx, "ns1") }),
		},
		{
			name: "Keys", want: asked(get, "/keys"), answer: `[]`, result: []string{},
			call: func(ctx context.Context, c *Client) (any, error) { return c.Keys(ctx, KeyFilter{}) },
		},
		{
			name: "Keys by all that selects them", want: asked(get, "/keys/pre.*?filter=1&label=a+%26+b"), answer: `[{"id":"pre.1"}]`,
			result: []string{"pre.1"},
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.Keys(ctx, KeyFilter{Prefix: "pre.", Label: "a & b", Usable: true})
			},
		},
		{
			name: "Key", want: asked(get, "/keys/secret"),
			answer: `{"mechanisms":["AES_Decryption_CBC"],"type":"Generic","operations":3,"public":null,"restrictions":{"tags":["t1"]},` +
				`"label":"my label","later":{}}`,
			result: Key{
				ID: "secret", Label: "my label", Type: TypeGeneric, Mechanisms: []Mechanism{AESDecryptionCBC}, Tags: []string{"t1"},
				Operations: 3,
			},
			call: func(ctx context.Context, c *Client) (any, error) { return c.Key(ctx, "secret") },
		},
		{
			name: "GenerateKey", changes: true, status: 201, answer: `{"id":"rsa1"}`, result: "rsa1",
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.GenerateKey(ctx, NewKey{
					ID: "rsa1", Label: "my label", Type: TypeRSA, Length: 2048, Mechanisms: mechanisms, Tags: []string{"t1"},
				})
			},
			want: sent(post, "/keys/generate", `{"mechanisms":["RSA_Decryption_OAEP_SHA256"],"type":"RSA","length":2048,"id":"rsa1",`+
				`"restrictions":{"tags":["t1"]},"label":"my label"}`),
		},
		{
			name: "GenerateKey with as little as possible", changes: true, status: 201, answer: `{"id":"ab16"}`, result: "ab16",
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.GenerateKey(ctx, NewKey{Type: TypeECP256, Mechanisms: []Mechanism{ECDSASignature}})
			},
			want: sent(post, "/keys/generate", `{"mechanisms":["ECDSA_Signature"],"type":"EC_P256"}`),
		},
		{
			name: "ImportKey, RSA", changes: true, result: "rsa1",
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.ImportKey(ctx, ImportedKey{ID: "rsa1", Mechanisms: mechanisms, Private: &rsa.PrivateKey{
					PublicKey: rsa.PublicKey{E: 65537}, Primes: []*big.Int{big.NewInt(257), big.NewInt(251)},
				}})
			},
			want: sent(put, "/keys/rsa1", `{"mechanisms":["RSA_Decryption_OAEP_SHA256"],"type":"RSA",`+
				`"private":{"primeP":"AQE=","primeQ":"+w==","publicExponent":"AQAB"}}`),
		},
		{
			name: "ImportKey, Generic, without an id", changes: true, status: 201, answer: `{"id":"ab16"}`, result: "ab16",
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.ImportKey(ctx, ImportedKey{
					Label: "l", Mechanisms: []Mechanism{AESEncryptionCBC}, Tags: []string{"t1"}, Private: Secret("0123456789abcdef"),
				})
			},
			want: sent(post, "/keys", `{"mechanisms":["AES_Encryption_CBC"],"type":"Generic",`+
				`"private":{"data":"MDEyMzQ1Njc4OWFiY2RlZg=="},"restrictions":{"tags":["t1"]},"label":"l"}`),
		},
		{
			name: "MoveKey", changes: true, want: sent(post, "/keys/a/move", `{"newId":"b"}`), status: 200, answer: `{"id":"b"}`,
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.MoveKey(ctx, "a", "b") }),
		},
		{
			name: "DeleteKey", changes: true, want: asked(del, "/keys/a"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.DeleteKey(ctx, "a") }),
		},
		{
			name: "SetKeyLabel", changes: true, want: sent(put, "/keys/a/label", `{"label":"Grüße"}`),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetKeyLabel(ctx, "a", "Grüße") }),
		},
		{
			name: "DeleteKeyLabel", changes: true, want: asked(del, "/keys/a/label"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.DeleteKeyLabel(ctx, "a") }),
		},
		{
			name: "AddKeyTag that was there", changes: true, want: asked(put, "/keys/a/restrictions/tags/t1"), status: 304,
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.AddKeyTag(ctx, "a", "t1") }),
		},
		{
			name: "DeleteKeyTag", changes: true, want: asked(del, "/keys/a/restrictions/tags/t1"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.DeleteKeyTag(ctx, "a", "t1") }),
		},
		{
			name: "PublicPEM", want: asked(get, "/keys/a/public.pem"), answer: somePEM, result: []byte(somePEM),
			call: func(ctx context.Context, c *Client) (any, error) { return c.PublicPEM(ctx, "a") },
		},
		{
			name: "CSR", answer: someCSR, result: []byte(someCSR),
			want: sent(post, "/keys/a/csr.pem", `{"commonName":"n","countryName":"DE","subjectAltNames":["n","10.0.0.1"]}`),
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.CSR(ctx, "a", DistinguishedName{CommonName: "n", Country: "DE", AltNames: []string{"n", "10.0.0.1"}})
			},
		},
		{
			name: "Decrypt", want: sent(post, "/keys/a/decrypt", `{"mode":"OAEP_SHA256","encrypted":"+/8="}`),
			answer: `{"decrypted":"/+8="}`, result: []byte{0xff, 0xef},
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.Decrypt(ctx, "a", ModeOAEPSHA256, []byte{0xfb, 0xff}, nil)
			},
		},
		{
			name: "Decrypt with an IV to nothing", want: sent(post, "/keys/a/decrypt", `{"mode":"AES_CBC","encrypted":"","iv":"AA=="}`),
			answer: `{"decrypted":""}`, result: []byte{},
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.Decrypt(ctx, "a", ModeAESCBC, nil, []byte{0})
			},
		},
		{
			name: "Sign", want: sent(post, "/keys/a/sign", `{"mode":"EdDSA","message":"aGVsbG8="}`), answer: `{"signature":"AQI="}`,
			result: []byte{1, 2},
			call:   func(ctx context.Context, c *Client) (any, error) { return c.Sign(ctx, "a", ModeEdDSA, []byte("hello")) },
		},
		{
			name: "Encrypt", want: sent(post, "/keys/a/encrypt", `{"mode":"AES_CBC","message":"AQ=="}`),
			answer: `{"encrypted":"Ag==","iv":"Aw=="}`, result: [][]byte{{2}, {3}},
			call: func(ctx context.Context, c *Client) (any, error) {
				ciphertext, iv, err := c.Encrypt(ctx, "a", []byte{1}, nil)
				return [][]byte{ciphertext, iv}, err
			},
		},
		{
			name: "Random", want: sent(post, "/random", `{"length":2}`), answer: `{"random":"AQI="}`, result: []byte{1, 2},
			call: func(ctx context.Context, c *Client) (any, error) { return c.Random(ctx, 2) },
		},
		{
			name: "KeyCertificate", want: asked(get, "/keys/a/cert"), answer: "\x00 any bytes \xff", result: []byte("\x00 any bytes \xff"),
			call: func(ctx context.Context, c *Client) (any, error) { return c.KeyCertificate(ctx, "a") },
		},
		{
			name: "PutKeyCertificate", changes: true, status: 201,
			want: request{method: put, path: "/keys/a/cert", contentType: octets, body: "\x00 any bytes \xff"},
			call: ctxOf(func(ctx context.Context, c *Client) error {
				return c.PutKeyCertificate(ctx, "a", []byte("\x00 any bytes \xff"))
			}),
		},
		{
			name: "PutKeyCertificate of nothing", changes: true, status: 201,
			want: request{method: put, path: "/keys/a/cert", contentType: octets},
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.PutKeyCertificate(ctx, "a", nil) }),
		},
		{
			name: "DeleteKeyCertificate", changes: true, want: asked(del, "/keys/a/cert"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.DeleteKeyCertificate(ctx, "a") }),
		},
		{
			name: "UnattendedBoot", call: valueOf((*Client).UnattendedBoot), want: asked(get, "/config/unattended-boot"),
			answer: `{"status":"on"}`, result: true,
		},
		{
			name: "SetUnattendedBoot", changes: true, want: sent(put, "/config/unattended-boot", `{"status":"off"}`),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetUnattendedBoot(ctx, false) }),
		},
		{
			name: "SetUnlockPassphrase", changes: true,
			want: sent(put, "/config/unlock-passphrase", `{"newPassphrase":`+passphraseOut+`,"currentPassphrase":"old"}`),
			call: ctxOf(func(ctx context.Context, c *Client) error {
				return c.SetUnlockPassphrase(ctx, []byte("old"), passphrase)
			}),
		},
		{
			name: "SetBackupPassphrase", changes: true,
			want: sent(put, "/config/backup-passphrase", `{"newPassphrase":`+passphraseOut+`,"currentPassphrase":""}`),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetBackupPassphrase(ctx, nil, passphrase) }),
		},
		{
			name: "Time", call: valueOf((*Client).Time), want: asked(get, "/config/time"), answer: `{"time":"2026-11-22T01:03:15Z"}`,
			result: time.Date(2026, 11, 22, 1, 3, 15, 0, time.UTC),
		},
		{
			name: "SetTime", changes: true, want: sent(put, "/config/time", `{"time":"2026-11-22T00:03:15Z"}`),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetTime(ctx, someTime) }),
		},
		{
			name: "Logging", call: valueOf((*Client).Logging), want: asked(get, "/config/logging"), answer: loggingJSON, result: logging,
		},
		{
			name: "SetLogging", changes: true, want: sent(put, "/config/logging", loggingJSON),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetLogging(ctx, logging) }),
		},
		{
			name: "Network", call: valueOf((*Client).Network), want: asked(get, "/config/network"), answer: networkJSON, result: network,
		},
		{
			name: "SetNetwork", changes: true, want: sent(put, "/config/network", networkJSON),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetNetwork(ctx, network) }),
		},
		{
			name: "TLSPublicKey", call: valueOf((*Client).TLSPublicKey), want: asked(get, "/config/tls/public.pem"), answer: somePEM,
			result: []byte(somePEM),
		},
		{
			name: "TLSCertificate", call: valueOf((*Client).TLSCertificate), want: asked(get, "/config/tls/cert.pem"),
			answer: someCert + someCert, result: []byte(someCert + someCert),
		},
		{
			name: "SetTLSCertificate", changes: true, status: 201,
			want: request{method: put, path: "/config/tls/cert.pem", body: someCert, contentType: pemContentType},
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetTLSCertificate(ctx, []byte(someCert)) }),
		},
		{
			name: "TLSCSR", want: sent(post, "/config/tls/csr.pem", `{"commonName":"n"}`), answer: someCSR, result: []byte(someCSR),
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.TLSCSR(ctx, DistinguishedName{CommonName: "n"})
			},
		},
		{
			name: "GenerateTLSKey", changes: true, want: sent(post, "/config/tls/generate", `{"type":"RSA","length":2048}`),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.GenerateTLSKey(ctx, TypeRSA, 2048) }),
		},
		{
			name: "ClusterCA", call: valueOf((*Client).ClusterCA), want: asked(get, "/config/tls/cluster-ca.pem"), answer: someCert,
			result: []byte(someCert),
		},
		{
			name: "SetClusterCA", changes: true, status: 201,
			want: request{method: put, path: "/config/tls/cluster-ca.pem", body: someCert, contentType: pemContentType},
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.SetClusterCA(ctx, []byte(someCert)) }),
		},
		{
			name: "SystemInfo", call: valueOf((*Client).SystemInfo), want: asked(get, "/system/info"),
			answer: `{"softwareVersion":"5.0","softwareBuild":"4e192fb","firmwareVersion":"N/A","hardwareVersion":"N/A",` +
				`"deviceId":"0000000000","akPub":{"P256":"x"},"pcr":{"0":"y"}}`,
			result: SystemInfo{"5.0", "4e192fb", "N/A", "N/A", "0000000000", map[string]string{"P256": "x"}, map[string]string{"0": "y"}},
		},
		{
			name: "Backup", want: asked(post, "/system/backup"), answer: "a backup", result: []any{int64(8), "a backup"},
			call: func(ctx context.Context, c *Client) (any, error) {
				var out bytes.Buffer
				n, err := c.Backup(ctx, &out)
				return []any{n, out.String()}, err
			},
		},
		{
			name: "Restore", changes: true,
			want: request{method: post, path: "/system/restore", contentType: "multipart/form-data", body: multipartMark},
			call: ctxOf(func(ctx context.Context, c *Client) error {
				return c.Restore(ctx, Restoration{Backup: strings.NewReader("a backup"), Passphrase: passphrase, Time: someTime})
			}),
		},
		{name: "Reboot", changes: true, call: errorOf((*Client).Reboot), want: asked(post, "/system/reboot")},
		{name: "Shutdown", changes: true, call: errorOf((*Client).Shutdown), want: asked(post, "/system/shutdown")},
		{name: "FactoryReset", changes: true, call: errorOf((*Client).FactoryReset), want: asked(post, "/system/factory-reset")},
		{
			name: "Update", changes: true, answer: `{"releaseNotes":"New."}`, result: "New.",
			want: request{method: post, path: "/system/update", contentType: octets, body: "an image"},
			call: func(ctx context.Context, c *Client) (any, error) { return c.Update(ctx, []byte("an image")) },
		},
		{name: "CommitUpdate", changes: true, call: errorOf((*Client).CommitUpdate), want: asked(post, "/system/commit-update")},
		{name: "CancelUpdate", changes: true, call: errorOf((*Client).CancelUpdate), want: asked(post, "/system/cancel-update")},
		{
			name: "Members", call: valueOf((*Client).Members), want: asked(get, "/cluster/members"),
			answer: `[{"id":"8e9e05c52164694d","name":"9ZVNM2MNWP","urls":["https://172.22.1.2:2380"],"learner":false}]`,
			result: []Member{{ID: "8e9e05c52164694d", Name: "9ZVNM2MNWP", URLs: []string{"https://172.22.1.2:2380"}}},
		},
		{
			name: "AddMember", changes: true, status: 201, want: sent(post, "/cluster/members", `{"urls":["https://172.22.1.3:2380"]}`),
			answer: `{"members":[{"name":"","urls":["https://172.22.1.3:2380"]}],"joinerKit":"eyJi"}`,
			result: JoinKit{[]Peer{{"", []string{"https://172.22.1.3:2380"}}}, Secret("eyJi")},
			call: func(ctx context.Context, c *Client) (any, error) {
				return c.AddMember(ctx, []string{"https://172.22.1.3:2380"})
			},
		},
		{
			name: "SetMemberURLs", changes: true, want: sent(put, "/cluster/members/8e9e", `{"urls":["https://172.22.1.3:2380"]}`),
			call: ctxOf(func(ctx context.Context, c *Client) error {
				return c.SetMemberURLs(ctx, "8e9e", []string{"https://172.22.1.3:2380"})
			}),
		},
		{
			name: "RemoveMember", changes: true, want: asked(del, "/cluster/members/8e9e"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.RemoveMember(ctx, "8e9e") }),
		},
		{
			name: "Promote", changes: true, want: asked(post, "/cluster/members/8e9e/promote"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.Promote(ctx, "8e9e") }),
		},
		{
			name: "Join", changes: true,
			want: sent(post, "/cluster/join", `{"members":[{"name":"","urls":["https://172.22.1.3:2380"]}],"joinerKit":"eyJi",`+
				`"backupPassphrase":`+passphraseOut+`}`),
			call: ctxOf(func(ctx context.Context, c *Client) error {
				return c.Join(ctx, JoinKit{[]Peer{{"", []string{"https://172.22.1.3:2380"}}}, Secret("eyJi")}, passphrase)
			}),
		},
		{
			name: "ForceNewCluster", changes: true, want: asked(post, "/cluster/force-new"),
			call: ctxOf(func(ctx context.Context, c *Client) error { return c.ForceNewCluster(ctx, passphrase) }),
		},
		{
			name: "Metrics", call: valueOf((*Client).Metrics), want: asked(get, "/metrics"),
			answer: `{"keyOperations":"1132412","number":2222,"absent":null}`,
			result: map[string]string{"keyOperations": "1132412", "number": "2222", "absent": ""},
		},
	}
}

// multipartMark stands for the body of Restore, which has a test of its own.
const multipartMark = "(multipart)"

func TestEveryMethodSendsItsRequestAndReadsItsAnswer(t *testing.T) {
	for _, e := range endpoints() {
		t.Run(e.name, func(t *testing.T) {
			status := cmp.Or(e.status, map[bool]int{true: 200, false: 204}[e.answer != ""])
			client, node := startNode(t, replying(status, e.answer))
			result, err := e.call(t.Context(), client)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(result, e.result) {
				t.Errorf("result = %#v, want %#v", result, e.result)
			}
			if len(node.requests) != 1 {
				t.Fatalf("the node saw %d requests, want 1", len(node.requests))
			}
			got, want := node.requests[0], e.want
			want.path = apiPath + want.path
			want.authorized = !e.public
			if want.body == multipartMark {
				got.contentType, _, _ = strings.Cut(got.contentType, ";")
				got.body = want.body
			} else {
				want.length = int64(len(want.body))
			}
			if got.length < 0 || got.length == 0 && want.body != "" {
				t.Errorf("Content-Length = %d", got.length)
			}
			got.length = want.length
			if got != want {
				t.Errorf("the node saw %+v, want %+v", got, want)
			}
		})
	}
}

// endpointFiles are those whose methods are one endpoint each. What is made of several is elsewhere, with its tests.
var endpointFiles = []string{
	"certificate.go", "cluster.go", "configuration.go", "health.go", "info.go", "keyimport.go", "keys.go", "metrics.go",
	"namespaces.go", "operations.go", "provisioning.go", "system.go", "tlsconfiguration.go", "users.go",
}

// EndpointMethods lists the client's methods that are one endpoint each.
func EndpointMethods(t *testing.T) []string {
	t.Helper()
	var methods []string
	for method := range reflect.TypeFor[*Client]().Methods() {
		file, _ := runtime.FuncForPC(method.Func.Pointer()).FileLine(method.Func.Pointer())
		if slices.Contains(endpointFiles, filepath.Base(file)) {
			methods = append(methods, method.Name)
		}
	}
	if len(methods) < 70 {
		t.Fatalf("only %d methods were found: %v", len(methods), methods)
	}
	return methods
}

func TestEveryMethodOfTheClientIsInTheTable(t *testing.T) {
	covered := map[string]bool{}
	for _, e := range endpoints() {
		name, _, _ := strings.Cut(e.name, " ")
		covered[strings.TrimSuffix(name, ",")] = true
	}
	for _, method := range EndpointMethods(t) {
		if !covered[method] {
			t.Errorf("no test asks what %s sends", method)
		}
	}
}

// A change whose answer is lost says so and is not sent again; what changes nothing never says it.
func TestLostAnswerOfAChangeMayHaveHappened(t *testing.T) {
	for _, e := range endpoints() {
		t.Run(e.name, func(t *testing.T) {
			client, node := startNode(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
			_, err := e.call(t.Context(), client)
			if !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("error = %v, want ErrUnavailable", err)
			}
			if errors.Is(err, hsm.ErrMayHaveHappened) != e.changes {
				t.Errorf("error = %v; that it may have happened: want %v", err, e.changes)
			}
			if n := len(node.seen()); e.changes && n != 1 {
				t.Errorf("the node saw %d requests, want 1", n)
			}
		})
	}
}

// Nothing of what a method needs is assumed to be there.
func TestAnswersThatMakeNoSense(t *testing.T) {
	for _, e := range endpoints() {
		if e.result == nil {
			continue
		}
		for sentence, body := range map[string]string{
			"empty": "", "HTML": "<html>", "null": "null", "a number": "1", "cut short": e.answer[:len(e.answer)*2/3],
			"the wrong members": `{"other":"x"}`, "a list of wrong members": `[{"other":"x"}]`,
		} {
			if e.answer == "" || tolerates(e.name, body) {
				continue
			}
			t.Run(e.name+"/"+sentence, func(t *testing.T) {
				client, _ := startNode(t, replying(200, body))
				result, err := e.call(t.Context(), client)
				if !errors.Is(err, hsm.ErrUnavailable) {
					t.Errorf("result = %v, error = %v, want ErrUnavailable", result, err)
				}
				if errors.Is(err, hsm.ErrMayHaveHappened) != e.changes {
					t.Errorf("error = %v; that it may have happened: want %v", err, e.changes)
				}
			})
		}
	}
}

// tolerates lists what is an answer after all: any bytes are a backup and a certificate, and what has no needed members can
// be empty.
func tolerates(name, body string) bool {
	switch name {
	case "Backup", "KeyCertificate":
		return true
	case "Update":
		return body == "null" || body == `{"other":"x"}`
	case "Metrics":
		return body == `{"other":"x"}`
	default:
		return false
	}
}

var _ json.Unmarshaler = (*Key)(nil)
