PYTHON ?= python3.11
VENV := .venv
SECONDS ?= 120
BIN := $(VENV)/bin
# The reference makes gigabytes of masks an image: memory that is given back costs a fifth of the tests' time.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184

.PHONY: demo test test-without-ray test-with-ray chaos check fuzz install clean

demo: install
	$(BIN)/python -m jobs.demo

test: check
	@echo "Tests that start a Ray run beside the others; the results of each come at its end."
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-without-ray test-with-ray

test-without-ray:
	OMP_NUM_THREADS=1 $(KEEP_MEMORY) nice -n 19 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not alone"

# Ray waits more than it works, but not for long: its processes come first, and their threads wait without spinning.
test-with-ray:
	RAY_worker_niceness=0 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m alone

fuzz: install
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

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
