# Commands of the project. `make` alone lists them.
#
# `make train`, `make test`, `make faults` and `make docs` first see to it that .venv is there and complete. The files
# .venv/.installed-* hold a copy of the requirements that were installed, and the folder of the project, which is
# installed there in editable form: while they match, nothing is installed and a command starts at once.

PYTHON ?= python3
TASK ?= dmc:cartpole_swingup
SEED ?= 0
STEPS ?=
ARGS ?=
# The main job keeps to half an hour on slow machines too; what somebody asks for runs to its end.
ifeq ($(STEPS)$(TASK),dmc:cartpole_swingup)
override STEPS := 200k
MINUTES ?= 26
endif
MINUTES ?= 0
JOBS ?= 2

VENV := .venv
CHECKED := envs world_model agent train_agent.py evaluate.py

.PHONY: help train test faults docs clean ready-train ready-test ready-docs

help:
	@echo "make train   train an agent; the first call installs what is needed into $(VENV)"
	@echo "             TASK=$(TASK)  SEED=$(SEED)  STEPS=$(or $(STEPS),(environment steps))  ARGS=(more options)"
	@echo "             MINUTES=$(MINUTES) ends the training early where the machine is slow; 0: no limit"
	@echo "make test    check style and types, then run the tests"
	@echo "make faults  end runs at random and feed them damaged inputs, for two hours or so; JOBS=$(JOBS) at a time"
	@echo "make docs    build the documentation into site/"
	@echo "make clean   remove caches; $(VENV) and runs/ stay"
	@echo "PYTHON=python3.12 chooses the Python that $(VENV) is made with (3.11 or newer)"

train: ready-train
	$(VENV)/bin/python train_agent.py $(TASK) --seed $(SEED) $(if $(STEPS),--steps $(STEPS)) $(if $(filter-out 0,$(MINUTES)),--train.minutes $(MINUTES)) $(ARGS)

# Tools are run as modules: their scripts in $(VENV)/bin stop working when the folder is moved.
test: ready-test
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy $(CHECKED)
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4

# Its tables in runs/faults go on where they were; remove them to begin anew.
faults: ready-test
	$(VENV)/bin/python -m tests.faults --jobs $(JOBS)

# The variable silences a notice on the end of life of Material for MkDocs (May 2027); versions are pinned.
docs: ready-docs
	$(VENV)/bin/python -m docs.configuration
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "read it: site/index.html"

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

ready-train:
	@$(call ready,train,requirements.txt,requirements.txt)

ready-test:
	@$(call ready,test,requirements.txt requirements-dev.txt,requirements-dev.txt)

ready-docs:
	@$(call ready,docs,requirements.txt requirements-docs.txt,requirements-docs.txt)

# $(call fail,text): say why, once, and stop.
fail = { echo "$(1)" >&2; exit 1; }

# Does $(VENV) have a Python that runs, is new enough and has pip? A half-made one does not.
usable = $(VENV)/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

pip = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# dm-control asks for labmaze, which has no wheel for Python 3.13 and which the tasks never import.
# There dm-control goes in alone; requirements.txt names what else it needs.
ALONE := dm-control==1.0.50 ; python_version >= "3.13"

# $(call ready,kind,files kept in the stamp,file for pip): one shell script.
# The lock makes a second call wait for the first. A lock whose owner is gone means that an install
# was cut off; pip would take half-copied packages for whole ones, so $(VENV) is made anew.
define ready
stamp=$(VENV)/.installed-$(1); lock=$(VENV).lock; waited=0; \
if $(usable) && { cat $(2); pwd; } | cmp -s - $$stamp; then exit 0; fi; \
[ -w . ] || $(call fail,$(VENV) cannot be made: this folder is not writable); \
until (set -C; echo $$$$ > $$lock) 2>/dev/null; do \
  [ $$waited -gt 0 ] || echo "waiting for another make to finish installing"; \
  [ $$waited -lt 1800 ] || $(call fail,gave up waiting: remove $(VENV).lock if nothing is installing); \
  sleep 1; waited=$$((waited + 1)); \
  owner=$$(cat $$lock 2>/dev/null); \
  if ! kill -0 "$$owner" 2>/dev/null && [ -e $$lock ] && [ "$$(cat $$lock)" = "$$owner" ]; then \
    echo "the last installation was cut off: starting over"; rm -rf $(VENV) $$lock; \
  fi; \
done; \
trap 'rm -f $(VENV).lock' EXIT; \
trap 'rm -rf $(VENV); exit 130' INT TERM HUP; \
if $(usable) && { cat $(2); pwd; } | cmp -s - $$stamp; then exit 0; fi; \
if ! $(usable); then \
  command -v $(PYTHON) >/dev/null || $(call fail,$(PYTHON) was not found: install Python 3.11 or newer); \
  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
    $(call fail,Python 3.11 or newer is needed and $(PYTHON) is older: run make PYTHON=python3.12 ...); \
  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
    $(call fail,python3-venv is missing: run: apt install python3-venv); \
  rm -rf $(VENV); \
  $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(call fail,$(VENV) could not be made with $(PYTHON)); }; \
fi; \
rm -f $$stamp; \
echo "installing $(3) into $(VENV) (a minute or more, once)"; \
{ $(pip) -r $(3) && $(pip) --no-deps '$(ALONE)' && $(pip) --no-deps --editable .; } || \
  $(call fail,the installation failed; the lines above say why); \
{ cat requirements.txt; pwd; } > $(VENV)/.installed-train; \
{ cat $(2); pwd; } > $$stamp
endef
