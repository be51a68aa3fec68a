# Everything runs in .venv, which the first target that needs it makes: only Python 3.11, 3.12 or 3.13 and a C++ compiler
# are assumed.
PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(shell command -v python$(version))) python3)
BIN := .venv/bin
RUN := $(BIN)/threetowers
# The GPUs that this shell may use
GPUS := $(shell nvidia-smi --query-gpu=uuid --format=csv,noheader \
    $${CUDA_VISIBLE_DEVICES+--id="$$CUDA_VISIBLE_DEVICES"} 2>/dev/null | grep -c '^GPU-')
# Without a GPU to find, DeepSpeed would say so at length.
export DS_ACCELERATOR ?= $(if $(filter 0,$(GPUS)),cpu,cuda)
# Ranks of the demo: one a GPU, as far as they divide its batches of 256; two processes where there is none.
RANKS ?= $(if $(filter 0,$(GPUS)),2,$(shell ranks=256; while [ $$ranks -gt $(GPUS) ]; do ranks=$$((ranks / 2)); done; echo $$ranks))
# By itself DeepSpeed starts one on each visible GPU.
LAUNCH := $(BIN)/deepspeed --quiet $(if $(filter-out $(GPUS),$(RANKS)),--num_accelerators $(RANKS)) --module threetowers
DEMO := runs/emoji

.PHONY: help demo demo-clean reproduce reproduce-quick reproduce-distillation \
    reproduce-distillation-quick test test-isa test-slow fuzz lint types docs bench \
    gpu gpu-rehearse gpu-wheels
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 30

.venv/installed: pyproject.toml constraints.txt setup.py kernels/cpu/sweep.cpp $(wildcard kernels/cpu/*.h)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch torchvision setuptools wheel ninja
	# DeepSpeed's own setup imports torch, so it is installed after it and outside build isolation.
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	# The peer of the evaluation's metrics, of which only pure functions run: what else it depends on is not needed.
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps clip-benchmark
	touch $@

# What a stage of the demo is, and what it takes on two cores with AVX2
STAGE = @printf '\n%s of 6: %s (about %s on two cores)\n'

demo: .venv/installed  ## cache a classifier, train CLIP, LiT and 3T on it, compare them on concepts none of them saw
	$(STAGE) 1 'embed 8,068 images by the classifier, and check what is stored' '80 seconds'
	$(RUN) cache build --tars 'data/emoji/*.tar' --output-dir $(DEMO)/cache $(if $(filter cpu,$(DS_ACCELERATOR)),--runtime onnx) \
	    --encoder timm:tf_efficientnet_lite0@160:package:efficientnet-lite0
	$(RUN) cache verify $(DEMO)/cache --tars 'data/emoji/*.tar'
	$(STAGE) 2 'train a tokenizer on the captions' '5 seconds'
	$(RUN) tokenizer train --tars 'data/emoji/train-*.tar' --vocab-size 4096 --output $(DEMO)/tokenizer.model
	$(STAGE) 3 'train CLIP, both towers from scratch' '3 minutes'
	$(LAUNCH) train configs/emoji/clip.yaml
	$(STAGE) 4 'train LiT, the text tower alone' '90 seconds'
	$(LAUNCH) train configs/emoji/lit.yaml
	$(STAGE) 5 'train Three Towers, both towers from scratch beside the classifier' '3 minutes'
	$(LAUNCH) train configs/emoji/3t.yaml
	$(STAGE) 6 'compare the three on 350 emoji that none of them saw' '30 seconds'
	$(RUN) eval retrieval $(DEMO)/clip $(DEMO)/lit $(DEMO)/3t --tars 'data/emoji/test-*.tar' \
	    --group-field concept --gallery-field style --output-dir $(DEMO)/report

demo-clean:  ## forget what the demo made, so that it starts over
	rm -rf $(DEMO)

.venv/reproduce: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev,reproduce]'
	touch $@

reproduce: .venv/reproduce  ## do the papers' claims hold? 2.5 hours on two cores, resumable
	$(BIN)/python -m reproduce $(ARGS)

reproduce-quick: ARGS = --quick
reproduce-quick: reproduce  ## the same, shortened to 12 minutes

reproduce-distillation: .venv/reproduce  ## what do a teacher's similarities add to Three Towers? resumable
	$(BIN)/python -m reproduce --plan distillation $(ARGS)

reproduce-distillation-quick: ARGS = --quick
reproduce-distillation-quick: reproduce-distillation  ## the same, shortened to some minutes

test: .venv/installed  ## the tests, the distributed ones with real processes
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 -m 'not slow'

test-isa: .venv/installed  ## what computes, once more as processors with fewer vector instructions would
	OMP_NUM_THREADS=1 $(BIN)/python tests/instruction_sets.py --numprocesses 2 -m 'not slow'

test-slow: .venv/installed  ## the long sweeps of the CUDA kernels under emulation
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 -m slow

fuzz: export FUZZ_EXAMPLES ?= 1000
fuzz: .venv/installed  ## data sets with random defects, other ones each time and many more than the tests draw
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --timeout 0 -o faulthandler_timeout=0 tests/fuzz

lint: .venv/installed  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed  ## strict static types
	$(BIN)/mypy

docs/config.md: trainer/config/schema.py trainer/config/towers.py trainer/config/documentation.py .venv/installed
	$(BIN)/python -m threetowers.trainer.config.documentation > $@

docs: .venv/installed  ## the documentation as a site in build/site; broken links and references are errors
	$(BIN)/mkdocs build --quiet

bench: .venv/installed  ## measure against the floor and against peers; prints ratios
	for script in tests/benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

gpu: .venv/installed  ## on a machine with a GPU: is everything right, how fast is it? ten minutes
	$(BIN)/python -m tests.gpu $(ARGS)

gpu-rehearse: .venv/installed  ## the same on the CPU at tiny sizes, which tests nothing but itself
	$(BIN)/python -m tests.gpu --rehearse --output-dir runs/gpu-rehearsal $(ARGS)

gpu-wheels: .venv/installed  ## what a machine with torch and without a network lacks for it, in build/gpu-wheels
	PYTHON=$(BIN)/python tests/gpu/wheels.sh build/gpu-wheels
