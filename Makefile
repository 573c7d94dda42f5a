# `make test` and `make bench` make .venv when it is missing; nothing else needs to be installed by hand.
PYTHON ?= python3
DEPTH ?= 50
OUT ?= out
VENV := .venv
READY := $(VENV)/.ready

.PHONY: test test-slow bench lint gpu clean

$(READY): pyproject.toml constraints.txt
	@echo "== making $(VENV): torch, torchvision, triton and the test tools at the versions of constraints.txt"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $(READY)

test: $(READY)
	$(VENV)/bin/python -m pytest -n auto
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto -m "interpret and not slow"

test-slow: $(READY)
	$(VENV)/bin/python -m pytest -n auto -m "slow or not slow"
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n auto -m interpret

bench: $(READY)
	$(VENV)/bin/python bench/run.py --depth $(DEPTH)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# With the interpreter $(PYTHON), which must have torch already: all GPU tests and the bench, or PART="name name".
gpu:
	$(PYTHON) bench/gpu.py --out $(OUT) $(PART)

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
