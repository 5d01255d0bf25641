package keyring

import (
	"bytes"
	"crypto/ecdh"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/hsm/hsmtest"
	"vault-plugin-secrets-nitrokey/internal/envelope"
)

func TestADamagedRecordIsRefused(t *testing.T) {
	good := string(golden(t, "record.json"))
	kept := string(golden(t, "record-kept.json"))
	leased := string(golden(t, "record-leased.json"))
	for name, change := range map[string]func(string) string{
		"empty":                     func(string) string { return "" },
		"truncated":                 func(s string) string { return s[:len(s)/2] },
		"followed by something":     func(s string) string { return s + "{}" },
		"an unknown member":         func(s string) string { return strings.Replace(s, `{"format"`, `{"extra":1,"format"`, 1) },
		"a later format":            func(s string) string { return strings.Replace(s, `"format":1`, `"format":2`, 1) },
		"the record of another key": func(s string) string { return strings.Replace(s, `"name":"prod"`, `"name":"test"`, 1) },
		"a minimum above the newest": func(s string) string {
			return strings.Replace(s, `min_decryption_version":1`, `min_decryption_version":3`, 1)
		},
		"a minimum of zero": func(s string) string {
			return strings.Replace(s, `min_decryption_version":1`, `min_decryption_version":0`, 1)
		},
		"a version number out of order": func(s string) string { return strings.Replace(s, `"version":2`, `"version":5`, 1) },
		"an algorithm that does not fit": func(s string) string {
			return strings.Replace(s, `"alg":"ECDH-ES+A256KW"`, `"alg":"RSA-OAEP-256"`, 1)
		},
		"a short authentication key": func(s string) string {
			before, after, _ := strings.Cut(s, `"auth_key":"`)
			return before + `"auth_key":"` + after[4:]
		},
		"another kid":                      func(s string) string { return strings.Replace(s, `"kid":"`, `"kid":"A`, 1) },
		"no device":                        func(s string) string { return strings.Replace(s, `"device":"card"`, `"device":""`, 1) },
		"a pending version that is taken":  func(s string) string { return strings.Replace(s, `"version":3,"since"`, `"version":2,"since"`, 1) },
		"a pending key of an unknown kind": func(s string) string { return strings.Replace(s, `rsa-4096`, `rsa-1024`, 1) },
		"more recipients read than there are": func(string) string {
			return strings.Replace(kept, `"recipients":1`, `"recipients":3`, 1)
		},
		"fewer than no recipients read": func(string) string { return strings.Replace(kept, `"recipients":1`, `"recipients":-1`, 1) },
		"a record read without its recipients": func(string) string {
			return strings.Replace(kept, `"recipients":1,`, ``, 1)
		},
		"a lease below the shortest": func(string) string { return strings.Replace(leased, `"lease_seconds":600`, `"lease_seconds":9`, 1) },
		"a lease beyond the longest": func(string) string { return strings.Replace(leased, `"lease_seconds":600`, `"lease_seconds":86401`, 1) },
		"a lease of less than no time": func(string) string {
			return strings.Replace(leased, `"lease_seconds":600`, `"lease_seconds":-9223372036854775808`, 1)
		},
		"a KEK that is none": func(string) string {
			return strings.Replace(leased, `"kek_envelope":{`, `"kek_envelope":null,"x":{`, 1)
		},
		"an authentication key as KEK": func(string) string {
			_, after, _ := strings.Cut(leased, `"auth_envelope":`)
			auth, _, _ := strings.Cut(after, `,"kek_envelope"`)
			_, after, _ = strings.Cut(leased, `"kek_envelope":`)
			kek, _, _ := strings.Cut(after, `,"served_encrypt"`)
			return strings.Replace(leased, kek, auth, 1)
		},
		"the KEK of another version": func(string) string {
			parts := strings.Split(leased, `"kek_envelope":`)
			first, _, _ := strings.Cut(parts[1], `,"served_encrypt"`)
			second, _, _ := strings.Cut(parts[2], `,"served_encrypt"`)
			return strings.Replace(leased, first, second, 1)
		},
		"a KEK for other recipients": func(string) string {
			other, err := envelope.SealKEK("prod", 1, stranger(t), envelope.NewAuthKey(), envelope.NewKEK())
			if err != nil {
				t.Fatal(err)
			}
			_, after, _ := strings.Cut(leased, `"kek_envelope":`)
			kek, _, _ := strings.Cut(after, `,"served_encrypt"`)
			return strings.Replace(leased, kek, string(other.Raw()), 1)
		},
		"no versions and none that is coming": func(string) string { return `{"format":1,"name":"prod","min_decryption_version":1}` },
	} {
		t.Run(name, func(t *testing.T) {
			damaged := change(good)
			if damaged == good || damaged == kept || damaged == leased {
				t.Fatal("the test changed nothing")
			}
			_, err := decodeRecord("prod", []byte(damaged))
			if !errors.Is(err, ErrRecordMalformed) {
				t.Fatalf("got %v, want ErrRecordMalformed", err)
			}
			for _, secret := range []string{"auth_key", `{"format"`} {
				if strings.Contains(err.Error(), secret) {
					t.Errorf("the error quotes the record: %v", err)
				}
			}
		})
	}
}

func TestAPublicKeyIsReadInOneFormOnly(t *testing.T) {
	rec, err := decodeRecord("prod", golden(t, "record.json"))
	if err != nil {
		t.Fatal(err)
	}
	ec, rsaKey := rec.Versions[0].Recipients[0].PublicKey, rec.Versions[1].Recipients[0].PublicKey
	for name, test := range map[string]struct {
		good   jwk
		change func(*jwk)
	}{
		"a padded modulus":                {rsaKey, func(j *jwk) { j.N = "AA" + j.N }},
		"padding characters":              {rsaKey, func(j *jwk) { j.E += "=" }},
		"an even exponent":                {rsaKey, func(j *jwk) { j.E = "Ag" }},
		"exponent one":                    {rsaKey, func(j *jwk) { j.E = "AQ" }},
		"a huge exponent":                 {rsaKey, func(j *jwk) { j.E = "_____w" }},
		"no modulus":                      {rsaKey, func(j *jwk) { j.N = "" }},
		"a short modulus":                 {rsaKey, func(j *jwk) { j.N = j.N[:200] }},
		"members of both kinds":           {rsaKey, func(j *jwk) { j.CRV = "P-256" }},
		"an unknown kind":                 {rsaKey, func(j *jwk) { j.KTY = "oct" }},
		"a point that is not on the line": {ec, func(j *jwk) { j.X = j.Y }},
		"another curve's name":            {ec, func(j *jwk) { j.CRV = "P-384" }},
		"an unknown curve":                {ec, func(j *jwk) { j.CRV = "secp256k1" }},
		"a point without y":               {ec, func(j *jwk) { j.Y = "" }},
		"a point with a modulus":          {ec, func(j *jwk) { j.N = rsaKey.N }},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := test.good.public(); err != nil {
				t.Fatal(err)
			}
			bad := test.good
			test.change(&bad)
			if _, err := bad.public(); !errors.Is(err, ErrRecordMalformed) {
				t.Errorf("got %v, want ErrRecordMalformed", err)
			}
		})
	}
}

// Whatever the parser takes it writes again to the same meaning, and nothing makes it panic.
func FuzzDecodeRecord(f *testing.F) {
	f.Add(golden(f, "record.json"))
	f.Add(golden(f, "record-kept.json"))
	f.Add(golden(f, "record-leased.json"))
	f.Add([]byte(`{"format":1,"name":"prod","min_decryption_version":1,"versions":[]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		rec, err := decodeRecord("prod", raw)
		if err != nil {
			if !errors.Is(err, ErrRecordMalformed) {
				t.Fatalf("an error of another kind: %v", err)
			}
			return
		}
		describe(rec)
		first, err := rec.encode()
		if err != nil {
			if errors.Is(err, ErrTooLarge) {
				return
			}
			t.Fatal(err)
		}
		again, err := decodeRecord("prod", first)
		if err != nil {
			t.Fatalf("what was read does not read again: %v", err)
		}
		second, err := again.encode()
		if err != nil || !bytes.Equal(first, second) {
			t.Fatalf("the record changes each time it is written: %v\n%s\n%s", err, first, second)
		}
	})
}

// stranger is a recipient that no record has.
func stranger(t *testing.T) []envelope.Recipient {
	t.Helper()
	key := hsmtest.NewMemory().AddEC(t, "ec", "01", ecdh.P256())
	kid, err := hsm.Fingerprint(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return []envelope.Recipient{{KID: kid, Algorithm: envelope.ECDHESA256KW, Public: key.Public()}}
}

// A key record is taken only where its SHA-256 is the confirmed one, so the fuzzer confirms whatever it made.
func FuzzParseKeyRecord(f *testing.F) {
	f.Add(golden(f, "keyrecord.json"))
	f.Add(golden(f, "keyrecord-leased.json"))
	f.Add([]byte(`{"type":"nitroseal key record","format":1,"name":"prod","versions":[{"auth_envelope":{}}]}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var r keyRecord
		if json.Unmarshal(raw, &r) != nil {
			return
		}
		var confirmed string
		_, err := parseKeyRecord(RestoreRequest{Record: raw})
		if errors.Is(err, ErrRecordMismatch) { // the answer names the SHA-256 of what was understood
			_, after, _ := strings.Cut(err.Error(), "its SHA-256 is ")
			confirmed = after[:64]
		}
		parsed, err := parseKeyRecord(RestoreRequest{Record: raw, SHA256: confirmed})
		if err != nil {
			if confirmed != "" || !errors.Is(err, ErrRecordMalformed) {
				t.Fatalf("refused although confirmed: %v", err)
			}
			return
		}
		rec := (&Keyring{now: time.Now}).fromKeyRecord(parsed, RestoreRequest{})
		if rec.validate(parsed.Name) != nil {
			return
		}
		if newKeyRecord(rec).SHA256 != confirmed {
			t.Fatal("a restored record has another SHA-256 than the one confirmed")
		}
	})
}
