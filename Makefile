# `make test` and `make bench` make .venv when it is missing; nothing else needs to be installed by hand.
PYTHON ?= python3
DEPTH ?= 50
OUT ?= out
NETS ?= 5000
VENV := .venv
READY := $(VENV)/.ready

.PHONY: test test-all test-slow fuzz bench lint gpu clean

$(READY): pyproject.toml constraints.txt
	@echo "== making $(VENV): torch, torchvision, triton and the test tools at the versions of constraints.txt"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $(READY)

# Kernels are compiled in the first run, interpreted in the second. tests/helpers/covering.py says which cases are chosen.
test: $(READY)
	$(VENV)/bin/python -m pytest -n auto
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto

# All cases and a few long tests; what .ci/run runs.
test-all: $(READY)
	$(VENV)/bin/python -m pytest -n auto -m "not slow"
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto -m "not slow"

# The full sweeps as well.
test-slow: $(READY)
	$(VENV)/bin/python -m pytest -n auto -m "slow or not slow"
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto -m interpret

# Random nets, eager PyTorch beside `optimize` and torch.compile's backend.
fuzz: $(READY)
	$(VENV)/bin/python -W ignore tests/helpers/fuzz.py --nets $(NETS) --jobs 0

bench: $(READY)
	$(VENV)/bin/python bench/run.py --depth $(DEPTH)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# With the interpreter $(PYTHON), which must have the packages of the extra `test`: PLAN=1 to 7, ten minutes each;
# PART="name name" for single parts; neither for all of them, over three hours. REHEARSE=1 does the same without a GPU.
gpu:
	$(PYTHON) bench/gpu.py --out $(OUT) $(if $(PLAN),--plan $(PLAN) --archive plan-$(PLAN).tar.gz) \
		$(if $(REHEARSE),--rehearse) $(PART)

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
