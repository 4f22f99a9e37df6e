# Two commands matter: `make engine` and `make test`. Everything is installed into ./.venv by whichever needs it first.

MODEL ?= trol-nano
CHECKPOINT ?= $(MODEL)
BUNDLE ?= build/$(MODEL)
CONTEXT ?=
SCENES ?= 2000
MINUTES ?= 10
PIECE_MB ?= 48
# Empty: the best that runs on this machine (`trol-edge targets --best`), in the recipe that export chooses.
TARGET ?=
PRECISION ?=
PYTHON ?= python3
VENV ?= .venv
# One version, because a looser range fetches the newest build. Which build of it this machine needs, and about how much
# that fetches, is said by export/install_torch.py; TORCH= gives pip arguments of your own instead.
TORCH_VERSION ?= 2.13.0
TORCH ?=
# For `make test-oldest`: the Python and ONNX Runtime of JetPack 6.
PYTHON_OLDEST ?= python3.10
ORT_OLDEST ?= 1.23.2

# The tests start many processes, each of which would compile every file again.
unexport PYTHONDONTWRITEBYTECODE

BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet

.PHONY: help engine test check test-slow test-all test-golden faults fault-catalogue fuzz load browser profile bindings test-rtx engines-full test-gpu gpu-kit gpu-kit-jetson gpu-kit-check test-oldest test-aarch64 test-wheel lint bench bench-peers soak accuracy accuracy-kv accuracy-outliers nano wheel docs pictures release-check clean

help:  ## show this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'
	@echo "  e.g. make engine MODEL=trol-1.8b            (fetches the published checkpoint)"
	@echo "       make engine MODEL=trol-7b CHECKPOINT=folder CONTEXT=4096"
	@echo "       make engine TARGET=rtx PRECISION=fp16       (fetches TensorRT for RTX; trol-edge targets lists more)"

engine: $(VENV)/engine.stamp  ## checkpoint -> bundle in build/MODEL, verify it, then ask it (MODEL=, TARGET=, PRECISION=, CHECKPOINT=, CONTEXT=)
	@target="$(TARGET)"; test -n "$$target" || target=$$($(BIN)/trol-edge targets --best) || exit 1; \
	test $$target != rtx || $(BIN)/python -c "import tensorrt_rtx" 2>/dev/null || $(PIP) -e '.[rtx]' || exit 1; \
	$(BIN)/trol-edge export $(CHECKPOINT) -o $(BUNDLE) --model $(MODEL) --target $$target --force \
		$(if $(PRECISION),--precision $(PRECISION)) $(if $(CONTEXT),--context $(CONTEXT)) || exit 1; \
	case $$target in \
		cpu) $(BIN)/trol-edge verify $(BUNDLE) && $(BIN)/trol-edge demo $(BUNDLE);; \
		onnx) ;; \
		*) $(BIN)/trol-edge build $(BUNDLE) && $(BIN)/trol-edge doctor $(BUNDLE) && \
			{ test -n "$(TARGET)" || $(BIN)/trol-edge verify $(BUNDLE); };; \
	esac

# Contiguous halves of the suite, so that a file's fixtures are mostly made once; who is done first takes from the other.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

test: $(VENV)/test.stamp lint  ## lint, types and the test suite, on all cores
	$(PYTEST) -m "not slow" $(ARGS)

check: $(VENV)/test.stamp lint  ## lint, types and the tests that need no bundle and no process of their own: a minute
	$(PYTEST) -m "not slow and not bundle and not heavy" $(ARGS)

test-slow: $(VENV)/test.stamp  ## only what `make test` leaves out: more variants, browsers, other people's bindings
	$(PYTEST) -m slow $(ARGS)

test-all: test test-slow  ## the whole suite

faults: $(VENV)/test.stamp  ## plant faults in a copy, one after the other, and show that the tests see each (ARGS=word)
	$(BIN)/python -m tests.faults $(ARGS)

fuzz: $(VENV)/test.stamp  ## hostile trials: bundles, pictures, checkpoints, signals, kills, calls, http (MINUTES=10, ARGS=--help)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(ARGS)

# The older onnxruntime beside this environment's own, for the runs that nothing may alarm.
fault-catalogue: $(VENV)/test.stamp  ## put faults into bundles of both small models, every precision, and show that the self-test names each
	$(PIP) --no-deps --target build/onnxruntime-oldest onnxruntime==$(ORT_OLDEST)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.selftest_faults --oldest build/onnxruntime-oldest --page docs/faults.md $(ARGS)

GOLDEN_TESTS := $(addprefix tests/test_,$(addsuffix .py,reference phi3 graphs prefix beam lower_trt images text tiles checkpoint))

test-golden: $(VENV)/test.stamp  ## the comparisons with the authors' code on the full golden data (TROL_EDGE_GOLDEN=folder)
	@test -d "$(TROL_EDGE_GOLDEN)" || { echo "no folder: name that of the full data, TROL_EDGE_GOLDEN=folder"; exit 1; }
	$(BIN)/python -m tests.pack_golden $(TROL_EDGE_GOLDEN) --check
	TROL_EDGE_GOLDEN=$(abspath $(TROL_EDGE_GOLDEN)) $(PYTEST) $(GOLDEN_TESTS) $(ARGS)

lint: $(VENV)/test.stamp  ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/engine.stamp  ## prefill, decode, memory: our precisions beside torch, llama.cpp and OpenVINO (if installed; see ARGS=--help)
	$(BIN)/python -m tests.bench.speed $(ARGS)

bench-peers: $(VENV)/engine.stamp  ## an environment for each peer of make bench in build/peers: llama.cpp, OpenVINO (3 GB, minutes)
	$(BIN)/python -m tests.bench.peers

soak: $(VENV)/engine.stamp  ## hours in minutes: four threads against one Runtime (MINUTES=10, BUNDLE=)
	@test -f $(BUNDLE)/bundle.json || $(BIN)/trol-edge export $(CHECKPOINT) -o $(BUNDLE) --model $(MODEL)
	@$(BIN)/trol-edge soak $(BUNDLE) --minutes $(MINUTES)

load: $(VENV)/test.stamp  ## 16 clients of all kinds against trol-edge serve for five minutes: answers, memory, waiting, overhead (BUNDLE=, ARGS=--help)
	@test -f $(BUNDLE)/bundle.json || $(BIN)/trol-edge export $(CHECKPOINT) -o $(BUNDLE) --model $(MODEL)
	$(BIN)/python -m tests.bench.load $(BUNDLE) $(ARGS)

profile: $(VENV)/engine.stamp  ## stages, memory, energy of a bundle, and a page about it in build/profile (BUNDLE=, BUNDLES="a b", ARGS=--help)
	@test -n "$(BUNDLES)" || test -f $(BUNDLE)/bundle.json || $(BIN)/trol-edge export $(CHECKPOINT) -o $(BUNDLE) --model $(MODEL)
	$(BIN)/trol-edge profile $(or $(BUNDLES),$(BUNDLE)) -o build/profile $(ARGS)

ACCURACY := fp32 fp16 int8-dynamic int4-dynamic int8 int4
accuracy: $(VENV)/engine.stamp  ## what other precisions lose against fp32 on 2000 held-out questions (MODEL=, CHECKPOINT=, SCENES=)
	for p in $(ACCURACY); do $(BIN)/trol-edge export $(CHECKPOINT) --precision $$p -o build/accuracy/$(MODEL)-$$p --model $(MODEL) --force || exit 1; done
	$(BIN)/trol-edge compare $(foreach p,$(ACCURACY),build/accuracy/$(MODEL)-$(p)) --scenes $(SCENES) --threads 1 -o build/accuracy/$(MODEL)

# Each with 8-bit keys and values and without; and what large channels in the keys, which change nothing in FP32, cost them.
KV := fp32 int8 int4-dynamic
accuracy-kv: $(VENV)/engine.stamp  ## what 8-bit keys and values lose against fp32, also with outlier channels in keys (MODEL=, SCENES=)
	mkdir -p build/accuracy
	$(BIN)/trol-edge outliers export/checkpoints/$(MODEL) --keys -o build/accuracy/$(MODEL)-loud --force
	for p in $(KV); do $(BIN)/trol-edge export $(MODEL) --precision $$p -o build/accuracy/$(MODEL)-$$p --model $(MODEL) --force || exit 1; \
		$(BIN)/trol-edge export $(MODEL) --precision $$p --kv int8 -o build/accuracy/$(MODEL)-$$p-kv --model $(MODEL) --force || exit 1; done
	$(BIN)/trol-edge export build/accuracy/$(MODEL)-loud --precision fp32 --kv int8 -o build/accuracy/$(MODEL)-loud-kv --force
	$(BIN)/trol-edge compare $(foreach p,$(KV),build/accuracy/$(MODEL)-$(p)) $(foreach p,$(KV),build/accuracy/$(MODEL)-$(p)-kv) build/accuracy/$(MODEL)-loud-kv --scenes $(SCENES) --threads 1 -o build/accuracy/$(MODEL)-kv

# Outlier channels that change nothing in FP32: what our int8 and what plain INT8 (no rescaling, no clipping) make of them.
accuracy-outliers: $(VENV)/engine.stamp  ## the same with outlier channels in trol-nano: int8, and plain INT8 beside it
	mkdir -p build/accuracy
	echo '{"recipe": "int8", "scaling": false, "clipping": false, "observer": "minmax"}' > build/accuracy/plain.json
	$(BIN)/trol-edge outliers export/checkpoints/trol-nano -o build/accuracy/outliers --force
	for p in fp32 int8-dynamic int4-dynamic int8 build/accuracy/plain.json; do $(BIN)/trol-edge export build/accuracy/outliers --precision $$p -o build/accuracy/outliers-$$(basename $$p .json) --force || exit 1; done
	$(BIN)/trol-edge export trol-nano --precision build/accuracy/plain.json -o build/accuracy/trol-nano-plain --force
	$(BIN)/trol-edge compare $(foreach p,fp32 int8-dynamic int4-dynamic int8 plain,build/accuracy/outliers-$(p)) build/accuracy/trol-nano-plain --scenes $(SCENES) --threads 1 -o build/accuracy/outliers-report

# --scale 2: larger pictures of the same scenes, which trol-nano-phi3 cuts into tiles.
nano: $(VENV)/engine.stamp  ## train trol-nano (or MODEL=trol-nano-phi3) again, an hour on two cores, and measure its bundle (ARGS="--start FOLDER")
	rm -rf build/$(MODEL)-scratch
	$(BIN)/python -m trol_edge.export.nano.train $(MODEL) --out export/checkpoints/$(MODEL) \
		--scratch build/$(MODEL)-scratch $(ARGS)
	$(BIN)/trol-edge export $(MODEL) -o $(BUNDLE) --force
	$(BIN)/trol-edge evaluate $(BUNDLE) --report export/checkpoints/$(MODEL)/REPORT.md
	$(BIN)/trol-edge evaluate $(BUNDLE) --scale 2 --report export/checkpoints/$(MODEL)/REPORT.md

# The system's Chromium, or Playwright's own, or the distribution's where this user may install packages.
browser: $(VENV)/test.stamp  ## headless Chromium, in which the tests look at the page of a profile
	@$(PIP) -e '.[browser]'
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
		|| $(BIN)/python -m playwright install chromium \
		|| { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null

bindings: $(VENV)/test.stamp  ## fetch TensorRT's Python bindings (4 MB, no libraries), to which the tests hold our calls
	$(BIN)/python -m tests.bindings

test-rtx: $(VENV)/test.stamp  ## real engine builds by TensorRT for RTX (1.7, about 500 MB to fetch; needs no GPU)
	@$(PIP) -e '.[rtx]'
	$(BIN)/python -m pytest -q tests/test_trt_build.py tests/test_trt_api.py tests/test_targets.py tests/test_trt.py tests/test_program.py

# Checkpoints of random weights, bundles and engines of five builds, one after the other: 25 GB of disk, half an hour.
engines-full: $(VENV)/engine.stamp  ## full-size engines (1.8B, 3.8B, random weights) by TensorRT for RTX, held to limits (ARGS=--help)
	@$(PIP) -e '.[rtx]'
	$(BIN)/python -m tests.bench.engines_full $(ARGS)

test-gpu: $(VENV)/test.stamp  ## parity on an NVIDIA GPU, with engines built here
	$(BIN)/trol-edge export trol-nano -o build/test-gpu --target $$($(BIN)/trol-edge targets --best) --force
	$(BIN)/trol-edge build build/test-gpu && $(BIN)/trol-edge doctor build/test-gpu
	TROL_EDGE_GPU_BUNDLE=build/test-gpu $(BIN)/python -m pytest -q -m gpu tests/test_gpu.py

# One folder that proves on a GPU, without a network, what nothing here can: python3 run.py --budget 720, there.
gpu-kit: $(VENV)/test.stamp  ## build/gpu-kit: wheels, bundles, engines and a script for a machine with a GPU (PIECE_MB=48, ARGS=--help)
	@$(PIP) -e '.[rtx]'
	$(BIN)/python deploy/gpu_kit/make.py --piece-mb $(PIECE_MB) $(ARGS)

gpu-kit-jetson: $(VENV)/test.stamp  ## build/gpu-kit-jetson: the same for a Jetson, with JetPack's own TensorRT
	$(BIN)/python deploy/gpu_kit/make.py --jetson -o build/gpu-kit-jetson --piece-mb $(PIECE_MB) $(ARGS)

# Two bundles, and the CPU in the GPU's place: the script's own faults show here.
gpu-kit-check: $(VENV)/test.stamp  ## try the kit's script without a GPU
	$(BIN)/python deploy/gpu_kit/make.py -o build/gpu-kit-check --no-wheels --no-engines --piece-mb 1 \
		--only trol-nano-cpu-fp16,trol-nano-tensorrt-fp16
	rm -rf build/gpu-kit-check/result build/gpu-kit-check/scratch
	cd build/gpu-kit-check && $(abspath $(BIN))/python run.py --dry --budget 170 --soak-s 5 \
		--skip prepare-trol-nano-phi3,prepare-trol-nano-int8,full-trol-nano-phi3,full-trol-nano-int8,torch

# The robot side alone, on the oldest Python and ONNX Runtime we promise: no torch, no onnx in that environment.
test-oldest: $(VENV)/test.stamp  ## runtime tests on Python 3.10 and onnxruntime 1.23.2
	$(BIN)/trol-edge export trol-nano -o build/test-oldest-bundles/trol-nano --force
	$(BIN)/trol-edge export trol-nano-phi3 -o build/test-oldest-bundles/trol-nano-phi3 --force
	rm -rf build/venv-oldest && $(PYTHON_OLDEST) -m venv build/venv-oldest
	build/venv-oldest/bin/python -m pip install --quiet -e '.[cpu]' onnxruntime==$(ORT_OLDEST) 'pytest>=8,<10'
	build/venv-oldest/bin/trol-edge verify build/test-oldest-bundles/trol-nano
	build/venv-oldest/bin/trol-edge verify build/test-oldest-bundles/trol-nano-phi3
	rm -rf build/test-oldest-lowered
	TROL_EDGE_LOWERED_OUT=build/test-oldest-lowered $(BIN)/python -m pytest -q tests/test_lower_ort.py
	build/venv-oldest/bin/python tests/replay_lowered.py build/test-oldest-lowered
	TROL_EDGE_GOLDEN=$$($(BIN)/python -m tests.golden) TROL_EDGE_NANO_BUNDLES=build/test-oldest-bundles build/venv-oldest/bin/python -m pytest -q \
		tests/test_runtime.py tests/test_chat.py tests/test_robot.py tests/test_turns.py tests/test_vision_cache.py \
		tests/test_images.py tests/test_text.py tests/test_sampling.py tests/test_nano.py

# Not part of CI: it needs root, and Debian's arm64 packages (once, 3 minutes).
AARCH64 := fp32 int8-dynamic int4-dynamic
test-aarch64: wheel  ## the [cpu] install from aarch64 wheels, under emulation: both nanos answer as here; [jetson] resolves
	for m in trol-nano trol-nano-phi3; do for p in $(AARCH64); do \
		$(BIN)/trol-edge export $$m --precision $$p -o build/aarch64/$$m-$$p --force || exit 1; done; done
	$(BIN)/python tests/aarch64.py build/aarch64 "$$(ls dist/*.whl)" $(foreach m,trol-nano trol-nano-phi3,$(foreach p,$(AARCH64),build/aarch64/$(m)-$(p)))

test-wheel: wheel  ## the wheel in an empty environment: imports, helps, and names the extras it lacks
	rm -rf build/venv-wheel && $(PYTHON) -m venv build/venv-wheel
	build/venv-wheel/bin/python -m pip install --quiet "$$(ls dist/*.whl)[cpu]"
	cd build && venv-wheel/bin/python -c "import trol_edge; print(trol_edge.__file__)" && venv-wheel/bin/trol-edge --help >/dev/null
	cd build && ! venv-wheel/bin/trol-edge synth --model trol-1.8b -o nowhere 2>wheel.err && grep -q "trol-edge\[export\]" wheel.err

wheel: $(VENV)/test.stamp  ## build dist/*.whl
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m pip wheel --quiet --no-deps -w dist .

docs: $(VENV)/docs.stamp  ## the site in build/site, from docs/ and the docstrings; a broken link fails
	$(BIN)/zensical build --strict --clean
	@echo "open build/site/index.html"

# The answer in the first picture is the one that the bundle gives; a test compares them.
pictures: browser $(VENV)/engine.stamp  ## docs/images again: a question with its answer, the page of a profile
	@test -f build/trol-nano/bundle.json || $(BIN)/trol-edge export trol-nano -o build/trol-nano
	$(BIN)/python docs/pictures.py question build/trol-nano
	$(BIN)/trol-edge export trol-nano -o build/pictures/trol-nano-fp32 --force
	$(BIN)/trol-edge export trol-nano -o build/pictures/trol-nano-int8 --precision int8 --force
	$(BIN)/trol-edge profile build/pictures/trol-nano-fp32 build/pictures/trol-nano-int8 -o build/pictures/profile
	$(BIN)/python docs/pictures.py profile build/pictures/profile/profile.html

# Uploads nothing; docs/release.md says what comes before and after.
release-check: $(VENV)/test.stamp  ## what a release must have: one version, a dated changelog, green checks, a good wheel
	@version=$$($(BIN)/python -c 'import trol_edge; print(trol_edge.__version__)'); \
	grep -qE "^## $$version \([0-9]{4}-[0-9]{2}-[0-9]{2}\)$$" CHANGELOG.md \
		|| { echo "CHANGELOG.md has no heading '## $$version (YYYY-MM-DD)': it is not released yet"; exit 1; }; \
	grep -qx "version: $$version" CITATION.cff || { echo "CITATION.cff does not say 'version: $$version'"; exit 1; }; \
	test -z "$$(git status --porcelain)" || { echo "not committed:"; git status --short; exit 1; }; \
	! git rev-parse -q --verify "refs/tags/v$$version" >/dev/null || { echo "the tag v$$version exists already"; exit 1; }
	.ci/run
	$(MAKE) docs wheel
	@$(PIP) -e '.[release]'
	$(BIN)/twine check --strict dist/*.whl

clean:  ## remove what was built (not downloaded checkpoints)
	rm -rf dist build/lib build/site .cache build/venv-* build/trol-nano* .mypy_cache .ruff_cache .pytest_cache

$(VENV)/engine.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else f"Python {v[0]}.{v[1]} found, 3.10 to 3.13 needed: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(if $(TORCH),$(PIP) $(TORCH),$(BIN)/python export/install_torch.py $(TORCH_VERSION))
	@echo "installing the rest into $(VENV), about 100 MB to fetch ..."
	@$(PIP) -e '.[cpu,export]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/engine.stamp
	@$(PIP) -e '.[cpu,export,sign,serve,dev]'
	@touch $@

$(VENV)/docs.stamp: $(VENV)/engine.stamp
	@$(PIP) -e '.[docs]'
	@touch $@
