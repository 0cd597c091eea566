PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# The reference makes gigabytes of masks an image: memory that is given back costs a fifth of the tests' time.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184

.PHONY: demo test chaos check install clean

demo: install
	$(BIN)/python -m jobs.demo

test: check
	OMP_NUM_THREADS=1 $(KEEP_MEMORY) $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not alone"
	$(BIN)/python -m pytest -m alone

chaos: install
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m chaos --seed 1 2 3

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-output
