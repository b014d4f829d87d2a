# make            set up the environment in .venv (once)
# make demo       train and evaluate a small model on real text; TEXT=directory-or-file: on your own documents
# make test       check the code (make lint) and run the tests
# make lint       check rules and format with ruff
# make clean      remove the output of demo and tests; keep the environment
# make distclean  remove the environment too
# make help       print this text
#
# PYTHON=python3.12   Python (3.11 or 3.12) used to create the environment
# VENV=.venv          directory of the environment
# FAISS=cpu|gpu       build of faiss; default: gpu if nvidia-smi finds a GPU, else cpu
# WORKERS=2           number of test processes
# PYTEST_ARGS="-k x"  further options of pytest

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
ifndef FAISS
FAISS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
endif
ifeq ($(filter cpu gpu,$(FAISS)),)
$(error FAISS=$(FAISS) is unknown: set FAISS=cpu or FAISS=gpu)
endif

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed-$(FAISS)
TORCH := $(shell sed -n 's/^TORCH = "\(.*\)"/\1/p' setup.py)
NUMPY := $(shell sed -n 's/^NUMPY = "\(.*\)"/\1/p' setup.py)
FAIRSEQ := $(shell sed -n 's/^FAIRSEQ = "\(.*\)"/\1/p' setup.py)

.PHONY: env demo test lint clean distclean help

env: $(STAMP)

demo test lint: export PATH := $(BIN):$(PATH)

demo: export TEXT ?=
demo: env
	bash examples/quickstart.sh

# One thread per process, because the tests are many small processes. Tests are distributed by file, so that the
# fixtures of a file are made once; the longest files start first (tests/conftest.py).
test: lint
	OMP_NUM_THREADS=1 python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS) tests

lint: env
	ruff check .
	ruff format --check .

# fairseq requires torchaudio, for a metric of its speech tasks. None is made for this torch: the newest (2.11) needs CUDA's
# libraries, fails to load beside torch's CPU build, and takes transformers' models along, which import it if it is there.
#
# fairseq is compiled against the torch and numpy of the environment. With pip's build isolation it would first download
# a second torch of several GB, and with CUDA_HOME set it would compile CUDA extensions that are not used. pip caches the
# wheel, so that the next environment needs seconds.
$(STAMP): setup.py Makefile $(wildcard longmem_fairseq/memory/search/native_search*)
	@if [ ! -x "$(BIN)/pip" ]; then \
	  version=$$("$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || { \
	    echo "PYTHON=$(PYTHON) does not run: set it to Python 3.11 or 3.12, make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	  case $$version in 3.11|3.12) ;; *) \
	    echo "PYTHON=$(PYTHON) is Python $$version, but $(FAIRSEQ) needs 3.11 or 3.12: make PYTHON=/path/to/python3.12" >&2; \
	    exit 1;; esac; \
	  echo "[1/4] Python $$version environment in $(VENV)"; \
	  "$(PYTHON)" -m venv --clear "$(VENV)"; \
	fi
	@command -v $(firstword $(CXX)) >/dev/null || { \
	  echo "CXX=$(CXX) is not a C++ compiler here, and fairseq is compiled: install one (Debian, Ubuntu: g++) or set make CXX=..." >&2; \
	  exit 1; }
	@echo '#include <Python.h>' | $(CXX) -fsyntax-only -x c++ \
	  -I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" - 2>/dev/null || { \
	  echo "CXX=$(CXX) does not find this Python's Python.h, and fairseq is compiled: install it (Debian, Ubuntu: python3-dev)" >&2; \
	  exit 1; }
	@rm -f $(VENV)/.installed-*
	@echo "[2/4] $(TORCH) and $(NUMPY) (a download of 0.2 to 3 GB, once)"
	@$(PIP) install --quiet "$(TORCH)" "$(NUMPY)" cython setuptools wheel
	@echo "[3/4] $(FAIRSEQ) (compiled, once: about 3 minutes)"
	@env -u CUDA_HOME $(PIP) install --quiet --no-build-isolation "$(FAIRSEQ)"
	@echo "[4/4] longmem_fairseq with faiss-$(FAISS)"
	@$(PIP) -qq uninstall --yes $(if $(filter gpu,$(FAISS)),faiss-cpu,faiss-gpu)
	@$(PIP) install --quiet --no-build-isolation --editable ".[$(FAISS),dev]"
	@$(PIP) -qq uninstall --yes torchaudio
	@errors=$$($(BIN)/python -c "import faiss, torch, fairseq.data.data_utils_fast; from transformers import GPT2LMHeadModel" 2>&1) || { echo "$$errors" >&2; exit 1; }
	@touch $@
	@echo "ready: source $(VENV)/bin/activate"

clean:
	rm -rf demo build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf "$(VENV)"

help:
	@sed -n '/^# make /,/^$$/s/^# \{0,1\}//p' Makefile
