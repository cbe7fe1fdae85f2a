# The commands of README.md and CONTRIBUTING.md. Each creates .venv and installs what it needs first.
BIN := .venv/bin

.PHONY: demo test test-all test-slow check format clean

demo: ## the main job on an embedded default, in a few minutes
	@tools/install.sh
	$(BIN)/bigtune demo

test: ## the tests, in under 15 minutes on 2 cores
	@tools/install.sh test
	$(BIN)/python -m pytest -m "not slow"

test-all: ## the tests and what takes longer
	@tools/install.sh test
	$(BIN)/python -m pytest

test-slow: ## only what `make test` leaves out
	@tools/install.sh test
	$(BIN)/python -m pytest -m slow

check: ## formatting, lint and types
	@tools/install.sh dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck -x tools/*.sh launchers/*.sh launchers/*.sbatch .ci/run; \
	else echo "not run: shellcheck (apt-get install shellcheck)"; fi

format: ## rewrite the code in the house's format
	@tools/install.sh dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what tools left
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
