# `make test` and `make bench` make .venv when it is missing; nothing else needs to be installed by hand.
PYTHON ?= python3
DEPTH ?= 50
OUT ?= out
NETS ?= 5000
VENV := .venv
READY := $(VENV)/.ready

.PHONY: help test test-all test-slow fuzz bench lint format gpu clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@echo "== making $(VENV): torch, torchvision, triton and the test tools at the versions of constraints.txt"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $(READY)

# Kernels are compiled in the first run, interpreted in the second. tests/helpers/covering.py says which cases are chosen.
test: $(READY)  ## a selection of test cases that covers every feature and every pair of features
	$(VENV)/bin/python -m pytest -n auto
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto

test-all: $(READY)  ## every test case and a few long tests, as .ci/run does
	$(VENV)/bin/python -m pytest -n auto -m "not slow"
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto -m "not slow"

test-slow: $(READY)  ## the full sweeps as well
	$(VENV)/bin/python -m pytest -n auto -m "slow or not slow"
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto -m interpret

fuzz: $(READY)  ## NETS=5000 random nets: eager PyTorch against optimize and the compile backend
	$(VENV)/bin/python -W ignore tests/helpers/fuzz.py --nets $(NETS) --jobs 0

bench: $(READY)  ## FLOPs and throughput of ResNet-DEPTH beside the paper and the peers
	$(VENV)/bin/python bench/run.py --depth $(DEPTH)

lint: $(READY)  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY)  ## rewrite imports and layout as `make lint` wants them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Uses the interpreter $(PYTHON), which must have the packages of the extra `test`. Without PLAN and PART it runs every
# part, which takes over three hours.
gpu:  ## measure on a GPU: PLAN=1 to 7, ten minutes each, or PART="name name"; REHEARSE=1 runs the same without a GPU
	$(PYTHON) bench/gpu.py --out $(OUT) $(if $(PLAN),--plan $(PLAN) --archive plan-$(PLAN).tar.gz) \
		$(if $(REHEARSE),--rehearse) $(PART)

clean:  ## remove .venv, build outputs and OUT
	rm -rf $(VENV) $(OUT) build dist *.egg-info
