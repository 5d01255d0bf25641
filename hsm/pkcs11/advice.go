package pkcs11

import "cmp"

// Advice is what the sentences about PINs tell people to do: they reach a device by the paths of a Vault mount or by a
// command. What is empty speaks of a mount.
type Advice struct {
	// Give says how to give a device the right PIN, where the token has it: that tries it once, whatever the token shows.
	Give string
	// Unbar says how to lift the bar of the PIN that a device has.
	Unbar string
	// LastTry says how to give a device a PIN that the last try is spent on.
	LastTry string
	// Force is what a request has to say for that.
	Force string
}

// complete fills in what is empty.
func (a Advice) complete() Advice {
	return Advice{
		Give: cmp.Or(a.Give, "give the right one to the device (devices/NAME/pin with new_pin and on_token=false; where the PIN comes from "+
			"a file, change the file and lift the bar with devices/NAME/unbar)"),
		Unbar:   cmp.Or(a.Unbar, "lift the bar (devices/NAME/unbar)"),
		LastTry: cmp.Or(a.LastTry, "give the right one with devices/NAME/pin on_token=false force=true"),
		Force:   cmp.Or(a.Force, "force=true"),
	}
}

// next ends the sentences about a PIN that was refused.
func (a Advice) next() string { return "make sure of the PIN and " + a.Give }

func (d *Device) advice() Advice { return d.manager.options.Advice }
