# Everything happens in one virtual environment, .venv. PYTHON picks the interpreter that makes it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RECIPE ?= recipes/quickstart.yaml
BENCHMARK ?= --direction forward
# Tests run in so many processes of one thread each: tiny models gain nothing from threads. 2 GB were seen in one.
TEST_WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed

# The tokenizers library warns about its own threads whenever an engine starts a process.
export TOKENIZERS_PARALLELISM := false

.PHONY: help install quickstart test lint types unit benchmark clean

help:
	@echo "make quickstart   install, then build $(RECIPE): distil, search, export, parity, the final table"
	@echo "make test         install, then ruff, mypy and pytest"
	@echo "make lint | types | unit   one part of make test"
	@echo "make benchmark    the operator's table; BENCHMARK='--direction backward' and so on, see benchmarks/README.md"
	@echo "make clean        remove .venv and caches; runs/ stays"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml scripts/install_cpu.sh
	@test -n "$(PYTHON)" || { echo "make: no python3.11 or python3 on the PATH; set PYTHON" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@begin=$$(date +%s); bash scripts/install_cpu.sh $(BIN)/python && end=$$(date +%s) && \
		echo "installation: $$((end - begin)) s" && echo "$$((end - begin))" > $(INSTALLED)

quickstart: install
	@echo "installation took $$(cat $(INSTALLED)) s"
	@begin=$$(date +%s); $(BIN)/dtr-deploy build --recipe $(RECIPE); status=$$?; end=$$(date +%s); \
		echo "build: $$((end - begin)) s; installation: $$(cat $(INSTALLED)) s"; exit $$status

test: lint types unit

lint: install
	@$(BIN)/ruff check .

types: install
	@$(BIN)/mypy

unit: install
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -rs -n $(TEST_WORKERS) --dist loadfile

benchmark: install
	@$(BIN)/python -m benchmarks.operator $(BENCHMARK)

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
