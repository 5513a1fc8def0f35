# make demo | test | conformance | bench: each sets up .venv by itself (plain pip, Python >= 3.11).
# PYTHON=python3.12 chooses the interpreter of a new .venv, ARGS="..." passes options on.
RUN := .venv/bin/python
ARGS ?=
# Processes of the tests; each computes on one thread.
WORKERS ?= 2
# Hundreds of processes import the package: let the first one keep what it compiles.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo demo-vision demo-rl test test-distributed test-integrations test-vllm test-gguf
.PHONY: lint conformance test-docs
.PHONY: compat soak soak-rl bench bench-check docs dist
.PHONY: setup-demo setup-demo-vision setup-demo-rl setup-dev

help:
	@echo 'make demo              fine-tune a real language model and show what changed'
	@echo 'make demo-vision       the same with real image models'
	@echo 'make demo-rl           reinforcement learning on a small task: GRPO, in about ten minutes'
	@echo 'make test              lint, types, spelling and every test'
	@echo 'make test-gguf         training in a GGUF file, run by llama.cpp where it can be fetched'
	@echo 'make test-docs         every block of code of the docs; make test runs those of README and quick start'
	@echo 'make conformance       the test-suite of the installed PEFT release, on our method'
	@echo 'make compat            the core beside old and pinned releases of PEFT, transformers and torch'
	@echo 'make test-distributed  several processes on the CPU: DDP, FSDP2, DeepSpeed'
	@echo 'make test-vllm         columns into a real vLLM on the CPU, in .venv-vllm'
	@echo 'make test-integrations PaCA in Axolotl, ms-swift, LLaMA-Factory, verl and modelexpress, each in an environment of its own'
	@echo 'make soak              2,000 folders with foreign files, then half an hour of random walks over layers'
	@echo 'make soak-rl           300 steps of GRPO beside a vLLM server, killed three times; about an hour'
	@echo 'make bench             measure step time and memory against the other methods'
	@echo 'make bench-check       kernels, bytes and estimates against the committed ones; ARGS=--all: what takes minutes, too'
	@echo 'make docs              tables and picture of README and docs, and the site with commands and Python API'
	@echo 'make dist              the source distribution and the wheel of a release, in dist/'

demo: setup-demo
	@$(RUN) examples/finetune_llm.py $(ARGS)

demo-vision: setup-demo-vision
	@$(RUN) examples/images.py $(ARGS)

demo-rl: setup-demo-rl
	@$(RUN) examples/grpo.py $(ARGS)

test: lint
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25 $(ARGS)

lint: setup-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m codespell_lib
	.venv/bin/lint-imports

test-docs: setup-dev
	$(RUN) -m pytest -m docs -n $(WORKERS) --dist loadfile tests/docs $(ARGS)

conformance: setup-dev
	$(RUN) tests/conformance/run.py -n $(WORKERS) $(ARGS)

compat: setup-dev
	$(RUN) tools/compat.py $(ARGS)

test-distributed: setup-dev
	$(RUN) -m pytest -m processes tests/distributed tests/docs tests/sync tests/training $(ARGS)
	PYTHONPATH="$(CURDIR)/.cache/deepspeed" $(RUN) -m pytest tests/training/test_deepspeed.py $(ARGS)

test-vllm:
	@PYTHON='$(PYTHON)' sh tools/test_vllm.sh $(ARGS)

test-gguf: setup-dev
	$(RUN) -m pytest tests/grid tests/adapters/test_gguf.py $(ARGS)

soak-rl:
	@PYTHON='$(PYTHON)' sh tools/test_vllm.sh soak $(ARGS)

test-integrations:
	@PYTHON='$(PYTHON)' sh tools/test_integrations.sh $(ARGS)

soak: setup-dev
	$(RUN) -W ignore -m tests.files.foreign --folders 2000
	$(RUN) -m tests.residency.soak --workers $(WORKERS) $(ARGS)

bench: setup-dev
	$(RUN) -m benchmarks.step $(ARGS)
	$(RUN) -m benchmarks.kernels
	$(RUN) -m benchmarks.tables

bench-check: setup-dev
	$(RUN) -m benchmarks.check $(ARGS)

docs: setup-dev
	$(RUN) -m benchmarks.tables
	$(RUN) -m tools.picture
	$(RUN) -m mkdocs build --strict --quiet
	@echo 'The site is in site/: open site/index.html.'

dist:
	$(or $(PYTHON),python3) -m venv --clear .cache/build
	.cache/build/bin/python -m pip install -q --disable-pip-version-check build twine
	rm -rf dist
	.cache/build/bin/python -m build --outdir dist .
	.cache/build/bin/python -m twine check --strict dist/*

setup-demo setup-demo-vision setup-demo-rl setup-dev:
	@PYTHON='$(PYTHON)' sh tools/setup_venv.sh $(@:setup-%=%)
