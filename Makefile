# make book [PRESET=laptop|smoke|paper] [DEVICE=cpu|cuda]   set up, run the pipeline and the notebooks, build the book
# make test                               set up, run all tests
# make quick                              the tests that take little time, for who edits
# make validate                           execute the notebooks as they are kept, by nbval
# make studies [TASK=addition|grammar|wikipedia] [PRESET=laptop|paper] [SEEDS="0 1 2"] [DEVICE=cpu|cuda]
#                                         make the kept studies anew; hours for paper on a CPU
# make faults                             do to a small run what can go wrong, and keep the table (needs the right to mount)
# make benchmarks [SIZES="smoke laptop"] [REPEATS=5] [DEVICE=cpu|cuda]   measure against other libraries; takes hours
PRESET ?= laptop
DEVICE ?= cpu
TASK ?= addition
SEEDS ?= 0
SIZES ?= smoke laptop paper
REPEATS ?= 5
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# Every test and every page starts processes that import torch: without compiled files, each would compile it anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: book runs test quick lint notebooks validate studies faults benchmarks clean
.DEFAULT_GOAL := book

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

book: runs
	$(BIN)/python book/build.py --preset $(PRESET) --set device=$(DEVICE)

# What the pages show, apart from kept studies.
runs: $(VENV)/.ready
	$(BIN)/polca paper run --preset $(PRESET) --device $(DEVICE) --beside parameters
	$(BIN)/polca paper run --task grammar --preset $(PRESET) --device $(DEVICE)

# Two workers, each with one thread: with more, they slow one another down. A file stays with one worker.
test: $(VENV)/.ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

quick: $(VENV)/.ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m 'not slow'

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Execute the notebooks of the checkout in place, as they are kept in the repository.
notebooks: runs
	$(BIN)/python book/build.py --preset laptop --in-place

# Cells must run; what they show may differ from machine to machine. Strictly: pytest --nbval notebooks
validate: runs
	$(BIN)/python -m pytest --nbval-lax notebooks

# What is kept in data is finished, not made over: delete a folder to have it made anew.
studies: $(VENV)/.ready
	for seed in $(SEEDS); do $(BIN)/polca paper study --task $(TASK) --preset $(PRESET) --seed $$seed --device $(DEVICE) || exit; done
	$(BIN)/polca paper verdicts

$(VENV)/.store: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[faults]'
	touch $@

faults: $(VENV)/.store
	$(BIN)/python tests/faults.py

# Nothing here uses torchvision, which one of the libraries asks for: beside a CPU build of torch, PyPI's breaks transformers.
$(VENV)/.peers: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[benchmarks]'
	$(BIN)/python -m pip uninstall --quiet --disable-pip-version-check --yes torchvision
	touch $@

# The whole pipeline at preset paper takes a GPU: on a CPU it is a matter of days.
benchmarks: $(VENV)/.peers
	$(BIN)/python benchmarks/projections.py --sizes $(SIZES) --repeats $(REPEATS) --device $(DEVICE)
	$(BIN)/python benchmarks/eigenvector.py --sizes $(SIZES) --repeats $(REPEATS) --device $(DEVICE)
	$(BIN)/python benchmarks/pipeline.py --sizes $(if $(filter cpu,$(DEVICE)),$(filter-out paper,$(SIZES)),$(SIZES)) --repeats $(REPEATS) --device $(DEVICE)
	$(BIN)/python benchmarks/engines.py

clean:
	rm -rf _build results
