package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"vault-plugin-secrets-nitrokey/internal/audit"
	"vault-plugin-secrets-nitrokey/internal/config"
	"vault-plugin-secrets-nitrokey/internal/custody"
	"vault-plugin-secrets-nitrokey/internal/store/file"
)

// The folder of the state directory with what is expected of the stores, generations and no secret, and the log of acts that
// lies there where the configuration names none.
const (
	materialDir  = "material"
	defaultAudit = "audit.log"
)

// keeper opens what keeps material, wrapping keys, stores and the records of this machine, the same one each time.
func (a *app) keeper() (*custody.Keeper, error) {
	if a.kept != nil {
		return a.kept, nil
	}
	config, err := a.keeperConfig()
	if err != nil {
		return nil, err
	}
	a.kept = custody.New(config)
	return a.kept, nil
}

func (a *app) keeperConfig() (custody.Config, error) {
	c, err := a.config()
	if err != nil {
		return custody.Config{}, err
	}
	keys, err := a.keyring() // which looks at the state directory
	if err != nil {
		return custody.Config{}, err
	}
	records, err := file.Open(filepath.Join(c.StateDir, materialDir))
	if err != nil {
		return custody.Config{}, fmt.Errorf("opening the records of material: %w", err)
	}
	a.onClose(records.Close)
	return custody.Config{
		Keys: keys, Stores: appStores{a}, Records: records, Logger: a.logger(),
		Shared: true, // other machines, with records of their own, write the same stores
		DefaultStore: func(context.Context) (string, error) {
			if len(c.Stores) == 1 {
				return c.Stores[0].Name, nil
			}
			return "", nil
		},
	}, nil
}

// audit opens the log of what is done to clusters and material, the same one each time.
func (a *app) audit() (*audit.Log, error) {
	if a.acts != nil {
		return a.acts, nil
	}
	c, err := a.config()
	if err != nil {
		return nil, err
	}
	var sinks []audit.Sink
	closeAll := func() error {
		var errs []error
		for _, sink := range sinks {
			errs = append(errs, sink.Close())
		}
		return errors.Join(errs...)
	}
	configured := auditsOf(c)
	if a.serving {
		configured = a.auditsOfServer(c)
	}
	for _, one := range configured {
		sink, err := openSink(one)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("%w: audit %q: %w", config.ErrInvalid, one.Kind, err), closeAll())
		}
		sinks = append(sinks, sink)
	}
	host, _ := os.Hostname() // a line without it is better than none
	log, err := audit.Open(audit.Options{Sinks: sinks, Host: host, Program: owner, Logger: a.logger(), OutcomesLater: a.serving})
	if err != nil {
		return nil, errors.Join(err, closeAll())
	}
	a.acts = log
	a.onClose(log.Close)
	return log, nil
}

// auditsOf are the sinks of a configuration: those that it names, else a file in the state directory.
func auditsOf(c *config.Config) []config.Audit {
	if len(c.Audits) > 0 {
		return c.Audits
	}
	return []config.Audit{{Kind: config.AuditFile, Path: filepath.Join(c.StateDir, defaultAudit)}}
}

// journalSocket is where systemd's journal takes lines.
const journalSocket = "/run/systemd/journal/socket"

// auditsOfServer are the sinks of the seal server. Unlike clusters in custody it writes lines all day, and nobody rotates a file that
// nobody asked for; systemd's journal bounds itself.
func (a *app) auditsOfServer(c *config.Config) []config.Audit {
	if len(c.Audits) > 0 {
		return c.Audits
	}
	if _, err := os.Stat(journalSocket); err == nil {
		return []config.Audit{{Kind: config.AuditJournal}}
	}
	usual := auditsOf(c)
	a.logger().Warn("every opening is written to a file in the state directory, which grows: have it rotated, or name another place by a block audit",
		"file", usual[0].Path)
	return usual
}

func openSink(configured config.Audit) (audit.Sink, error) {
	switch configured.Kind {
	case config.AuditFile:
		return audit.File(configured.Path)
	case config.AuditJournal:
		return audit.Journal()
	case config.AuditSyslog:
		return audit.Syslog(configured.Address)
	}
	return nil, errors.New("this version does not know it")
}
