package autounseal

import "testing"

// Lease implements [SealServer].
func (s *serve) Lease(t testing.TB, key, lease string) {
	t.Helper()
	s.Must(t, "key", "configure", key, "--lease", lease)
	s.keepRecord(t, key)
}
