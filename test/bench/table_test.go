package bench

import (
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// table is what goes into docs/benchmarks.md.
type table struct {
	speed []string
	other []string
}

func newTable() *table { return &table{} }

func (t *table) add(what, measured, wanted string) {
	t.other = append(t.other, fmt.Sprintf("| %s | %s | %s |", what, measured, wanted))
}

// speeds fills in the first table, and judges it.
func (t *table) speeds(parts []*part) {
	p50 := map[string]time.Duration{}
	rate := map[string]float64{}
	for _, p := range parts {
		p50[p.name] = median(p.all)
		if len(p.rates) > 0 {
			rate[p.name] = median(p.rates)
		}
	}
	wanted := map[string]string{
		"hop":    "p50 ≤ 0.1 ms",
		"wrap":   "p50 ≤ echo + 0.3 ms = " + milliseconds(p50["echo"]+300*time.Microsecond),
		"unwrap": "p50 ≤ raw + echo + 0.5 ms = " + milliseconds(p50["raw"]+p50["echo"]+500*time.Microsecond),
	}
	if rate["raw"] > 0 && rate["echo"] > 0 {
		wanted["unwrap"] += fmt.Sprintf("; 8 clients ≥ %.0f/s", 0.85/(1/rate["raw"]+1/rate["echo"]))
	}
	explained := map[string]string{
		"raw":                  "C_DecryptInit and C_Decrypt in a Go loop",
		"hop":                  "to the module host and back, again and again: one random byte",
		"hop between requests": "the same, when the host has gone to sleep meanwhile",
		"decrypt":              "raw, through the module host, without Vault",
		"echo":                 "a path of the plugin that does nothing (bench build)",
		"transit encrypt":      "Vault's own transit engine, no HSM",
		"transit decrypt":      "the same",
		"wrap":                 "`wrap/:key`: software only",
		"unwrap":               "`unwrap/:key`: one C_Decrypt",
	}
	for _, p := range parts {
		together := ""
		if r, ok := rate[p.name]; ok {
			together = fmt.Sprintf("%.0f/s", r)
		}
		t.speed = append(t.speed, fmt.Sprintf("| %s | %s | %s | %s | %s |",
			p.name, explained[p.name], milliseconds(p50[p.name]), together, wanted[p.name]))
	}
}

// memory uses the site for a while, then looks at its processes.
func (t *table) memory(b *testing.B, how string, site *vaulttest.Site, wanted string) {
	progress("%d operations %s", soak, how)
	wrapped := site.Wrap(b, "bench", "memory")
	client := site.Client(b)
	unwrap := &part{name: "soak", once: func() error {
		_, err := client.Logical().Write("nitrokey/unwrap/bench", vaulttest.Fields{"ciphertext": wrapped})
		return err
	}}
	for range soak / (perPart * clients) {
		unwrap.crowd(b)
	}
	for range soak % (perPart * clients) {
		unwrap.alone(b)
	}
	for _, p := range site.Plugins() {
		t.add("memory of the plugin "+how, megabytes(p.ResidentKiB(b)), wanted)
	}
	for _, p := range site.Hosts() {
		t.add("memory of its module host", megabytes(p.ResidentKiB(b)), "≤ 40 MB")
	}
}

func megabytes(kib int) string { return fmt.Sprintf("%.1f MB", float64(kib)*1024/1e6) }

// The part of docs/benchmarks.md that is written by this package lies between these lines.
const (
	begin = "<!-- written by make bench -->\n"
	end   = "<!-- end -->\n"
)

// publish prints the tables and writes them into the file where one was named.
func (t *table) publish(b *testing.B) {
	text := machine(b) + fmt.Sprintf(`
Medians of %d rounds of %d operations of each kind, taking turns; RSA 2048 with OAEP on SoftHSM; an unseal key of 44 bytes;
clients use TLS and keep their connection.

| | what | p50 | 8 clients | wanted |
| --- | --- | --- | --- | --- |
`, rounds, perPart) + strings.Join(t.speed, "\n") + `

| | measured | wanted |
| --- | --- | --- |
` + strings.Join(t.other, "\n") + "\n"
	fmt.Println(text)
	if *out == "" {
		return
	}
	page, err := os.ReadFile(*out)
	must(b, err)
	before, rest, found := strings.Cut(string(page), begin)
	_, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		b.Fatalf("%s lacks the lines %q and %q", *out, begin, end)
	}
	must(b, os.WriteFile(*out, []byte(before+begin+text+end+after), 0o644))
}

// machine describes where this ran.
func machine(b *testing.B) string {
	info, err := os.ReadFile("/proc/cpuinfo")
	must(b, err)
	model := "unknown processor"
	for line := range strings.Lines(string(info)) {
		if name, value, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
			break
		}
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	must(b, err)
	kernel, _, _ := strings.Cut(string(release), "-") // what follows names somebody's build
	return fmt.Sprintf("Measured %s: %s, %d of its processors, Linux %s, %s.\n",
		time.Now().UTC().Format("2006-01-02"), model, runtime.NumCPU(), strings.TrimSpace(kernel), runtime.Version())
}
