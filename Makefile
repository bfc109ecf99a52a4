# Everything runs in .venv, which each target sets up first if necessary.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

SOURCES := daemon dataset tests examples bench

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test torture check format bench build clean install-systemd uninstall-systemd

help: ## Show what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with the daemon, the dataset package and everything to develop them

# The stamp is written last, and a failed install removes its .venv, so that no incomplete one is left.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON) is older than Python 3.11; name a newer one: make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null \
	    || { echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv" >&2; exit 1; }
	rm -rf $(VENV)
	{ $(PYTHON) -m venv $(VENV) \
	    && $(BIN)/python -m pip install --quiet --upgrade pip \
	    && $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dataset,dev]' \
	    && touch $@; } || { rm -rf $(VENV); exit 1; }

demo: $(INSTALLED) ## Train a small network through a real daemon from a local GCS-speaking server
	$(BIN)/python examples/demo.py

# Tests wait for daemons, timeouts and disks for most of their time, so more of them run at a time than there are cores.
TEST_PROCESSES ?= 4

test: $(INSTALLED) ## Run every test
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadgroup

# The second command runs even if the first one has failed.
torture: $(INSTALLED) ## Run the long loops over faults and a soak, and print their results, for docs/reliability.md
	$(BIN)/python -m pytest -m torture; \
	    status=$$?; $(BIN)/python bench/soak.py --minutes 3 && exit $$status

check: $(INSTALLED) ## Check format, lint and types; change nothing
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy $(SOURCES)

# A missed target does not keep the others from being measured. All of it must fit in ten minutes. In full,
# `bench/origin_traffic.py` takes 13 minutes: `--quick` has the same runs over 700 items for 2,000, half of the epochs and one
# cache for five, in 70 s. `bench/restart.py` takes 5 minutes in full, `bench/listing.py` 2 and `bench/plan.py` 1.
bench: $(INSTALLED) ## Measure: origin traffic, listing, fill, cold and warm epochs, waiting, restart; takes about nine minutes
	-$(BIN)/python bench/origin_traffic.py --quick
	-$(BIN)/python bench/listing.py --pairs 250000 --plot docs/listing.png
	-$(BIN)/python bench/fill.py --plot docs/fill.png
	-$(BIN)/python bench/cold.py --plot docs/cold.png
	-$(BIN)/python bench/warm.py --plot docs/warm.png
	-$(BIN)/python bench/stall.py --plot docs/stall.png
	-$(BIN)/python bench/plan.py --items 1000000
	-$(BIN)/python bench/restart.py --objects 200000 --plot docs/restart.png

format: $(INSTALLED) ## Format the sources in place
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

build: $(INSTALLED) ## Build the wheel and the source distribution into dist/
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean: ## Remove .venv, caches and build outputs
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# The daemon in a virtual environment of its own in PREFIX, its unit, user, example configuration and a link in
# /usr/local/bin. Run it again to upgrade. DESTDIR stages all of it somewhere else.
PREFIX ?= /opt/gcs-prefetchd
DESTDIR ?=

install-systemd: ## Install the daemon as a systemd service, as root
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' PYTHON='$(PYTHON)' systemd/install.sh install

uninstall-systemd: ## Remove the service; keep its configuration and cache
	DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' systemd/install.sh uninstall
