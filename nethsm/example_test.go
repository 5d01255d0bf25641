package nethsm_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// A key is made by an Administrator, anybody can encrypt to its public half, and an Operator has the NetHSM decrypt.
func Example() {
	double, err := nethsmtest.Serve(nethsmtest.Options{Provisioned: true}) // stands in for an appliance
	if err != nil {
		panic(err)
	}
	defer double.Close()

	client, err := nethsm.New(nethsm.Options{URLs: double.URLs(), TLS: nethsm.TLS{CA: double.CA()}})
	if err != nil {
		panic(err)
	}
	defer func() { _ = client.Close() }()
	admin := client.As(nethsm.Credentials{Username: "admin", Password: nethsm.Secret(nethsmtest.AdminPassphrase)})
	operator := client.As(nethsm.Credentials{Username: "operator", Password: nethsm.Secret(nethsmtest.OperatorPassphrase)})

	ctx := context.Background()
	id, err := admin.GenerateKey(ctx, nethsm.NewKey{
		ID: "seal", Type: nethsm.TypeRSA, Length: 2048, Mechanisms: []nethsm.Mechanism{nethsm.RSADecryptionOAEPSHA256},
	})
	if err != nil {
		panic(err)
	}
	key, err := operator.Key(ctx, id)
	if err != nil {
		panic(err)
	}
	public, _ := key.Public.(*rsa.PublicKey)
	ciphertext, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, public, []byte("open sesame"), nil)
	if err != nil {
		panic(err)
	}
	plaintext, err := operator.Decrypt(ctx, id, nethsm.ModeOAEPSHA256, ciphertext, nil)
	if err != nil {
		panic(err)
	}
	fmt.Println(string(plaintext))

	_, err = admin.Decrypt(ctx, id, nethsm.ModeOAEPSHA256, ciphertext, nil)
	fmt.Println(errors.Is(err, hsm.ErrForbidden))
	// Output:
	// open sesame
	// true
}

// Credentials can be printed and logged; what is secret in them is not shown.
func ExampleSecret() {
	fmt.Printf("%+v\n", nethsm.Credentials{Username: "operator", Password: nethsm.Secret("OperatorPassphrase")})
	// Output: {Username:operator Password:[secret]}
}
