# `make help` lists the targets. Each target does its own set-up.

CARGO ?= cargo
# The paths below and in the README expect the binaries in ./target.
unexport CARGO_TARGET_DIR

.DEFAULT_GOAL := help
.PHONY: help run test test-page test-api test-compose check bench up update down logs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## run the whole pipeline on this machine (its options: make run ARGS=--help)
	@nats/install >/dev/null
	$(CARGO) build --locked --release --workspace --bins
	@server="$$(nats/install)" && exec target/release/evenodd up --nats-server "$$server" $(ARGS)

test: ## run all tests, against real nats-servers
	@nats/install >/dev/null
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --workspace --lib --bins --tests

test-page: ## test the page in a real browser (needs chromium and chromium-driver)
	@nats/install >/dev/null
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --package tests --test e2e -- --ignored page::

test-api: ## compare the HTTP API with its description, with schemathesis
	@nats/install >/dev/null
	$(CARGO) build --locked --workspace --bins
	$(CARGO) test --locked --package tests --test e2e -- --ignored api::

test-compose: ## test the cluster in real containers (needs Docker, root, ports 8080 and 4222; only some steps: ARGS="kills cuts")
	$(CARGO) test --locked --package tests --test compose -- $(ARGS)

check: test ## make test, and check format, clippy and documentation (.ci/run runs more)
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS="--deny warnings" $(CARGO) doc --locked --workspace --no-deps --document-private-items

bench: ## measure the steps of a tick, and the gateway (against nginx if wrk and nginx are installed)
	@nats/install >/dev/null
	$(CARGO) bench --locked --package tests

up: ## build and start the cluster in containers: http://127.0.0.1:8080/
	docker compose up --build --detach

update: ## update the services of the cluster without a pause (to go back: ARGS=evenodd:previous)
	deploy/update $(ARGS)

down: ## stop the cluster; the history stays in its volumes
	docker compose down

logs: ## follow the logs of the cluster
	docker compose logs --follow --tail 20

clean: ## remove all build output and the downloaded nats-server; the history in ./data stays
	$(CARGO) clean
	rm -rf nats/bin
