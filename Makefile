# make train: set up and run the main job.  make test: set up and run the tests.
PYTHON ?= python3
BIN := .venv/bin
# Ranks on a machine without a GPU; with GPUs DeepSpeed takes all of them.
export LOCAL_SIZE ?= 2
TEST_WORKERS ?= 2

.PHONY: train test quick lint compile-check compile-check-old clean

train: .venv/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed launch/train.py --ds_config ds_configs/zero3.json

# A file of tests stays on one worker, since its tests share fixtures; the longest files begin first (tests/conftest.py).
PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

test: .venv/ready
	$(PYTEST)

# Under a minute on two idle cores: what to run while one works.
quick: .venv/ready
	$(PYTEST) -m "not slow"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every Triton kernel, for GPUs that need not be there, with the pinned Triton.
compile-check: .venv/ready
	$(BIN)/python -m lcl_kernels.compile_check $(TARGETS)

# The same with the oldest supported Triton, for Hopper.
compile-check-old: .venv/ready .venv/triton-3.6.0
	PYTHONPATH=.venv/triton-3.6.0 $(BIN)/python -m lcl_kernels.compile_check --target sm_90

.venv/triton-3.6.0: .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps --target $@ triton==3.6.0
	touch $@

.venv/ready: requirements.txt setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -e .
	touch $@

clean:
	rm -rf .venv build *.egg-info
