# nsa-lm: `make help` lists what there is.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
export PYTHONUNBUFFERED := 1
unexport PYTHONPATH VIRTUAL_ENV

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(INSTALLED) ## create .venv and install requirements.txt

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: nsa-lm needs Python 3.11 or newer; name one with make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "error: no virtual environment could be made; on Debian: apt-get install python3-venv"; exit 1; }
	@echo "Installing requirements.txt into $(VENV), a few minutes the first time."
	@$(PY) -m pip install -q --disable-pip-version-check --retries 2 --timeout 20 -r requirements.txt || \
	  { echo "error: the packages could not be installed. This step needs a Python package index:"; \
	    echo "check the network, and the proxy settings (https_proxy, pip config list). Then run make again."; exit 1; }
	@touch $@

quickstart: $(INSTALLED) ## raw text to a scored checkpoint and a report, on two CPU cores
	$(PY) train/pretrain.py +experiment=quickstart
	$(PY) eval/baseline.py run=outputs/quickstart
	$(PY) eval/needle.py checkpoint=outputs/quickstart
	$(PY) eval/report.py run=outputs/quickstart
	@echo
	@echo "What next:"
	@echo "  open outputs/quickstart/report.html in a browser"
	@echo "  $(PY) train/pretrain.py +experiment=quickstart name=mine data=folder data.path=~/my-text   your own text"
	@echo "  $(PY) train/pretrain.py +experiment=quickstart name=full attention=full   the same with full attention"
	@echo "  $(PY) train/pretrain.py +experiment=nsa_64k   64k tokens on one GPU with 80 GB"

test: $(INSTALLED) ## all tests that need no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test-gpu: $(INSTALLED) ## the tests of the kernels on a CUDA device
	$(PY) -m pytest -m gpu

clean: ## remove .venv; outputs/ holds your runs and stays
	rm -rf $(VENV)
