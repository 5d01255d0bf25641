package nethsmtest

import (
	"bytes"
	"net/http"
	"strconv"
	"strings"
)

// updateHeader begins a software image: behind it come fields (3 bytes of length) with the signature, the release notes
// and the version. The double reads those and installs nothing; it cannot judge the signature.
const updateHeader = "_NETHSM_UPDATE_\x00"

func updateRoutes() {
	admin := notRootRole(roleAdministrator)
	add("system/update", resource{
		states: operational, allow: postOnly, forbidden: admin, provides: typeJSON, limit: -1, post: update,
	})
	add("system/commit-update", resource{
		states: operational, allow: postOnly, forbidden: admin, provides: typeJSON, post: commitUpdate,
	})
	add("system/cancel-update", resource{
		states: operational, allow: postOnly, forbidden: admin, provides: typeJSON, post: cancelUpdate,
	})
}

func update(x *exchange) answer {
	if x.hsm.options.Container {
		return platformTrouble()
	}
	if x.node.updating.Load() {
		return refuse(http.StatusConflict, "Update already in progress.")
	}
	rest, ok := bytes.CutPrefix(x.body(), []byte(updateHeader))
	if !ok {
		return refuse(http.StatusBadRequest, "Invalid update file")
	}
	d := &backupReader{rest: rest}
	d.field()
	notes, version := d.field(), d.field()
	if d.err != nil {
		return refuse(http.StatusBadRequest, d.err.Error())
	}
	major, _, _ := strings.Cut(string(version), ".")
	if n, err := strconv.Atoi(major); err != nil || n < softwareMajor {
		return refuse(http.StatusConflict, "Software version downgrade not allowed.")
	}
	x.node.updating.Store(true)
	return jsonAnswer(struct {
		ReleaseNotes string `json:"releaseNotes"`
	}{string(notes)})
}

// softwareMajor is the major version that /system/info shows.
const softwareMajor = 5

func commitUpdate(x *exchange) answer {
	if !x.node.updating.CompareAndSwap(true, false) {
		return noUpdate()
	}
	x.node.boot()
	x.header.Set("Connection", "close")
	return empty(http.StatusNoContent)
}

func cancelUpdate(x *exchange) answer {
	if !x.node.updating.CompareAndSwap(true, false) {
		return noUpdate()
	}
	return empty(http.StatusNoContent)
}

func noUpdate() answer {
	return refuse(http.StatusPreconditionFailed, "No update available. Please upload a system image to /system/update.")
}
