# Everything a user or contributor runs. Each target sets up .venv first, when it is missing or out of date.
#
#   make setup PYTHON=python3.12                                     another Python (3.11 or newer)
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu      the small CPU build of torch
#   make setup PIP_ARGS="--proxy http://localhost:3128"              anything else that pip takes
#   make stage1 MODEL=longllava-9b NPROC=8 SET="init_from.backbone=FOLDER"      another model, on 8 GPUs
#   make stage1 PRESET=smoke                                         seconds instead of minutes
#   make stage1 SET="phases.0.steps=50 seed=7"                        any key of the stage's YAML

PYTHON ?= python3
PIP_ARGS ?=
TORCH_INDEX ?=
MODEL ?= nano
NPROC ?= 1
PRESET ?=
SET ?=
IMAGES ?= 1000
WORKERS ?= 2
N ?= 20

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
LIBRARY := longllava/lib/liblongllava_cpu.so
PIP := $(RUN) -m pip install --disable-pip-version-check -c constraints.txt \
       $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $(PIP_ARGS)
OVERRIDES := $(if $(PRESET),preset=$(PRESET)) $(SET)
ifeq ($(NPROC),1)
TRAIN := $(RUN) -m longllava train
else
TRAIN := $(VENV)/bin/torchrun --standalone --nproc-per-node=$(NPROC) -m longllava train
endif

.PHONY: help setup demo test test-triton test-long kill-test fuzz sanitize check foundation stage1 stage2 stage3 bench clean
# stage1 stage2 stage3: each starts from what the one before it has written, whatever -j says.
.NOTPARALLEL:

help:           ## this list
	@awk -F ' *## ' '/^[a-z0-9-]+:.*## / { split($$1, name, ":"); printf "make %-12s %s\n", name[1], $$2 }' Makefile
	@sed -n '3,8s/^#  //p' Makefile

setup: $(STAMP)  ## make .venv and install the tested set (minutes, once)

$(STAMP): setup.py pyproject.toml constraints.txt $(filter-out csrc/__pycache__%,$(wildcard csrc/* csrc/*/*))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make setup: needs Python 3.11 or newer as $(PYTHON); name another with: make setup PYTHON=python3.11"; exit 1; }
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make setup: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation -e ".[train,video,dev]"
	@test -e $(LIBRARY) || echo "make setup: no C++ kernels were built (no compiler, or it failed: $(RUN) csrc/build.py" \
	  "builds them, or says why not); everything works with plain torch, slower."
	@touch $@

demo: setup     ## a needle in a haystack of 1,000 pictures, with the model that ships in the package
	$(RUN) benchmarks/vniah.py --images $(IMAGES) --needles 5 --depths 0,0.5,1 --output runs/demo

test: setup     ## the tests, minutes
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS)

TRITON := build/triton
$(TRITON): $(STAMP)  # its interpreter: torch's own for a GPU may be older
	$(PIP) --no-deps --target $@ triton==3.9.0

test-triton: $(TRITON)  ## the GPU's Triton kernels without a GPU: interpreted, and compiled ahead (Linux, minutes)
	PYTHONPATH=$(TRITON) OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) tests/ops/test_triton.py

test-long: setup  ## the sweeps that take longer
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n $(WORKERS) -m long

kill-test: setup  ## a training run killed N times (20) at random moments is the run that was not
	OMP_NUM_THREADS=1 LONGLLAVA_KILLS=$(N) $(RUN) -m pytest -q -s -m long tests/train/test_kills.py

fuzz: N = 10000
fuzz: setup     ## N hostile pictures, videos, prompts, configs, indices ... (10000 of each)
	OMP_NUM_THREADS=1 LONGLLAVA_FUZZ=$(N) $(RUN) -m pytest -q -s -n $(WORKERS) -m long tests/fuzz

SANITIZED := build/sanitized
SANITIZERS = $(shell $(or $(CXX),g++) -print-file-name=libasan.so) $(shell $(or $(CXX),g++) -print-file-name=libubsan.so)
CPU_OPS := $(addprefix tests/ops/test_,selective_scan.py causal_conv1d.py attention.py merge.py conv3x3.py pixel_conv.py fused.py int8_linear.py native.py forms.py)
sanitize: setup  ## the CPU kernels' tests under the address and undefined-behaviour sanitizers (GCC, minutes)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r longllava csrc tests pyproject.toml $(SANITIZED) && rm -rf $(SANITIZED)/longllava/lib
	CXXFLAGS="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	  $(RUN) csrc/build.py $(SANITIZED)/longllava/lib
	cd $(SANITIZED) && PYTHONPATH=. LD_PRELOAD="$(SANITIZERS)" OMP_NUM_THREADS=2 \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(abspath $(RUN)) -m pytest -q -p no:cacheprovider $(CPU_OPS)

check: setup    ## lint, types, import layers
	$(RUN) -m ruff check
	$(RUN) -m mypy
	$(RUN) -m pytest -q tests/test_layers.py

foundation: setup  ## what stage 1 starts from: an encoder aligned with names, a language model of text
	$(TRAIN) configs/train/$(MODEL)/foundation-vision.yaml $(filter-out phases.%,$(OVERRIDES))
	$(TRAIN) configs/train/$(MODEL)/foundation-text.yaml $(OVERRIDES)

stage1: setup   ## single-image alignment: only the bridge learns
	$(TRAIN) configs/train/$(MODEL)/stage1.yaml $(OVERRIDES)

stage2: setup   ## single-image questions: bridge and language model learn
	$(TRAIN) configs/train/$(MODEL)/stage2.yaml $(OVERRIDES)

stage3: setup   ## several images, with replay
	$(TRAIN) configs/train/$(MODEL)/stage3.yaml $(OVERRIDES)

bench: setup    ## kernels, then V-NIAH and what each stage brought
	$(RUN) benchmarks/kernels.py --device cpu
	$(RUN) benchmarks/vniah.py --images $(IMAGES)
	$(RUN) benchmarks/curriculum.py

clean:          ## build products and caches, which the next target makes again; keeps .venv and runs/
	rm -rf $(STAMP) build dist *.egg-info longllava/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find longllava tests benchmarks csrc -name __pycache__ -prune -exec rm -rf {} +
