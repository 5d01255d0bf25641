package test

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"

	"vault-plugin-secrets-nitrokey/internal/config"
)

const manifests = "../deploy/kubernetes"

// podsOf are the pods that a manifest makes, by the name of its file; patches are pods in part.
type podsOf map[string]corev1.PodSpec

// patchDirective is what kustomize takes away before Kubernetes sees a patch.
var patchDirective = regexp.MustCompile(`(?m)^\s*\$patch: delete\n`)

func TestEveryManifestIsWhatKubernetesReads(t *testing.T) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{appsv1.AddToScheme, batchv1.AddToScheme, corev1.AddToScheme, networkingv1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	found := 0
	for _, path := range manifestFiles(t) {
		if filepath.Base(path) == "kustomization.yaml" || strings.Contains(path, "/helm/") {
			continue
		}
		for _, document := range documents(t, path) {
			document = patchDirective.ReplaceAll(document, nil)
			document = bytes.ReplaceAll(document, []byte("emptyDir: null"), nil)
			if _, _, err := decoder.Decode(document, nil, nil); err != nil {
				t.Errorf("%s: %v", path, err)
			}
			found++
		}
	}
	if found < 10 {
		t.Errorf("only %d manifests were found", found)
	}
	if _, _, err := decoder.Decode([]byte("apiVersion: v1\nkind: Service\nspec: { portz: [] }\n"), nil, nil); err == nil {
		t.Error("a field that does not exist was not noticed")
	}
}

// kustomization is what we use of kustomize's file.
type kustomization struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Namespace  string   `json:"namespace"`
	Resources  []string `json:"resources"`
	Patches    []struct {
		Path string `json:"path"`
	} `json:"patches"`
	ConfigMapGenerator []struct {
		Name  string   `json:"name"`
		Files []string `json:"files"`
	} `json:"configMapGenerator"`
	GeneratorOptions struct {
		DisableNameSuffixHash bool `json:"disableNameSuffixHash"`
	} `json:"generatorOptions"`
	Images []struct {
		Name    string `json:"name"`
		NewName string `json:"newName"`
		NewTag  string `json:"newTag"`
	} `json:"images"`
}

func TestEveryKustomizationNamesFilesThatAreThereAndAllOfThem(t *testing.T) {
	for _, path := range manifestFiles(t) {
		if filepath.Base(path) != "kustomization.yaml" {
			continue
		}
		var k kustomization
		decodeStrictly(t, path, &k)
		named := []string{"kustomization.yaml"}
		for _, resource := range k.Resources {
			named = append(named, filepath.Base(resource))
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), resource)); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
		for _, patch := range k.Patches {
			named = append(named, patch.Path)
		}
		for _, made := range k.ConfigMapGenerator {
			named = append(named, made.Files...)
		}
		if len(k.ConfigMapGenerator) > 0 && !k.GeneratorOptions.DisableNameSuffixHash {
			t.Errorf("%s: the ConfigMap's name ends with a hash, and the job beside it does not find it", path)
		}
		entries, err := os.ReadDir(filepath.Dir(path))
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if !slices.Contains(named, entry.Name()) {
				t.Errorf("%s does not use %s, which lies beside it", path, entry.Name())
			}
		}
	}
}

// helmValues is what we set of the values of HashiCorp's chart.
type helmValues struct {
	Global struct {
		TLSDisable *bool `json:"tlsDisable"`
	} `json:"global"`
	Server struct {
		HA struct {
			Enabled  bool `json:"enabled"`
			Replicas int  `json:"replicas"`
			Raft     struct {
				Enabled   bool   `json:"enabled"`
				SetNodeID bool   `json:"setNodeId"`
				Config    string `json:"config"`
			} `json:"raft"`
		} `json:"ha"`
		Volumes      []corev1.Volume      `json:"volumes"`
		VolumeMounts []corev1.VolumeMount `json:"volumeMounts"`
		StatefulSet  struct {
			SecurityContext struct {
				Pod *corev1.PodSecurityContext `json:"pod"`
			} `json:"securityContext"`
		} `json:"statefulSet"`
		ExtraInitContainers []corev1.Container `json:"extraInitContainers"`
		ExtraContainers     []corev1.Container `json:"extraContainers"`
	} `json:"server"`
}

func TestEveryPodOfOursIsUnprivileged(t *testing.T) {
	pods := podsOf{}
	for _, path := range manifestFiles(t) {
		name, _ := filepath.Rel(manifests, path)
		switch {
		case strings.HasPrefix(name, "device-plugin/"): // another project's, which needs the kubelet's socket
		case strings.HasPrefix(name, "helm/"):
			var values helmValues
			decodeStrictly(t, path, &values)
			s := values.Server
			pods[name] = corev1.PodSpec{
				SecurityContext: s.StatefulSet.SecurityContext.Pod, InitContainers: s.ExtraInitContainers, Containers: s.ExtraContainers,
				Volumes: append(s.Volumes, corev1.Volume{Name: "data"}), // the chart makes that one
			}
		case filepath.Base(name) == "statefulset.yaml":
			pods[name] = serversPod(t)
		case filepath.Base(name) == "deployment.yaml":
			var deployment appsv1.Deployment
			decodeStrictly(t, path, &deployment)
			pods[name] = deployment.Spec.Template.Spec
		case filepath.Base(name) == "pcscd.yaml":
			var base, patch appsv1.Deployment
			decodeStrictly(t, filepath.Join(manifests, "base/deployment.yaml"), &base)
			decodeStrictly(t, path, &patch)
			pods[name] = patched(base.Spec.Template.Spec, patch.Spec.Template.Spec)
		case filepath.Base(name) == "job.yaml":
			var job batchv1.Job
			decodeStrictly(t, path, &job)
			pods[name] = job.Spec.Template.Spec
		}
	}
	if len(pods) != 6 {
		t.Fatalf("%d pods were found", len(pods))
	}
	daemons := 0
	for name, pod := range pods {
		checkPod(t, name, pod)
		for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
			if c.Name == "pcscd" {
				daemons++
				checkPCSCD(t, name, c)
			}
		}
	}
	if daemons != 3 {
		t.Errorf("%d containers run pcscd", daemons)
	}
}

// serversPod is the pod of `nitroseal serve`, with the volumes that are made for it.
func serversPod(t *testing.T) corev1.PodSpec {
	t.Helper()
	var set appsv1.StatefulSet
	decodeStrictly(t, filepath.Join(manifests, "serve/statefulset.yaml"), &set)
	pod := set.Spec.Template.Spec
	for _, claim := range set.Spec.VolumeClaimTemplates {
		pod.Volumes = append(pod.Volumes, corev1.Volume{Name: claim.Name})
	}
	return pod
}

// startPCSCD is how pcscd starts in a container, where it is always process 1: what an earlier one left, that was killed, says that
// process 1 is pcscd already, and it would not start again before the pod is deleted.
var startPCSCD = []string{"sh", "-c", "rm -f /run/pcscd/pcscd.comm /run/pcscd/pcscd.pid; exec /usr/sbin/pcscd --foreground"}

func checkPCSCD(t *testing.T, name string, c corev1.Container) {
	t.Helper()
	if !slices.Equal(c.Command, startPCSCD) || len(c.Args) > 0 {
		t.Errorf("%s: pcscd is started by %q %q, want %q", name, c.Command, c.Args, startPCSCD)
	}
	if _, err := exec.LookPath("/usr/sbin/pcscd"); err != nil {
		return
	}
	// The image has the one of Debian 12, which knows no option about polkit, since it was built without.
	last := slices.Concat(c.Command, c.Args)
	options := append(strings.Fields(last[len(last)-1]), "--help")
	options = options[slices.IndexFunc(options, func(o string) bool { return strings.HasPrefix(o, "--") }):]
	if out, err := exec.CommandContext(t.Context(), "/usr/sbin/pcscd", options...).CombinedOutput(); err != nil {
		t.Errorf("%s: pcscd %q: %v\n%s", name, options, err, out)
	}
}

// patched is a pod with what a patch adds to it.
func patched(pod, patch corev1.PodSpec) corev1.PodSpec {
	for _, added := range patch.Containers {
		i := slices.IndexFunc(pod.Containers, func(c corev1.Container) bool { return c.Name == added.Name })
		if i < 0 {
			pod.Containers = append(pod.Containers, added)
			continue
		}
		pod.Containers[i].VolumeMounts = append(pod.Containers[i].VolumeMounts, added.VolumeMounts...)
	}
	pod.Volumes = append(pod.Volumes, patch.Volumes...)
	pod.SecurityContext.SupplementalGroups = patch.SecurityContext.SupplementalGroups
	return pod
}

func checkPod(t *testing.T, name string, pod corev1.PodSpec) {
	t.Helper()
	if s := pod.SecurityContext; s == nil || s.RunAsNonRoot == nil || !*s.RunAsNonRoot || s.SeccompProfile == nil ||
		s.FSGroupChangePolicy == nil || *s.FSGroupChangePolicy != corev1.FSGroupChangeOnRootMismatch {
		t.Errorf("%s: the pod may run as root, or without seccomp, or has its state made group-writable at each start", name)
	}
	if pod.HostNetwork || pod.HostPID || pod.HostIPC {
		t.Errorf("%s: the pod shares the node's network or processes", name)
	}
	volumes := map[string]bool{}
	for _, volume := range pod.Volumes {
		volumes[volume.Name] = true
		if volume.HostPath != nil {
			t.Errorf("%s: volume %s is a folder of the node", name, volume.Name)
		}
		if volume.Secret != nil && (volume.Secret.DefaultMode == nil || *volume.Secret.DefaultMode != 0o440) {
			t.Errorf("%s: the files of secret %s are readable by everybody in the pod", name, volume.Name)
		}
	}
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		where := name + ": container " + c.Name
		if s := c.SecurityContext; s == nil || s.Privileged != nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation ||
			s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem || s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) ||
			len(s.Capabilities.Add) > 0 || s.RunAsUser != nil && *s.RunAsUser == 0 {
			t.Errorf("%s may do more than it needs: %+v", where, s)
		}
		if len(c.Env)+len(c.EnvFrom) > 0 {
			t.Errorf("%s gets variables; what it needs are files", where)
		}
		for _, mount := range c.VolumeMounts {
			if !volumes[mount.Name] {
				t.Errorf("%s mounts %s, and there is no such volume", where, mount.Name)
			}
		}
		devices := c.Resources.Limits["nitrokey.com/hsm"]
		if got, want := devices.Value(), int64(0); c.Name == "pcscd" && got != 1 || c.Name != "pcscd" && got != want {
			t.Errorf("%s has %d sticks", where, got)
		}
	}
}

// mountsOf are the folders that a variant's container nitroseal gets.
func mountsOf(t *testing.T, variant string) (folders []string) {
	t.Helper()
	var containers []corev1.Container
	switch variant {
	case "helm":
		var values helmValues
		decodeStrictly(t, filepath.Join(manifests, "helm/values-nitrokey.yaml"), &values)
		containers = values.Server.ExtraContainers
	case "serve":
		containers = serversPod(t).Containers
	default:
		var deployment appsv1.Deployment
		decodeStrictly(t, filepath.Join(manifests, "base/deployment.yaml"), &deployment)
		containers = deployment.Spec.Template.Spec.Containers
	}
	for _, mount := range containers[slices.IndexFunc(containers, func(c corev1.Container) bool { return c.Name == "nitroseal" })].VolumeMounts {
		folders = append(folders, mount.MountPath)
	}
	return folders
}

var (
	// namedFile is a file that a configuration names, secretFile one with a secret.
	namedFile  = regexp.MustCompile(`_file\s*=\s*"([^"]+)"`)
	secretFile = regexp.MustCompile(`(?:pin|password|key)_file\s*=\s*"([^"]+)"`)
)

func TestEveryConfigurationForKubernetesLoads(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(manifests, "*/nitroseal.hcl"))
	if err != nil || len(paths) != 4 {
		t.Fatalf("configurations: %q, %v", paths, err)
	}
	for _, path := range paths {
		t.Run(filepath.Base(filepath.Dir(path)), func(t *testing.T) {
			source, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			certificate := selfSigned(t)
			for _, named := range namedFile.FindAllStringSubmatch(string(source), -1) {
				if !slices.Contains(mountsOf(t, filepath.Base(filepath.Dir(path))), filepath.Dir(named[1])) {
					t.Errorf("%s is in no folder that is mounted", named[1])
				}
				file := filepath.Join(dir, named[1])
				if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, certificate, 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			text := strings.ReplaceAll(string(source), `"/run/`, `"`+dir+`/run/`)
			mounted := filepath.Join(dir, "nitroseal.hcl")
			if err := os.WriteFile(mounted, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			loaded, err := config.Load(mounted)
			if err != nil {
				t.Fatal(err)
			}
			if loaded.Serve == nil && (len(loaded.Clusters) != 1 || len(loaded.Clusters[0].Nodes) != 3) {
				t.Errorf("the clusters are %+v", loaded.Clusters)
			}
			secrets := secretFile.FindAllStringSubmatch(text, -1)
			for _, named := range secrets {
				if _, err := loaded.SecretFiles().ReadPEM(named[1]); err != nil {
					t.Error(err)
				}
			}
			if len(secrets) < 2 {
				t.Errorf("it names the secrets %q", secrets)
			}
		})
	}
}

// selfSigned is a certificate, PEM.
func selfSigned(t *testing.T) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "any"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func manifestFiles(t *testing.T) []string {
	t.Helper()
	var paths []string
	err := filepath.WalkDir(manifests, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && !entry.IsDir() && filepath.Ext(path) == ".yaml" {
			paths = append(paths, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// documents are those of a YAML file.
func documents(t *testing.T, path string) [][]byte {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	reader := yaml.NewDocumentDecoder(io.NopCloser(bytes.NewReader(content)))
	var all [][]byte
	buffer := make([]byte, len(content)+1)
	for {
		n, err := reader.Read(buffer)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		all = append(all, bytes.Clone(buffer[:n]))
	}
}

// decodeStrictly reads a file of one document; a field that is not known fails the test.
func decodeStrictly(t *testing.T, path string, into any) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := sigsyaml.UnmarshalStrict(content, into); err != nil {
		t.Errorf("%s: %v", path, err)
	}
}
