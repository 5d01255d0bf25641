package main

import (
	"runtime"

	"github.com/spf13/cobra"
)

// version is set by the linker: make build.
var version = "v0.0.0-dev"

func newVersionCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version, and what this build can do",
		Args:  noArguments,
		RunE: func(*cobra.Command, []string) error {
			view := versionView{Version: version, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH, PKCS11: loadsModules}
			return a.print(view, func(t *table) {
				t.row("nitroseal " + view.Version)
				t.field("go", view.Go+" "+view.OS+"/"+view.Arch)
				modules := "loaded by this program"
				if !view.PKCS11 {
					modules = "loaded by another program only, see module_host in the configuration: this one was built without cgo"
				}
				t.field("pkcs11 modules", modules)
			})
		},
	}
}

type versionView struct {
	Version string `json:"version"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
	PKCS11  bool   `json:"pkcs11"` // whether it can load PKCS#11 modules by itself
}
