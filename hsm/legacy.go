package hsm

import "context"

// LegacyDecrypter is an RSA key that opens what an older program encrypted with PKCS#1 v1.5. It exists for taking such
// values over, once, and for nothing else: whoever can have blocks of their choice decrypted and learns which of them
// failed can have any message of that key decrypted (Bleichenbacher's attack), RSA-OAEP's included. So a caller tells
// nobody which block it was, decrypts few, and never does it for the network.
//
// A key may implement it and still answer [ErrUnsupported]: its token has no mechanism for it.
type LegacyDecrypter interface {
	Key
	// DecryptPKCS1v15 decrypts one RSAES-PKCS1-v1_5 block (RFC 8017, 7.2). The ciphertext is as long as the modulus. It
	// costs one private-key operation. A block that does not decrypt gives [ErrCiphertext]; one that does may still be
	// rubbish, for the padding is no proof. The caller wipes the result.
	DecryptPKCS1v15(ctx context.Context, ciphertext []byte) ([]byte, error)
}

// ForeignObjects is an [ObjectStore] on which other programs may have left data objects: without an application, or with
// one of their own, under labels that repeat, private or not. They are read and deleted, never written.
type ForeignObjects interface {
	// ForeignLabels lists the labels of all data objects, whatever their application and ours among them, sorted, one
	// entry for each object. No value is read.
	ForeignLabels(ctx context.Context) ([]string, error)
	// ReadForeign returns all data objects with a label, in the order of their values; none is [ErrNotFound]. The caller
	// wipes the values.
	ReadForeign(ctx context.Context, label string) ([]ForeignObject, error)
	// DeleteForeign removes every data object that has both this label and this value, and returns nil only when none of
	// them is found any more, independently of whatever cache the deletion went through. None is [ErrNotFound].
	DeleteForeign(ctx context.Context, label string, value []byte) error
}

// ForeignObject is a data object that another program left.
type ForeignObject struct {
	// Application is its CKA_APPLICATION, empty for none. OpenSC makes the label of it where a program gave none.
	Application string
	Value       []byte
}
