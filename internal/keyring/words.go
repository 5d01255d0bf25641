package keyring

// Words are how the sentences of a keyring name what people see of it: they reach one by Vault's paths, another by a command.
type Words struct {
	// Home is what holds the records, and what they would be lost with: "this mount".
	Home string
	// Read says how to read the key record of a key: "read keys/prod/backup".
	Read func(key string) string
	// Set says how to set a setting of a key to true, by the name that it has in [Settings]: "set backup_confirmed=true".
	Set func(key, setting string) string
	// Ask says how a request asks for something: "accept_weak_key=true".
	Ask func(what string) string
}

// vaultWords are those of a mount.
var vaultWords = Words{
	Home: "this mount",
	Read: func(key string) string { return "read keys/" + key + "/backup" },
	Set:  func(_, setting string) string { return "set " + setting + "=true" },
	Ask:  func(what string) string { return what + "=true" },
}

// own makes a record this keyring's: it speaks its words and keeps its rule about authentication keys.
func (k *Keyring) own(rec *record) *record {
	rec.sealed, rec.words = k.sealed, &k.words
	return rec
}

// say returns the words for this record.
func (r *record) say() *Words {
	if r.words == nil { // a record that no keyring has yet
		return &vaultWords
	}
	return r.words
}
