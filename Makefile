# `make help` lists what there is. Every target does its own set-up.

CARGO ?= cargo
# Here and in the README binaries are in ./target.
unexport CARGO_TARGET_DIR

.DEFAULT_GOAL := help
.PHONY: help run test test-page test-api test-compose check bench up update down logs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## run the whole pipeline on this machine (options: make run ARGS="--http 127.0.0.1:9090")
	$(CARGO) build --locked --release --workspace --bins
	@server="$$(nats/install)" && exec target/release/evenodd up --nats-server "$$server" $(ARGS)

test: ## run all tests, against real nats-servers
	@nats/install >/dev/null
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --workspace

test-page: ## test the page in a real browser (needs chromium and chromium-driver)
	@nats/install >/dev/null
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --package tests --test e2e -- --ignored page::

test-api: ## hold the HTTP API against its description, with schemathesis
	@nats/install >/dev/null
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --package tests --test e2e -- --ignored api::

test-compose: ## test the cluster in real containers (needs Docker, root, ports 8080 and 4222; steps: ARGS="kills cuts")
	$(CARGO) test --locked --package tests --test compose -- $(ARGS)

check: test ## everything that CI checks: format, clippy, tests, documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items

bench: ## measure the steps of a tick and the gateway here (with wrk and nginx, if there are any)
	@nats/install >/dev/null
	$(CARGO) bench --locked --package tests

up: ## build and start the cluster in containers: http://127.0.0.1:8080/
	docker compose up --build --detach

update: ## replace the services of the cluster by a new version, without a pause (back: ARGS=evenodd:previous)
	deploy/update $(ARGS)

down: ## stop it; the history stays in its volumes
	docker compose down

logs: ## follow what its containers log
	docker compose logs --follow --tail 20

clean: ## remove what was built; the history in ./data stays
	$(CARGO) clean
	rm -rf nats/bin
