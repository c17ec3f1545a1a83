# One command each on a machine with Python 3.11 or newer, make and git; the first one sets everything up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_DIR ?= runs/quickstart

.PHONY: install quickstart quickstart-assets model-cards test quality style clean

install: $(STAMP)

# torch first: with the pinned version in place, nothing else pulls in another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[quickstart,dev]"
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python examples/quickstart/run.py --run_dir $(RUN_DIR)

quickstart-assets: $(STAMP)
	$(BIN)/python examples/quickstart/make_assets.py

model-cards: $(STAMP)
	$(BIN)/python model_cards/render.py

test: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	SREPA_HUB_TESTS=1 $(BIN)/python -m pytest tests/hub

quality: $(STAMP)
	$(BIN)/ruff check src tests examples benchmarks model_cards
	$(BIN)/ruff format --check src tests examples benchmarks model_cards
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check --fix src tests examples benchmarks model_cards
	$(BIN)/ruff format src tests examples benchmarks model_cards

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache
