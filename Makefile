# Everything a fresh machine needs: Python 3.11+, pip, make and git. `make quickstart` and `make test` set up by themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes with one torch thread each: more threads than cores spin waiting for one another. They may keep
# compiled code: otherwise each of the hundred processes that they start compiles the package anew (0.7 s).
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup --durations 15
# Slow tests have an hour each: it ends what hangs, and no slow machine misses it.
SLOWLY := --timeout 3600 --durations 40

.PHONY: help setup quickstart comparison what-travels site dist extras test test-slow mutants test-container test-rest test-all test-cluster test-matrix test-oldest check format clean

help:
	@echo "make quickstart   set up, train on real digits (configs/quickstart.toml), say where the curves are"
	@echo "make comparison   set up, sweep over I and momentum policy on real digits: tables, figures, report.html"
	@echo "make what-travels set up, run the tables of what travels (Fashion-MNIST; CIFAR=FILE.npz adds its part)"
	@echo "make test         set up, run the fast tests"
	@echo "make site         the documentation as a site, in build/site"
	@echo "make dist         the sdist, and the wheel that it gives, in dist"
	@echo "make check        ruff, mypy and the fast tests"
	@echo "make test-matrix  the fast tests on every Python that is here, the oldest torch, the oldest and newest flwr"
	@echo "make test-oldest  the fast tests with the oldest torch that goes, in .venv-oldest"
	@echo "make mutants      which fast tests notice which mistake (tests/mutants)"
	@echo "make test-slow    the slow tests;  make test-container: those that need a Docker engine"
	@echo "make test-cluster runs on Ray clusters of two machines, in namespaces of this one"
	@echo "make test-all     all tests, and a record of what the fault and intruder tests passed with"

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedmom needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

setup: $(VENV)/.ready

# Everything that some test can use.
extras: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[tests]"

quickstart: setup
	$(BIN)/fedmom run configs/quickstart.toml

SWEEP := runs/comparison

# And what one client with all data reaches, by steps of 20 times as many examples, so in as many joint epochs.
comparison: setup
	$(BIN)/fedmom sweep configs/comparison.toml --grid algorithm.num-local-steps=1,4,16 \
		--grid algorithm.momentum-policy=average,local,reset --seeds 3 --workers 2 --out $(SWEEP)
	$(BIN)/fedmom sweep configs/comparison.toml --grid data.num-clients=1 --set data.batch-size=640 --seeds 3 \
		--out $(SWEEP)-pooled
	$(BIN)/fedmom compare $(SWEEP) $(SWEEP)-pooled --out $(SWEEP)/comparison
	$(BIN)/fedmom report $(SWEEP) $(SWEEP)-pooled --out $(SWEEP)

# Within an hour of two cores. The same command goes on where it was cut.
what-travels: setup
	$(BIN)/python benchmarks/what_travels.py --out build/what-travels $(if $(CIFAR),--cifar $(CIFAR))

site: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

# The wheel is made of the sdist, so that what is missing there is missed here.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation

test: setup
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m slow $(SLOWLY)

# Which fast tests fail under every mistake of tests/mutants; status 1 if none does under one of them.
mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants

# pytest's exit status 5 says that no test was collected: there is nothing to run, and that is no failure.
test-container: setup
	$(PYTEST) -m container $(SLOWLY) || test $$? -eq 5

# A third process, as that of the containers mostly waits.
test-rest: setup
	$(PYTEST) -m "slow or container" $(SLOWLY) -n 3 --ignore tests/cluster

# Clusters of two machines in namespaces of this one, three side by side, as much of their time is waiting.
test-cluster: setup
	$(PYTEST) tests/cluster -m slow $(SLOWLY) -n 3

# What passed is what was there before: where somebody has changed it meanwhile, it is not written.
FINGERPRINT := $(BIN)/python tests/deployment/fingerprint.py

test-all: extras
	found=$$($(FINGERPRINT) --value) && unset FEDMOM_FAULTS && $(MAKE) test && \
		$(MAKE) test-cluster && FEDMOM_NEEDS_ENGINE=1 .ci/with-engine $(MAKE) test-rest && $(FINGERPRINT) --write $$found

# The fast tests on every Python, torch and flwr that pyproject.toml allows, as far as they are here: tests/matrix.py.
# ROWS="3.12 flwr" takes some of them, TESTS="-k layers" goes to pytest.
test-matrix: setup
	VENV=$(VENV) $(BIN)/python tests/matrix.py $(ROWS) -- $(TESTS)

# The oldest torch alone.
test-oldest: setup
	VENV=$(VENV) $(BIN)/python tests/matrix.py torch -- $(TESTS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache
