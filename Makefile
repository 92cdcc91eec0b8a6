# `make test` and `make demo` need only python3 (3.11 or later): they make .venv themselves.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help test demo zoo lint types docs tests quick thorough

PY := .venv/bin/python
INSTALLED := .venv/.installed

# $(call stage,name,command): runs the command and says how long it took.
stage = @start=$$SECONDS; { $(2); } || exit; echo "== $(1): $$((SECONDS - start)) s"

help:
	@echo "make test   lint, types, docs, then all tests"
	@echo "make demo   train a small Llama as it is, tied, and as a mixture of recursions (4 minutes)"
	@echo "make zoo    one row an architecture: captured, exact, cached, lowered"
	@echo "also: make lint | types | docs | tests | quick (the tests not marked slow) | thorough (every test)"

$(INSTALLED): pyproject.toml requirements/ci.txt
	python3 -m venv .venv
	$(PY) -m pip install --quiet --constraint requirements/ci.txt --editable '.[dev]'
	@touch $@

test: lint types docs tests

lint: $(INSTALLED)
	$(call stage,lint,$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet . && $(PY) tools/size_report.py)

types: $(INSTALLED)
	$(call stage,types,$(PY) tools/check_types.py)

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(INSTALLED)
	$(call stage,docs,$(PY) tools/link_package.py && $(PY) -m mkdocs build --quiet --strict)

tests: $(INSTALLED)
	$(call stage,tests,$(PY) -m pytest -q -n auto --dist worksteal -m "not thorough")

thorough: $(INSTALLED)
	$(call stage,all tests,$(PY) -m pytest -q -n auto --dist worksteal -m "thorough or not thorough")

quick: $(INSTALLED)
	$(call stage,quick tests,$(PY) -m pytest -q -n auto --dist worksteal)

demo: export OMP_WAIT_POLICY := PASSIVE  # two spinning threads crawl when another process holds a core
demo: $(INSTALLED)
	$(call stage,demo,$(PY) examples/train_mor.py)

zoo: $(INSTALLED)
	$(call stage,zoo,$(PY) bench/zoo.py)
