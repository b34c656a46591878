# Each target makes .venv, installs what it needs, and runs. Needs Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fuzz bench bench-conversion bench-step bench-packed bench-shots bench-digits zoo docs clean

demo: $(VENV)/.demo ## convert the pretrained TransNetV2 and run it on its own video
	$(BIN)/qconvert demo

test: $(VENV)/.test ## lint, types, documentation and every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=auto

fuzz: $(VENV)/.test ## bad packed files, made by atheris with a look at the code that they reach: two minutes
	$(BIN)/python tests/fuzz_packed_file.py -max_total_time=120 -rss_limit_mb=4096

bench: bench-conversion bench-step ## speed and memory, as ratios measured side by side (`make -k`: both, even if a bar is missed)

bench-conversion: $(VENV)/.test
	$(BIN)/python tests/bench/bench_conversion.py

bench-step: $(VENV)/.test
	$(BIN)/python tests/bench/bench_step.py

bench-packed: $(VENV)/.bench ## packed layers and models beside what a user would run instead
	$(BIN)/python tests/bench/bench_packed.py

bench-shots: $(VENV)/.test ## real trainings of pretrained TransNetV2, as tables: hours; goes on where it was interrupted
	$(BIN)/python tests/bench/bench_tasks.py shots

bench-digits: $(VENV)/.test ## real trainings on moving digits, five seeds, as tables: hours; goes on where it was interrupted
	$(BIN)/python tests/bench/bench_tasks.py digits --seeds 5

zoo: $(VENV)/.test ## what a conversion does to every model that the tests run, written to docs/zoo.md
	$(BIN)/python tests/zoo/table.py

docs: $(VENV)/.test ## the documentation, on http://127.0.0.1:8000
	$(BIN)/mkdocs serve

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

clean:
	rm -rf $(VENV) site dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
