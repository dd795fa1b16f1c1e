# Two commands for users, both safe to repeat and needing nothing done before them:  make run,  make test

PYTHON ?= $(shell python3 -c 'import os, sys; print(os.path.realpath(sys.executable))')
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements.lock

.PHONY: help run test test-host check bench fuzz fuzz-keep deps clean lock

help:
	@echo 'make run    start the stack and run a first container'
	@echo 'make test   every check and every test'
	@echo 'make test-host  pyx under systemd on a cgroup v2 host, in a virtual machine (five minutes)'
	@echo 'make check  the checks alone: ruff, mypy, import rules'
	@echo 'make bench  the benchmarks, beside docker and podman, redis-server and dbus-daemon where installed'
	@echo 'make fuzz   the bus under a coverage-guided fuzzer, a million inputs or ten minutes'

# System packages: a runtime, nftables and busybox to run; the tools that make test images to test.
deps:
	@deploy/install-packages run

$(BIN)/pyx: $(LOCK) pyproject.toml
	@deploy/install-packages python
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@# What a new environment comes with hooks itself into every start of the interpreter: 5 ms of each command.
	@$(BIN)/python -m pip uninstall -q -q -y --disable-pip-version-check setuptools
	@touch $@

run: deps $(BIN)/pyx
	@deploy/first-run

check: $(BIN)/pyx
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	@deploy/install-packages run test
	$(BIN)/pytest

test-host: $(BIN)/pyx
	@deploy/install-packages run host
	$(BIN)/pytest tests/host -s

bench: deps $(BIN)/pyx
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.bus

# What it finds new is kept in .fuzz, and what breaks a promise too; `make fuzz-keep` puts what adds to the coverage into the corpus.
fuzz: $(BIN)/pyx
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r tests/fuzz/requirements.lock
	@mkdir -p .fuzz/world .fuzz/parts
	$(BIN)/python -m tests.fuzz world -runs=700000 -max_total_time=420 -artifact_prefix=.fuzz/ .fuzz/world tests/fuzz/corpus/world
	$(BIN)/python -m tests.fuzz parts -runs=300000 -max_total_time=180 -artifact_prefix=.fuzz/ .fuzz/parts tests/fuzz/corpus/parts

fuzz-keep: $(BIN)/pyx
	$(BIN)/python -m tests.fuzz world -merge=1 -use_counters=0 tests/fuzz/corpus/world .fuzz/world
	$(BIN)/python -m tests.fuzz parts -merge=1 -use_counters=0 tests/fuzz/corpus/parts .fuzz/parts

# The lock is made for all supported Pythons at once, with hashes and no registry's address.
lock:
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --no-emit-find-links --extra dev -o $(LOCK) pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --no-emit-find-links --extra fuzz -c $(LOCK) -o tests/fuzz/requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .fuzz .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
