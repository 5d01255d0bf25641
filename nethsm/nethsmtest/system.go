package nethsmtest

import (
	"bytes"
	"io"
	"mime/multipart"
	"net/http"
	"strconv"
)

// systemRoutes are those below /system, and what an operator of the machine looks at.
func systemRoutes() {
	admin := notRootRole(roleAdministrator)
	for _, row := range []struct {
		path     string
		resource resource
	}{
		{"system/info", resource{
			states: operational, allow: getOnly, forbidden: admin, provides: typeJSON, get: systemInfo,
			etag: func(*exchange) string { return etag("system info") },
		}},
		{"system/reboot", resource{
			states: []State{Operational, Failed}, open: []State{Failed}, allow: postOnly, forbidden: admin,
			provides: typeJSON, post: reboot,
		}},
		{"system/shutdown", resource{
			states: always, open: []State{Unprovisioned, Locked, Failed}, allow: postOnly, forbidden: admin,
			provides: typeJSON, post: shutdown,
		}},
		{"system/factory-reset", resource{
			states: []State{Operational, Failed}, open: []State{Failed}, allow: postOnly, forbidden: admin,
			provides: typeJSON, post: factoryReset,
		}},
		{"system/backup", resource{
			states: operational, allow: postOnly, forbidden: notRootRole(roleBackup), provides: typeBytes, post: makeBackup,
		}},
		{"system/restore", resource{
			states: []State{Unprovisioned, Operational}, open: []State{Unprovisioned}, allow: postOnly, forbidden: admin,
			provides: typeJSON, limit: -1, post: restore,
		}},
		{"metrics", resource{
			states: operational, allow: getOnly, forbidden: notRole(roleMetrics), provides: typeJSON, get: getMetrics,
		}},
	} {
		add(row.path, row.resource)
	}
}

// platformTrouble is what a software container says where it has no machine to command.
func platformTrouble() answer {
	return refuse(http.StatusInternalServerError, "Could not connect to platform. Check logs.")
}

func systemInfo(*exchange) answer {
	return jsonAnswer(struct {
		SoftwareVersion string   `json:"softwareVersion"`
		SoftwareBuild   string   `json:"softwareBuild"`
		FirmwareVersion string   `json:"firmwareVersion"`
		HardwareVersion string   `json:"hardwareVersion"`
		DeviceID        string   `json:"deviceId"`
		AkPub           struct{} `json:"akPub"`
		PCR             struct{} `json:"pcr"`
	}{"5.0", "4e192fb", "N/A", "N/A", deviceID, struct{}{}, struct{}{}})
}

func reboot(x *exchange) answer {
	if x.hsm.options.Container {
		return platformTrouble()
	}
	x.node.boot()
	x.header.Set("Connection", "close")
	return empty(http.StatusNoContent)
}

// shutdown stops the node once its answer was sent.
func shutdown(x *exchange) answer {
	if x.hsm.options.Container {
		return platformTrouble()
	}
	x.header.Set("Connection", "close")
	x.after = func() {
		x.node.boot()
		x.node.Stop()
	}
	return empty(http.StatusNoContent)
}

func factoryReset(x *exchange) answer {
	if x.hsm.options.Container {
		return platformTrouble()
	}
	err := x.hsm.store.update(func(r *record) error {
		fresh := emptyRecord()
		fresh.Authority, fresh.Revision = r.Authority, r.Revision
		for _, n := range r.Nodes {
			made := newNodeRecord()
			made.TLS = n.TLS
			fresh.Nodes = append(fresh.Nodes, made)
		}
		*r = *fresh
		return nil
	})
	if err != nil {
		return databaseTrouble("write to")
	}
	for _, n := range x.hsm.nodes {
		n.boot()
	}
	return empty(http.StatusNoContent)
}

func getMetrics(x *exchange) answer {
	statuses := map[int]int{}
	for _, r := range x.node.Requests() {
		statuses[r.Status]++
	}
	metrics := map[string]string{
		"uptime":       strconv.Itoa(int(x.hsm.now().Sub(x.node.startedAt()).Seconds())),
		"key generate": strconv.FormatInt(x.node.generated.Load(), 10),
		"key decrypt":  strconv.Itoa(x.node.Decrypts()),
		"key sign":     strconv.Itoa(x.node.Operations() - x.node.Decrypts()),
	}
	for status, count := range statuses {
		metrics["http response "+strconv.Itoa(status)] = strconv.Itoa(count)
	}
	return jsonAnswer(metrics)
}

// form reads the parts of a multipart body by their names.
func (x *exchange) form() (map[string][]byte, error) {
	reader, err := x.r.MultipartReader()
	if err != nil {
		return nil, err
	}
	parts := map[string][]byte{}
	for {
		part, err := reader.NextPart()
		if err == io.EOF { //nolint:errorlint // NextPart promises it unwrapped
			return parts, nil
		}
		if err != nil {
			return nil, err
		}
		data, err := readPart(part)
		if err != nil {
			return nil, err
		}
		parts[part.FormName()] = data
	}
}

func readPart(part *multipart.Part) ([]byte, error) {
	var b bytes.Buffer
	_, err := io.Copy(&b, io.LimitReader(part, operationLimit))
	return b.Bytes(), err
}
