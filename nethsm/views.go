package nethsm

// Operator returns the device's view of its NetHSM with the operator's credentials, for what package hsm has no word for:
// users, configuration, metrics. It ends with the device; the caller does not close it.
func (d *Device) Operator() *Client { return d.shared.operator }

// Administrator is the same with the administrator's credentials; nil where the device has none.
func (d *Device) Administrator() *Client { return d.shared.administrator }
