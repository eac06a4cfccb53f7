.PHONY: setup format check test soak bench

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
	$(PYTHON) -m pytest -n 2 --dist loadfile

# What the tests do in seconds, for as long as it takes to trust it; docs/reliability.md has the figures.
soak:
	for program in kill leaks fuzz ranks scale; do $(PYTHON) soak/$$program.py || exit 1; done

# make bench BENCH=--quick: small sizes, in seconds
bench:
	$(PYTHON) benchmarks/bench_loss.py $(BENCH)
