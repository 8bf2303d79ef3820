# make distill    sets everything up and runs the main job (ARGS="fashion-mnist --data-path DIR" for another)
# make test       sets everything up and runs the tests
# make quick      the tests that take a moment
# make lint       ruff, mypy and clang-format, in the versions that pyproject.toml pins
# make zoo        networks of torchvision and timm, rewritten, against themselves
# make packages   builds sdist and wheel and tries them away from the checkout
# make kills      100 runs killed at random moments: the same command ends with the same bytes
# make torture    bad command lines and files by the hundred: one sentence each
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: distill test quick lint packages zoo kills torture bench clean

distill: $(READY)
	$(BIN)/python -m infer_fast.distill $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -q $(ARGS)

quick: $(READY)
	$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h tests/stand_in/*.c

packages: $(READY)
	.ci/packages $(BIN)/python

zoo: $(READY)
	$(BIN)/python -m pip install --quiet timm
	$(BIN)/python -m pytest -q tests/models/zoo.py $(ARGS)

kills: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kills $(ARGS)

torture: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture $(ARGS)

bench: $(READY)
	$(BIN)/python -m bench.ops --quick
	$(BIN)/python -m bench.distill --quick

$(READY): setup.py pyproject.toml $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[all,test,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info infer_fast/_native*.so .mypy_cache .pytest_cache .ruff_cache
