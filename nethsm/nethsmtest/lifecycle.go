package nethsmtest

import (
	"errors"
	"net/http"
	"time"
)

// What everybody may ask: who are you, and how do you fare.

func getInfo(*exchange) answer {
	return jsonAnswer(struct {
		Vendor  string `json:"vendor"`
		Product string `json:"product"`
	}{"Nitrokey GmbH", "NetHSM"})
}

func getState(x *exchange) answer {
	return jsonAnswer(struct {
		State State `json:"state"`
	}{x.node.State()})
}

func healthy(*exchange) answer { return empty(http.StatusOK) }

func provision(x *exchange) answer {
	var unlock, admin, systemTime string
	err := decode("provision_req", x.body(),
		text("unlockPassphrase", &unlock), text("adminPassphrase", &admin), text("systemTime", &systemTime))
	if err == nil {
		err = validPassphrase("unlockPassphrase", unlock)
	}
	if err == nil {
		err = validPassphrase("adminPassphrase", admin)
	}
	var at time.Time
	if err == nil {
		at, err = parseTime(systemTime)
	}
	if err != nil {
		return refuse(http.StatusBadRequest, err.Error())
	}
	if x.node.blind() {
		return databaseTrouble("write to")
	}
	if err := x.hsm.provision(x.node, unlock, admin, at); err != nil {
		return databaseTrouble("write to")
	}
	return empty(http.StatusNoContent)
}

// provision fills the shared database. The other nodes of the cluster come up Locked, with the same passphrase, as a
// node does that joins.
func (h *HSM) provision(by *Node, unlock, admin string, at time.Time) error {
	domain := random(32)
	locks := make([]*lockRecord, len(h.nodes))
	for i := range h.nodes {
		var err error
		if locks[i], err = sealDomainKey(domain, []byte(unlock), h.options.RealCosts); err != nil {
			return err
		}
	}
	err := h.store.update(func(r *record) error {
		if r.DomainKey != nil {
			return errExists
		}
		r.DomainKey = domain
		r.Users[AdminUser] = newUser(AdminUser, roleAdministrator, []byte(admin))
		for i, n := range h.nodes {
			n.record().Lock = locks[i]
			n.record().UnattendedBoot = h.options.UnattendedBoot
		}
		by.record().TimeOffset = at.Sub(h.now())
		return nil
	})
	if err != nil {
		return err
	}
	for _, n := range h.nodes {
		n.mu.Lock()
		n.locked = n != by
		n.mu.Unlock()
	}
	return nil
}

// parseTime reads a time in UTC (RFC 3339).
func parseTime(s string) (time.Time, error) {
	at, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return at, errors.New("Failed to decode timestamp: invalid RFC 3339 time.") //nolint:staticcheck // the original's way
	}
	if _, offset := at.Zone(); offset != 0 {
		return at, errors.New("Error while parsing timestamp. Offset must be 0.") //nolint:staticcheck // the original's words
	}
	return at, nil
}

func lock(x *exchange) answer {
	x.node.mu.Lock()
	defer x.node.mu.Unlock()
	x.node.locked = true
	return empty(http.StatusNoContent)
}

func unlock(x *exchange) answer {
	if x.node.limited(x.client, unlockUser) {
		return refuse(http.StatusTooManyRequests, "Service unavailable: too many requests")
	}
	var passphrase string
	err := decode("passphrase_req", x.body(), text("passphrase", &passphrase))
	if err == nil {
		err = validPassphrase("passphrase", passphrase)
	}
	if err != nil {
		x.node.failed(x.client, unlockUser)
		return refuse(http.StatusBadRequest, err.Error())
	}
	if x.node.blind() {
		return databaseTrouble("read from")
	}
	var l *lockRecord
	x.hsm.store.read(func(*record) { l = x.node.record().Lock })
	if _, err := l.open([]byte(passphrase)); err != nil {
		x.node.failed(x.client, unlockUser)
		return refuse(http.StatusForbidden, "not authenticated")
	}
	x.node.unlocked()
	return empty(http.StatusNoContent)
}
