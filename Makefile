# `make demo` and `make test` need python3 >= 3.11 with venv, git, make and gcc; they do all other set-up themselves.

CORES ?= $(shell nproc)
MODEL := resources/demo/SmolLM2-135M-Instruct
SNAKEFILES := Snakefile workflow/rules
LEFT := .env/tests

# Nothing of the caller's Python and Snakemake changes what happens here. HOME stays, because pip and git keep their
# configuration there, but what runs has settings and caches of its own.
unexport PYTHONPATH PYTHONHOME PYTHONSTARTUP PYTHONDONTWRITEBYTECODE VIRTUAL_ENV CONDA_PREFIX SNAKEMAKE_PROFILE
export PYTHONNOUSERSITE := 1
XDG := $(CURDIR)/.env/xdg
APART := XDG_CACHE_HOME='$(XDG)/cache' XDG_CONFIG_HOME='$(XDG)/config' XDG_DATA_HOME='$(XDG)/data'

.PHONY: help demo test lint lock schemas model clean

help:
	@echo 'make demo      evaluate a real model on this machine, without a GPU, and name the report'
	@echo 'make test      all checks and tests'
	@echo 'make lint      format, style, types and Snakemake lint'
	@echo 'make lock      the locks in envs/ from their .in files; UPGRADE=1 for the newest versions'
	@echo 'make schemas   workflow/schemas/ from the models in workflow/reproval/'
	@echo 'make clean     remove environments and caches; results/ and resources/ stay'
	@echo
	@echo 'CORES=N        cores for make demo (now: $(CORES))'
	@echo 'PYTHON=FILE    the Python that environments are made with (3.11, 3.12 or 3.13)'

demo: model
	@envs/install controller
	$(APART) .env/controller/bin/snakemake --cores $(CORES) --configfile config/demo/config.yaml

model:
	@envs/install cpu demo
	@PYTHONPATH=workflow .env/cpu/bin/python -m reproval.demo_model $(MODEL) --package .env/demo

# Every part runs, whatever the one before said; the summary at the end tells what failed and what was skipped.
# tests/engine runs inside the engine's environment, the others in the one with Snakemake and the tools.
test: model
	@envs/install dev pytest export
	@mkdir -p $(LEFT) && rm -f $(LEFT)/*.xml
	@failed=0; lint=passed; \
	$(MAKE) --no-print-directory lint || { failed=1; lint=failed; }; \
	$(APART) .env/dev/bin/python -m pytest --ignore=tests/engine --junitxml=$(LEFT)/tests.xml || failed=1; \
	$(APART) PYTHONPATH=.env/pytest .env/cpu/bin/python -m pytest tests/engine --junitxml=$(LEFT)/engine.xml || failed=1; \
	.env/dev/bin/python tests/summary.py $(LEFT)/tests.xml $(LEFT)/engine.xml || failed=1; \
	echo "lint: $$lint"; \
	exit $$failed

lint:
	@envs/install dev
	.env/dev/bin/ruff check
	.env/dev/bin/ruff format --check
	.env/dev/bin/mypy
	.env/dev/bin/snakefmt --check $(SNAKEFILES)
	@echo 'snakemake --lint, but for "Specify a conda environment or container": the environments are locks with hashes'
	@! $(APART) .env/dev/bin/snakemake --lint 2>&1 | grep '^    \* ' | grep -v 'Specify a conda environment or container'

lock:
	envs/lock $(if $(UPGRADE),--upgrade)

schemas:
	@envs/install dev
	PYTHONPATH=workflow .env/dev/bin/python -m reproval.config schema > workflow/schemas/config.schema.yaml.part
	mv workflow/schemas/config.schema.yaml.part workflow/schemas/config.schema.yaml
	PYTHONPATH=workflow .env/dev/bin/python -m reproval.tiers > workflow/schemas/tiers.schema.yaml.part
	mv workflow/schemas/tiers.schema.yaml.part workflow/schemas/tiers.schema.yaml
	PYTHONPATH=workflow .env/dev/bin/python -m reproval.reference schema > workflow/schemas/reference.schema.yaml.part
	mv workflow/schemas/reference.schema.yaml.part workflow/schemas/reference.schema.yaml

clean:
	rm -rf .env .mypy_cache .pytest_cache .ruff_cache .hypothesis
