package daemon

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"sigs.k8s.io/yaml"

	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

const deployDir = "../../deploy"

// families returns every metric that the daemon has, with its labels, by the names of its samples.
func families(t *testing.T) map[string][]string {
	t.Helper()
	y := newYard()
	a := y.cluster("a", 1)
	y.seal(a.Nodes...)
	y.set(func() { y.nodes[a.Nodes[0]].CertificateEnds = time.Now().Add(time.Hour) })
	m := newMetrics()
	hooks := newHooks(m)
	site := full(t, y, hooks, a)
	defer func() { must(t, site.Close()) }()
	c := newCrew(site, newLanes(), hooks, slog.New(slog.DiscardHandler), nil, nil)
	<-c.looked
	eventually(t, func() bool { // everything was asked once
		_, store := m.lastOfStore("local")
		known := true
		for _, d := range c.devices {
			_, asked := d.State()
			known = known && asked
		}
		return store && known && len(y.sealed()) == 0
	})
	c.end()
	hooks.DeviceOperation("stick", "decrypt", time.Second, nil)
	m.registry.MustRegister(&collector{version: "1", crew: func() *crew { return c }, hooks: hooks})
	gathered, err := m.registry.Gather()
	must(t, err)
	known := map[string][]string{}
	for _, family := range gathered {
		var labels []string
		for _, pair := range family.GetMetric()[0].GetLabel() {
			labels = append(labels, pair.GetName())
		}
		for _, name := range names(family) {
			known[name] = labels
		}
	}
	return known
}

var (
	metricName = regexp.MustCompile(`\b(?:nitroseal|process)_[a-z0-9_]+\b`)
	selection  = regexp.MustCompile(`\b((?:nitroseal|process)_[a-z0-9_]+)\{([^}]*)\}`)
	matcher    = regexp.MustCompile(`([a-z_]+)\s*(?:=~|!~|!=|=)`)
	grouping   = regexp.MustCompile(`\bby \(([^)]*)\)`)
	legend     = regexp.MustCompile(`\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}`)
)

// checkExpression complains about metrics and labels that there are not.
func checkExpression(t *testing.T, known map[string][]string, where, expr string) (labels []string) {
	t.Helper()
	used := metricName.FindAllString(expr, -1)
	if len(used) == 0 {
		t.Errorf("%s: no metric of ours in %q", where, expr)
	}
	for _, name := range used {
		if _, ok := known[name]; !ok {
			t.Errorf("%s: there is no metric %s", where, name)
		}
		labels = append(labels, known[name]...)
		if strings.HasSuffix(name, "_bucket") {
			labels = append(labels, "le")
		}
	}
	for _, found := range selection.FindAllStringSubmatch(expr, -1) {
		for _, label := range matcher.FindAllStringSubmatch(found[2], -1) {
			if !slices.Contains(known[found[1]], label[1]) {
				t.Errorf("%s: %s has no label %s", where, found[1], label[1])
			}
		}
	}
	for _, found := range grouping.FindAllStringSubmatch(expr, -1) {
		for label := range strings.SplitSeq(found[1], ",") {
			if !slices.Contains(labels, strings.TrimSpace(label)) {
				t.Errorf("%s: no label %s to group by", where, label)
			}
		}
	}
	for _, pair := range []string{"()", "{}", "[]"} {
		if strings.Count(expr, pair[:1]) != strings.Count(expr, pair[1:]) {
			t.Errorf("%s: %q does not close what it opens", where, expr)
		}
	}
	return labels
}

func TestTheDashboardUsesMetricsThatThereAre(t *testing.T) {
	known := families(t)
	text, err := os.ReadFile(filepath.Join(deployDir, "grafana", "nitroseal.json"))
	must(t, err)
	var dashboard struct {
		Panels []struct {
			ID      int
			Title   string
			Type    string
			Targets []struct{ Expr, LegendFormat string }
		}
		Templating struct {
			List []struct{ Name, Definition string }
		}
	}
	must(t, json.Unmarshal(text, &dashboard))
	shown := map[string]bool{}
	ids := map[int]bool{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the id %d", p.ID)
		}
		ids[p.ID] = true
		if p.Type != "row" && len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			labels := checkExpression(t, known, p.Title, target.Expr)
			for _, used := range legend.FindAllStringSubmatch(target.LegendFormat, -1) {
				if used[1] != "instance" && !slices.Contains(labels, used[1]) {
					t.Errorf("panel %q: no label %s for the legend", p.Title, used[1])
				}
			}
			for _, name := range metricName.FindAllString(target.Expr, -1) {
				shown[name] = true
			}
		}
	}
	for _, variable := range dashboard.Templating.List {
		for _, name := range metricName.FindAllString(variable.Definition, -1) {
			if _, ok := known[name]; !ok {
				t.Errorf("variable %s: there is no metric %s", variable.Name, name)
			}
		}
	}
	if len(shown) < 15 {
		t.Errorf("only %d metrics are shown", len(shown))
	}
}

func TestTheAlertsUseMetricsThatThereAre(t *testing.T) {
	known := families(t)
	text, err := os.ReadFile(filepath.Join(deployDir, "grafana", "nitroseal-alerts.yaml"))
	must(t, err)
	var rules struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name   string            `json:"name"`
			Labels map[string]string `json:"labels"`
		} `json:"metadata"`
		Spec struct {
			Groups []struct {
				Name  string `json:"name"`
				Rules []struct {
					Alert       string            `json:"alert"`
					Expr        string            `json:"expr"`
					For         string            `json:"for"`
					Labels      map[string]string `json:"labels"`
					Annotations map[string]string `json:"annotations"`
				} `json:"rules"`
			} `json:"groups"`
		} `json:"spec"`
	}
	must(t, yaml.UnmarshalStrict(text, &rules))
	if rules.Kind != "PrometheusRule" || rules.APIVersion != "monitoring.coreos.com/v1" || len(rules.Spec.Groups) != 1 {
		t.Errorf("%s %s with %d groups", rules.APIVersion, rules.Kind, len(rules.Spec.Groups))
	}
	seen := map[string]bool{}
	for _, rule := range rules.Spec.Groups[0].Rules {
		if seen[rule.Alert] {
			t.Errorf("two alerts are called %s", rule.Alert)
		}
		seen[rule.Alert] = true
		labels := checkExpression(t, known, rule.Alert, rule.Expr)
		if rule.Annotations["summary"] == "" || !slices.Contains([]string{"critical", "warning"}, rule.Labels["severity"]) {
			t.Errorf("%s: severity %q, summary %q", rule.Alert, rule.Labels["severity"], rule.Annotations["summary"])
		}
		if rule.For != "" {
			if _, err := time.ParseDuration(rule.For); err != nil {
				t.Errorf("%s: %v", rule.Alert, err)
			}
		}
		for _, annotation := range rule.Annotations {
			for _, used := range legend.FindAllStringSubmatch(annotation, -1) {
				if !slices.Contains(labels, used[1]) {
					t.Errorf("%s: no label %s", rule.Alert, used[1])
				}
			}
		}
	}
	for _, a := range alarms {
		if !strings.Contains(clusterAlarm.String(), string(a)) {
			t.Errorf("the help of the alarms does not explain %s", a)
		}
	}
	if alarmOf(cluster.ErrForeignCluster) != "foreign_cluster" || !strings.Contains(string(text), `alarm="foreign_cluster"`) {
		t.Error("the worst alarm goes by another name")
	}
}

func TestThePagesNameMetricsThatThereAre(t *testing.T) {
	known := families(t)
	pages, err := filepath.Glob(filepath.Join("..", "..", "docs", "*.md"))
	must(t, err)
	pages = append(pages, filepath.Join(deployDir, "grafana", "README.md"), filepath.Join(deployDir, "systemd", "README.md"))
	for _, page := range pages {
		text, err := os.ReadFile(page)
		must(t, err)
		for _, name := range regexp.MustCompile(`nitroseal_[a-z0-9_]*[a-z0-9]\b`).FindAllString(string(text), -1) {
			if strings.HasPrefix(name, "nitroseal_serve_") { // of the seal server, which is compared elsewhere
				continue
			}
			_, one := known[name]
			_, several := known[name+"_count"]
			if !one && !several {
				t.Errorf("%s: there is no metric %s", filepath.Base(page), name)
			}
		}
	}
}

func TestTheUnitIsOneThatSystemdTakes(t *testing.T) {
	units := filepath.Join(deployDir, "systemd")
	text, err := os.ReadFile(filepath.Join(units, "nitroseal.service"))
	must(t, err)
	older, err := os.ReadFile(filepath.Join(units, "nitroseal.service.d", "before-253.conf"))
	must(t, err)
	for _, want := range []string{
		"Type=notify-reload", "WatchdogSec=", "LoadCredentialEncrypted=pin:", "StateDirectory=nitroseal", "NoNewPrivileges=yes",
		"ProtectSystem=strict", "CapabilityBoundingSet=\n", "LimitCORE=0", "User=nitroseal",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the unit has no %s", want)
		}
	}
	checkUnit(t, string(text))
	checkUnit(t, string(older))

	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed: the unit was parsed only")
	}
	told, err := exec.CommandContext(t.Context(), analyze, "--version").Output()
	must(t, err)
	version := 0
	if _, err := fmt.Sscanf(string(told), "systemd %d", &version); err != nil {
		t.Fatalf("which version is %q?", told)
	}
	dir := t.TempDir()
	self, err := os.Executable() // systemd wants the program to be there
	must(t, err)
	unit := strings.ReplaceAll(string(text), "/usr/bin/nitroseal", self)
	must(t, os.WriteFile(filepath.Join(dir, "nitroseal.service"), []byte(unit), 0o644))
	if version < 253 {
		must(t, os.Mkdir(filepath.Join(dir, "nitroseal.service.d"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, "nitroseal.service.d", "before-253.conf"), older, 0o644))
	}
	verify := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", "--recursive-errors=no", filepath.Join(dir, "nitroseal.service"))
	verify.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":", "SYSTEMD_LOG_COLOR=0")
	said, err := verify.CombinedOutput()
	var complaints []string
	for line := range strings.Lines(string(said)) {
		line = strings.TrimSpace(line)
		foreign := !strings.Contains(line, "nitroseal") // other units of the machine
		known := version < 253 && strings.Contains(line, "notify-reload")
		if line != "" && !foreign && !known {
			complaints = append(complaints, line)
		}
	}
	if complaints != nil {
		t.Errorf("systemd %d says:\n%s\n(%v)", version, strings.Join(complaints, "\n"), err)
	}
}

// checkUnit reads a unit as systemd does, roughly, and complains about settings that are none of a service.
func checkUnit(t *testing.T, text string) {
	t.Helper()
	section := ""
	assignment := regexp.MustCompile(`^([A-Z][A-Za-z0-9]+)=(.*)$`)
	for i, line := range strings.Split(text, "\n") {
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "["):
			section = line
			if !slices.Contains([]string{"[Unit]", "[Service]", "[Install]"}, section) {
				t.Errorf("line %d: section %s", i+1, section)
			}
		case section == "" || !assignment.MatchString(line):
			t.Errorf("line %d: %q", i+1, line)
		case strings.HasSuffix(strings.SplitN(line, "=", 2)[0], "Sec"):
			if _, err := strconv.Atoi(strings.SplitN(line, "=", 2)[1]); err != nil {
				t.Errorf("line %d: %q is no number of seconds", i+1, line)
			}
		}
	}
}
