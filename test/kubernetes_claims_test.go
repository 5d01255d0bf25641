package test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	sigsyaml "sigs.k8s.io/yaml"

	"vault-plugin-secrets-nitrokey/test/vaulttest"
)

// The kubelet is told of sticks by what the device plugin finds: Nitrokey's own vendor and product, as text, one stick a group by
// its serial, and two units of each, for the daemon and for a job beside it.
func TestTheDevicePluginOffersTwoUnitsOfEachStick(t *testing.T) {
	var set appsv1.DaemonSet
	decodeStrictly(t, filepath.Join(manifests, "device-plugin/daemonset.yaml"), &set)
	args := set.Spec.Template.Spec.Containers[0].Args
	valueOf := func(flag string) string {
		i := slices.Index(args, flag)
		if i < 0 || i+1 == len(args) {
			t.Fatalf("no %s in %q", flag, args)
		}
		return args[i+1]
	}
	var device struct {
		Name   string `json:"name"`
		Groups []struct {
			Count int `json:"count"`
			USB   []struct {
				Vendor  string `json:"vendor"`
				Product string `json:"product"`
				Serial  string `json:"serial"`
			} `json:"usb"`
		} `json:"groups"`
	}
	must(t, sigsyaml.UnmarshalStrict([]byte(valueOf("--device")), &device))
	if domain := valueOf("--domain"); domain+"/"+device.Name != "nitrokey.com/hsm" || len(device.Groups) == 0 {
		t.Fatalf("it offers %s/%s of %d groups", domain, device.Name, len(device.Groups))
	}
	for _, group := range device.Groups {
		if group.Count != 2 || len(group.USB) != 1 {
			t.Errorf("a group is %+v", group)
		}
		for _, usb := range group.USB {
			if usb.Vendor != "20a0" || usb.Product != "4230" || usb.Serial == "" {
				t.Errorf("a stick is known by %+v", usb)
			}
		}
	}
}

// What Bank-Vaults' custom resource had is in the table, with attributes that there are here.
func TestEverySettingOfBankVaultsHasItsPlace(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(manifests, "README.md"))
	must(t, err)
	_, table, _ := strings.Cut(string(page), "| `unsealConfig.hsm` | here |")
	table, _, _ = strings.Cut(table, "\n\n")
	rows := map[string]string{}
	for _, row := range regexp.MustCompile(`(?m)^\| (.*?) \| (.*) \|$`).FindAllStringSubmatch(table, -1) {
		rows[row[1]] = row[2]
	}
	example, err := os.ReadFile(filepath.Join(vaulttest.Root(), "internal/config/testdata/nitroseal.hcl"))
	must(t, err)
	for setting, attribute := range map[string]string{
		"modulePath": "modules", "slotId": "slot", "tokenLabel": "token_label", "`pin`": "pin_file", "BANK_VAULTS_HSM_PIN": "pin_env",
		"keyLabel": "key adopt", "daemon": "pcscd",
	} {
		found := false
		for left, right := range rows {
			found = found || strings.Contains(left, setting) && strings.Contains(right, attribute)
		}
		if !found {
			t.Errorf("the table says nothing of %s, which is %s here", setting, attribute)
		}
		if strings.Contains(attribute, "_") || attribute == "modules" || attribute == "slot" {
			if !regexp.MustCompile(`(?m)^[ #]*` + attribute + `\s*=`).Match(example) {
				t.Errorf("no configuration has %s", attribute)
			}
		}
	}
}

// The audit log of the servers is copied to the pod's log and never fills their volume.
func TestTheServersAuditLogIsShownAndBounded(t *testing.T) {
	pod := serversPod(t)
	i := slices.IndexFunc(pod.Containers, func(c corev1.Container) bool { return c.Name == "audit" })
	if i < 0 || len(pod.Containers[i].Command) != 3 {
		t.Fatalf("the containers are %+v", pod.Containers)
	}
	dir := t.TempDir()
	script := strings.NewReplacer("/var/lib/nitroseal/state", dir, "sleep 600", "sleep 0.1", "268435456", "20").Replace(pod.Containers[i].Command[2])
	write(t, dir, "audit.log", "from before\n")
	var shown output
	command := exec.CommandContext(t.Context(), "sh", "-c", script)
	command.Stdout, command.Stderr = &shown, &shown
	command.Cancel = func() error { return command.Process.Signal(syscall.SIGTERM) }
	command.WaitDelay = 10 * time.Second
	must(t, command.Start())
	says := func(line string) {
		t.Helper()
		vaulttest.Eventually(t, limit, "the line in the pod's log", func() error { // which may begin a moment later
			log, err := os.OpenFile(filepath.Join(dir, "audit.log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
			must(t, err)
			_, err = log.WriteString(line + "\n")
			must(t, errors.Join(err, log.Close()))
			return contains(shown.String(), line)
		})
	}
	says("the first line")
	vaulttest.Eventually(t, limit, "the log to be moved away", func() error {
		_, err := os.Stat(filepath.Join(dir, "audit.log.1"))
		return err
	})
	says("after it was moved away")
	must(t, command.Process.Signal(syscall.SIGTERM))
	if err := command.Wait(); err != nil {
		t.Errorf("it ends with %v", err)
	}
}
