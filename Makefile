# make demo: train and evaluate a tokenizer in minutes | make retrain-demo: train the one in the package again
# make bench: measure speed against peers | make gpu: check and time on a GPU | make test | make quick: the tests of minutes | make lab | make docs | make wheel: check the wheel as a new user | make export | make clean
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

# threads that wait must not spin: with several processes on few cores that costs more than it gains
demo retrain-demo test quick: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo retrain-demo bench gpu test quick lab hooks docs wheel export clean

demo: .venv/installed
	$(BIN)/python tools/demo.py

retrain-demo: .venv/installed
	$(BIN)/python tools/retrain_demo.py $(if $(STEPS),--steps $(STEPS))

bench: .venv/installed
	folder=benchmarks/speed/$$($(BIN)/python -c "import torch; print('cuda' if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability().lower())"); \
	mkdir -p $$folder && $(BIN)/bitvae run nbs/experiments/benchmark.ipynb $$folder/benchmark.ipynb --set folder=$$folder --set width=128 --set size=256 \
		--set rounds=3 --set 'dims=[16,32,64]' --set 'latents=[16,32,64]' --set images=64 --set small=128 --set compiled=true --set memory=true $(if $(LARGE),--set large=$(LARGE) --set large_width=128) \
		--set 'counted=[]'

gpu:  # with the machine's own python3 and torch
	python3 tools/gpu.py --out runs/gpu --minutes 8

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

quick: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

lab: .venv/installed hooks
	$(BIN)/jupyter lab nbs

hooks:  # git merges notebooks cell by cell, with nbdev's driver, and Jupyter trusts what was merged
	@if [ -d .git ]; then PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_install_hooks && \
		git config merge.nbdev-merge.driver '"$(CURDIR)/$(BIN)/nbdev_merge" %O %A %B %P' && \
		printf '#!/bin/sh\n"%s/nbdev_trust"\n' "$(CURDIR)/$(BIN)" > .git/hooks/post-merge; fi

docs: .venv/installed
	$(BIN)/python tools/docs.py

wheel:  # builds the wheel and uses it in a fresh environment, as a new user does
	$(PYTHON) tools/check_wheel.py

export: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

.venv/installed: settings.ini setup.py
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing into .venv (torch and what it needs: a few minutes, about 6 GB)"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e ".[dev]"
	# the S3 server of the tests, apart: fitting its boto3 to s3fs takes pip many minutes among all packages
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check "moto[server]>=5.1" "s3fs>=2025.9"
	touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
