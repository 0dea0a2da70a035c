# Everything starts here. `make demo` and `make test` work on a fresh clone: they create .venv and install what they
# need. PYTHON=python3.12 chooses the interpreter .venv is made of. PY=python3 runs a target in an existing
# interpreter that has everything, without any set-up or network.
PYTHON ?= python3
JOBS ?= 2
ifdef PY
SETUP =
else
PY := .venv/bin/python
# one for each group of packages that a target needs (pyproject.toml, [dependency-groups])
SETUP = setup-$(1)
endif

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export MPLBACKEND ?= Agg

PYTEST = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal --durations=15

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-env sanitize bench bench-check figures integrations docs lint audit format gpu-check dist clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## create or refresh .venv with everything (the other targets install what they need)
	@$(PYTHON) scripts/setup_env.py

setup-%:
	@$(PYTHON) scripts/setup_env.py $*

demo: $(call SETUP,demo)  ## the main job on a real model and real text; everything is saved under runs/
	$(PY) -m demo

test: $(call SETUP,test)  ## the tests, without the slow ones and those that need a GPU
	$(PYTEST) -m "not slow and not gpu"

test-all: $(call SETUP,test)  ## every test, the packaging ones too (GPU tests say why they are skipped), and ENV=oldest
	$(PYTEST)
	$(PY) scripts/test_env.py oldest --jobs $(JOBS)

test-env: $(call SETUP,test)  ## the tests with other versions: ENV=oldest|gpu|newest|py310|py312|py313 ARGS="--short"
	$(PY) scripts/test_env.py $(ENV) --jobs $(JOBS) $(ARGS)

sanitize: $(call SETUP,test)  ## the tests of the kernels with address and undefined-behaviour sanitizers (another build)
	$(PY) scripts/sanitize.py --jobs $(JOBS)

bench: $(call SETUP,bench)  ## speed and memory as ratios to PyTorch's; ARGS="step:llama --check" (bench/README.md)
	$(PY) -m bench $(ARGS)

bench-check: $(call SETUP,bench)  ## fail if a ratio grew by more than 15 % over this kind of machine's baseline (UPDATE=1 writes it)
	$(PY) -m bench attention norm head step --quick --baseline bench/baselines $(if $(filter 1,$(UPDATE)),--update)

figures: $(call SETUP,bench)  ## the tables of README.md and docs and the pictures of the committed rows
	$(PY) -m bench.report --write .

integrations: $(call SETUP,test)  ## run the tests of docs/integrations.md and rewrite its table
	$(PY) scripts/integration_table.py --run

docs: $(call SETUP,docs)  ## the documentation as a site in site/; a broken link fails it
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "open site/index.html"

lint: $(call SETUP,lint)  ## ruff's checks and format, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

audit: $(call SETUP,audit)  ## known vulnerabilities of the installed packages and of the lower bounds; exit code 2: not looked up
	$(PY) scripts/audit.py

format: $(call SETUP,lint)  ## apply ruff's format and safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

gpu-check: $(call SETUP,test)  ## all that needs a GPU, in SECONDS=560, to OUT=build/gpu (AGAIN=build/gpu repeats failures)
	$(PY) scripts/gpu_first.py --seconds $(or $(SECONDS),560) --out $(or $(OUT),build/gpu$(if $(AGAIN),-again)) $(if $(AGAIN),--again $(AGAIN)) $(ARGS)

dist: $(call SETUP,release)  ## source archive and wheel in dist/, checked; the wheel of a commit is reproducible
	rm -rf build dist
	SOURCE_DATE_EPOCH=$(or $(SOURCE_DATE_EPOCH),$(shell git log -1 --format=%ct),$(shell date +%s)) $(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PY) -m check_wheel_contents dist/*.whl

clean:  ## remove .venv, build products and caches (runs/ stays)
	rm -rf .venv .venv.lock build dist *.egg-info aajr_kernels/_build_info.json aajr_kernels/_native*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
