# `make demo` runs the three stages on the embedded task, `make test` the tests; each makes what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint clean

demo: .venv/demo.done
	$(BIN)/python sft.py --overwrite
	$(BIN)/python reward_model.py --overwrite
	$(BIN)/python ppo_rlhf.py --overwrite
	@echo "Curves and sample texts: $(BIN)/tensorboard --logdir runs"

test: .venv/test.done
	$(BIN)/python -m pytest

test-slow: .venv/test.done
	$(BIN)/python -m pytest -m slow

lint: .venv/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/demo.done: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test.done: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv runs
