# `make demo` and `make test` build .venv first, as all targets do, and touch nothing outside the checkout.

# The lock was made with Python 3.11, so that comes first. Each candidate is run: pyenv has names for versions that it lacks.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$name -c "$(SUPPORTED)" 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
STAMP := $(VENV)/.installed
LOCK := tools/lock/requirements.txt
FRESH := .cache/lock-venv
PLATFORMS := linux darwin win32

# Caches of the libraries stay inside the checkout too.
export HF_HOME := $(CURDIR)/.cache/huggingface
export XDG_CACHE_HOME := $(CURDIR)/.cache

.PHONY: demo test test-arm64 lint format docs lock dist audit setup clean

demo: $(STAMP)
	$(BIN)/qat-edge demo

# A process a core, up to four, each with one thread: with more they would wait for one another.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not arm64"

# On ARM instructions, under qemu: minutes, and the first time 3 GB of packages into .cache/arm64.
test-arm64: $(STAMP)
	tests/devices/install-arm64
	$(BIN)/python -m pytest -m arm64 tests/devices

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	for platform in $(PLATFORMS); do \
		$(BIN)/mypy --platform $$platform --cache-dir .mypy_cache/$$platform || exit 1; done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The generated pages first, then the site, into site/. Offline; a broken link is an error.
docs: $(STAMP)
	$(BIN)/python tools/write_api.py
	$(BIN)/python tools/write_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Resolves pyproject.toml in an empty environment. A local version, such as torch's "+cpu", depends on the machine.
lock:
	rm -rf $(FRESH)
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install --quiet --upgrade pip
	$(FRESH)/bin/python -m pip install --quiet --editable ".[dev]"
	$(FRESH)/bin/python -m pip uninstall --quiet --yes qat-edge
	$(FRESH)/bin/python -m pip freeze | sed 's/+cpu$$//' > $(LOCK)
	$(FRESH)/bin/cyclonedx-py environment --output-reproducible --spec-version 1.6 --validate \
		--output-file tools/lock/sbom.cdx.json $(FRESH)
	rm -rf $(FRESH)

# A wheel and an sdist, into dist/, checked as PyPI would.
dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

# --strict: a package that cannot be looked up is an error, not a pass.
audit: $(STAMP)
	$(BIN)/pip-audit --strict --no-deps --disable-pip --requirement $(LOCK)

setup: $(STAMP)

$(STAMP): pyproject.toml $(LOCK)
	$(if $(PYTHON),,$(error No Python 3.11, 3.12, 3.13 or 3.14 found. Install one, or name it: make PYTHON=/path/to/python3.11))
	@echo "Setting up $(VENV): about 2 GB of packages, a minute or more"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .cache dist runs site
