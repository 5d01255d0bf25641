package nethsm

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"unicode/utf8"
)

// Role is what a user may do. A user has one, and none includes another.
type Role string

// The roles. An Administrator manages keys and users and cannot use a key; an Operator uses keys; Metrics reads metrics;
// Backup makes backups.
const (
	RoleAdministrator Role = "Administrator"
	RoleOperator      Role = "Operator"
	RoleMetrics       Role = "Metrics"
	RoleBackup        Role = "Backup"
)

// User describes a user.
type User struct {
	RealName string `json:"realName"`
	Role     Role   `json:"role"`
}

// NewUser is a user to be made.
type NewUser struct {
	RealName   string // not empty
	Role       Role
	Passphrase Secret // 10 to 200 bytes of UTF-8
}

// Users lists the ids of all users, to an Administrator: those of the caller's namespace, or of all for one of the root
// namespace.
func (c *Client) Users(ctx context.Context) ([]string, error) {
	var (
		got []struct {
			User string `json:"user"`
		}
		users []string
	)
	_, err := c.do(ctx, call{
		op: "listing users", method: http.MethodGet, path: "/users", limit: maxList,
		into: wanting(&got, func() error {
			if got == nil {
				return errNoList
			}
			for _, entry := range got {
				if err := present("user", entry.User); err != nil {
					return err
				}
				users = append(users, entry.User)
			}
			return nil
		}),
	})
	return users, err
}

// User reads a user, to an Administrator or to the user itself.
func (c *Client) User(ctx context.Context, id string) (User, error) {
	op := fmt.Sprintf("reading user %q", id)
	if err := checkUser(op, id); err != nil {
		return User{}, err
	}
	var got User
	_, err := c.do(ctx, call{
		op: op, method: http.MethodGet, path: path("users", id),
		into: wanting(&got, func() error { return present("role", got.Role) }),
	})
	return got, err
}

// AddUser makes a user, as an Administrator, and returns its id. An empty id lets the NetHSM choose one, "namespace~" lets
// it choose one in that namespace. An id that exists is [hsm.ErrExists].
//
// The first users of a namespace are made by an Administrator of the root namespace, before [Client.AddNamespace];
// afterwards only an Administrator of the namespace can make more.
func (c *Client) AddUser(ctx context.Context, id string, user NewUser) (string, error) {
	op := fmt.Sprintf("adding user %q", id)
	namespace, chosen := strings.CutSuffix(id, "~")
	chosen = chosen || id == ""
	switch {
	case !chosen:
		if err := checkUser(op, id); err != nil {
			return "", err
		}
	case namespace != "":
		if err := checkID(op, "the namespace", namespace); err != nil {
			return "", err
		}
	}
	if err := checkPassphrase(op, "the passphrase", user.Passphrase); err != nil {
		return "", err
	}
	if !utf8.ValidString(user.RealName) {
		return "", fmt.Errorf("%s: %w: the real name is not UTF-8", op, ErrRequest)
	}
	in := call{
		op: op, method: http.MethodPut, path: path("users", id), creates: true,
		body: struct {
			RealName   string `json:"realName"`
			Role       Role   `json:"role"`
			Passphrase secret `json:"passphrase"`
		}{user.RealName, user.Role, secret(user.Passphrase)},
	}
	if !chosen {
		_, err := c.do(ctx, in)
		return id, err
	}
	in.method = http.MethodPost
	if id == "" {
		in.path = "/users"
	}
	return c.create(ctx, in)
}

// create sends a call that makes something, and returns the id that the NetHSM gave it.
func (c *Client) create(ctx context.Context, in call) (string, error) {
	var got struct {
		ID string `json:"id"`
	}
	in.creates = true
	in.into = wanting(&got, func() error { return present("id", got.ID) })
	_, err := c.do(ctx, in)
	return got.ID, err
}

// DeleteUser deletes a user, as an Administrator. Nobody can delete himself.
func (c *Client) DeleteUser(ctx context.Context, id string) error {
	op := fmt.Sprintf("deleting user %q", id)
	if err := checkUser(op, id); err != nil {
		return err
	}
	_, err := c.do(ctx, call{op: op, method: http.MethodDelete, path: path("users", id), creates: true})
	return err
}

// SetPassphrase changes a user's passphrase, as an Administrator or the user itself.
func (c *Client) SetPassphrase(ctx context.Context, id string, passphrase []byte) error {
	op := fmt.Sprintf("setting the passphrase of user %q", id)
	if err := checkUser(op, id); err != nil {
		return err
	}
	if err := checkPassphrase(op, "the passphrase", passphrase); err != nil {
		return err
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPost, path: path("users", id, "passphrase"), creates: true,
		body: passphraseBody{secret(passphrase)},
	})
	return err
}

// UserTags lists the tags of an Operator: the keys restricted to one of them are his to use. A user of another role is
// [hsm.ErrNotFound].
func (c *Client) UserTags(ctx context.Context, id string) ([]string, error) {
	op := fmt.Sprintf("listing the tags of user %q", id)
	if err := checkUser(op, id); err != nil {
		return nil, err
	}
	var tags []string
	_, err := c.do(ctx, call{
		op: op, method: http.MethodGet, path: path("users", id, "tags"),
		into: wanting(&tags, func() error {
			if tags == nil {
				return errNoList
			}
			return nil
		}),
	})
	return tags, err
}

// AddUserTag gives an Operator a tag, as an Administrator. One that he has already is no error.
func (c *Client) AddUserTag(ctx context.Context, id, tag string) error {
	return c.userTag(ctx, http.MethodPut, fmt.Sprintf("giving user %q the tag %q", id, tag), id, tag)
}

// DeleteUserTag takes a tag from an Operator, as an Administrator. One that he does not have is [hsm.ErrNotFound].
func (c *Client) DeleteUserTag(ctx context.Context, id, tag string) error {
	return c.userTag(ctx, http.MethodDelete, fmt.Sprintf("taking the tag %q from user %q", tag, id), id, tag)
}

func (c *Client) userTag(ctx context.Context, method, op, id, tag string) error {
	if err := checkUser(op, id); err != nil {
		return err
	}
	if err := checkID(op, "the tag", tag); err != nil {
		return err
	}
	_, err := c.do(ctx, call{op: op, method: method, path: path("users", id, "tags", tag), ok: unchanged, creates: true})
	return err
}

// unchanged are the statuses of a change that may find everything as it should be.
var unchanged = []int{http.StatusOK, http.StatusCreated, http.StatusNoContent, http.StatusNotModified}
