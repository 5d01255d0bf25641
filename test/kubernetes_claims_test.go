package test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
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
