# Everything runs in .venv, which these targets make; nothing else has to be installed.
PYTHON ?= python3
ARGS ?=

.PHONY: finetune test lint clean

# fine-tunes the bundled tiny model's first layer on instructions about its world, offline
finetune: .venv/installed
	.venv/bin/python train/finetune_llama.py --layers 1 --config train/tiny.json $(ARGS)

# two processes of one thread each, as one process leaves half of two cores idle; for the debugger
# ARGS="-n 0 --pdb", or plain pytest
test: .venv/installed-dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: .venv/installed-dev
	.venv/bin/ruff check .

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv *.egg-info
