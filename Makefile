# Every target makes the virtual environment it needs: Python 3.11 or later and make are enough.
#   make demo      the built-in world, from rankings to a reward model to a better policy
#   make test      the tests, at reduced size (minutes)
#   make test-all  every test at full size
#   make check     formatting, lint, types, architecture
#   make bench     all benchmarks (an hour and a half of one core), and their tables into docs/benchmarks.md
#   make bench-quick  a few ratios beside those recorded last (3 minutes)
#   make study-grouped  docs/studies/grouped-vs-shuffled.md anew (two hours; goes on where it was stopped)
#   make study-alignment  docs/studies/alignment.md anew (three hours of one core; goes on where it was stopped)
#   make study-families  docs/studies/families.md anew (two hours of one core; goes on where it was stopped)
#   make docs      the manual, into site/

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11 python; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$candidate; break; fi; done)

.PHONY: demo test test-all check bench bench-quick study-grouped study-alignment study-families docs venv clean
.DEFAULT_GOAL := test

venv: $(STAMP)

# torch comes first and alone: pinned, so that nothing that depends on it can draw another build of it.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "Plaudit needs Python 3.11 or later; '$(if $(PYTHON),$(PYTHON),python3)' is not. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if [ ! -x $(BIN)/python ]; then $(PYTHON) -m venv $(VENV) || { \
		echo "Python cannot make virtual environments here; on Debian and Ubuntu install python3-venv." >&2; exit 1; }; fi
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/plaudit demo

# One worker a core and one thread a worker: two pools of threads on the same cores would wait for each other.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "slow or not slow" --timeout 36000

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(STAMP)
	$(BIN)/python benchmarks/against_trl.py
	$(BIN)/python benchmarks/against_limit.py
	$(BIN)/python benchmarks/against_limit.py --compile
	$(BIN)/python benchmarks/compiled.py
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/scoring.py
	$(BIN)/python benchmarks/generation.py --clock processor
	$(BIN)/python benchmarks/against_trl_rl.py
	$(BIN)/python benchmarks/threads.py --competitors 1
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/quick.py --record
	$(BIN)/python benchmarks/report.py

bench-quick: $(STAMP)
	$(BIN)/python benchmarks/quick.py

study-grouped: $(STAMP)
	for data in world-frozen oasst fgrlhf_qa world; do $(BIN)/python studies/grouped_vs_shuffled.py run $$data || exit 1; done
	$(BIN)/python studies/grouped_vs_shuffled.py table

study-alignment: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python studies/alignment.py run algorithms critic ablations
	OMP_NUM_THREADS=1 $(BIN)/python studies/alignment.py run reward-models --seeds 0 1 2
	$(BIN)/python studies/alignment.py table

study-families: $(STAMP)
	for action in tune run table; do OMP_NUM_THREADS=1 $(BIN)/python studies/families.py $$action || exit 1; done
	for action in run table; do $(BIN)/python studies/families_world.py $$action || exit 1; done

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
