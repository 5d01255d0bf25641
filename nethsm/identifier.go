package nethsm

import (
	"fmt"
	"net/url"
	"strings"
)

// maxID is the longest identifier in bytes.
const maxID = 128

// checkID refuses an id of a key, a tag or a namespace that a NetHSM would refuse: [A-Za-z0-9][A-Za-z0-9_.-]{0,127}.
func checkID(op, what, id string) error {
	complain := func(reason string) error {
		return fmt.Errorf("%s: %w: %s %.140q %s", op, ErrRequest, what, id, reason)
	}
	switch {
	case id == "":
		return fmt.Errorf("%s: %w: %s is empty", op, ErrRequest, what)
	case len(id) > maxID:
		return complain("is longer than 128 characters")
	case strings.ContainsFunc(id, func(r rune) bool { return !alphanumeric(r) && !strings.ContainsRune("_.-", r) }):
		return complain("may only have letters, digits, underscores, dots and dashes")
	case !alphanumeric(rune(id[0])):
		return complain("must begin with a letter or a digit")
	default:
		return nil
	}
}

func alphanumeric(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9'
}

// checkUser refuses a user's id that a NetHSM would refuse: an id, or "namespace~id".
func checkUser(op, id string) error {
	if namespace, user, namespaced := strings.Cut(id, "~"); namespaced {
		if err := checkID(op, "the namespace", namespace); err != nil {
			return err
		}
		return checkID(op, "the user", user)
	}
	return checkID(op, "the user", id)
}

// checkUsername refuses the user of a login that no NetHSM can have. With a colon it would even be another user, with another
// password.
func checkUsername(name string) error {
	if checkUser("", name) != nil {
		return fmt.Errorf("%w: no NetHSM can have a user %.140q: a name has up to 128 letters, digits, underscores, dots and dashes, begins "+
			"with a letter or a digit, and comes after \"namespace~\" where it has one", ErrConfig, name)
	}
	return nil
}

// checkTags refuses tags that a NetHSM would refuse.
func checkTags(op string, tags []string) error {
	for _, tag := range tags {
		if err := checkID(op, "the tag", tag); err != nil {
			return err
		}
	}
	return nil
}

// path joins the segments of a path, each escaped.
func path(segments ...string) string {
	var out strings.Builder
	for _, segment := range segments {
		out.WriteByte('/')
		out.WriteString(url.PathEscape(segment))
	}
	return out.String()
}

// maxList is the largest list in bytes: that of 100,000 ids as long as they can get.
const maxList = 16 << 20

// ids is a JSON list of {"id": …}.
type ids []struct {
	ID string `json:"id"`
}

// take returns the ids of a list, an error where an entry has none.
func (list ids) take(into *[]string) error {
	if list == nil {
		return errNoList
	}
	out := make([]string, 0, len(list))
	for _, entry := range list {
		if err := present("id", entry.ID); err != nil {
			return err
		}
		out = append(out, entry.ID)
	}
	*into = out
	return nil
}
