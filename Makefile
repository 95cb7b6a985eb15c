# make demo · make test · make check · make lab · make ui
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# processes of pytest: as many as cores and memory allow; 0 is none beside its own
WORKERS ?= auto

.PHONY: help install demo test check lab ui readme fresh clean

help:
	@echo "make demo     set up, fetch the embedded model, run the flagship experiment, print its result"
	@echo "make test     set up, run every test"
	@echo "make check    the gates: clean notebooks, fresh export, README and outputs, floors, wheel"
	@echo "make lab      JupyterLab with the kernel ready"
	@echo "make ui       MLflow on 127.0.0.1"
	@echo "make readme   README.md from nbs/index.ipynb"
	@echo "make fresh    re-execute every notebook in nbs/ and keep its outputs"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "genai_lab needs Python 3.11 or newer, and $(PYTHON) is older; name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Setting up $(VENV) (about 3 minutes, 2.5 GB) …"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/genai-lab models fetch
	@$(BIN)/genai-lab run experiments/01_compare_prompts.ipynb

test: $(STAMP)
	@$(BIN)/genai-lab models fetch
	$(BIN)/nbdev-test nbs
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(STAMP)
	@$(BIN)/python .ci/gates.py
	@touch $(STAMP) # nbdev-export rewrites pyproject.toml as it is

lab: $(STAMP)
	@$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root)

ui: $(STAMP)
	@$(BIN)/genai-lab ui

readme: $(STAMP)
	@$(BIN)/python .ci/readme.py

fresh: $(STAMP)
	@$(BIN)/nbdev-export
	@TQDM_DISABLE=1 $(BIN)/nbdev-test nbs --save
	@$(BIN)/nbdev-clean
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
