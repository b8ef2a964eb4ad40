# demo: a video from a prompt · test: lint and all tests · quick: the fast ones · lint · fake-cuda: runs on a pretended GPU
# aot: the GPU kernels, compiled · options: docs/options.md · embed: the C interface · wheel-test: the wheel, installed, for each Python · bench · venv · clean
# The environment is .venv, made by `python3 -m venv` from the lock files; setting it up again costs nothing.

PYTHON ?= python3
PYTHONS ?= python3.10 python3.11 python3.12 python3.13
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/*/*)

.PHONY: demo test quick lint fake-cuda aot options embed wheel-test bench venv clean

demo: venv
	mkdir -p out
	$(BIN)/miga generate "a red balloon over snowy hills at dawn" --num-frames 241 --overwrite \
		--output out/demo.mp4 --contact-sheet out/demo.png

# One thread a process: tests/conftest.py.
test: lint
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

# The working loop: under a minute on two cores. All but the tests that are marked slow.
quick: $(VENV)/.test $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" -q --numprocesses logical --maxprocesses 4 --dist worksteal

lint: $(VENV)/.test $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Whole runs on a pretended GPU, watched for unordered work; part of the tests.
fake-cuda: $(VENV)/.test $(VENV)/.installed
	$(BIN)/python -m pytest tests/runtime/test_pretended_*.py --numprocesses logical --maxprocesses 4

aot: $(VENV)/.installed
	$(BIN)/python bench/aot.py

# After a change of miga_engine/config.py.
options: $(VENV)/.installed
	$(BIN)/python -m miga_engine.options > docs/options.md

# Into build/embed: libmiga_embed.so, miga_embed.h and example.
embed: $(VENV)/.installed
	$(BIN)/python -m miga_engine.embed --build-dir build/embed

# Minutes a Python (docs/wheels.md). PYTHONS: names or paths; auditwheel is used where it is on the PATH.
wheel-test: $(VENV)/.test $(VENV)/.installed
	$(BIN)/python tests/wheels.py --pythons "$(PYTHONS)"

# One thread, measured in turns; about a quarter of an hour. Rows are appended to bench/results.
bench: export OMP_NUM_THREADS = 1
bench: $(VENV)/.test $(VENV)/.installed
	$(BIN)/python -m pytest bench/bench_kernels.py -q -s -o python_files='bench_*.py' -o python_functions='bench_*' --benchmark-disable
	for name in engine forward load formats memory savings scaling batch; do $(BIN)/python bench/bench_$$name.py || exit 1; done
	$(BIN)/python bench/table.py

venv: $(VENV)/.installed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else \
		"miga_engine needs Python 3.10 to 3.13, and $(PYTHON) is %d.%d: run make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.runtime: requirements.lock requirements-torch.lock | $(VENV)/.created
	$(PIP) install --require-hashes -r requirements.lock
	$(PIP) install -r requirements-torch.lock
	@touch $@

$(VENV)/.test: requirements-test.lock $(VENV)/.runtime
	$(PIP) install --require-hashes -r requirements-test.lock
	@touch $@

# Editable, without dependencies (the lock has them) and without isolation (so that the C++ kernels see the locked torch).
$(VENV)/.installed: $(SOURCES) $(VENV)/.runtime
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info miga_engine/*.so
