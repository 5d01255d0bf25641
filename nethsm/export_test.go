package nethsm

import "time"

// ShortenGrace lets a device believe soon that whoever made an empty carrier is gone.
func ShortenGrace(d *Device, grace time.Duration) { d.grace = grace }
