"""Engines by layer on the stand-in of tests/trt_standin.py: the answers of a CPU, weights once, and every rule kept."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import trt_standin
from tests.cases import difference
from tests.conftest import CHECKPOINTS, NANO, NANOS
from tests.test_trt import GPU, PICTURE, QUESTION, Machine, backend, stand_in_engine
from tests.test_trt_api import RTX
from tests.trt_standin import CudaRuntime
from trol_edge.bundle.engines import FORMAT_VERSION, EngineSet, Key, folder_of, names_of, read, write
from trol_edge.bundle.layer_graphs import HEAD, MIXTURE, Parts, layer_name, part_names
from trol_edge.bundle.manifest import Bundle
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.sizes import cache_bytes
from trol_edge.errors import BundleError, UsageError
from trol_edge.runtime import Runtime
from trol_edge.runtimes.cuda import CudaPython
from trol_edge.runtimes.trt import backend as trt_module
from trol_edge.runtimes.trt import build as trt_build
from trol_edge.runtimes.trt.api import Library

pytestmark = pytest.mark.heavy

SCRATCH = 4096  # bytes that each engine overwrites
VERSIONS = {"tensorrt": "10.3.0", "jetson-jp72": "10.16.1", "rtx": "1.7.1.1"}


def add_layers(folder: Path, key: Key) -> None:
    """Stand-in engines by layer: each runs the graph that was cut for it, which is written beside it."""
    bundle = Bundle(folder)
    target = folder_of(bundle, key.target)
    target.mkdir(parents=True)
    os.link(folder / WEIGHTS, target / WEIGHTS)
    parts, infos = Parts(bundle), {}
    for name in names_of(bundle, by_layer=True):
        info, path = bundle.manifest.graphs.get(name), target / f"{name}.onnx"
        if info is None:
            part = parts.cut(name)
            info = part.info
            path.write_bytes(part.model)
        else:
            path = folder / info.file
        infos[name] = stand_in_engine(bundle, name, info, path, target, SCRATCH)
    weights = bundle.manifest.files[WEIGHTS].sha256
    write(target, EngineSet(FORMAT_VERSION, "a test", key, "fp32", weights, infos))


def machine_of(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A stand-in machine with a copy of a bundle, whose engines are by layer."""
    shutil.copytree(source, folder)
    target = Bundle(folder).manifest.target
    stand_in = CudaRuntime()
    module = trt_standin.module(RTX if target == "rtx" else "tensorrt", VERSIONS[target], stand_in)
    library = Library(module)
    gpu = dataclasses.replace(GPU, capability="8.9") if target == "rtx" else GPU
    add_layers(folder, Key(target, library.title, gpu.name, gpu.capability, "12.6"))
    monkeypatch.setattr(trt_module, "load", lambda name: library)
    monkeypatch.setattr(trt_module, "open_cuda", lambda: CudaPython(stand_in))
    monkeypatch.setattr(trt_module, "devices", lambda: [gpu])
    return Machine(stand_in, lambda **options: Runtime(folder, **options), folder)


@pytest.fixture(params=list(VERSIONS))
def machine(
    request: pytest.FixtureRequest, exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    """TensorRT without and with KVCacheUpdate, and the RTX kind."""
    return machine_of(exported(NANO, target=request.param), tmp_path / "bundle", monkeypatch)


def test_the_same_answers_as_on_a_cpu(machine: Machine, nano: Runtime) -> None:
    """Tokens of a question about a picture, of one without, and of a second one on the same session."""
    runtime = machine.open()
    for prompt, picture in ((QUESTION, PICTURE), ("Describe the scene.", PICTURE), ("What is this?", None)):
        assert runtime.generate(prompt, picture).token_ids == nano.generate(prompt, picture).token_ids


def told(runtime: Runtime) -> list[Any]:
    """What a session gives for chunks, steps, a fork and what follows them."""
    ids = runtime.tokenize(QUESTION, 1)
    session = runtime.session(prefill_chunk=19)
    found: list[Any] = [session.prefill(ids, runtime.preprocess(PICTURE))]
    twin = session.fork()
    for each in (session, twin):
        found += [each.step(int(found[-1].argmax())).copy() for _ in range(4)]
    found.append(twin.extend(ids[-5:]))
    session.become(twin)
    found.append(session.step(3).copy())
    session.truncate(len(ids))
    return [*found, session.extend([5]), session.step(4).copy()]


def test_sessions_as_on_a_cpu(machine: Machine, nano: Runtime) -> None:
    """Chunks, steps that are launched, extend, fork, truncate, become."""
    for ours, theirs in zip(told(machine.open()), told(nano), strict=True):
        assert difference(ours, theirs) <= 1e-5
    assert machine.cuda.calls.count("launch") >= 4


def test_fewer_image_tokens(machine: Machine, nano: Runtime) -> None:
    """Rope tables of a session's own reach every layer."""
    asked = [r.generate(QUESTION, PICTURE, image_tokens=0.5).token_ids for r in (machine.open(), nano)]
    assert asked[0] == asked[1]


def test_a_step_is_one_graph(machine: Machine, nano: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers and the head in one launch, with one plain run for each number of rows, and no memory of its own."""
    monkeypatch.setattr(trt_module, "ROWS", 8)
    runtime = machine.open()
    rows = runtime.model.embeddings[np.arange(40)]
    state, theirs = backend(runtime).new_state(), nano.model.backend.new_state()
    assert difference(state.traverse(rows[:5], None), theirs.traverse(rows[:5], None)) <= 1e-5
    machine.cuda.calls.clear()
    held = dict(machine.cuda.memory)
    for at in range(5, 25):
        assert difference(state.step(rows[at], at), theirs.step(rows[at], at)) <= 1e-5
    assert machine.cuda.calls.count("launch") == 20 - 4
    assert machine.cuda.calls.count("2D") == (20 if machine.engines.name == "tensorrt" else 0)
    assert machine.cuda.memory.keys() == held.keys()
    contexts = state.execution.contexts
    assert list(contexts) == [*map(layer_name, range(8)), "head"]
    shared = {context.raw.scratch for context in (*contexts.values(), *backend(runtime).loaded.contexts.values())}
    assert len(shared) == 1 and not any(context.raw.own_scratch for context in contexts.values())


def test_one_pair_for_the_second_pass(machine: Machine, nano_bundle: Path) -> None:
    """Without reuse of prefixes: one set, a pair of buffers for all sessions, and the answers of a CPU without it."""
    ours, theirs = machine.open(prefix_reuse=False), Runtime(nano_bundle, prefix_reuse=False)
    trt = backend(ours)
    graphs, context = ours.bundle.manifest.graphs, trt.context
    first = cache_bytes(graphs["step"].inputs, context)
    assert trt.cache_bytes == theirs.model.backend.cache_bytes == first * 6 // 5
    before = machine.cuda.held()
    state = trt.new_state()
    assert first <= machine.cuda.held() - before < first * 11 // 10
    assert state.rows(np.arange(3, dtype=np.int32), 1) == []
    for prompt, picture in ((QUESTION, PICTURE), ("What is this?", None)):
        assert ours.generate(prompt, picture).token_ids == theirs.generate(prompt, picture).token_ids
    with pytest.raises(UsageError, match="prefix_reuse=True"):
        ours.session().extend([5])


@pytest.mark.parametrize("machine", ["tensorrt", "rtx"], indirect=True)
@pytest.mark.parametrize("reuse", [True, False])
def test_a_prompt_in_parts(reuse: bool, machine: Machine, nano: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is longer than an engine takes goes through a layer in parts, before it enters the next."""
    monkeypatch.setattr(trt_build, "GIVEN", 128)
    monkeypatch.setattr(trt_build, "PART", 128)
    key = read(Bundle(machine.folder), machine.engines.name).key
    shutil.rmtree(machine.engines)
    add_layers(machine.folder, key)
    runtime = machine.open(prefix_reuse=reuse)
    state, theirs = backend(runtime).new_state(), nano.model.backend.new_state()
    rows = runtime.model.embeddings[np.arange(300)]
    machine.cuda.bytes.clear()
    assert difference(state.traverse(rows, None), theirs.traverse(rows, None)) <= 1e-5
    size = cache_bytes(runtime.bundle.manifest.graphs["traverse"].inputs, 1) // runtime.model.backend.context
    assert machine.cuda.bytes["2D"] == (len(rows) * size if machine.engines.name == "tensorrt" else 0)
    every = np.arange(len(rows), dtype=np.int32)
    for which in (0, 1) if reuse else (0,):
        for ours, right in zip(state.rows(every, which), theirs.rows(every, which), strict=True):
            assert difference(ours, right) <= 1e-5
    assert difference(state.step(rows[0], 300), theirs.step(rows[0], 300)) <= 1e-5


def test_fewer_second_passes(exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without a second pass is not mixed."""
    source = exported(NANO, target="tensorrt", traversal="1,3")
    ours = machine_of(source, tmp_path / "bundle", monkeypatch).open()
    for one, two in zip(told(ours), told(Runtime(exported(NANO, traversal="1,3"))), strict=True):
        assert difference(one, two) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4", "fp8"])
@pytest.mark.parametrize("model", NANOS)
def test_tokens_of_every_precision(
    model: str, recipe: str, exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the same bundle's graphs on a CPU, which run a prompt and a step as a whole."""
    source = exported(CHECKPOINTS / model, target="rtx", recipe=recipe)
    machine = machine_of(source, tmp_path / "bundle", monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt_module, "devices", lambda: "no GPU")
        with pytest.warns(RuntimeWarning):
            whole = Runtime(source, fallback="cpu")
    ours = machine.open()
    assert isinstance(ours.model.backend, trt_module.TrtBackend)
    assert not isinstance(whole.model.backend, trt_module.TrtBackend)
    # The 16th token of the second is a tie between two in FP16, whose sums are rounded in another order by layer.
    for prompt, picture in ((QUESTION, CHECKPOINTS / model / "scene.png"), ("What is this?", None)):
        answers = [rt.generate(prompt, picture, max_new_tokens=12).token_ids for rt in (ours, whole)]
        assert answers[0] == answers[1] and len(answers[0]) > 1


@pytest.mark.parametrize("machine", ["rtx"], indirect=True)
def test_engines_of_other_layers_are_not_loaded(machine: Machine) -> None:
    """One that is missing, cut short, or in another layer's place: only its hash says so."""
    one, two = (machine.engines / f"{layer_name(i)}.engine" for i in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second) and first != second
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(BundleError, match=r"layer_1\.engine: altered since the build \(sha256 differs\)"):
        machine.open()
    one.write_bytes(first)
    two.unlink()
    with pytest.raises(BundleError, match=r"layer_2\.engine: missing"):
        machine.open()
    two.write_bytes(second)
    assert machine.open().generate("What is this?").token_ids


def test_parts_are_the_whole(exported: Callable[..., Path]) -> None:
    """Every weight is in one part, and every operator of the traverse in as many as it has passes and mixtures."""
    bundle = Bundle(exported(NANO, target="rtx"))
    parts, graphs = Parts(bundle), bundle.manifest.graphs
    found = {name: parts.cut(name).info for name in part_names(8)}
    weights = [weight for part in found.values() for weight in part.constants]
    assert sorted(weights) == sorted({*graphs["traverse"].constants, *graphs["step"].constants})
    layers = [found[layer_name(i)].operators for i in range(8)]
    assert all(each == layers[0] for each in layers)
    for operator in ("MatMul", "Attention", "TensorScatter", "Softmax", "RMSNormalization", "RotaryEmbedding"):
        counts = [found[name].operators.get(operator, 0) for name in (layer_name(0), MIXTURE, HEAD)]
        assert 16 * counts[0] + 8 * counts[1] + counts[2] == graphs["traverse"].operators.get(operator, 0)


def test_passes_that_differ_are_refused(exported: Callable[..., Path], tmp_path: Path) -> None:
    """A second pass with another layer's weight is not taken for the first one."""
    import onnx_ir as ir

    folder = tmp_path / "bundle"
    shutil.copytree(exported(NANO, target="rtx"), folder)
    bundle = Bundle(folder)
    model = ir.load(folder / "traverse.onnx")
    products = [node for node in model.graph if node.op_type == "MatMul"]
    _, second, other, _ = [n for n in products if any(f"layers.{i}.out.weight" in str(n.inputs[1]) for i in (2, 3))]
    second.replace_input_with(1, other.inputs[1])
    (folder / "traverse.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    with pytest.raises(BundleError, match="the two passes of layer 2 do not compute alike"):
        Parts(bundle)
