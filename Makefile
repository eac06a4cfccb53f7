.PHONY: setup format check test bench

PYTHON ?= python

setup:
	$(PYTHON) -m pip install -e '.[test,dev]'

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
	git ls-files 'csrc/*' 'tests/cpp/*.cpp' 'tests/emulator/*.cpp' 'tests/emulator/*.h' | xargs clang-format -i

check:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	git ls-files 'csrc/*' 'tests/cpp/*.cpp' 'tests/emulator/*.cpp' 'tests/emulator/*.h' | xargs clang-format --dry-run -Werror

test:
	$(PYTHON) -m pytest

# make bench BENCH=--quick: small sizes, in seconds
bench:
	$(PYTHON) benchmarks/bench_loss.py $(BENCH)
