# `make test` and `make demo` do all the set-up on a fresh clone. Everything that they install
# into Python lies in .venv, at the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2# test processes
ROOMS := fedmoe server client simulations

# One thread each: tests and clients run side by side. No news to or from anybody.
export OMP_NUM_THREADS := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

# Debian's package, or a folder that the user names, or the package unpacked here without root.
LOCAL_DATA := .data/fashion-mnist
DATA := $(or $(FEDMOE_FASHION_MNIST),$(patsubst %/train-images-idx3-ubyte.gz,%,$(firstword \
	$(wildcard $(addsuffix /train-images-idx3-ubyte.gz,/usr/share/datasets/fashion-mnist $(LOCAL_DATA))))))
BROWSER := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
# Package lists are fetched once, and only if something is missing.
APT := $(shell command -v apt-get)
ROOT := $(filter 0,$(shell id -u))
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

.DEFAULT_GOAL := help
.PHONY: help venv data browser lint test quick demo clean lists

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

test: venv data browser lint ## set up; check style and types; run all tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup

quick: venv ## the tests that take milliseconds
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(JOBS) -m "not slow and not browser"

demo: venv data ## set up; run the demonstration and say where its report is
	@$(BIN)/python -m fedmoe.data.fashion
	$(BIN)/fedmoe run demo

lint: venv ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy $(foreach room,$(ROOMS),$(if $(wildcard $(room)/*.py),-p $(room)))

venv: $(VENV)/.installed ## fedmoe and its tools in .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit( \
		"fedmoe needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d: make PYTHON=python3.11" % v)'
	@# Debian's own Python comes without what makes an environment.
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { [ -n "$(ROOT)" ] && [ -n "$(APT)" ] \
		&& apt-get update -qq && $(APT_INSTALL) python3-venv; } || \
		{ echo "$(PYTHON) cannot make environments: install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

data: $(if $(DATA),,lists) ## Fashion-MNIST, 31 MB
ifeq ($(DATA),)
ifneq ($(ROOT),)
	@$(if $(APT),$(APT_INSTALL) dataset-fashion-mnist >/dev/null || true)
else
	@# Without root the package can still be fetched and unpacked.
	@$(if $(APT),mkdir -p .data && cd .data && apt-get download -qq dataset-fashion-mnist \
		&& dpkg-deb -x dataset-fashion-mnist_*.deb unpacked \
		&& mv unpacked/usr/share/datasets/fashion-mnist fashion-mnist; \
		rm -rf unpacked dataset-fashion-mnist_*.deb)
endif
	@[ -f /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ] \
		|| [ -f $(LOCAL_DATA)/train-images-idx3-ubyte.gz ] || { printf '%s\n' \
		"Fashion-MNIST is not here, and there is no package of it for this machine. Either" \
		"  1. as root on Debian or Ubuntu: apt-get install dataset-fashion-mnist," \
		"  2. set FEDMOE_FASHION_MNIST to a folder with its four files, or" \
		"  3. with network, run without it: it comes from the Hugging Face hub." >&2; \
		[ "$(CI)" != true ]; }
endif

browser: $(if $(BROWSER),,lists) ## Chromium, for the tests of the report
ifeq ($(BROWSER),)
	@$(if $(and $(ROOT),$(APT)),$(APT_INSTALL) chromium >/dev/null || true)
	@command -v chromium >/dev/null || { \
		echo "no Chromium: the tests of the report are skipped; install the package chromium" >&2; \
		[ "$(CI)" != true ]; }
endif

lists:
	@$(if $(and $(ROOT),$(APT)),apt-get update -qq || true)

clean: ## remove what make and the tests have made
	rm -rf $(VENV) .data build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
