# `make` or `make help` lists what there is. Everything a target needs it gets by itself, through scripts/.
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PLUGIN  := vault-plugin-secrets-nitrokey
COMMAND := nitroseal
# A version of Vault's catalog must be semantic and start with "v": the newest tag, else the default of the source.
VERSION ?= $(shell git describe --tags --match 'v[0-9]*' --dirty 2>/dev/null || echo v0.0.0-dev)
LDFLAGS := -X vault-plugin-secrets-nitrokey/backend.Version=$(VERSION) -X main.version=$(VERSION)
GO      ?= go
# Seconds that each fuzz target runs: a short look in `make test`, longer by hand: make fuzz FUZZ_SECONDS=600
FUZZ_SECONDS ?= 5
# Narrows `make test`: make test PACKAGES=./internal/... TESTFLAGS='-run Envelope -v'
# The longest come first, so that the others run beside them.
PACKAGES  ?= ./test ./cmd/... ./test/... ./...
TESTFLAGS ?=

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  \033[1m%-12s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## see it work: a real Vault, a software HSM, an etcd; cleans up after itself
	@scripts/setup demo
	@scripts/demo run

.PHONY: demo-nethsm
demo-nethsm: ## the same with a NetHSM double: two nodes over TLS, an etcd over mutual TLS, a node that fails, one that restarts
	@scripts/setup demo
	@scripts/demo-nethsm

.PHONY: demo-custody
demo-custody: ## see three Vaults initialised, cut off from power and unsealed again, rekeyed, drilled
	@scripts/setup demo
	@scripts/demo-custody

.PHONY: demo-seal
demo-seal: ## see a Vault that unseals itself by an HSM: power cut, rotation, a lease, a stolen token
	@scripts/setup demo
	@scripts/demo-seal

.PHONY: dev
dev: ## the same, left running for you to play with; prints how to talk to it
	@scripts/setup demo
	@scripts/demo stay

.PHONY: dev-stop
dev-stop: ## end what `make dev` left running
	@scripts/demo stop

.PHONY: build
build: ## build bin/vault-plugin-secrets-nitrokey and bin/nitroseal
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/$(PLUGIN) ./cmd/$(PLUGIN)
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/$(COMMAND) ./cmd/$(COMMAND)

.PHONY: test
test: ## test everything with the race detector: unit, SoftHSM, etcd, Vault, short fuzz runs
	@scripts/setup test
	$(GO) vet ./...
	CGO_ENABLED=0 $(GO) build ./...
	$(GO) test -race -timeout 40m $(TESTFLAGS) $(PACKAGES)
	@scripts/fuzz $(FUZZ_SECONDS)

.PHONY: unit
unit: ## the quick part of the tests: no race detector, no Vault, no fuzzing
	@scripts/setup test
	$(GO) test -timeout 5m $(TESTFLAGS) $$($(GO) list ./... | grep -v '/test')

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZ_SECONDS each
	@scripts/fuzz $(FUZZ_SECONDS)

.PHONY: lint
lint: ## check style, mistakes and who may import whom
	@scripts/lint

.PHONY: bench
bench: ## measure, print the table and write it to docs/benchmarks.md (about 6 minutes)
	@scripts/setup test
	$(GO) test -run '^$$' -bench '^BenchmarkTable$$' -benchtime 1x -timeout 30m ./test/bench -args -out $(CURDIR)/docs/benchmarks.md

.PHONY: vuln
vuln: ## look for known vulnerabilities; asks the database at vuln.go.dev, so it needs the internet
	$(GO) run golang.org/x/vuln/cmd/govulncheck@v1.9.0 ./...

.PHONY: clean
clean: ## remove what was built here; built tools stay in ~/.cache/nitroseal-tools
	rm -rf bin dist
