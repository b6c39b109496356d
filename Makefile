# Every command that anyone types; CI calls only these. `make` alone lists them.
.DEFAULT_GOAL := help
SHELL := /bin/sh
.SUFFIXES:

CARGO  ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
# State of `make run`; keep it and the next run goes on with the same authority.
DIR    ?= $(TARGET)/mesh
# State of `make cluster-up`.
CLUSTER ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/malha/cluster
# Handed on: make run ARGS=--once, make test ARGS=rooms, make bench ARGS=inject
ARGS   ?=

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z][a-z-]*:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -- what must be there first; each line says how to get it --

# $(call need,PROGRAM,PACKAGES): root on Debian gets the packages at once, everybody else is told the command.
define need
@command -v $(1) >/dev/null 2>&1 || { $(call get,$(1),$(2)); }
endef

# $(call need-header,HEADER,PACKAGES): the same for a library.
define need-header
@echo '#include <$(1)>' | cc -E -o /dev/null - 2>/dev/null || { $(call get,$(1),$(2)); }
endef

get = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
		echo "make: installing $(2)" >&2; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) >/dev/null; \
	else \
		echo "make: $(1) is needed: apt-get install $(2), or your system's like" >&2; exit 1; \
	fi

.PHONY: needs-rust needs-go needs-clients needs-node needs-envoy needs-strip needs-namespaces
needs-rust:
	@command -v $(CARGO) >/dev/null 2>&1 || { echo "make: Rust 1.89 or later is needed: curl --proto '=https' -sSf https://sh.rustup.rs | sh" >&2; exit 1; }
	$(call need,cc,gcc libc6-dev)

needs-go:
	@command -v go >/dev/null 2>&1 || { echo "make: Go 1.26 or later is needed to build the test cluster's programs: https://go.dev/dl" >&2; exit 1; }

# runc is built with libseccomp, kube-proxy speaks through nft, and the images of the rig hold a busybox of one file. A
# library has no program to look for: its package is asked for by the header.
needs-node:
	$(call need,cc,gcc libc6-dev)
	$(call need,python3,python3)
	$(call need,nft,nftables)
	$(call need,ip,iproute2)
	$(call need,busybox,busybox-static)
	$(call need,curl,curl ca-certificates)
	$(call need,openssl,openssl)
	$(call need,tcpdump,tcpdump)
	$(call need-header,seccomp.h,libseccomp-dev)

needs-strip:
	$(call need,strip,binutils)

needs-envoy:
	@[ -n "$(MALHA_ENVOY)" ] || tests/support/envoy --where >/dev/null 2>&1 || python3 -m pip --version >/dev/null 2>&1 || { \
		$(call get,python3 -m pip,python3 python3-pip); }

needs-clients:
	$(call need,curl,curl ca-certificates)
	$(call need,openssl,openssl)

# The redirection is tested in network namespaces, which takes root; without it those tests say that they are skipped.
needs-namespaces:
ifeq ($(shell id -u),0)
	$(call need,nft,nftables)
	$(call need,ip,iproute2)
	$(call need,setcap,libcap2-bin)
	$(call need,python3,python3)
endif

# -- use --

.PHONY: build run
build: needs-rust ## Build the three programs into target/debug
	$(CARGO) build --locked

run: needs-rust needs-clients ## Start a control plane here and watch it work (no cluster, no root); ARGS=--once ends after it
	@$(CARGO) build --locked --bin malha
	@$(TARGET)/debug/malha tour --dir $(DIR) $(ARGS)

# Asked before minutes of building.
.PHONY: needs-root cluster-up cluster-down
needs-root:
	@[ "$$(id -u)" = 0 ] || { echo "make: root is needed: a node is made of namespaces, mounts and cgroups of its own (sudo -E make $(MAKECMDGOALS))" >&2; exit 1; }

cluster-up: needs-root rig ## Start a Kubernetes of one node on this machine (root, no Docker); NODES=2 for two
	@tests/cluster/node/up $(CLUSTER)
	@echo "# or: $(CLUSTER)/kubectl get pods -A        'make cluster-down' removes it"

cluster-down: ## Remove it without a trace
	@tests/cluster/node/down $(CLUSTER)

# On debug programs unless told otherwise: the same code in a fraction of the building.
.PHONY: demo demo-down
demo: needs-root rig ## Malha on a Kubernetes of this machine, shown: identities, a refused plaintext call (root)
	@$(MAKE) --no-print-directory image PROFILE=dev
	@demo/run $(CLUSTER) $(TARGET)/images/dev $(TARGET)/debug/malha

demo-down: cluster-down ## Remove it without a trace

.PHONY: release certs
release: needs-rust ## Build the programs as they ship into target/release (slow)
	$(CARGO) build --locked --release

# The control plane and the init container are static, the agent too: only Envoy needs a libc. With a --target of its own,
# because build scripts and macros cannot be static.
STATIC := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
# release, or dev: programs with debug assertions and without optimisation, for a quick turn.
PROFILE ?= release

.PHONY: image
ifeq ($(PROFILE),dev)
image: needs-rust needs-envoy needs-strip ## Build the images malha, malha-init, malha-proxy as OCI archives (PROFILE=dev: quickly)
	$(CARGO) build --locked --bins
	images/build --programs $(TARGET)/debug --envoy $$(tests/support/envoy) --out $(TARGET)/images/dev
else
# Addresses that the loader of a static program moves, packed: 0.3 MB of the agent, 0.8 MB of the control plane.
image: export RUSTFLAGS := -C target-feature=+crt-static -C link-arg=-Wl,-z,pack-relative-relocs
image: needs-rust needs-envoy
	$(CARGO) build --locked --release --target $(STATIC) --bin malha
	$(CARGO) build --locked --profile agent --target $(STATIC) --no-default-features --features agent --bin malha-agent
	$(CARGO) build --locked --profile agent --target $(STATIC) --no-default-features --bin malha-init
	images/build --release --programs $(TARGET)/$(STATIC)/release $(TARGET)/$(STATIC)/agent --envoy $$(tests/support/envoy) --out $(TARGET)/images/release
endif

certs: needs-rust ## Make development certificates in certs/dev
	$(CARGO) run --locked --quiet --example certs $(ARGS)

# -- check --

.PHONY: test test-unit test-cluster test-node soak rig
test: test-unit test-cluster test-node ## Run every test, from nothing

test-unit: needs-rust needs-clients needs-namespaces needs-envoy ## Run the tests that need no cluster
	@tests/support/envoy >/dev/null
	$(CARGO) test --locked --lib --bins --test it $(ARGS)
	$(CARGO) test --locked --doc $(ARGS)

# A node with pods keeps both cores busy, and bounds that the others hold to (a second) would not be theirs any more.
ON_NODE = installed:: mesh:: on_a_node
test-cluster: needs-rust needs-clients rig ## Run the tests on a real API server without a node
	$(CARGO) test --locked --test cluster $(ARGS) -- $(foreach it,$(ON_NODE),--skip $(it))

# The second run's tests take away what others need: one after the other, on a node that they have for themselves.
ALONE = alone:: lifecycle::on_a_node --ignored --test-threads=1
test-node: needs-rust needs-clients rig ## Run the tests on a real node with pods (root)
	$(CARGO) test --locked --test cluster -- $(or $(ARGS),$(ON_NODE))
	$(if $(ARGS),,$(CARGO) test --locked --test cluster -- $(ALONE))

soak: needs-rust needs-clients rig ## Renew every leaf every ten seconds for ten minutes under load, and take parts away (root)
	MALHA_SOAK_SECONDS=600 $(CARGO) test --locked --test cluster -- $(ALONE) --nocapture

# A node needs root, so whoever is not root gets the programs of a cluster without nodes.
ifeq ($(shell id -u),0)
rig: needs-go needs-node needs-envoy ## Build Kubernetes and get Envoy for the tests, into the cache (once)
	@tests/cluster/programs/build >/dev/null
	@tests/cluster/programs/promtool/build >/dev/null
	@tests/support/envoy >/dev/null
else
rig: needs-go needs-envoy
	@tests/cluster/programs/build cluster >/dev/null
	@tests/cluster/programs/promtool/build >/dev/null
	@tests/support/envoy >/dev/null
endif

.PHONY: lint fmt doc deny golden crds dashboards proto
lint: needs-rust ## Format, clippy and documentation without a warning
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -Dwarnings
	RUSTDOCFLAGS=-Dwarnings $(CARGO) doc --locked --no-deps --quiet

fmt: needs-rust ## Format the code
	$(CARGO) fmt

doc: needs-rust ## Build the documentation of the rooms; target/doc/malha/index.html
	$(CARGO) doc --locked --no-deps --document-private-items

deny: needs-rust ## Check every crate's licence, source, doubles and known faults
	@$(CARGO) deny --version >/dev/null 2>&1 || { echo "make: cargo-deny is needed: cargo install --locked cargo-deny" >&2; exit 1; }
	$(CARGO) deny --all-features check bans licenses sources
	@if $(CARGO) deny --all-features fetch db >/dev/null 2>&1; then \
		$(CARGO) deny --all-features check --disable-fetch advisories; \
	else \
		echo "make: KNOWN FAULTS WERE NOT CHECKED: https://github.com/RustSec/advisory-db cannot be fetched from here" >&2; \
	fi

golden: needs-rust ## Write the golden files anew; read the difference like code
	SNAPSHOTS=overwrite TRYCMD=overwrite $(CARGO) test --locked --lib --test it $(ARGS)

crds: needs-rust ## Write manifests/crds anew from src/mesh/crd.rs
	$(CARGO) run --locked --quiet --example crds

dashboards: needs-rust ## Write manifests/monitoring/dashboards anew from dashboards.rs beside them
	$(CARGO) run --locked --quiet --example dashboards

proto: needs-rust ## Write src/proto anew from proto/
	$(CARGO) run --locked --quiet --example proto

.PHONY: fuzz
# Seconds for each target.
SECONDS ?= 60
fuzz: needs-rust needs-clients ## Search for input that breaks what reads it; SECONDS=60 each, ARGS=jwks for some of them
	$(call need,c++,g++)
	@fuzz/run $(SECONDS) $(ARGS)

.PHONY: bench bench-mesh manifests clean
bench: needs-rust ## Measure; one line a figure: bench <name> <value> <unit>
	$(CARGO) bench --locked --bench figures -- $(ARGS)

bench-mesh: rig image ## Measure what two sidecars add to a call, and how soon a change is in effect (root; some minutes)
	MALHA_IMAGES=$(TARGET)/images/release $(CARGO) test --locked --test cluster bench_ -- --ignored --nocapture --test-threads=1

# With the kubectl of the test cluster, so that everybody's renders alike.
KUBECTL = $$(tests/cluster/programs/build --where cluster | sed -n 's/^kubectl //p')
manifests: needs-go ## Write manifests/*.yaml anew from manifests/base, the overlay ha and manifests/monitoring
	@tests/cluster/programs/build cluster >/dev/null
	@for form in install:base install-ha:overlays/ha monitoring:monitoring; do \
		{ echo "# Written by \`make manifests\` from manifests/$${form#*:}; change that instead."; \
		$(KUBECTL) kustomize "manifests/$${form#*:}"; } > "manifests/$${form%%:*}.yaml" || exit 1; \
	done

clean: ## Remove what the build made, the state of `make run` included
	$(CARGO) clean
