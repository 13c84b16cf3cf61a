# make train · test · lab · soak · bench: each sets up what it needs. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin
SET_UP := .venv/.set-up
export OMP_NUM_THREADS ?= 2

help:
	@sed -n 's/^##  *//p' Makefile

$(SET_UP): constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "trainbook needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name one: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing the pinned set (PyTorch and Jupyter are large: some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(sed -n 's/^torch==/torch==/p' constraints.txt)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(SET_UP)

## make train   set up, then train configs/demo.yaml: both stages of the ink recipe, in a minute
train: $(SET_UP)
	@$(BIN)/trainbook train configs/demo.yaml

## make test    set up, then everything that must hold;  make test ONLY=tests/test_run.py runs a part
# Two cores: what starts many processes runs beside the rest, and its report follows.
BESIDE := tests/test_pages.py tests/test_stages.py tests/test_prove.py
test: $(SET_UP)
ifdef ONLY
	@$(BIN)/python -m pytest $(ONLY)
else
	@$(BIN)/python -m pytest $(BESIDE) > .venv/beside.log 2>&1 & beside=$$!; \
	$(BIN)/python -m pytest $(BESIDE:%=--ignore=%); rest=$$?; \
	wait $$beside; beside=$$?; echo "and $(BESIDE):"; cat .venv/beside.log; exit $$((rest | beside))
endif

## make soak    the tests with their long repetitions
soak: $(SET_UP)
	@$(BIN)/python -m pytest --soak $(ONLY)

## make lab     JupyterLab on the pages
lab: $(SET_UP)
	@$(BIN)/jupyter lab --notebook-dir=. $$(test "$$(id -u)" = 0 && echo --allow-root) nbs/index.ipynb

## make pages   run all pages in place, export them, make the README;  make pages PAGES=nbs/08_run.ipynb
pages: $(SET_UP)
	@$(BIN)/python tools/pages.py refresh $(PAGES)

## make bench   the measurements in benchmarks/
bench: $(SET_UP)
	@for file in benchmarks/*.py; do echo "$$file"; $(BIN)/python $$file || exit 1; done

## make surface freeze the public surface and the config schema anew, after a change on purpose
surface: $(SET_UP)
	@$(BIN)/trainbook config schema > configs/schema.json
	@PYTHONPATH=tools $(BIN)/python tests/test_house.py

.PHONY: help train test soak lab pages bench surface
