PYTHON ?= python3.11
VENV := .venv
SECONDS ?= 120
BIN := $(VENV)/bin
WANTED := --constraint constraints.txt --editable '.[dev]'
# The reference makes gigabytes of masks an image: memory that is given back costs a fifth of the tests' time.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184

.PHONY: audit demo test test-without-ray test-with-ray chaos check fuzz guards install clean

demo: install
	$(BIN)/python -m jobs.demo

test: install
	@echo "Tests that start a Ray run beside the others and the checks; the results of each come at its end."
	@$(MAKE) --no-print-directory --jobs=3 --output-sync=target check test-without-ray test-with-ray

test-without-ray:
	OMP_NUM_THREADS=1 $(KEEP_MEMORY) nice -n 19 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations 20 -m "not alone"

# Ray waits more than it works, but not for long: its processes come first, and their threads wait without spinning.
test-with-ray:
	RAY_worker_niceness=0 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --durations 20 -m alone

fuzz: install
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

guards: install
	OMP_NUM_THREADS=1 $(BIN)/python tests/guards.py

chaos: install
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m chaos --seed 1 2 3

# Asks Python's package index for known vulnerabilities of every version in constraints.txt; one it has no answer for
# is a failure too.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet pip-audit
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

# uv downloads side by side. It does not read pip's settings, such as a mirror's address: where it fails, pip installs.
# Compiled once here, torch and Ray are imported in half the time or less where Python may not write what it compiles.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --compile-bytecode $(WANTED) --python $(BIN)/python || $(BIN)/python -m pip install --quiet $(WANTED)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-audit demo-output
