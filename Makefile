# Two commands do all the set-up: `make demo` (environment, build, the main job) and `make test`.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
PIP_OPTIONS ?=

VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-runtime
TEST := $(VENV)/.installed-test
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.*pp)

# Not compiled to bytecode at install: most of torch is never imported, and the rest is at first use.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile -c constraints.txt $(PIP_OPTIONS)

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
BUILD_NEEDS := import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')

.DELETE_ON_ERROR:
.PHONY: help env demo test lint sanitize faults clean

help:
	@echo "make demo      environment, build, and the whole pipeline on text found on this machine"
	@echo "make test      environment with the test tools, lint, tests"
	@echo "make env       the environment with the test tools, in $(VENV)"
	@echo "make lint      ruff and mypy"
	@echo "make sanitize  the C++ core under the sanitizers for memory and threads (part of make test)"
	@echo "make faults    the whole fault suite: kills, hangs, full disks, damage; half an hour"
	@echo "make clean     remove what the build wrote, but not $(VENV)"

env: $(TEST)

demo: $(RUNTIME)
	$(BIN)/regmix-fast demo

test: export REGMIX_REQUIRE_NATIVE := 1
test: $(TEST)
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2

lint: $(TEST)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

sanitize: $(TEST)
	$(BIN)/python -m pytest tests/test_native.py

faults: $(TEST)
	rm -rf build/faults
	$(BIN)/python -m regmix_bench.faults --out build/faults --json build/faults.jsonl --table build/faults.md

clean:
	rm -rf build dist *.egg-info regmix/*.so regmix/*.pyd

# Build isolation would fetch the build tools into a second environment for every install.
define install
	@test -x $(BIN)/pip || $(PYTHON) -c "$(SUPPORTED)" || \
		{ echo "$$($(PYTHON) -V) cannot run regmix-fast: name another, make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || { echo "Making the environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing $(1) into $(VENV)"
	@$(BIN)/python -c "$(BUILD_NEEDS)" > $(VENV)/build-requires.txt
	@$(PIP) -r $(VENV)/build-requires.txt
	@$(PIP) --no-build-isolation -e "$(1)"
endef

$(RUNTIME): $(SOURCES)
	$(call install,.)
	@touch $@

$(TEST): $(SOURCES)
	$(call install,.[test$(comma)lint])
	@touch $(RUNTIME) $@

comma := ,
