PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
BIN := .venv/bin
.DEFAULT_GOAL := help
.PHONY: help app test lint format fuzz kills load scale audit mutation screenshots

help: ## show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/make \1\t\2/' | expand -t 20

app: .venv/installed ## install what the app needs, find or download Whisper base, and start it
	@test ! -f assets/real/config.json || $(BIN)/hdmole models get whisper-base >/dev/null \
		|| echo "The app starts without the model for real speakers."
	$(BIN)/hdmole app

test: .venv/installed-dev ## install what the tests need, check style and types, run all tests
	$(MAKE) --no-print-directory lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

lint: .venv/installed-dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy hdmole app pages

format: .venv/installed-dev ## format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fuzz: .venv/installed-dev ## decode mutated audio files of every container: 10,000 of them, or e.g. n=500
	$(BIN)/python tests/fuzz.py $(or $(n),10000)

kills: .venv/installed-dev ## kill a tiny job at random points and compare what it ends in: of=evaluate, compare or build; e.g. n=100
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/kills.py $(or $(of),evaluate) $(or $(n),20)

load: .venv/installed-dev ## start the app and let many visitors in at once: 50, or e.g. visitors=10 sessions=200
	$(BIN)/python tests/load.py $(or $(visitors),50) $(or $(sessions),1000)

scale: .venv/installed-dev ## measure memory and time by hours of speech for docs/scaling.md; e.g. hours="1 10"
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/scale.py $(hours)

audit: .venv/bin/python ## look the pinned packages up in the database of known weaknesses (needs the network)
	$(BIN)/python -m venv build/audit
	build/audit/bin/pip install -q --disable-pip-version-check pip-audit==2.10.1
	build/audit/bin/pip-audit -r requirements.txt --no-deps --disable-pip --strict

mutation: .venv/installed-dev ## change the code in small ways and count what the tests notice: all of it, or e.g. of=gate
	OMP_NUM_THREADS=1 nice $(BIN)/python tests/mutation.py $(of)

screenshots: .venv/installed-dev ## write docs/screenshots from the running app (needs Chromium)
	$(BIN)/python -m app.screenshots

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with its venv module is needed; install it (Debian: apt install python3 python3-venv) and run this again."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python requirements.txt pyproject.toml Makefile
	$(BIN)/pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	@echo 'import hdmole._torchaudio' > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/hdmole_torchaudio.pth"
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@
