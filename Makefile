# Set up and run; needs python3.11, make and git, nothing else.
PYTHON ?= python3.11
INSTALLER ?= uv
VENV := .venv
STAMP := $(VENV)/.installed
LOCK := requirements.lock

# uv does not read pip's settings, and without the folder of wheels that pip is told to look in
# it may pick another build of torch than pip would.
PIP_LINKS = $${PIP_FIND_LINKS:-$$($(VENV)/bin/pip config get global.find-links 2>/dev/null)}
FIND_LINKS = $$(echo $${UV_FIND_LINKS:-$(PIP_LINKS)} | tr ' ' ',')

export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline
# Importing torch, lightning and transformers uncached costs 8 s more in every process.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-short test test-slurm lint check lock clean

help:                ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' $(MAKEFILE_LIST) | expand -t 18

setup: $(STAMP)      ## .venv with the locked versions (INSTALLER=pip: without uv)

$(STAMP): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	@if [ "$(INSTALLER)" = uv ] \
	  && $(VENV)/bin/pip install -q -c $(LOCK) uv \
	  && UV_FIND_LINKS="$(FIND_LINKS)" \
	    $(VENV)/bin/uv pip install -q -p $(VENV) -c $(LOCK) -e '.[demo,exr,dev]'; \
	then echo "installed with uv"; \
	else echo "installing with pip"; $(VENV)/bin/pip install -q -c $(LOCK) -e '.[demo,exr,dev]'; fi
	@touch $@

demo: $(STAMP)       ## post-train the small model for minutes, write a page of results
	$(call run-demo,demo,)

demo-short: $(STAMP) ## the same path in a few steps, for CI
	rm -rf runs/demo-short runs/demo-short_scratch
	$(call run-demo,demo-short,$(SHORT))

# Train from the base and, for comparison, from random weights; score both and the shipped model.
define run-demo
	$(VENV)/bin/python train.py experiment=demo name=$(1) $(2)
	$(VENV)/bin/python train.py experiment=demo name=$(1)_scratch init_from=null $(2)
	$(VENV)/bin/python evaluate.py name=$(1) run_dir=runs/$(1) limit=$(if $(2),8,128) \
	  model=runs/$(1)/export label='"post-trained here"' \
	  'also={from random weights: runs/$(1)_scratch/export, shipped model: small}' \
	  'losses={from the base: runs/$(1), from random weights: runs/$(1)_scratch}'
	@echo "open runs/$(1)/report.html"
endef
SHORT = trainer.max_steps=4 data.sources.scenes.make.count=40 \
  data.sources.scenes.shards=data/made/scenes_short

test: $(STAMP)       ## the tests, on CPU and without network (ARGS: passed to pytest)
	$(VENV)/bin/pytest -q $(ARGS)

test-slurm: $(STAMP) ## faults of clusters, on a local SLURM (needs root; half an hour)
	$(VENV)/bin/pytest -q -m slurm tests/slurm $(ARGS)

lint: $(STAMP)       ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

check: lint test     ## lint, types, tests

lock: $(STAMP)       ## pin what pyproject.toml newly asks for (ARGS=--upgrade: newest of all)
	echo uv | $(VENV)/bin/uv pip compile -q --all-extras --python-version 3.11 --no-header \
	  --annotation-style line $(ARGS) -o $(LOCK) pyproject.toml -

clean:               ## remove the environment and all caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
