package nethsm

import (
	"context"
	"net/http"
	"time"
)

// Info says what answers.
type Info struct {
	Vendor  string `json:"vendor"`
	Product string `json:"product"`
}

// Info asks for vendor and product. It needs no credentials and works in every state.
func (c *Client) Info(ctx context.Context) (Info, error) {
	var got Info
	_, err := c.do(ctx, call{
		op: "asking for vendor and product", method: http.MethodGet, path: "/info", public: true,
		into: wanting(&got, func() error { return present("product", got.Product) }),
	})
	return got, err
}

// containerID is the device id of every NetHSM that is not an appliance.
const containerID = "0000000000"

// SystemInfo describes the hardware and software of a node.
type SystemInfo struct {
	SoftwareVersion string `json:"softwareVersion"` // "5.0"
	SoftwareBuild   string `json:"softwareBuild"`
	FirmwareVersion string `json:"firmwareVersion"` // "N/A" in a container
	HardwareVersion string `json:"hardwareVersion"` // "N/A" in a container
	DeviceID        string `json:"deviceId"`        // the serial number; [SystemInfo.Container]
	// AttestationKeys and PCRs are those of the TPM, none in a container.
	AttestationKeys map[string]string `json:"akPub"`
	PCRs            map[string]string `json:"pcr"`
}

// Container is true for the software container, false for the appliance.
func (i SystemInfo) Container() bool { return i.DeviceID == containerID }

// SystemInfo asks for hardware and software, as an Administrator of the root namespace. With several nodes it is that of
// whichever answers.
func (c *Client) SystemInfo(ctx context.Context) (SystemInfo, error) {
	var got SystemInfo
	_, err := c.do(ctx, call{
		op: "asking for the system's versions", method: http.MethodGet, path: "/system/info",
		into: wanting(&got, func() error { return present("deviceId", got.DeviceID) }),
	})
	return got, err
}

// timestamp is a time as a NetHSM takes it: RFC 3339 in UTC, whole seconds.
func timestamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
