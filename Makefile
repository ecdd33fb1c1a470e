PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: demo test types everything gpu install

demo: install
	.venv/bin/unlearn concept=cat method=uce sampler.steps=20

test: install
	.venv/bin/python -m pytest

types: install
	.venv/bin/mypy

# What fails does not keep the rest from being shown, but is the result; Ctrl-C ends all of it.
everything: install
	trap 'exit 1' INT; failed=0; \
	.venv/bin/unlearn -m experiment=everything hydra/launcher=joblib || failed=1; \
	.venv/bin/unlearn -m experiment=everything model=emoji_vqgan 'method=glob([none, lcr*], exclude=*_nudity)' hydra/launcher=joblib || failed=1; \
	.venv/bin/unlearn-table outputs/runs || failed=1; \
	.venv/bin/unlearn-report outputs/runs || failed=1; \
	exit $$failed

# Installs nothing: a machine with a GPU may have no internet. out=FOLDER writes the results there.
gpu:
	$(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON)) -m experiments.gpu $(if $(out),--out $(out))

install: .venv/.installed

.venv/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "This needs Python 3.11 or newer, and none was found: see python.org, or environment.yml for conda." >&2; exit 1; }
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -e '.[dev]'
	touch $@
