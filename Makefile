# livebackup: `make help` says what there is. Needs Debian 12, a Rust toolchain (1.90 or later) and make; what else is
# needed is installed from Debian by tests/setup.sh (as root; otherwise it says what to install).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test bench bench-throughput bench-write-overhead lint cargo
CARGO ?= cargo
SCRIPTS := tests/setup.sh tests/guest/build.sh tests/guest/build-db.sh tests/guest/setup-db tests/guest/init-db demo/run.sh .ci/run

help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-20s %s\n", $$1, $$2}' Makefile

demo: cargo ## back up and restore a running guest, in one process and over TCP, and prove what was restored (about 2 minutes)
	tests/setup.sh --packages
	$(CARGO) build --release --locked
	demo/run.sh

test: cargo ## all checks and tests, on real QEMUs of two versions
	tests/setup.sh
	$(MAKE) --no-print-directory lint
	tests/guest/build.sh
	tests/guest/build-db.sh
	RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$$(( $$(nproc) * 3 ))} $(CARGO) test --locked --no-fail-fast # most of them wait most of the time

lint: cargo ## formatting, clippy, scripts
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	for script in $(SCRIPTS); do bash -n "$$script"; test -x "$$script"; done
	busybox sh -n tests/guest/init
	python3 -c 'import ast; ast.parse(open("demo/guest.py").read())'
	@command -v shellcheck >/dev/null || { echo "shellcheck is missing: run tests/setup.sh"; exit 1; }
	shellcheck $(SCRIPTS)

bench: cargo ## measure (release): the parts, then all of it beside QEMU's own means
	tests/setup.sh --packages
	$(CARGO) bench --locked --benches
	$(MAKE) --no-print-directory bench-throughput
	bench/tracking.py
	$(MAKE) --no-print-directory bench-write-overhead

bench-throughput: cargo ## only the latter (about 15 minutes); writes bench/RESULTS.md and its picture
	tests/setup.sh --bench
	$(CARGO) build --release --locked
	bench/throughput.py

bench-write-overhead: cargo ## what backups cost a guest's writes, by method, workload and reader (about 20 minutes); writes bench/WRITE-OVERHEAD.md
	tests/setup.sh --packages
	$(CARGO) build --release --locked
	mkdir -p target/bench
	"$${CARGO_TARGET_DIR:-target}/release/livebackup" bench write-overhead --workload all --seconds 3 \
	  --reader-rate unlimited --reader-rate 100M --markdown bench/WRITE-OVERHEAD.md \
	  --html target/bench/write-overhead.html --json-file target/bench/write-overhead.json

cargo:
	@command -v $(CARGO) >/dev/null || { echo "$(CARGO) is missing: install Rust 1.90 or later (https://rustup.rs), then try again"; exit 1; }
