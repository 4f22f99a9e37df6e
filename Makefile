# Two commands matter: `make engine` and `make test`. Everything is installed into ./.venv by whichever needs it first.

MODEL ?= trol-nano
CHECKPOINT ?= $(MODEL)
BUNDLE ?= build/$(MODEL)
CONTEXT ?=
PYTHON ?= python3
VENV ?= .venv
# One version, because a looser range fetches the newest build. On Linux PyPI's torch brings CUDA libraries (several
# GB, not needed here); for the small CPU build: make engine TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'
TORCH ?= torch==2.13.0
# For `make test-oldest`: the Python and ONNX Runtime of JetPack 6.
PYTHON_OLDEST ?= python3.10
ORT_OLDEST ?= 1.23.2

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet

.PHONY: help engine test test-oldest test-wheel lint bench nano wheel clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "  e.g. make engine MODEL=trol-1.8b            (fetches the published checkpoint)"
	@echo "       make engine MODEL=trol-7b CHECKPOINT=folder CONTEXT=4096"

engine: $(VENV)/engine.stamp  ## checkpoint -> bundle in build/MODEL, then ask it about a picture (MODEL=, CHECKPOINT=, CONTEXT=)
	@$(BIN)/trol-edge export $(CHECKPOINT) -o $(BUNDLE) --model $(MODEL) $(if $(CONTEXT),--context $(CONTEXT)) --force
	@$(BIN)/trol-edge demo $(BUNDLE)

test: $(VENV)/test.stamp lint  ## lint, types and the test suite
	$(BIN)/python -m pytest -q

lint: $(VENV)/test.stamp  ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/engine.stamp  ## prefill, decode and memory beside the torch reference and llama.cpp (if installed)
	$(BIN)/python -m trol_edge.export.bench $(ARGS)

# --scale 2: larger pictures of the same scenes, which trol-nano-phi3 cuts into tiles.
nano: $(VENV)/engine.stamp  ## train trol-nano (or MODEL=trol-nano-phi3) again, an hour on two cores, and measure its bundle
	rm -rf build/$(MODEL)-scratch
	$(BIN)/python -m trol_edge.export.train_nano $(MODEL) --out export/checkpoints/$(MODEL) \
		--scratch build/$(MODEL)-scratch $(ARGS)
	$(BIN)/trol-edge export $(MODEL) -o $(BUNDLE) --force
	$(BIN)/trol-edge evaluate $(BUNDLE) --report export/checkpoints/$(MODEL)/REPORT.md
	$(BIN)/trol-edge evaluate $(BUNDLE) --scale 2 --report export/checkpoints/$(MODEL)/REPORT.md

# The robot side alone, on the oldest Python and ONNX Runtime we promise: no torch, no onnx in that environment.
test-oldest: $(VENV)/test.stamp  ## runtime tests on Python 3.10 and onnxruntime 1.23.2
	$(BIN)/trol-edge export trol-nano -o build/test-oldest-bundles/trol-nano --force
	$(BIN)/trol-edge export trol-nano-phi3 -o build/test-oldest-bundles/trol-nano-phi3 --force
	rm -rf build/venv-oldest && $(PYTHON_OLDEST) -m venv build/venv-oldest
	build/venv-oldest/bin/python -m pip install --quiet -e '.[cpu]' onnxruntime==$(ORT_OLDEST) 'pytest>=8,<10'
	TROL_EDGE_NANO_BUNDLES=build/test-oldest-bundles build/venv-oldest/bin/python -m pytest -q \
		tests/test_runtime.py tests/test_images.py tests/test_text.py tests/test_sampling.py tests/test_nano.py

test-wheel: wheel  ## the wheel in an empty environment: imports, helps, and names the extras it lacks
	rm -rf build/venv-wheel && $(PYTHON) -m venv build/venv-wheel
	build/venv-wheel/bin/python -m pip install --quiet "$$(ls dist/*.whl)[cpu]"
	cd build && venv-wheel/bin/python -c "import trol_edge; print(trol_edge.__file__)" && venv-wheel/bin/trol-edge --help >/dev/null
	cd build && ! venv-wheel/bin/trol-edge synth --model trol-1.8b -o nowhere 2>wheel.err && grep -q "trol-edge\[export\]" wheel.err

wheel: $(VENV)/test.stamp  ## build dist/*.whl
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

clean:  ## remove what was built (not downloaded checkpoints)
	rm -rf dist build/lib build/venv-* build/trol-nano* .mypy_cache .ruff_cache .pytest_cache

$(VENV)/engine.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} found, 3.10 to 3.13 needed: make PYTHON=python3.12 ...")'
	@echo "installing into $(VENV) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) -e '.[cpu,export]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/engine.stamp
	@$(PIP) -e '.[cpu,export,dev]'
	@touch $@
