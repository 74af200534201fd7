# `make demo` and `make test` work on a fresh checkout: they make .venv and install what they need into it, once.
# PYTHON chooses the interpreter that .venv is made with: `make test PYTHON=python3.12`.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed

.PHONY: demo test style quality clean

demo: $(STAMP)-core
	$(VENV)/bin/python examples/generate.py "a volcano at dusk"

test: $(STAMP)-test
	$(VENV)/bin/python -m pytest tests -q --timeout=600

style: $(STAMP)-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

quality: $(STAMP)-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# The stamps are written last, so that an interrupted installation is taken up again.
$(STAMP)-core: setup.py pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e .
	touch $@

$(STAMP)-%: setup.py pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -e ".[$*]"
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
