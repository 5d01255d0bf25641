package bankvaults

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"
)

// Secret reads what "kubectl get secret -o yaml" (or json) prints: a Secret, a List of them, or several documents. Only
// values under Bank-Vaults' names are kept. Errors: [ErrInvalid], [ErrNothing].
func Secret(text []byte) ([]Copy, error) {
	if len(text) > MaxSecret {
		return nil, fmt.Errorf("%w: a document of %d bytes; %d are read at most", ErrInvalid, len(text), MaxSecret)
	}
	var copies []Copy
	for documents := yaml.NewDecoder(bytes.NewReader(text)); ; {
		var document yaml.Node
		err := documents.Decode(&document)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%w: it is neither YAML nor JSON", ErrInvalid) // the parser's own text quotes
		}
		object := document.Content[0]
		if object.Kind == yaml.ScalarNode && object.Value == "" {
			continue // between two lines of dashes
		}
		if !plain(object) {
			return nil, fmt.Errorf("%w: it has aliases or tags, which kubectl does not print", ErrInvalid)
		}
		found, err := readDocument(object, true)
		if err != nil {
			return nil, err
		}
		copies = append(copies, found...)
	}
	if len(copies) == 0 {
		return nil, fmt.Errorf("%w: no Secret with a key such as vault-unseal-0 or vault-root", ErrNothing)
	}
	if len(copies) > MaxBlocks {
		return nil, fmt.Errorf("%w: %d values; %d are read at most", ErrInvalid, len(copies), MaxBlocks)
	}
	sortCopies(copies)
	return copies, nil
}

// plain tells whether a document is no more than it says: with aliases, a few bytes can be gigabytes.
func plain(node *yaml.Node) bool {
	if node.Kind == yaml.AliasNode || node.Style&yaml.TaggedStyle != 0 {
		return false
	}
	for _, part := range node.Content {
		if !plain(part) {
			return false
		}
	}
	return true
}

// readDocument reads one object. A List holds no Lists.
func readDocument(node *yaml.Node, outermost bool) ([]Copy, error) {
	object, ok := members(node)
	if !ok {
		return nil, fmt.Errorf("%w: it is no Secret, and no List of Secrets, or has a key twice", ErrInvalid)
	}
	switch kind := object.text("kind"); {
	case kind == "Secret":
		return readSecret(object)
	case outermost && (kind == "List" || kind == "SecretList"):
		items := object["items"]
		if items == nil {
			return nil, nil
		}
		var copies []Copy
		for _, item := range items.Content {
			found, err := readDocument(item, false)
			if err != nil {
				return nil, err
			}
			copies = append(copies, found...)
		}
		return copies, nil
	case !outermost:
		return nil, nil // of another kind, which "kubectl get all" lists as well
	default:
		return nil, fmt.Errorf("%w: an object of kind %.40q; a Secret or a List of Secrets is wanted", ErrInvalid, kind)
	}
}

// mapping is one of YAML, by its keys.
type mapping map[string]*yaml.Node

// members reads a mapping; ok is false for what is none, or has a key twice. The parser's own decoder would take hours for a key
// that comes very often.
func members(node *yaml.Node) (m mapping, ok bool) {
	if node.Kind != yaml.MappingNode {
		return nil, false
	}
	m = make(mapping, len(node.Content)/2)
	for i := 0; i+1 < len(node.Content); i += 2 {
		key := node.Content[i].Value // empty for what is no text
		if m[key] != nil {
			return nil, false
		}
		m[key] = node.Content[i+1]
	}
	return m, true
}

// text is a value, empty for what is no text.
func (m mapping) text(key string) string {
	if m[key] == nil {
		return ""
	}
	return m[key].Value
}

// part is a mapping in it, empty where there is none.
func (m mapping) part(key string) (_ mapping, ok bool) {
	if m[key] == nil || m[key].Kind == yaml.ScalarNode && m[key].Value == "" {
		return nil, true
	}
	return members(m[key])
}

func readSecret(secret mapping) ([]Copy, error) {
	metadata, ok := secret.part("metadata")
	data, okData := secret.part("data") // base64
	stringData, okStrings := secret.part("stringData")
	if !ok || !okData || !okStrings {
		return nil, fmt.Errorf("%w: a Secret with something else than names and values, or with a key twice", ErrInvalid)
	}
	from := fmt.Sprintf("the Secret %.253s", metadata.text("name")) // no name of Kubernetes is longer
	if namespace := metadata.text("namespace"); namespace != "" {
		from = fmt.Sprintf("the Secret %.253s/%.253s", namespace, metadata.text("name"))
	}
	var copies []Copy
	keep := func(values mapping, decode func(string) ([]byte, error)) error {
		for key := range values {
			name, known := ParseName(key)
			if !known {
				continue
			}
			block, err := decode(values.text(key))
			if err != nil {
				return fmt.Errorf("%w: %s in %s is no base64", ErrInvalid, name, from) // the decoder's own text quotes
			}
			if len(block) == 0 || len(block) > MaxBlock {
				return fmt.Errorf("%w: %s in %s has %d bytes; an encrypted value has 256 to %d", ErrInvalid, name, from, len(block), MaxBlock)
			}
			copies = append(copies, Copy{Name: name, From: from, Block: block})
		}
		return nil
	}
	if err := keep(data, base64.StdEncoding.DecodeString); err != nil {
		return nil, err
	}
	if err := keep(stringData, unwrapText); err != nil {
		return nil, err
	}
	return copies, nil
}
