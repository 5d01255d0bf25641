package nethsm

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// joining is the deadline of joining a cluster, which waits until the new node has all data.
const joining = 10 * time.Minute

// Member is a node of a cluster, or its witness, as the cluster sees it. Its URLs are those of the database, not of the API.
type Member struct {
	ID      string   `json:"id"`   // hexadecimal
	Name    string   `json:"name"` // empty until it has joined
	URLs    []string `json:"urls"`
	Learner bool     `json:"learner"` // it has not caught up, or was not promoted
}

// Members lists the members of the cluster, to an Administrator of the root namespace. A NetHSM alone is a cluster of one.
func (c *Client) Members(ctx context.Context) ([]Member, error) {
	var got []Member
	_, err := c.do(ctx, call{
		op: "listing the members of the cluster", method: http.MethodGet, path: "/cluster/members",
		into: wanting(&got, func() error {
			if len(got) == 0 {
				return errNoList // the node itself is a member
			}
			for _, member := range got {
				if err := present("id", member.ID); err != nil {
					return err
				}
			}
			return nil
		}),
	})
	return got, err
}

// JoinKit is what a new node needs to join a cluster. The cluster's domain key is in it, encrypted with the unlock
// passphrase and the backup passphrase.
type JoinKit struct {
	Members []Peer
	Kit     Secret
}

// Peer is a member in a [JoinKit]. The one without a name is the new node.
type Peer struct {
	Name string   `json:"name"`
	URLs []string `json:"urls"`
}

// AddMember announces a new member by the URLs of its database, as an Administrator of the root namespace. The cluster
// counts it at once, so that it should join soon. Without a backup passphrase this is [ErrState], while another member is
// still a learner [hsm.ErrExists].
func (c *Client) AddMember(ctx context.Context, urls []string) (JoinKit, error) {
	const op = "adding a member to the cluster"
	if len(urls) == 0 {
		return JoinKit{}, fmt.Errorf("%s: %w: it has no URL", op, ErrRequest)
	}
	var got struct {
		Members []Peer `json:"members"`
		Kit     string `json:"joinerKit"`
	}
	_, err := c.do(ctx, call{
		op: op, method: http.MethodPost, path: "/cluster/members", creates: true, timeout: slowly, body: memberURLs{urls},
		into: wanting(&got, func() error {
			if len(got.Members) == 0 {
				return errors.New("the member members is missing")
			}
			return present("joinerKit", got.Kit)
		}),
	})
	return JoinKit{got.Members, Secret(got.Kit)}, err
}

type memberURLs struct {
	URLs []string `json:"urls"`
}

// SetMemberURLs changes the URLs of a member, as an Administrator of the root namespace.
func (c *Client) SetMemberURLs(ctx context.Context, id string, urls []string) error {
	return c.changeMember(ctx, fmt.Sprintf("changing the URLs of member %q", id), http.MethodPut, id, memberURLs{urls})
}

// RemoveMember removes a member from the cluster, as an Administrator of the root namespace.
func (c *Client) RemoveMember(ctx context.Context, id string) error {
	return c.changeMember(ctx, fmt.Sprintf("removing member %q", id), http.MethodDelete, id, nil)
}

// Promote makes a learner a full member, as an Administrator of the root namespace. One that has not caught up yet gives
// [ErrState].
func (c *Client) Promote(ctx context.Context, id string) error {
	return c.changeMember(ctx, fmt.Sprintf("promoting member %q", id), http.MethodPost, id, nil, "promote")
}

func (c *Client) changeMember(ctx context.Context, op, method, id string, body any, below ...string) error {
	if err := checkID(op, "the member", id); err != nil {
		return err
	}
	segments := append([]string{"cluster", "members", id}, below...)
	_, err := c.do(ctx, call{
		op: op, method: method, path: path(segments...), body: body, ok: unchanged, creates: true, timeout: slowly,
	})
	return err
}

// Join makes a node join the cluster that the kit is from, as an Administrator of the node's root namespace. The node loses
// its own data. It returns when the node has the cluster's, and then the node is Locked, with the unlock passphrase of the
// node that made the kit.
func (c *Client) Join(ctx context.Context, kit JoinKit, backupPassphrase []byte) error {
	const op = "joining a cluster"
	if err := checkCurrent(op, "the backup passphrase", backupPassphrase); err != nil {
		return err
	}
	return c.doAlone(ctx, call{
		op: op, method: http.MethodPost, path: "/cluster/join", creates: true, timeout: joining,
		body: struct {
			Members          []Peer `json:"members"`
			Kit              secret `json:"joinerKit"`
			BackupPassphrase secret `json:"backupPassphrase"`
		}{kit.Members, secret(kit.Kit), secret(backupPassphrase)},
	})
}

// unlockUser is the user name that stands for the unlock passphrase where a Failed node can ask nobody else.
const unlockUser = "unlock"

// ForceNewCluster makes a Failed node a cluster of its own, with the data that it has (since 5.0). It is the way out when
// the majority of a cluster is lost for good; other members must not come back afterwards. The node reboots.
func (c *Client) ForceNewCluster(ctx context.Context, unlockPassphrase []byte) error {
	alone := c.As(Credentials{Username: unlockUser, Password: unlockPassphrase})
	return alone.doAlone(ctx, call{
		op: "making the node a cluster of its own", method: http.MethodPost, path: "/cluster/force-new", creates: true, timeout: slowly,
	})
}
