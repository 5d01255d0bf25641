package server

import (
	"fmt"
	"hash/fnv"
	"os"
	"strings"
)

// recordFiles is how the names of records begin in the folder of a file store.
const recordFiles = "keys+"

// fingerprint is a number that changes whenever a record in the folder does. A folder that cannot be read has one too: then nothing
// is known to have changed.
func fingerprint(folder string) (uint64, error) {
	entries, err := os.ReadDir(folder) // sorted
	if err != nil {
		return 0, fmt.Errorf("looking for changed records: %w", err)
	}
	hash := fnv.New64a()
	for _, entry := range entries {
		if !strings.HasPrefix(entry.Name(), recordFiles) {
			continue
		}
		info, err := entry.Info()
		if err != nil {
			continue // gone meanwhile, which the next look sees
		}
		_, _ = fmt.Fprintf(hash, "%s %d %d;", entry.Name(), info.Size(), info.ModTime().UnixNano()) // a hash does not fail
	}
	return hash.Sum64(), nil
}
