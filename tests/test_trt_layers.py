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
from tests.conftest import CHECKPOINTS, NANO, NANOS, slow
from tests.test_trt import GPU, PICTURE, QUESTION, Machine, backend, stand_in_engine
from tests.test_trt_api import RTX
from tests.trt_standin import CudaRuntime
from trol_edge.bundle.engines import FORMAT_VERSION, EngineSet, Key, folder_of, names_of, read, write
from trol_edge.bundle.layer_graphs import (
    ATTENTION,
    ATTENTION_STEP,
    ENTER,
    HEAD,
    LEAVE,
    MIXTURE,
    Parts,
    half_name,
    part_names,
)
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


@pytest.fixture(params=["tensorrt", *slow("jetson-jp72", "rtx")])
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


@pytest.mark.slow
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
    layers = runtime.bundle.manifest.spec.num_layers
    halves = [(f"enter_{i}", f"attention_step of layer {i}", f"leave_{i}") for i in range(layers)]
    assert list(contexts) == [*(name for of in halves for name in of), "head"]
    shared = {context.raw.scratch for context in (*contexts.values(), *backend(runtime).loaded.contexts.values())}
    assert len(shared) == 1 and not any(context.raw.own_scratch for context in contexts.values())


def test_one_pair_for_the_second_pass(machine: Machine, nano_bundle: Path) -> None:
    """Without reuse of prefixes: one set, a pair of buffers for all sessions, and the answers of a CPU without it."""
    ours, theirs = machine.open(prefix_reuse=False), Runtime(nano_bundle, prefix_reuse=False)
    trt = backend(ours)
    graphs, context = ours.bundle.manifest.graphs, trt.context
    first = cache_bytes(graphs["step"].inputs, context)
    layers = ours.bundle.manifest.spec.num_layers
    assert trt.cache_bytes == theirs.model.backend.cache_bytes == first + first // layers
    before = machine.cuda.held()
    state = trt.new_state()
    assert first <= machine.cuda.held() - before < first * 11 // 10
    assert state.rows(np.arange(3, dtype=np.int32), 1) == []
    for prompt, picture in ((QUESTION, PICTURE), ("What is this?", None)):
        assert ours.generate(prompt, picture).token_ids == theirs.generate(prompt, picture).token_ids
    with pytest.raises(UsageError, match="prefix_reuse=True"):
        ours.session().extend([5])


@pytest.mark.parametrize("machine", ["tensorrt", "rtx"], indirect=True)
@pytest.mark.parametrize("reuse", [*slow(True), False])
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


@pytest.mark.slow
def test_fewer_second_passes(exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer without a second pass is not mixed."""
    source = exported(NANO, target="tensorrt", traversal="1,3")
    ours = machine_of(source, tmp_path / "bundle", monkeypatch).open()
    for one, two in zip(told(ours), told(Runtime(exported(NANO, traversal="1,3"))), strict=True):
        assert difference(one, two) <= 1e-5


@pytest.mark.parametrize(
    ("model", "reuse"),
    [(NANOS[1], True), *slow((NANOS[0], True), (NANOS[0], False), (NANOS[1], False))],
)
def test_passes_chosen_at_run_time(
    reuse: bool, model: str, exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines of all passes give what a bundle gives that was exported with those passes, and keep no more."""
    machine = machine_of(exported(CHECKPOINTS / model, target="rtx"), tmp_path / "bundle", monkeypatch)
    ours = machine.open(traversal="0,2-3", prefix_reuse=reuse)
    theirs = Runtime(exported(CHECKPOINTS / model, traversal="0,2-3"), prefix_reuse=reuse)
    assert ours.model.backend.cache_bytes == theirs.model.backend.cache_bytes
    for prompt, picture in ((QUESTION, CHECKPOINTS / model / "scene.png"), ("What is this?", None)):
        answers = [rt.generate(prompt, picture, max_new_tokens=12).token_ids for rt in (ours, theirs)]
        assert answers[0] == answers[1]
    if reuse:
        state = backend(ours).new_state()
        caches = [p for p in ours.bundle.manifest.graphs["traverse"].inputs if p.name.startswith("past_second_")]
        assert len(state.rows(np.arange(3, dtype=np.int32), 1)) == 6 < len(caches)
        if model == NANO.name:
            for one, two in zip(told(ours), told(theirs), strict=True):
                assert difference(one, two) <= 1e-5
    again = machine.open(traversal="all", prefix_reuse=reuse)
    assert again.model.backend.second_layers == ours.bundle.manifest.spec.second_layers


def test_passes_that_cannot_be_chosen(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers without caches of a second pass, layers that are not there, and what is no list."""
    machine = machine_of(exported(NANO, target="rtx", traversal="1,3"), tmp_path / "bundle", monkeypatch)
    with pytest.raises(UsageError, match=r"exported with a second pass in layers 1, 3, so .* in 0, 2; leave these out"):
        machine.open(traversal="0-3")
    with pytest.raises(UsageError, match="99-99 is not within layers 0"):
        machine.open(traversal="1,99-99")
    for wrong in ("", "some", [], [1.5], True, 0, {}):
        with pytest.raises(UsageError, match="traversal"):
            machine.open(traversal=wrong)
    assert machine.open(traversal=[3]).model.backend.second_layers == (3,)
    with pytest.raises(UsageError, match="its graphs have their second passes built in"):
        Runtime(exported(NANO), traversal=2)


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
    one, two = (machine.engines / f"{half_name(LEAVE, i)}.engine" for i in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second) and first != second
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(BundleError, match=r"leave_1\.engine: altered since the build \(sha256 differs\)"):
        machine.open()
    one.write_bytes(first)
    two.unlink()
    with pytest.raises(BundleError, match=r"leave_2\.engine: missing"):
        machine.open()
    two.write_bytes(second)
    assert machine.open().generate("What is this?").token_ids


def test_parts_are_the_whole(exported: Callable[..., Path]) -> None:
    """Every weight is in one part, and every operator of the traverse in as many as it has passes and mixtures."""
    bundle = Bundle(exported(NANO, target="rtx"))
    parts, graphs = Parts(bundle), bundle.manifest.graphs
    count = bundle.manifest.spec.num_layers
    found = {name: parts.cut(name).info for name in part_names(count)}
    weights = [weight for part in found.values() for weight in part.constants]
    assert sorted(weights) == sorted({*graphs["traverse"].constants, *graphs["step"].constants})
    assert not found[ATTENTION].constants and not found[ATTENTION_STEP].constants
    for half in (ENTER, LEAVE):
        layers = [found[half_name(half, i)].operators for i in range(count)]
        assert all(each == layers[0] for each in layers)
    for operator in ("MatMul", "Attention", "TensorScatter", "Softmax", "RMSNormalization", "RotaryEmbedding"):
        enter, attention, leave, mixture, head = (
            found[name].operators.get(operator, 0)
            for name in (half_name(ENTER, 0), ATTENTION, half_name(LEAVE, 0), MIXTURE, HEAD)
        )
        passes = 2 * count * (enter + attention + leave)
        assert passes + count * mixture + head == graphs["traverse"].operators.get(operator, 0)
        steps = count * (enter + found[ATTENTION_STEP].operators.get(operator, 0) + leave)
        if operator != "MatMul":  # a step has none of image tokens
            assert steps + head == graphs["step"].operators.get(operator, 0)


def changed(exported: Callable[..., Path], tmp_path: Path, change: Callable[[Any], None]) -> Bundle:
    """A bundle whose traverse was changed behind the manifest's back."""
    import onnx_ir as ir

    folder = tmp_path / "bundle"
    shutil.copytree(exported(NANO, target="rtx"), folder)
    bundle = Bundle(folder)
    model = ir.load(folder / "traverse.onnx")
    change(model.graph)
    (folder / "traverse.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    return bundle


def test_attention_that_differs_is_refused(exported: Callable[..., Path], tmp_path: Path) -> None:
    """A layer that scales its scores in another way than the others, in both passes, is not given their engine."""
    import onnx_ir as ir

    def change(graph: Any) -> None:
        for node in [node for node in graph if node.op_type == "Attention"][2:4]:
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.5)

    bundle = changed(exported, tmp_path, change)
    with pytest.raises(BundleError, match="its layers do not attend alike"):
        Parts(bundle)


def test_passes_that_differ_are_refused(exported: Callable[..., Path], tmp_path: Path) -> None:
    """A second pass with another layer's weight is not taken for the first one."""

    def change(graph: Any) -> None:
        products = [node for node in graph if node.op_type == "MatMul"]
        _, second, other, _ = [n for n in products if any(f"layers.{i}.out.weight" in str(n.inputs[1]) for i in (2, 3))]
        second.replace_input_with(1, other.inputs[1])

    bundle = changed(exported, tmp_path, change)
    with pytest.raises(BundleError, match="the two passes of layer 2 do not compute alike"):
        Parts(bundle)
