# `make demo` runs the three stages on the embedded task, `make test` the tests; each makes what it
# needs in .venv, in the exact versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check

.DELETE_ON_ERROR:  # a .venv that could not be made whole
.PHONY: demo test test-slow test-newest gpu lint clean

demo: .venv/demo.done
	$(BIN)/python sft.py --overwrite
	$(BIN)/python reward_model.py --overwrite
	$(BIN)/python ppo_rlhf.py --overwrite
	@echo "Curves and sample texts: $(BIN)/tensorboard --logdir runs"

test: .venv/test.done
	$(BIN)/python -m pytest

test-slow: .venv/test.done
	$(BIN)/python -m pytest -m slow

# the quick tests on the newest versions that the ranges admit
test-newest: requirements-dev.txt requirements.txt
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(PIP) --upgrade -r requirements-dev.txt
	.venv-newest/bin/python -m pytest

# what only a GPU can show, in three times 9.5 minutes; results in benchmarks/results/gpu-*.json
gpu: .venv/test.done
	$(BIN)/python $(PIP) -r requirements-bench.txt -c constraints.txt
	for third in 1 2 3; do \
		PYTHON=$(BIN)/python benchmarks/gpu.sh $$third || failed=1; \
	done; test -z "$$failed"

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@echo "Installing packages into .venv, up to 5 GB: some minutes"

.venv/demo.done: requirements.txt constraints.txt | .venv/bin/python
	$(BIN)/python $(PIP) -r requirements.txt -c constraints.txt
	touch $@

.venv/test.done: requirements-dev.txt requirements.txt constraints.txt | .venv/bin/python
	$(BIN)/python $(PIP) -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf .venv .venv-newest runs
