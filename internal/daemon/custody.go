package daemon

import (
	"errors"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
	"vault-plugin-secrets-nitrokey/internal/custody/node"
)

// Alarm is a kind of trouble that only a person can mend. It is the value of a label, so there are few.
type Alarm string

// The alarms.
const (
	AlarmNone           Alarm = ""
	AlarmForeignCluster Alarm = "foreign_cluster" // shares were given away: rekey
	AlarmWrongShares    Alarm = "wrong_shares"
	AlarmMismatch       Alarm = "mismatch"
	AlarmIdentity       Alarm = "identity" // by TLS it is not the node that we know
	AlarmPIN            Alarm = "pin"
)

// alarms lists them, the gravest first.
var alarms = []Alarm{AlarmForeignCluster, AlarmWrongShares, AlarmMismatch, AlarmIdentity, AlarmPIN}

// alarmOf returns what only a person can mend about an error.
func alarmOf(err error) Alarm {
	var pin *hsm.PINError
	switch {
	case err == nil:
	case errors.Is(err, cluster.ErrForeignCluster):
		return AlarmForeignCluster
	case errors.Is(err, cluster.ErrWrongShares), errors.Is(err, node.ErrWrongShares):
		return AlarmWrongShares
	case errors.Is(err, cluster.ErrMismatch):
		return AlarmMismatch
	case errors.Is(err, node.ErrIdentity):
		return AlarmIdentity
	case errors.As(err, &pin):
		return AlarmPIN
	}
	return AlarmNone
}

// retryAfter returns how long a node asked to be left alone, longestPause at most.
func retryAfter(err error) time.Duration {
	var refused *node.Error
	if errors.As(err, &refused) {
		return min(refused.RetryAfter, longestPause)
	}
	return 0
}
