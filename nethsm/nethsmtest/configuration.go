package nethsmtest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"time"
)

// network and logging are what /config/network and /config/logging hold.
type network struct {
	IPAddress string `json:"ipAddress"`
	Netmask   string `json:"netmask"`
	Gateway   string `json:"gateway"`
	IPv6      *ipv6  `json:"ipv6,omitempty"`
}

type ipv6 struct {
	CIDR    string  `json:"cidr"`
	Gateway *string `json:"gateway"`
}

type logging struct {
	IPAddress string `json:"ipAddress"`
	Port      int    `json:"port"`
	LogLevel  string `json:"logLevel"`
}

var getPut = []string{http.MethodPut, http.MethodGet}

// configurationRoutes are those below /config, all for administrators of the root namespace.
func configurationRoutes() {
	for _, row := range []struct {
		path     string
		allow    []string
		provides string
		get, put func(*exchange) answer
		post     func(*exchange) answer
	}{
		{"config/unlock-passphrase", putOnly, typeJSON, nil, putUnlockPassphrase, nil},
		{"config/unattended-boot", getPut, typeJSON, getUnattendedBoot, putUnattendedBoot, nil},
		{"config/backup-passphrase", putOnly, typeJSON, nil, putBackupPassphrase, nil},
		{"config/network", getPut, typeJSON, getNetwork, putNetwork, nil},
		{"config/logging", getPut, typeJSON, getLogging, putLogging, nil},
		{"config/time", getPut, typeJSON, getTime, putTime, nil},
		{"config/tls/public.pem", getOnly, typePEM, getTLSPublic, nil, nil},
		{"config/tls/cert.pem", getPut, typePEM, getTLSCertificate, putTLSCertificate, nil},
		{"config/tls/csr.pem", postOnly, typePEM, nil, nil, postTLSCSR},
		{"config/tls/generate", postOnly, typeJSON, nil, nil, generateTLSKey},
		{"config/tls/cluster-ca.pem", getPut, typePEM, getClusterCA, putClusterCA, nil},
	} {
		r := resource{
			states: operational, allow: row.allow, forbidden: notRootRole(roleAdministrator), provides: row.provides,
			accepts: []string{row.provides}, get: row.get, put: row.put, post: row.post,
		}
		if row.provides == typePEM && row.get != nil {
			r.etag = tlsTag
		}
		add(row.path, r)
	}
}

func putUnlockPassphrase(x *exchange) answer {
	fresh, current, refused := x.twoPassphrases()
	if refused != nil {
		return *refused
	}
	var l *lockRecord
	x.hsm.store.read(func(*record) { l = x.node.record().Lock })
	domain, err := l.open([]byte(current))
	if err != nil {
		return refuse(http.StatusForbidden, "unlock passphrase is incorrect.")
	}
	sealed, err := sealDomainKey(domain, []byte(fresh), x.hsm.options.RealCosts)
	if err != nil {
		return crash(err.Error())
	}
	return x.configure(func(_ *record, n *nodeRecord) { n.Lock = sealed })
}

// twoPassphrases reads a new and the current passphrase; the current one may be empty.
func (x *exchange) twoPassphrases() (fresh, current string, refused *answer) {
	err := decode("change_passphrase_req", x.body(), text("newPassphrase", &fresh), text("currentPassphrase", &current))
	if err == nil {
		err = validPassphrase("newPassphrase", fresh)
	}
	if err == nil && current != "" {
		err = validPassphrase("currentPassphrase", current)
	}
	if err != nil {
		a := refuse(http.StatusBadRequest, err.Error())
		return "", "", &a
	}
	return fresh, current, nil
}

// configure changes the configuration of the node or of the cluster: 204.
func (x *exchange) configure(change func(*record, *nodeRecord)) answer {
	err := x.hsm.store.update(func(r *record) error {
		change(r, x.node.record())
		return nil
	})
	if err != nil {
		return databaseTrouble("write to")
	}
	return empty(http.StatusNoContent)
}

// configuration is a copy of the node's part.
func (x *exchange) configuration() nodeRecord {
	var n nodeRecord
	x.hsm.store.read(func(*record) { n = *x.node.record() })
	return n
}

func getUnattendedBoot(x *exchange) answer {
	status := "off"
	if x.configuration().UnattendedBoot {
		status = "on"
	}
	return jsonAnswer(struct {
		Status string `json:"status"`
	}{status})
}

func putUnattendedBoot(x *exchange) answer {
	value, err := parseJSON(x.body())
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	members, ok := value.([]member)
	if !ok || len(members) != 1 || members[0].name != "status" {
		return refuse(http.StatusBadRequest,
			"Invalid data for JSON schema: Invalid status data, expected a dictionary with one entry 'status'..")
	}
	status := members[0].value
	if status != "on" && status != "off" {
		return refuse(http.StatusBadRequest, "Invalid data for JSON schema: Invalid status data, expected 'on' or 'off'..")
	}
	return x.configure(func(_ *record, n *nodeRecord) { n.UnattendedBoot = status == "on" })
}

func getNetwork(x *exchange) answer { return jsonAnswer(x.configuration().Network) }

func putNetwork(x *exchange) answer {
	var n network
	var six ipv6
	err := decode("network", x.body(),
		address("ipAddress", &n.IPAddress), address("netmask", &n.Netmask), address("gateway", &n.Gateway),
		optional(object("ipv6", "network_v6", text("cidr", &six.CIDR), optionalText("gateway", &six.Gateway))))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if six.CIDR != "" {
		if _, err := netip.ParsePrefix(six.CIDR); err != nil {
			return refuse(http.StatusBadRequest, "Invalid data for JSON schema: "+err.Error()+".")
		}
		n.IPv6 = &six
	}
	if x.hsm.options.Container {
		return platformTrouble()
	}
	return x.configure(func(_ *record, r *nodeRecord) { r.Network = n })
}

// address is an IPv4 address.
func address(name string, into *string) field {
	return field{name: name, set: func(v any) string {
		s, _ := v.(string)
		at, err := netip.ParseAddr(s)
		if err != nil || !at.Is4() {
			return "expected string for IP"
		}
		*into = s
		return ""
	}}
}

func getLogging(x *exchange) answer { return jsonAnswer(x.configuration().Logging) }

func putLogging(x *exchange) answer {
	var l logging
	err := decode("log", x.body(), address("ipAddress", &l.IPAddress), integer("port", &l.Port),
		choice("logLevel", "log_level", &l.LogLevel, []string{"debug", "info", "warning", "error"}))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	return x.configure(func(_ *record, r *nodeRecord) { r.Logging = l })
}

// timeBody is what /config/time holds.
type timeBody struct {
	Time string `json:"time"`
}

func getTime(x *exchange) answer {
	at := x.hsm.now().Add(x.configuration().TimeOffset)
	return jsonAnswer(timeBody{at.UTC().Format(time.RFC3339)})
}

func putTime(x *exchange) answer {
	var t timeBody
	if err := decode("time_req", x.body(), text("time", &t.Time)); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	at, err := parseTime(t.Time)
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	return x.configure(func(_ *record, n *nodeRecord) { n.TimeOffset = at.Sub(x.hsm.now()) })
}

// ---- TLS ----------------------------------------------------------------------------------------------------------

func tlsTag(x *exchange) string {
	n := x.configuration()
	return etag("tls " + string(n.TLS.Certificate))
}

// tlsPair is the node's certificate and key.
func (x *exchange) tlsPair() (*x509.Certificate, crypto.Signer, error) {
	pair := x.configuration().TLS
	parsed, err := tls.X509KeyPair(pair.Certificate, pair.Key)
	if err != nil {
		return nil, nil, err
	}
	key, ok := parsed.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, nil, errors.New("the TLS key cannot sign")
	}
	return parsed.Leaf, key, nil
}

func getTLSPublic(x *exchange) answer {
	_, key, err := x.tlsPair()
	if err != nil {
		return crash(err.Error())
	}
	return pemOf(key.Public())
}

func getTLSCertificate(x *exchange) answer {
	return answer{status: http.StatusOK, kind: typePEM, body: x.configuration().TLS.Certificate}
}

func putTLSCertificate(x *exchange) answer {
	chain := x.body()
	leaf, err := firstCertificate(chain)
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	pair := x.configuration().TLS
	if _, err := tls.X509KeyPair(chain, pair.Key); err != nil {
		return refuse(http.StatusBadRequest, "public key in certificate does not match private key.")
	}
	var authority []byte
	x.hsm.store.read(func(r *record) { authority = r.ClusterCA })
	if authority != nil && !signedBy(leaf, authority) {
		return refuse(http.StatusPreconditionFailed, "certificate is not signed by the cluster CA")
	}
	return x.useCertificate(&pairRecord{Certificate: chain, Key: pair.Key}, http.StatusCreated)
}

// useCertificate stores a certificate and shows it from the next connection on.
func (x *exchange) useCertificate(pair *pairRecord, status int) answer {
	if a := x.configure(func(_ *record, n *nodeRecord) { n.TLS = pair }); a.status != http.StatusNoContent {
		return a
	}
	if err := x.node.show(pair); err != nil {
		return crash(err.Error())
	}
	x.header.Set("Connection", "close") // so that the next request meets it
	return empty(status)
}

func firstCertificate(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("PEM: no certificate found")
	}
	return x509.ParseCertificate(block.Bytes)
}

func signedBy(leaf *x509.Certificate, authority []byte) bool {
	parent, err := firstCertificate(authority)
	return err == nil && leaf.CheckSignatureFrom(parent) == nil
}

func generateTLSKey(x *exchange) answer {
	var kind string
	var length int
	err := decode("tls_generate_key_req", x.body(),
		choice("type", "key_type", &kind, keyTypes), optional(integer("length", &length)))
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	key, err := tlsKey(kind, length)
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	template := certificate("keyfender", x.hsm.now())
	template.IPAddresses, template.DNSNames = nil, nil
	pair, err := (*authority)(nil).issue(template, key)
	if err != nil {
		return crash(err.Error())
	}
	return x.useCertificate(pair, http.StatusNoContent)
}

func tlsKey(kind string, length int) (crypto.Signer, error) {
	switch {
	case kind == typeRSA && length >= 1024 && length <= 8192:
		return rsa.GenerateKey(rand.Reader, length)
	case kind == typeRSA:
		return nil, errors.New("RSA key length must be between 1024 and 8192.") //nolint:staticcheck // the original's words
	case curves[kind] != nil:
		return ecdsa.GenerateKey(curves[kind], rand.Reader)
	case kind == typeEd25519:
		_, key, err := ed25519.GenerateKey(rand.Reader)
		return key, err
	default:
		return nil, fmt.Errorf("a TLS key cannot have type %s", kind)
	}
}

func getClusterCA(x *exchange) answer {
	var authority []byte
	x.hsm.store.read(func(r *record) { authority = r.ClusterCA })
	if authority == nil {
		return empty(http.StatusNotFound)
	}
	return answer{status: http.StatusOK, kind: typePEM, body: authority}
}

func putClusterCA(x *exchange) answer {
	data := x.body()
	if _, err := firstCertificate(data); err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	leaf, _, err := x.tlsPair()
	if err != nil {
		return crash(err.Error())
	}
	if len(x.hsm.nodes) > 1 {
		return refuse(http.StatusPreconditionFailed, "the cluster is up: its CA cannot change")
	}
	if !signedBy(leaf, data) {
		return refuse(http.StatusPreconditionFailed, "the TLS certificate is not signed by this CA")
	}
	if a := x.configure(func(r *record, _ *nodeRecord) { r.ClusterCA = data }); a.status != http.StatusNoContent {
		return a
	}
	return empty(http.StatusCreated)
}

// ---- signing requests ---------------------------------------------------------------------------------------------

// subject is who a certificate is asked for.
type subject struct {
	pkix.Name

	mail  string
	names []string
}

func (x *exchange) subject() (*subject, error) {
	var common, country, locality, state, organization, unit string
	s := &subject{}
	err := decode("subject_req", x.body(),
		text("commonName", &common),
		optional(text("countryName", &country)),
		optional(text("localityName", &locality)),
		optional(text("stateOrProvinceName", &state)),
		optional(text("organizationName", &organization)),
		optional(text("organizationalUnitName", &unit)),
		optional(text("emailAddress", &s.mail)),
		optional(list("subjectAltNames", "subject_alt_names", &s.names, nil)))
	if err != nil {
		return nil, err
	}
	if common == "" {
		return nil, errors.New("JSON field commonName is empty.") //nolint:staticcheck // the original's words
	}
	s.CommonName = common
	for into, value := range map[*[]string]string{
		&s.Country: country, &s.Locality: locality, &s.Province: state, &s.Organization: organization,
		&s.OrganizationalUnit: unit,
	} {
		if value != "" {
			*into = []string{value}
		}
	}
	return s, nil
}

// request is a PKCS#10 signing request, PEM.
func (s *subject) request(key crypto.Signer) ([]byte, error) {
	template := &x509.CertificateRequest{Subject: s.Name}
	if s.mail != "" {
		template.Subject.ExtraNames = []pkix.AttributeTypeAndValue{{
			Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, Value: s.mail,
		}}
	}
	for _, name := range s.names {
		if ip, err := netip.ParseAddr(name); err == nil {
			template.IPAddresses = append(template.IPAddresses, ip.AsSlice())
		} else {
			template.DNSNames = append(template.DNSNames, name)
		}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(encodePEM("CERTIFICATE REQUEST", der), []byte("\n")), nil
}

func keyCSR(x *exchange) answer {
	k := x.key()
	if k.signer == nil {
		return refuse(http.StatusBadRequest, "Generic keys can't create certificates")
	}
	return x.csr(k.signer)
}

func postTLSCSR(x *exchange) answer {
	_, key, err := x.tlsPair()
	if err != nil {
		return crash(err.Error())
	}
	return x.csr(key)
}

func (x *exchange) csr(key crypto.Signer) answer {
	s, err := x.subject()
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	request, err := s.request(key)
	if err != nil {
		return refuse(http.StatusBadRequest, "creating signing request: "+err.Error())
	}
	return answer{status: http.StatusOK, kind: typePEM, body: request}
}
