package bankvaults

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"
)

// secretDocument is the part of a Kubernetes object that matters here.
type secretDocument struct {
	Metadata struct {
		Name      string `yaml:"name"`
		Namespace string `yaml:"namespace"`
	} `yaml:"metadata"`
	Data       map[string]string `yaml:"data"` // base64
	StringData map[string]string `yaml:"stringData"`
}

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
		if object := document.Content[0]; object.Kind == yaml.ScalarNode && object.Value == "" {
			continue // between two lines of dashes
		}
		if !plain(&document) {
			return nil, fmt.Errorf("%w: it has aliases or tags, which kubectl does not print", ErrInvalid)
		}
		found, err := readDocument(&document, true)
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
func readDocument(object *yaml.Node, outermost bool) ([]Copy, error) {
	var d struct {
		Kind  string      `yaml:"kind"`
		Items []yaml.Node `yaml:"items"`
	}
	// The decoder's own text quotes, here and below.
	if err := object.Decode(&d); err != nil {
		return nil, fmt.Errorf("%w: it is no Secret, and no List of Secrets, or has a key twice", ErrInvalid)
	}
	switch {
	case d.Kind == "Secret":
		var secret secretDocument
		if err := object.Decode(&secret); err != nil {
			return nil, fmt.Errorf("%w: a Secret with something else than texts, or with a key twice", ErrInvalid)
		}
		return secret.copies()
	case outermost && (d.Kind == "List" || d.Kind == "SecretList"):
		var copies []Copy
		for i := range d.Items {
			found, err := readDocument(&d.Items[i], false)
			if err != nil {
				return nil, err
			}
			copies = append(copies, found...)
		}
		return copies, nil
	case !outermost:
		return nil, nil // of another kind, which "kubectl get all" lists as well
	}
	return nil, fmt.Errorf("%w: an object of kind %.40q; a Secret or a List of Secrets is wanted", ErrInvalid, d.Kind)
}

func (d *secretDocument) copies() ([]Copy, error) {
	from := fmt.Sprintf("the Secret %.253s", d.Metadata.Name) // no name of Kubernetes is longer
	if d.Metadata.Namespace != "" {
		from = fmt.Sprintf("the Secret %.253s/%.253s", d.Metadata.Namespace, d.Metadata.Name)
	}
	var copies []Copy
	keep := func(texts map[string]string, decode func(string) ([]byte, error)) error {
		for key, text := range texts {
			name, known := ParseName(key)
			if !known {
				continue
			}
			block, err := decode(text)
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
	if err := keep(d.Data, base64.StdEncoding.DecodeString); err != nil {
		return nil, err
	}
	if err := keep(d.StringData, unwrapText); err != nil {
		return nil, err
	}
	return copies, nil
}
