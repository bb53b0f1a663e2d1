# Two commands: `make demo` runs the main job, `make test` passes the tests. Each sets up .venv by itself.

PYTHON ?= python3
BIN := .venv/bin
PROMPT ?= What is the capital of France? Name one famous building there.

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/onelaunch run smollm2-135m-instruct --prompt "$(PROMPT)" --max-new-tokens 80 --stats

test: lint
	$(BIN)/python -m pytest -n auto --dist loadgroup --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	MYPYPATH=.venv/src $(BIN)/mypy -p onelaunch

# The repository root is the package `onelaunch`; mypy finds it under that name through the link.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	mkdir -p .venv/src && ln -sfn ../.. .venv/src/onelaunch
	touch $@

clean:
	rm -rf .venv build *.egg-info
