# `make demo` and `make test` work on a fresh checkout: they make .venv and install what they need into it, once.
# PYTHON chooses the interpreter that .venv is made with: `make test PYTHON=python3.12`.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed

.PHONY: demo test docs figures style quality clean

demo: $(STAMP)-core
	$(VENV)/bin/python examples/generate.py "a volcano at dusk"

test: $(STAMP)-test
	$(VENV)/bin/python -m pytest tests -q --timeout=600 -n auto --dist loadfile

# The documentation as a site, in site/. Strictly: a broken link or reference is an error.
docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict

# The pictures of docs/quickstart.md, docs/how-it-works.md and docs/figures.md, which have the same commands.
figures: $(STAMP)-core
	$(VENV)/bin/python examples/generate.py "a volcano at dusk" "a fox in the desert" "a castle by the sea" \
	    --num-images 1 --output docs/images/first-pictures.png
	$(VENV)/bin/python examples/generate.py "a volcano at dusk" --output docs/images/volcano-at-dusk.png
	$(VENV)/bin/python examples/two_phases.py "a castle by the sea" --output docs/images/two-phases.png
	$(VENV)/bin/python examples/draft_steps.py "a cat in the snow" "a pumpkin at night" \
	    --output docs/images/figure-2-draft-steps.png
	$(VENV)/bin/python examples/caption_grid.py "a cat in the snow" "a fox in the snow" "a penguin in the snow" \
	    "a whale in the snow" --output docs/images/figure-3-objects.png
	$(VENV)/bin/python examples/caption_grid.py "a fox at dusk" "a fox at night" "a fox in the snow" \
	    "a fox in the desert" "a fox on the grass" "a fox by the sea" --num-images 4 --output docs/images/figure-4-places.png
	$(VENV)/bin/python examples/inpaint_regions.py "a snowman in the snow" "a pumpkin at night" "a cat on the grass" \
	    "a whale by the sea" --fill-prompts "a snowman in the snow" "a pumpkin at night" "a fox on the grass" \
	    "a sailboat by the sea" --output docs/images/figure-5-inpainting.png
	$(VENV)/bin/python examples/infill_random_mask.py "a cat in the snow" "a pumpkin at night" \
	    "a snowman on the grass" "a cactus in the desert" --output docs/images/figure-6-infilling.png

style: $(STAMP)-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

quality: $(STAMP)-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

clean:
	rm -rf build dist site src/*.egg-info .pytest_cache .ruff_cache .hypothesis
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
