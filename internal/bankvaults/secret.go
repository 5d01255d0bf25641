package bankvaults

import (
	"bytes"
	"encoding/json"
	"fmt"

	"sigs.k8s.io/yaml"
)

// secretDocument is the part of a Kubernetes object that matters here: a Secret, or a List of them.
type secretDocument struct {
	Kind     string `json:"kind"`
	Metadata struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"metadata"`
	Data       map[string][]byte `json:"data"` // base64
	StringData map[string]string `json:"stringData"`
	Items      []json.RawMessage `json:"items"`
}

// Secret reads what "kubectl get secret -o yaml" (or json) prints: a Secret, a List of them, or several documents. Only
// values under Bank-Vaults' names are kept. Errors: [ErrInvalid], [ErrNothing].
func Secret(text []byte) ([]Copy, error) {
	if len(text) > MaxSecret {
		return nil, fmt.Errorf("%w: a document of %d bytes; %d are read at most", ErrInvalid, len(text), MaxSecret)
	}
	var copies []Copy
	for _, document := range documents(text) {
		object, err := yaml.YAMLToJSONStrict(document)
		if err != nil {
			return nil, fmt.Errorf("%w: it is neither YAML nor JSON, or has a key twice", ErrInvalid) // the parser's own text quotes
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

// documents splits at lines of three dashes. Inside of a document no such line can be.
func documents(text []byte) [][]byte {
	var all [][]byte
	begin := 0
	for rest := 0; rest < len(text); {
		end := len(text)
		if i := bytes.IndexByte(text[rest:], '\n'); i >= 0 {
			end = rest + i + 1
		}
		if line := bytes.TrimRight(text[rest:end], " \r\n"); bytes.Equal(line, []byte("---")) {
			all = append(all, text[begin:rest])
			begin = end
		}
		rest = end
	}
	all = append(all, text[begin:])
	kept := all[:0]
	for _, document := range all {
		if len(bytes.TrimSpace(document)) > 0 {
			kept = append(kept, document)
		}
	}
	return kept
}

// readDocument reads one object. A List holds no Lists.
func readDocument(object []byte, outermost bool) ([]Copy, error) {
	var d secretDocument
	if err := json.Unmarshal(object, &d); err != nil {
		return nil, fmt.Errorf("%w: it is no Secret, and no List of Secrets", ErrInvalid) // the decoder's own text quotes
	}
	switch {
	case d.Kind == "Secret":
		return d.copies()
	case outermost && (d.Kind == "List" || d.Kind == "SecretList"):
		var copies []Copy
		for _, item := range d.Items {
			found, err := readDocument(item, false)
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
	from := "the Secret " + d.Metadata.Name
	if d.Metadata.Namespace != "" {
		from = "the Secret " + d.Metadata.Namespace + "/" + d.Metadata.Name
	}
	var copies []Copy
	keep := func(key string, block []byte) error {
		name, known := ParseName(key)
		if !known {
			return nil
		}
		if len(block) == 0 || len(block) > MaxBlock {
			return fmt.Errorf("%w: %s in %s has %d bytes; an encrypted value has 256 to %d", ErrInvalid, name, from, len(block), MaxBlock)
		}
		copies = append(copies, Copy{Name: name, From: from, Block: block})
		return nil
	}
	for key, block := range d.Data {
		if err := keep(key, block); err != nil {
			return nil, err
		}
	}
	for key, text := range d.StringData {
		if err := keep(key, unwrapText([]byte(text))); err != nil {
			return nil, err
		}
	}
	return copies, nil
}
