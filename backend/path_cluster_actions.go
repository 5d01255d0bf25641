package backend

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/custody/cluster"
)

// actAnswer describes what is said of every act, whether or not it has ended.
func actAnswer(fields map[string]*framework.FieldSchema) map[string]*framework.FieldSchema {
	fields["state"] = &framework.FieldSchema{
		Type: framework.TypeString, Required: true,
		Description: "done, or running where it takes longer than a request may: read clusters/<name>/status until it has ended, and send this " +
			"request again for the rest of the answer.",
	}
	return fields
}

func peopleAnswer() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type:        framework.TypeSlice,
		Description: "The people who took a share, each with name, index, fingerprint of the key and the message that only they can open.",
	}
}

func nodesAnswer() *framework.FieldSchema {
	return &framework.FieldSchema{
		Type: framework.TypeMap,
		Description: "Each node by its address: action (none, unsealed, waiting, auto-seal), sealed, initialized, role, joined, people (who must " +
			"still give a share), note, error.",
	}
}

// clusterActionPaths are what can be done with one cluster besides configuring it. No answer holds a share or a token, but
// as messages to the OpenPGP keys of people.
func (b *backend) clusterActionPaths() []*framework.Path {
	pattern := "clusters/" + framework.GenericNameRegex("name")
	name := nameField("The name of the cluster.")
	onlyName := map[string]*framework.FieldSchema{"name": name}
	display := &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "cluster"}
	write := func(
		handle framework.OperationFunc, verb, summary string, responses map[int][]framework.Response,
	) map[logical.Operation]framework.OperationHandler {
		return map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: &framework.PathOperation{
				Callback:                    handle,
				Summary:                     summary,
				DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: verb},
				Responses:                   responses,
				ForwardPerformanceStandby:   true,
				ForwardPerformanceSecondary: true,
			},
		}
	}
	return []*framework.Path{
		{
			Pattern:      pattern + "/init",
			Fields:       onlyName,
			DisplayAttrs: display,
			Operations: write(b.clusterInit, "initialize", "Initialise a cluster and keep its keys.", answer(http.StatusOK, "What was done.",
				actAnswer(map[string]*framework.FieldSchema{
					"initialized":  {Type: framework.TypeBool, Description: "Whether this request initialised it; false where it had been before."},
					"kind":         {Type: framework.TypeString, Description: "The keys that are kept: unseal, or recovery of a cluster that unseals itself."},
					"shares":       {Type: framework.TypeInt, Description: "How many there are."},
					"threshold":    {Type: framework.TypeInt, Description: "How many of them are wanted together."},
					"items":        {Type: framework.TypeStringSlice, Description: "The items of material/<name>/ that they lie in."},
					"people":       peopleAnswer(),
					"root_token":   {Type: framework.TypeString, Description: "The root token, encrypted to root_pgp_key; empty but with root_token=pgp."},
					"root_revoked": {Type: framework.TypeBool, Description: "Whether the root token has been revoked."},
					"nodes":        nodesAnswer(),
				}))),
			HelpSynopsis: "Initialise a cluster that has no keys yet, and keep them.",
			HelpDescription: "The store and the HSM are tried first; then the first node is initialised, its keys are sealed and stored, and the nodes " +
				"join and are unsealed. A cluster that was initialised by this mount before is unsealed, so a repetition is harmless. Vault " +
				"forgets the keys the moment that it answers: where this mount was cut off just then, the error says so, and how to begin again. " +
				"What is encrypted to people is in the answer, and in those of repetitions until the plugin is restarted.",
		},
		{
			Pattern:      pattern + "/unseal",
			Fields:       onlyName,
			DisplayAttrs: display,
			Operations: write(b.clusterUnseal, "unseal", "Unseal the nodes of a cluster that are sealed.", answer(http.StatusOK, "How the nodes are now.",
				actAnswer(map[string]*framework.FieldSchema{
					"unsealed": {Type: framework.TypeBool, Description: "Whether all nodes are unsealed."},
					"nodes":    nodesAnswer(),
				}))),
			HelpSynopsis: "Unseal the nodes of a cluster now.",
			HelpDescription: "What the watch does about once a minute: sealed nodes are given as many shares as they want, after they were known by " +
				"TLS and looked as recorded. One operation in an HSM opens all shares. A node that fails is a warning where another one is " +
				"unsealed. No answer holds a share, so this may be allowed to whoever restarts nodes.",
		},
		{
			Pattern: pattern + "/rekey",
			Fields: map[string]*framework.FieldSchema{
				"name":      name,
				"shares":    {Type: framework.TypeInt, Description: "How many new keys there are to be; as many as now where it is left out."},
				"threshold": {Type: framework.TypeInt, Description: "How many of them are wanted together; as many as now where it is left out."},
				"kind": {
					Type: framework.TypeString, AllowedValues: []any{string(cluster.KindUnseal), string(cluster.KindRecovery)},
					Description: "Which keys: unseal, or recovery of a cluster that unseals itself. Those that it has where it is left out.",
				},
				"cancel": {
					Type:        framework.TypeBool,
					Description: "Make no new keys, but end a rekey that is under way, whoever began it, and undo what one of ours left.",
				},
			},
			DisplayAttrs: display,
			Operations: write(b.clusterRekey, "rekey", "Give a cluster new keys, and keep them.", answer(http.StatusOK, "What was done.",
				actAnswer(map[string]*framework.FieldSchema{
					"kind":      {Type: framework.TypeString, Description: "Which keys."},
					"node":      {Type: framework.TypeString, Description: "The node that it was done at."},
					"shares":    {Type: framework.TypeInt, Description: "How many there are now."},
					"threshold": {Type: framework.TypeInt, Description: "How many of them are wanted together."},
					"items":     {Type: framework.TypeStringSlice, Description: "The items of material/<name>/ that they lie in."},
					"people":    peopleAnswer(),
					"finished":  {Type: framework.TypeBool, Description: "Whether this was an earlier rekey that had not ended; no other one was made then."},
					"dropped":   {Type: framework.TypeBool, Description: "Whether an earlier rekey that had not ended was undone."},
					"redealt":   {Type: framework.TypeBool, Description: "Whether shares were dealt anew, because the configuration names another key or spread."},
					"cancelled": {Type: framework.TypeBool, Description: "Whether a rekey that was under way in the cluster was ended."},
				}))),
			HelpSynopsis: "Give a cluster new unseal keys or recovery keys.",
			HelpDescription: "The old keys hold until the cluster has seen that the new ones were kept, and one that was cut off is finished or undone by " +
				"the next. The shares go as the configuration says today: to its key or spread, and to its people, whose messages are in the " +
				"answer. A rekey that somebody else has begun is reported, and ended with cancel=true only. All nodes of a raft cluster must be " +
				"unsealed: one that is away meanwhile would want the old keys.",
		},
		{
			Pattern: pattern + "/root",
			Fields: map[string]*framework.FieldSchema{
				"name":    name,
				"pgp_key": {Type: framework.TypeString, Description: "The OpenPGP key that the token is encrypted to, armored or base64.", Required: true},
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "cluster-root-token"},
			Operations: write(b.clusterRoot, "generate", "Make a root token of a cluster, encrypted to a person.",
				answer(http.StatusOK, "The token.", actAnswer(map[string]*framework.FieldSchema{
					"root_token": {Type: framework.TypeString, Description: "The root token, encrypted to pgp_key: an armored OpenPGP message."},
				}))),
			HelpSynopsis: "Make a root token of a cluster, which only one person can read.",
			HelpDescription: "Whoever may write here may do everything in that cluster: allow it to nobody else. The token is encrypted to pgp_key and " +
				"lives until it is revoked (vault token revoke -self). An attempt that somebody else has begun is reported, not ended.",
		},
		{
			Pattern: pattern + "/alarm",
			Fields: map[string]*framework.FieldSchema{
				"name":  name,
				"node":  {Type: framework.TypeString, Description: "The address of the node, as the cluster's nodes have it.", Required: true},
				"clear": {Type: framework.TypeBool, Description: "Clear the alarm: say that the cause is mended, and let the node have shares again.", Required: true},
			},
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "cluster-alarm"},
			Operations:   write(b.clusterAlarm, "clear", "Clear the alarm of a node.", noContent("The node may have shares again.")),
			HelpSynopsis: "Let a node have shares again that gave an alarm.",
			HelpDescription: "A node that took shares and then showed the id of another cluster gets no more of them, whatever restarts meanwhile. " +
				"Those shares are in foreign hands: rekey, find out how it came to answer there, and clear the alarm then.",
		},
		{
			Pattern:      pattern + "/status",
			Fields:       onlyName,
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: operationPrefix, OperationSuffix: "cluster-status"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:  b.clusterStatus,
					Summary:   "Ask the nodes of a cluster how they are, and how its keys are kept.",
					Responses: answer(http.StatusOK, "How the cluster is.", clusterStatusAnswer()),
					// Acts and the watch are in the memory of the node that may write.
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis: "How a cluster is, and how well its keys are kept.",
			HelpDescription: "The nodes are asked now; no HSM is. It is 200 also where nodes do not answer: read error of each. act is the last " +
				"thing that a request did to the cluster, watch what the mount found by itself.",
		},
	}
}

func clusterStatusAnswer() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"nodes": {
			Type: framework.TypeMap, Required: true,
			Description: "Each node by its address: error, initialized, sealed, type, shares, threshold, progress, version, cluster_id, role, leader, alarm.",
		},
		"material": {
			Type: framework.TypeMap, Required: true,
			Description: "Each item that keeps keys: error, state, generation, key, key_version, rewrap_due, hsms, store, updated.",
		},
		"spread": {Type: framework.TypeString, Description: "How the shares are spread over wrapping keys; empty where each envelope has all.", Required: true},
		"held":   {Type: framework.TypeStringSlice, Description: "Items that the mount's storage holds because the store has not taken them yet.", Required: true},
		"intent": {Type: framework.TypeMap, Description: "An initialisation that is under way or was cut off: host, node, by, at; empty for none.", Required: true},
		"act":    {Type: framework.TypeMap, Description: "The last thing that a request did to the cluster: verb, state, by, began, ended, error; empty for none.", Required: true},
		"watch":  {Type: framework.TypeMap, Description: "What the mount found when it last looked: on, looked, error, and each of the nodes: action, note, error, since, next.", Required: true},
	}
}

// verbUnseal is the verb that can be done at any time.
const verbUnseal = "unseal"

// actOn runs a verb on the cluster that a request names, or joins the one that is at work.
func (b *backend) actOn(
	ctx context.Context, req *logical.Request, data *framework.FieldData, verb, request string,
	run func(ctx context.Context, c *cluster.Cluster) (*logical.Response, error),
) (*logical.Response, error) {
	name := data.Get("name").(string)
	c, err := b.knownCluster(ctx, name)
	if err != nil {
		return nil, err
	}
	if _, err := b.checkOwnVault(ctx, c); err != nil {
		return nil, err
	}
	wanted := act{verb: verb, request: request, by: by(req), kept: verb != verbUnseal}
	response, err := b.perform(ctx, name, wanted, func(ctx context.Context) (*logical.Response, error) { return run(ctx, c) })
	if errors.Is(err, errAtWork) {
		response = &logical.Response{Data: map[string]any{"state": "running"}}
		response.AddWarning(fmt.Sprintf("it takes longer than this request may; read clusters/%s/status until it has ended, and send the request again "+
			"for the rest of the answer", name))
		return response, nil
	}
	return response, err
}

func (b *backend) clusterInit(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	return b.actOn(ctx, req, data, "init", "", func(ctx context.Context, c *cluster.Cluster) (*logical.Response, error) {
		// While no keys are kept yet, a write does not know that it moves them: none comes in between.
		done, err := b.clusters.writing.take(ctx, writingOf(c.Name))
		if err != nil {
			return nil, err
		}
		defer done()
		if c, err = b.knownCluster(ctx, c.Name); err != nil {
			return nil, err
		}
		result, err := b.clusters.custodian.Init(ctx, c, cluster.InitOptions{By: by(req)})
		b.clusters.letters.keep(c.Name, &result) // there may be some beside an error
		if err != nil {
			return nil, err
		}
		b.clusters.watch.note(b.logger, c.Name, result.Nodes, time.Now())
		return withWarnings(map[string]any{
			"state": "done", "initialized": result.Initialized, "kind": string(result.Kind), "shares": result.Shares, "threshold": result.Threshold,
			"items": present(result.Items), "people": showPeople(result.People), "root_token": string(result.RootPGP),
			"root_revoked": result.RootRevoked, "nodes": showOutcomes(result.Nodes),
		}, append(result.Warnings, outcomeWarnings(result.Nodes)...)), nil
	})
}

func (b *backend) clusterUnseal(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	return b.actOn(ctx, req, data, verbUnseal, "", func(ctx context.Context, c *cluster.Cluster) (*logical.Response, error) {
		b.clusters.custodian.Retry(c) // whoever asks may have mended a node
		outcomes, err := b.tend(ctx, c)
		if err != nil {
			return nil, err
		}
		if err := worst(outcomes); err != nil {
			return nil, err
		}
		return withWarnings(map[string]any{
			"state": "done", "unsealed": unsealed(outcomes) == len(outcomes), "nodes": showOutcomes(outcomes),
		}, outcomeWarnings(outcomes)), nil
	})
}

func (b *backend) clusterRekey(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	options := cluster.RekeyOptions{
		By: by(req), Kind: cluster.Kind(data.Get("kind").(string)), Shares: data.Get("shares").(int), Threshold: data.Get("threshold").(int),
		Cancel: data.Get("cancel").(bool),
	}
	switch {
	case options.Kind != "" && options.Kind != cluster.KindUnseal && options.Kind != cluster.KindRecovery:
		return nil, mistake("kind %q is not known; use %s or %s, or leave it out", options.Kind, cluster.KindUnseal, cluster.KindRecovery)
	case options.Shares < 0 || options.Threshold < 0:
		return nil, mistake("shares and threshold are numbers of keys; leave out what is to stay as it is")
	case options.Cancel && options.Shares+options.Threshold > 0:
		return nil, mistake("cancel=true makes no new keys; leave shares and threshold out")
	}
	request := fmt.Sprint(options.Kind, options.Shares, options.Threshold, options.Cancel)
	return b.actOn(ctx, req, data, "rekey", request, func(ctx context.Context, c *cluster.Cluster) (*logical.Response, error) {
		if !options.Cancel {
			if err := b.checkPresent(ctx, c); err != nil {
				return nil, err
			}
		}
		result, err := b.clusters.custodian.Rekey(ctx, c, options)
		if err != nil {
			return nil, err
		}
		b.clusters.watch.forget(c.Name)
		b.clusters.letters.forget(c.Name)
		return withWarnings(map[string]any{
			"state": "done", "kind": string(result.Kind), "node": result.Node, "shares": result.Shares, "threshold": result.Threshold,
			"items": present(result.Items), "people": showPeople(result.People), "finished": result.Finished, "dropped": result.Dropped,
			"redealt": result.Redealt, "cancelled": result.Cancelled,
		}, result.Warnings), nil
	})
}

func (b *backend) clusterRoot(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	key, err := pgpKey("pgp_key", data.Get("pgp_key").(string))
	if err != nil {
		return nil, err
	}
	if key == nil {
		return nil, mistake("pgp_key is missing: the token is given out encrypted to a person only; give pgp_key=@FILE, as gpg --armor --export writes it")
	}
	read, err := cluster.ReadPGPKey(key)
	if err != nil {
		return nil, fmt.Errorf("pgp_key: %w", err)
	}
	return b.actOn(ctx, req, data, "root", read.Fingerprint, func(ctx context.Context, c *cluster.Cluster) (*logical.Response, error) {
		result, err := b.clusters.custodian.Root(ctx, c, cluster.RootOptions{By: by(req), PGPKey: key})
		if err != nil {
			return nil, err
		}
		return withWarnings(map[string]any{"state": "done", "root_token": string(result.Message)}, result.Warnings), nil
	})
}

func (b *backend) clusterAlarm(ctx context.Context, req *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	c, err := b.knownCluster(ctx, data.Get("name").(string))
	if err != nil {
		return nil, err
	}
	if !data.Get("clear").(bool) {
		return nil, mistake("nothing to do: status shows alarms, and clear=true clears one")
	}
	address := data.Get("node").(string)
	if !slices.Contains(c.Nodes, address) {
		return nil, mistake("node %q is none of cluster %q; it is one of %s", address, c.Name, strings.Join(c.Nodes, ", "))
	}
	if err := b.clusters.custodian.ClearAlarm(ctx, c, address); err != nil {
		return nil, err
	}
	b.clusters.watch.forget(c.Name)
	b.logger.Warn("the alarm of a node was cleared: it may have shares again", "cluster", c.Name, "node", address, "by", by(req))
	return nil, nil
}

// worst is the error that a request to unseal is answered with: that of an alarm, or any where no node is unsealed.
func worst(outcomes []cluster.NodeOutcome) error {
	var first error
	for _, outcome := range outcomes {
		for _, alarm := range alarms {
			if errors.Is(outcome.Err, alarm) {
				return outcome.Err
			}
		}
		if first == nil {
			first = outcome.Err
		}
	}
	if unsealed(outcomes) > 0 {
		return nil
	}
	return first
}

// unsealed counts the nodes that are.
func unsealed(outcomes []cluster.NodeOutcome) int {
	count := 0
	for _, outcome := range outcomes {
		if seal := outcome.Outcome.Node.Seal; outcome.Err == nil && seal.Initialized && !seal.Sealed {
			count++
		}
	}
	return count
}

func showPeople(people []cluster.PersonMessage) []any {
	shown := []any{}
	for _, person := range people {
		shown = append(shown, map[string]any{
			"name": person.Name, "index": person.Index, "fingerprint": person.Fingerprint, "message": string(person.Message),
		})
	}
	return shown
}

func showOutcomes(outcomes []cluster.NodeOutcome) map[string]any {
	shown := map[string]any{}
	for _, one := range outcomes {
		seal := one.Outcome.Node.Seal
		shown[one.Address] = map[string]any{
			"action": string(one.Outcome.Action), "sealed": seal.Sealed, "initialized": seal.Initialized, "role": string(one.Outcome.Node.Role),
			"joined": one.Outcome.Joined, "people": one.Outcome.People, "note": one.Outcome.Note, "error": message(one.Err),
		}
	}
	return shown
}

// outcomeWarnings are what a client should read about nodes, each of which is named in it.
func outcomeWarnings(outcomes []cluster.NodeOutcome) []string {
	var warnings []string
	for _, one := range outcomes {
		if one.Err != nil {
			warnings = append(warnings, one.Err.Error())
		}
	}
	return warnings
}

// message is the text of an error, empty for none.
func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func withWarnings(data map[string]any, warnings []string) *logical.Response {
	response := &logical.Response{Data: data}
	for _, warning := range warnings {
		response.AddWarning(warning)
	}
	return response
}

func (b *backend) clusterStatus(ctx context.Context, _ *logical.Request, data *framework.FieldData) (*logical.Response, error) {
	name := data.Get("name").(string)
	record, err := b.readCluster(ctx, name)
	if err != nil || record == nil {
		return nil, err
	}
	c, err := record.cluster(name)
	if err != nil {
		return nil, err
	}
	status, err := b.clusters.custodian.Status(ctx, c)
	if err != nil {
		return nil, err
	}
	nodes, material, intent := map[string]any{}, map[string]any{}, map[string]any{}
	for _, one := range status.Nodes {
		nodes[one.Address] = showNode(one)
	}
	for _, item := range status.Material {
		material[item.Item] = showKept(item)
	}
	if status.Intent != nil {
		intent = map[string]any{"host": status.Intent.Host, "node": status.Intent.Node, "by": status.Intent.By, "at": stamp(status.Intent.At)}
	}
	return withWarnings(map[string]any{
		"nodes": nodes, "material": material, "spread": status.Spread, "held": present(status.Held), "intent": intent,
		"act": b.clusters.acts.show(name), "watch": b.clusters.watch.show(name, record.Watch, record.Nodes),
	}, status.Warnings), nil
}

func showNode(status cluster.NodeStatus) map[string]any {
	alarm := map[string]any{}
	if status.Alarm != nil {
		alarm = map[string]any{"at": stamp(status.Alarm.At), "recorded": status.Alarm.Recorded, "seen": status.Alarm.Seen}
	}
	return map[string]any{
		"error": message(status.Err), "initialized": status.Seal.Initialized, "sealed": status.Seal.Sealed, "type": status.Seal.Type,
		"shares": status.Seal.N, "threshold": status.Seal.T, "progress": status.Seal.Progress, "version": status.Seal.Version,
		"cluster_id": status.Seal.ClusterID, "role": string(status.Role), "leader": status.Leader, "alarm": alarm,
	}
}

func showKept(item cluster.MaterialStatus) map[string]any {
	if item.Err != nil {
		text := item.Err.Error()
		if errors.Is(item.Err, custody.ErrNotFound) {
			text = "it is not there: " + text
		}
		return map[string]any{"error": text}
	}
	return map[string]any{
		"error": "", "state": string(item.State), "generation": item.Generation, "key": item.Key, "key_version": item.Version,
		"rewrap_due": item.Version < item.LatestVersion, "hsms": item.HSMs, "store": item.Store, "updated": stamp(item.Updated),
	}
}
