"""The GPU back end on a stand-in (tests/trt_standin.py): the same answers as on a CPU, and every rule kept.

Nothing here ran on a GPU; tests/test_gpu.py does, where there is one.
"""

from __future__ import annotations

import dataclasses
import gc
import inspect
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import bindings, trt_standin
from tests.cases import difference
from tests.conftest import NANO, slow
from tests.test_trt_api import RTX, described
from tests.trt_standin import CudaRuntime, IRuntimeCache
from trol_edge.bundle.engines import (
    ENGINES,
    FORMAT_VERSION,
    EngineInfo,
    EngineSet,
    Key,
    folder_of,
    left_out,
    read,
    write,
)
from trol_edge.bundle.folder import sha256_of
from trol_edge.bundle.manifest import Bundle, GraphInfo
from trol_edge.bundle.names import WEIGHTS
from trol_edge.bundle.sizes import cache_bytes, shared_weights
from trol_edge.cli import main as cli
from trol_edge.errors import BackendError, BundleError, ContextError, UsageError
from trol_edge.rope import TABLES
from trol_edge.runtime import Runtime
from trol_edge.runtimes import cuda as cuda_module
from trol_edge.runtimes.cuda import CudaPython, Gpu
from trol_edge.runtimes.trt import backend as trt_module
from trol_edge.runtimes.trt import build as trt_build
from trol_edge.runtimes.trt import weights as trt_weights
from trol_edge.runtimes.trt.api import Library

pytestmark = pytest.mark.heavy

PICTURE = NANO / "scene.png"
QUESTION = "What is left of the red circle?"
GPU = Gpu("stand-in for Orin", "8.7", 8 << 30, (12, 6))


@pytest.fixture(scope="module")
def plain_bundle(request: pytest.FixtureRequest) -> Path:
    """trol-nano exported for classic TensorRT; or a given one, where export is not installed (a Jetson)."""
    given = os.environ.get("TROL_EDGE_TENSORRT_BUNDLE")
    return Path(given) if given else request.getfixturevalue("exported")(NANO, target="tensorrt")


def add_engines(folder: Path, key: Key) -> None:
    """Stand-in engines for a bundle, with the manifest that a build writes."""
    bundle = Bundle(folder)
    target = folder_of(bundle, key.target)
    target.mkdir(parents=True)
    infos = {}
    for name in ENGINES:
        graph = bundle.manifest.graphs[name]
        infos[name] = stand_in_engine(bundle, name, graph, folder / graph.file, target)
    weights = bundle.manifest.files[WEIGHTS].sha256
    write(target, EngineSet(FORMAT_VERSION, "a test", key, "fp32", weights, infos))


def stand_in_engine(
    bundle: Bundle, name: str, graph: GraphInfo, source: Path, target: Path, scratch: int = 0
) -> EngineInfo:
    """Write an engine that runs the graph in the file `source`."""
    ranges = trt_build.profiles(bundle, graph)
    path = target / f"{name}.engine"
    shown = [{k: list(v) for k, v in r.items()} for r in ranges]
    path.write_bytes(trt_standin.engine_file(source, shown, left_out(graph), scratch))
    sha = bundle.manifest.files[graph.file].sha256
    return EngineInfo(path.name, path.stat().st_size, sha256_of(path), sha, 0, {}, ranges, 0.0)


@dataclasses.dataclass
class Machine:
    """A stand-in machine, and a Runtime on it."""

    cuda: CudaRuntime
    open: Callable[..., Runtime]
    folder: Path

    @property
    def engines(self) -> Path:
        """The folder of its engines, named for their target."""
        return folder_of(Bundle(self.folder), Bundle(self.folder).manifest.target)


@pytest.fixture(params=["10.3.0", *slow("10.16.1", "rtx")])
def machine(
    request: pytest.FixtureRequest, plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Machine:
    """Classic TensorRT without and with KVCacheUpdate, and the RTX kind with its runtime config and kernel cache."""
    folder = tmp_path / "bundle"
    rtx = request.param == "rtx"
    target = {"10.16.1": "jetson-jp72", "rtx": "rtx"}.get(request.param, "tensorrt")
    exported = target != "tensorrt" and not os.environ.get("TROL_EDGE_TENSORRT_BUNDLE")
    source = request.getfixturevalue("exported")(NANO, target=target) if exported else plain_bundle
    shutil.copytree(source, folder)
    target = Bundle(folder).manifest.target
    stand_in = CudaRuntime()
    module = trt_standin.module(RTX if rtx else "tensorrt", "1.7.1.1" if rtx else request.param, stand_in)
    library = Library(module)
    gpu = dataclasses.replace(GPU, capability="8.9") if rtx else GPU
    add_engines(folder, Key(target, library.title, gpu.name, gpu.capability, "12.6"))
    monkeypatch.setattr(trt_module, "load", lambda name: library)
    monkeypatch.setattr(trt_module, "open_cuda", lambda: CudaPython(stand_in))
    monkeypatch.setattr(trt_module, "devices", lambda: [gpu])
    return Machine(stand_in, lambda: Runtime(folder), folder)


def backend(runtime: Runtime) -> trt_module.TrtBackend:
    """The back end of a Runtime."""
    found = runtime.model.backend
    assert isinstance(found, trt_module.TrtBackend)
    return found


def test_the_same_answers_as_on_a_cpu(machine: Machine, nano: Runtime) -> None:
    """Tokens of a question about a picture, of one without, and of a second one on the same session."""
    runtime = machine.open()
    for prompt, picture in ((QUESTION, PICTURE), ("Describe the scene.", PICTURE), ("What is this?", None)):
        assert runtime.generate(prompt, picture).token_ids == nano.generate(prompt, picture).token_ids
    pixels = nano.preprocess([PICTURE, PICTURE])
    assert pixels is not None
    ours, theirs = (np.asarray(r.model.backend.encode_image(pixels)) for r in (runtime, nano))
    assert difference(ours, theirs) <= 1e-5


def test_sessions_as_on_a_cpu(machine: Machine, nano: Runtime) -> None:
    """Chunks, extend, fork, truncate, become: whatever a session does with its cache."""

    def tell(runtime: Runtime) -> list[Any]:
        ids = runtime.tokenize(QUESTION)
        session = runtime.session(prefill_chunk=7)
        found = [session.prefill(ids)]
        twin = session.fork()
        for each in (session, twin):
            found += [each.step(int(found[-1].argmax())) for _ in range(3)]
        found.append(twin.extend(ids[-5:]))
        session.become(twin)
        found.append(session.step(3))
        session.truncate(len(ids))
        found.append(session.extend([5]))
        return found

    for ours, theirs in zip(tell(machine.open()), tell(nano), strict=True):
        assert ours.dtype == np.float32
        assert difference(ours, theirs) <= 1e-5


def test_a_picture_in_several_chunks(machine: Machine, nano: Runtime) -> None:
    """Each chunk copies its own rows of the features, which stay on the device."""
    runtime = machine.open()
    spec = runtime.bundle.manifest.spec
    ids = [1, *[spec.image_token_id] * spec.vision.tokens_per_image, *runtime.tokenize("What is this?")]
    pixels = nano.preprocess([PICTURE])
    chunked = runtime.session(prefill_chunk=spec.vision.tokens_per_image // 3).prefill(ids, pixels)
    assert difference(chunked, nano.session().prefill(ids, pixels)) <= 1e-5


@pytest.mark.slow
def test_fewer_image_tokens(machine: Machine, nano: Runtime) -> None:
    """Tables of each session's own, on the device: chunks, steps, forks and whole prompts after pruned ones."""

    def tell(runtime: Runtime) -> list[Any]:
        ids, pixels = runtime.tokenize(QUESTION, 1), nano.preprocess([PICTURE])
        features = nano.model.backend.encode_image(pixels)  # the same tokens are kept
        session, found = runtime.session(prefill_chunk=19), list[Any]()
        for share in (0.5, 1.0, 0.25):
            found.append(session.prefill_features(ids, features, image_tokens=share, reuse=share < 1))
            twin = session.fork()
            for each in (session, twin):
                found += [each.step(int(found[-1].argmax())) for _ in range(2)]
            found += [session.step_token(7), session.extend([5])]
        assert session.dropped == 48
        return found

    for ours, theirs in zip(tell(machine.open()), tell(nano), strict=True):
        assert difference(np.asarray(ours), np.asarray(theirs)) <= 1e-5
    asked = [r.generate(QUESTION, PICTURE, image_tokens=0.5).token_ids for r in (machine.open(), nano)]
    assert asked[0] == asked[1]


def test_fewer_second_passes(exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of the second pass for the layers that have one only, and the numbers of a CPU with the same passes."""
    folder = tmp_path / "bundle"
    shutil.copytree(exported(NANO, target="tensorrt", traversal="1,3"), folder)
    stand_in = CudaRuntime()
    library = Library(trt_standin.module("tensorrt", "10.3.0", stand_in))
    add_engines(folder, Key("tensorrt", library.title, GPU.name, GPU.capability, "12.6"))
    monkeypatch.setattr(trt_module, "load", lambda name: library)
    monkeypatch.setattr(trt_module, "open_cuda", lambda: CudaPython(stand_in))
    monkeypatch.setattr(trt_module, "devices", lambda: [GPU])
    ours, theirs = Runtime(folder), Runtime(exported(NANO, traversal="1,3"))
    first = cache_bytes(ours.bundle.manifest.graphs["step"].inputs, ours.bundle.manifest.context)
    assert backend(ours).cache_bytes == theirs.model.backend.cache_bytes == first * 10 // 8
    found = []
    for runtime in (ours, theirs):
        ids, session = runtime.tokenize(QUESTION, 1), runtime.session(prefill_chunk=17)
        logits = [session.prefill(ids, runtime.preprocess(PICTURE))]
        twin = session.fork()
        logits += [session.step(7), session.extend([5]), twin.extend([5, 6])]
        found.append(logits)
    for one, two in zip(*found, strict=True):
        assert difference(one, two) <= 1e-5


@pytest.mark.parametrize("machine", ["10.16.1"], indirect=True)
def test_engines_that_must_be_built_again(machine: Machine) -> None:
    """One that is truncated or missing is not up to date."""
    bundle = Bundle(machine.folder)
    key = read(bundle, machine.engines.name).key
    assert trt_build.why(bundle, key) is None
    path = machine.engines / "step.engine"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert trt_build.why(bundle, key) == "step.engine is missing or truncated"
    path.unlink()
    assert trt_build.why(bundle, key) == "step.engine is missing or truncated"


@pytest.fixture(scope="module", params=["fp32", "int8"])
def sharing_bundles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """trol-nano for classic TensorRT, its weights in both engines, and as inputs of both."""
    pytest.importorskip("torch", reason="export is not installed")
    from trol_edge.export import pipeline
    from trol_edge.export.quantize.made_up import made_up_statistics
    from trol_edge.export.quantize.recipes import RecipeOptions

    request.getfixturevalue("traces")
    options = RecipeOptions(recipe=request.param, scaling=False, clipping=False, observer="minmax")
    folders = []
    for shared in (False, True):
        folders.append(tmp_path_factory.mktemp("sharing") / request.param)
        pipeline.export(
            NANO,
            folders[-1],
            target="tensorrt",
            options=options,
            calibration=made_up_statistics,
            shared_weights=shared,
            record_selftest=False,
        )
    return folders[0], folders[1]


@pytest.mark.slow
def test_engines_that_share_their_weights(
    sharing_bundles: tuple[Path, Path], nano: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block of device memory for both engines, uploaded once; the same answers as with weights in each of them."""
    answers, used = [], []
    for source, name in zip(sharing_bundles, ("apart", "shared"), strict=True):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        stand_in = CudaRuntime()
        library = Library(trt_standin.module("tensorrt", "10.3.0", stand_in))
        add_engines(folder, Key("tensorrt", library.title, GPU.name, GPU.capability, "12.6"))
        monkeypatch.setattr(trt_module, "load", lambda name, library=library: library)
        monkeypatch.setattr(trt_module, "open_cuda", lambda stand_in=stand_in: CudaPython(stand_in))
        monkeypatch.setattr(trt_module, "devices", lambda: [GPU])
        runtime = Runtime(folder)
        answers.append([runtime.generate(q, p).token_ids for q, p in ((QUESTION, PICTURE), ("What is this?", None))])
        used.append(backend(runtime))
    assert answers[0] == answers[1]
    if Bundle(sharing_bundles[0]).manifest.plan.recipe == "fp32":
        assert answers[1][0] == nano.generate(QUESTION, PICTURE).token_ids
    apart, shared = used
    assert apart.weights.keys() == set(TABLES)
    assert shared.weights.keys() == shared_weights(shared.bundle).keys() > set(TABLES)
    state, traverse = shared.new_state(), shared.loaded.contexts["traverse"]
    for raw in (state.execution.contexts["step"].raw, traverse.raw):
        for name, address in shared.weights.items():
            assert (raw.addresses[name] == address) == (name not in TABLES)  # each state has tables of its own
    # Altered weights are found before anything is uploaded.
    path = shared.bundle.path("weights.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"weights\.safetensors: altered since export"):
        trt_module.TrtBackend(shared.bundle)


def test_a_step_moves_little_and_allocates_nothing(machine: Machine) -> None:
    """One embedding and one position up, the token down, and the logits where asked; then one launch; no new memory."""
    runtime = machine.open()
    session = runtime.session()
    session.prefill(runtime.tokenize(QUESTION))
    machine.cuda.calls.clear()
    session.step_token(1)
    written = ["2D"] if machine.engines.name == "tensorrt" else []  # the new rows of all caches
    assert machine.cuda.calls == ["HostToDevice", "HostToDevice", "DeviceToHost", *written, "wait"]
    session.step_token(2)
    held, reached = dict(machine.cuda.memory), machine.cuda.next
    pinned = len(machine.cuda.host)
    machine.cuda.calls.clear()
    machine.cuda.bytes.clear()
    for token in range(20):
        session.step_token(token)
    assert machine.cuda.calls == ["launch", *written, "wait"] * 20
    row = cache_bytes(runtime.bundle.manifest.graphs["step"].inputs, 1) // runtime.bundle.manifest.context
    assert machine.cuda.bytes["2D"] == 20 * row * len(written)
    for token in range(20):
        session.step(token)
    assert machine.cuda.calls[len(written) * 20 + 40 :] == ["launch", *written, "DeviceToHost", "wait"] * 20
    assert machine.cuda.memory.keys() == held.keys() and machine.cuda.next == reached
    assert len(machine.cuda.host) == pinned


def test_a_step_reads_filled_rows(machine: Machine, nano: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded up, and a CUDA graph for each number of rows: where it changes, one plain run and a new capture."""
    monkeypatch.setattr(trt_module, "ROWS", 8)
    runtime = machine.open()
    rows = runtime.model.embeddings[np.arange(40)]
    state, theirs = backend(runtime).new_state(), nano.model.backend.new_state()
    assert difference(state.traverse(rows[:5], None), theirs.traverse(rows[:5], None)) <= 1e-5
    machine.cuda.calls.clear()
    shapes = []
    for at in range(5, 25):
        assert difference(state.step(rows[at], at), theirs.step(rows[at], at)) <= 1e-5
        shapes.append(state.execution.contexts["step"].raw.shapes["slots"][0])
    assert shapes == [8] * 3 + [16] * 8 + [24] * 8 + [32]
    assert machine.cuda.calls.count("launch") == 20 - 4  # the first run of each is not captured
    for at in (5, 6, 7):  # back, as after a shorter question
        assert difference(state.step(rows[at], at), theirs.step(rows[at], at)) <= 1e-5
    assert sum(graph is not None for graph in machine.cuda.graphs) == 1


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
@pytest.mark.parametrize("packed", [False, *slow(True)])
def test_new_rows_are_copied_into_the_caches(
    packed: bool, machine: Machine, nano: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no engine writes in place: one copy for all caches, or one for each if there are gaps between the tensors.

    A step changes its own row of every cache, to what a CPU computes, and no other byte.
    """
    if not packed:
        monkeypatch.setattr(trt_weights, "ALIGNMENT", 1 << 16)
    runtime = machine.open()
    state, theirs = backend(runtime).new_state(), nano.model.backend.new_state()
    caches = [p for p in runtime.bundle.manifest.graphs["step"].inputs if p.name.startswith("past_")]
    assert not [name for name in backend(runtime).loaded.infos["step"] if name.startswith("present_")]
    rows, every = runtime.model.embeddings[np.arange(8)], np.arange(runtime.model.backend.context, dtype=np.int32)
    for each in (state, theirs):
        each.traverse(rows[:5], None)
    for at in (5, 6, 7):  # enqueued, captured, launched
        before = [array.copy() for array in state.rows(every, 0)]
        machine.cuda.calls.clear()
        assert difference(state.step(rows[at], at), theirs.step(rows[at], at)) <= 1e-5
        assert machine.cuda.calls.count("2D") == (1 if packed else len(caches))
        now, wanted = state.rows(every, 0), theirs.rows(every[: at + 1], 0)
        for old, new, right in zip(before, now, wanted, strict=True):
            assert np.flatnonzero((old != new).any(axis=1)).tolist() == [at]
            assert difference(new[: at + 1], right) <= 1e-5


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_a_prompt_in_parts_gives_its_rows(machine: Machine, nano: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traverse of more tokens than its engine takes runs in parts, and writes its own rows of both sets alone."""
    monkeypatch.setattr(trt_build, "GIVEN", 128)
    target = machine.engines
    key = read(Bundle(machine.folder), target.name).key
    shutil.rmtree(target)
    add_engines(machine.folder, key)
    runtime = machine.open()
    state, theirs = backend(runtime).new_state(), nano.model.backend.new_state()
    assert not [name for name in backend(runtime).loaded.infos["traverse"] if name.startswith("present_")]
    count, start = 200, 7
    every = np.arange(runtime.model.backend.context, dtype=np.int32)
    rows = runtime.model.embeddings[np.arange(start + count)]
    for each in (state, theirs):
        each.traverse(rows[:start], None)
    before = [array.copy() for which in (0, 1) for array in state.rows(every, which)]
    machine.cuda.calls.clear()
    machine.cuda.bytes.clear()
    logits = state.traverse(rows[start:], None, start=start)
    assert difference(logits, theirs.traverse(rows[start:], None, start=start)) <= 1e-5
    size = cache_bytes(runtime.bundle.manifest.graphs["traverse"].inputs, 1) // len(every)
    assert machine.cuda.bytes["2D"] == count * size
    now = [array for which in (0, 1) for array in state.rows(every, which)]
    wanted = [array for which in (0, 1) for array in theirs.rows(every[: start + count], which)]
    for old, new, right in zip(before, now, wanted, strict=True):
        assert np.flatnonzero((old != new).any(axis=1)).tolist() == list(range(start, start + count))
        assert difference(new[: start + count], right) <= 1e-5


@pytest.mark.parametrize("machine", ["10.16.1", "rtx"], indirect=True)
def test_caches_are_written_in_place(machine: Machine) -> None:
    """KVCacheUpdate: the engine says which input each present is; another address, or a row too many, fails."""
    runtime = machine.open()
    trt = backend(runtime)
    for name in ("traverse", "step"):
        aliases = {n: info.alias for n, info in trt.loaded.infos[name].items() if n.startswith("present_")}
        assert aliases and aliases == {n: n.replace("present_", "past_", 1) for n in aliases}
    state = trt.new_state()
    rows = runtime.model.embeddings[np.arange(3)]
    state.traverse(rows, None)
    before = state.rows(np.arange(3, dtype=np.int32), 0)
    state.step(rows[0], 3)
    assert all(np.array_equal(a, b) for a, b in zip(before, state.rows(np.arange(3, dtype=np.int32), 0), strict=True))
    raw: Any = state.execution.contexts["step"].raw
    raw.addresses["present_key_0"] = raw.addresses["present_key_1"]
    assert raw.execute_async_v3(7) is False
    raw.addresses["present_key_0"] = raw.addresses["past_key_0"]
    beyond = np.full((1, 1), trt.context, np.int64)  # the runtime never gives such a position
    trt.cuda.upload(raw.addresses["position_ids"], beyond)
    assert raw.execute_async_v3(7) is True
    assert machine.cuda.cudaStreamSynchronize(7) == (trt_standin.Status.cudaErrorIllegalAddress,)


def test_an_alias_of_another_tensor(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that would write a cache elsewhere is not used."""
    wrong = {"present_key_0": "past_value_0"}
    monkeypatch.setattr(trt_standin.ICudaEngine, "get_aliased_input_tensor", lambda self, name: wrong.get(name))
    if machine.engines.name == "tensorrt":
        machine.open()  # 10.3 has no aliases
        return
    with pytest.raises(BundleError, match=r"other inputs or outputs than the graph \(present_key_0\)"):
        machine.open()


@pytest.mark.slow
def test_without_cuda_graphs(machine: Machine, nano: Runtime, plain_bundle: Path) -> None:
    """The switch: every step is enqueued call by call, with the same logits."""
    bundle = Bundle(machine.folder)
    plain = trt_module.TrtBackend(bundle, cuda_graphs=False)
    runtime = machine.open()
    logits = []
    for engine in (plain, backend(runtime)):
        state = engine.new_state()
        rows = runtime.model.embeddings[np.arange(5)]
        state.traverse(rows, None)
        logits.append([state.step(rows[i], 5 + i).copy() for i in range(4)])
    assert "launch" in machine.cuda.calls
    assert np.array_equal(logits[0], logits[1])


def test_a_greedy_answer_downloads_tokens_only(machine: Machine, nano: Runtime) -> None:
    """Eight bytes a token, and the logits of the prompt once a chunk; with logprobs the logits of every token."""
    runtime = machine.open()
    logits = 4 * runtime.bundle.manifest.spec.vocab_size
    found = {}
    for options in ({}, {"logprobs": 0}):
        machine.cuda.bytes.clear()
        answer = runtime.generate("Describe the scene.", PICTURE, **options)
        assert answer.token_ids == nano.generate("Describe the scene.", PICTURE, **options).token_ids
        found[len(options)] = machine.cuda.bytes["DeviceToHost"]
    steps = len(answer.token_ids)  # the end token is chosen by the last of them
    assert found == {0: logits + 8 * steps, 1: logits + (8 + logits) * steps}


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_logits_that_are_no_numbers(machine: Machine, nano: Runtime) -> None:
    """The error of a CPU, from the logits, which are looked at then."""
    for runtime in (machine.open(), nano):
        state = runtime.model.backend.new_state()
        state.traverse(runtime.model.embeddings[np.arange(3)], None)
        broken = np.full(runtime.bundle.manifest.spec.hidden_size, np.nan, np.float32)
        with pytest.raises(BackendError, match=r"logit 0 of \d+ is nan: the graph computed no usable numbers"):
            state.step_token(broken, 3)


def test_features_stay_on_the_device(machine: Machine, nano: Runtime) -> None:
    """A picture goes up once and its features never come down: not for the prompt, a second question, or a fork."""
    runtime = machine.open()
    cuda, spec = machine.cuda, runtime.bundle.manifest.spec
    size = 4 * spec.vision.tokens_per_image * spec.hidden_size
    tables = sum(tensor.nbytes for tensor in shared_weights(runtime.bundle).values())  # a session has its own
    runtime.generate(QUESTION, PICTURE)
    assert cuda.bytes["DeviceToDevice"] == 2 * size + tables  # out of the engine's buffer, and among the embeddings
    uploaded = cuda.bytes["HostToDevice"]
    cuda.bytes.clear()
    second = runtime.generate("What is this?", [PICTURE, PICTURE])
    assert second.token_ids == nano.generate("What is this?", [PICTURE, PICTURE]).token_ids
    assert second.cached_tokens > spec.vision.tokens_per_image and cuda.bytes["DeviceToDevice"] == size
    pixels = 4 * 3 * spec.vision.image_size**2
    assert uploaded - cuda.bytes["HostToDevice"] > pixels - 2 * size  # no pixels: they were in the vision cache
    assert cuda.bytes["DeviceToHost"] < size
    assert runtime.vision_cache.entries == 1 and runtime.vision_cache.bytes == size


def test_pictures_are_known_by_their_pixels(machine: Machine, nano: Runtime) -> None:
    """Token level: a prefix with the same picture is reused, another picture is another one; nothing is downloaded."""
    runtime = machine.open()
    pixels = nano.preprocess(PICTURE)
    assert pixels is not None
    ids = runtime.tokenize(QUESTION, 1)
    session = runtime.session()
    logits = session.prefill(ids, pixels)
    assert difference(logits, nano.session().prefill(ids, pixels)) <= 1e-5
    session.prefill(ids, pixels.copy(), reuse=True)
    assert session.reused == len(ids) - 1
    session.prefill(ids, pixels[..., ::-1].copy(), reuse=True)
    assert 0 < session.reused < ids.index(runtime.bundle.manifest.spec.image_token_id) + 1
    # Arrays are taken too, and so are several blocks; another Runtime's device memory is not.
    features = np.asarray(runtime.model.backend.encode_image(pixels))
    assert difference(session.prefill_features(ids, [features]), logits) <= 1e-5
    other = machine.open()
    with pytest.raises(UsageError, match="in the memory of another Runtime"):
        session.prefill_features(ids, other.model.backend.encode_image(pixels))
    assert difference(session.prefill(ids, pixels), logits) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_memory_follows_its_users(machine: Machine) -> None:
    """Sessions, forks and features that are gone are given back at the next allocation; the cache bounds features."""
    bundle = Bundle(machine.folder)
    runtime = Runtime(machine.folder, vision_cache_bytes=100_000)
    spec = bundle.manifest.spec
    size = 4 * spec.vision.tokens_per_image * spec.hidden_size
    rng = np.random.default_rng(0)
    held = set()
    for _ in range(8):
        frame = rng.integers(0, 255, (64, 64, 3), np.uint8)
        runtime.generate("What is this?", frame, max_new_tokens=3)
        session = runtime.session()
        session.prefill([1, 2, 3])
        fork = session.fork()
        fork.step(4)
        fork.step(5)
        del session, fork
        gc.collect()  # the stand-in's captured graphs refer to what they launch, and so to their session
        held.add(machine.cuda.held())
    assert runtime.vision_cache.entries == 100_000 // size
    assert len(held) <= 1 + 100_000 // size  # it grew by features until the cache was full, and then no more
    pinned = len(machine.cuda.host)
    backend(runtime).new_state()
    assert len(machine.cuda.host) <= pinned
    del runtime
    gc.collect()
    assert machine.cuda.memory == {}


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_a_step_that_cannot_be_captured(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs plain, and says so."""
    runtime = machine.open()
    expected = runtime.generate(QUESTION, PICTURE).token_ids

    def refuse(stream: int, mode: Any) -> Any:
        return (trt_standin.Status.cudaErrorStreamCaptureInvalidated,)

    monkeypatch.setattr(machine.cuda, "cudaStreamBeginCapture", refuse)
    with pytest.warns(RuntimeWarning, match="steps run without a CUDA graph: CUDA: cudaStreamBeginCapture failed"):
        assert machine.open().generate(QUESTION, PICTURE).token_ids == expected


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_both_sets_are_always_kept(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    """What halves the memory on a CPU would not here, and is refused."""
    with pytest.raises(UsageError, match="prefix_reuse=False would save nothing with engines"):
        Runtime(machine.folder, prefix_reuse=False)
    both = backend(machine.open()).cache_bytes
    manifest = Bundle(machine.folder).manifest
    assert both == 2 * cache_bytes(manifest.graphs["step"].inputs, manifest.context)
    assert cli.main(["inspect", str(machine.folder)]) == 0
    assert f"two sets, {both / 1e6:.1f} MB, always, because engines keep both" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_a_board_that_shares_its_memory(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """There CUDA counts files that Linux keeps in memory as used; what Linux would give up counts as free."""
    machine.cuda.total = 1 << 20
    monkeypatch.setattr(trt_module, "devices", lambda: [dataclasses.replace(GPU, integrated=True)])
    monkeypatch.setattr(trt_module, "available_memory", lambda: 1 << 34)
    with pytest.raises(BackendError, match="what all sessions share needs"):  # past the check, and CUDA has the word
        machine.open()
    monkeypatch.setattr(trt_module, "available_memory", lambda: 0)
    with pytest.raises(BackendError, match=r"of GPU memory \(K/V cache"):
        machine.open()


def test_memory_is_given_back(machine: Machine) -> None:
    """After close nothing is allocated; and a state that runs on nevertheless is an error, not a crash."""
    runtime = machine.open()
    session = runtime.session()
    session.prefill(runtime.tokenize(QUESTION))
    session.step(1)
    backend(runtime).close()
    assert machine.cuda.memory == {}
    with pytest.raises(BackendError, match="its engines have been closed"):
        session.step(2)
    with pytest.raises(BackendError, match="cudaErrorInvalidValue"):
        session.prefill(runtime.tokenize(QUESTION))


def test_kernels_are_kept_in_the_bundle(machine: Machine) -> None:
    """TensorRT for RTX: what the first run compiled is there for the second start, if it is as it was written."""
    runtime = machine.open()
    runtime.generate(QUESTION, PICTURE, max_new_tokens=3)
    kept = sorted(p.name for p in machine.engines.glob("*.cache"))
    if not backend(runtime).library.rtx:
        assert kept == []
        return
    assert kept == ["kernels.cache"]  # of all engines
    IRuntimeCache.loaded.clear()
    again = machine.open()
    again.session()
    assert len(IRuntimeCache.loaded) == 1
    for path in machine.engines.glob("*.cache"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    IRuntimeCache.loaded.clear()
    machine.open().session()
    assert IRuntimeCache.loaded == []


def rewrite(machine: Machine, **changes: Any) -> None:
    """Change the key of a bundle's engines."""
    bundle = Bundle(machine.folder)
    engines = read(bundle, machine.engines.name)
    key = dataclasses.replace(engines.key, **changes)
    write(machine.engines, dataclasses.replace(engines, key=key))


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        (
            "library",
            {"library": "TensorRT 10.7.0"},
            "built with library 'TensorRT 10.7.0', but here is 'TensorRT 10.3.0'",
        ),
        (
            "major",
            {"library": "TensorRT 11.4.0"},
            "built with library 'TensorRT 11.4.0', but here is 'TensorRT 10.3.0'",
        ),
        ("gpu", {"gpu": "RTX 4090"}, "built with gpu 'RTX 4090', but here is 'stand-in for Orin'"),
        ("capability", {"capability": "8.9"}, "built with capability '8.9', but here is '8.7'"),
        ("driver", {"driver": "13.0"}, "built with driver '13.0', but here is '12.6'"),
    ],
)
@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_engines_of_another_machine(what: str, changes: dict[str, str], message: str, machine: Machine) -> None:
    """Each part of the key, named; and what to do."""
    rewrite(machine, **changes)
    with pytest.raises(BundleError, match=re.escape(message)) as caught:
        machine.open()
    assert "build them again on this machine with `trol-edge build" in str(caught.value)


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("truncate", "bytes instead of .* truncated or altered; it was not loaded"),
        ("alter", r"altered since the build \(sha256 differs\); it was not used, because an engine is a program"),
        ("remove", "step.engine: missing"),
        ("manifest", "engines.json: altered since the build"),
        ("nothing", "no engines for target tensorrt; make them with `trol-edge build`"),
        ("graph", "built from another step graph than the bundle has now"),
        ("weights", "built from other weights than the bundle has now"),
    ],
)
def test_harmed_engines_are_not_loaded(
    harm: str, message: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is checked before anything is deserialised."""
    folder = machine.engines
    path = folder / "step.engine"
    if harm == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "alter":
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
    elif harm == "remove":
        path.unlink()
    elif harm == "manifest":
        text = (folder / "engines.json").read_text()
        (folder / "engines.json").write_text(text.replace("stand-in for Orin", "something else"))
    elif harm == "nothing":
        shutil.rmtree(folder)
    elif harm == "weights":
        write(folder, dataclasses.replace(read(Bundle(machine.folder), machine.engines.name), weights_sha256="0" * 64))
    else:
        bundle = Bundle(machine.folder)
        engines = read(bundle, machine.engines.name)
        step = dataclasses.replace(engines.engines["step"], graph_sha256="0" * 64)
        write(folder, dataclasses.replace(engines, engines=engines.engines | {"step": step}))
    monkeypatch.setattr(Library, "open", lambda self, plan, name: pytest.fail("it was deserialised"))
    with pytest.raises(BundleError, match=message):
        machine.open()


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_an_engine_changed_while_it_is_loaded(machine: Machine, nano: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortened in place, after it was hashed: what was hashed is loaded. The next load refuses the file."""
    path, load = machine.folder / "engines" / "tensorrt" / "step.engine", Library.open

    def changed(self: Library, plan: Any, name: str) -> Any:
        if name == path.name:
            os.truncate(path, 10)
        return load(self, plan, name)

    monkeypatch.setattr(Library, "open", changed)
    assert machine.open().generate(QUESTION, PICTURE).token_ids == nano.generate(QUESTION, PICTURE).token_ids
    with pytest.raises(BundleError, match=r"step.engine: 10 bytes instead of"):
        machine.open()


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_an_engine_replaced_after_the_check_is_not_used(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are hashed before one is loaded; and what is loaded then, once more."""
    path, load = machine.folder / "engines" / "tensorrt" / "step.engine", Library.open

    def changed(self: Library, plan: Any, name: str) -> Any:
        if name == "vision.engine":
            with path.open("r+b") as file:
                file.seek(path.stat().st_size - 2)
                file.write(b"  ")
        return load(self, plan, name)

    monkeypatch.setattr(Library, "open", changed)
    with pytest.raises(BundleError, match=r"step.engine: altered since the build \(sha256 differs\); it was not used"):
        machine.open()


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_a_plan_that_tensorrt_refuses(machine: Machine) -> None:
    """Right by its hash, and yet none: what TensorRT said is in the error."""
    bundle = Bundle(machine.folder)
    folder = folder_of(bundle, machine.engines.name)
    (folder / "step.engine").write_bytes(b"no plan")
    engines = read(bundle, machine.engines.name)
    info = dataclasses.replace(engines.engines["step"], bytes=7, sha256=sha256_of(folder / "step.engine"))
    write(folder, dataclasses.replace(engines, engines=engines.engines | {"step": info}))
    with pytest.raises(BackendError, match=r"TensorRT 10\.3\.0 could not load step.engine: .*magic tag") as caught:
        machine.open()
    assert "build the engines again on this machine" in str(caught.value)


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_too_little_memory(machine: Machine) -> None:
    """Said before anything is loaded, with the figures; and where it runs out later, by the call that failed."""
    machine.cuda.total = 1 << 20
    with pytest.raises(
        BackendError, match=r"needs 0\.\d\d GB of GPU memory \(K/V cache 0\.\d\d\), but 0\.00 of 0\.00 are"
    ):
        machine.open()
    machine.cuda.total = 1 << 34
    runtime = machine.open()
    machine.cuda.total = machine.cuda.held() + 1000
    cache, pixels = backend(runtime).cache_bytes / 1e6, runtime.preprocess(PICTURE)
    for what, run in (
        (rf"a session \(both K/V sets for 2048 tokens\) needs {cache:.1f} MB", lambda: runtime.session()),
        (r"features of 1 picture\(s\) or tile\(s\) needs 0\.0", lambda: runtime.model.backend.encode_image(pixels)),
    ):
        with pytest.raises(BackendError, match=rf"cudaMalloc failed \(cudaErrorMemoryAllocation\): .*{what}") as caught:
            run()
        assert re.search(r"0\.0 of \d+\.\d MB are free; close sessions, forks and other", str(caught.value))
    machine.cuda.total = 1 << 34
    machine.cuda.scratch = 1 << 35
    with pytest.raises(BackendError, match=f"execution context: .*size was {1 << 35} bytes.; memory is short: close"):
        runtime.session()
    machine.cuda.scratch = 0
    assert runtime.generate(QUESTION, PICTURE).text  # and it stays usable


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_shapes_beyond_every_profile(machine: Machine) -> None:
    """Engines that were built for less than the bundle's context."""
    bundle = Bundle(machine.folder)
    folder = folder_of(bundle, machine.engines.name)
    graph = machine.folder / bundle.manifest.graphs["traverse"].file
    path = folder / "traverse.engine"
    sizes = [{"tokens": [1, 8, 256], "slots": [1, 16, 32]}]
    path.write_bytes(trt_standin.engine_file(graph, sizes, left_out(bundle.manifest.graphs["traverse"])))
    engines = read(bundle, machine.engines.name)
    info = dataclasses.replace(engines.engines["traverse"], bytes=path.stat().st_size, sha256=sha256_of(path))
    write(folder, dataclasses.replace(engines, engines=engines.engines | {"traverse": info}))
    session = machine.open().session()
    session.prefill(np.arange(32))
    with pytest.raises(ContextError, match=r"the traverse engine was built for other sizes than .*33"):
        session.prefill(np.arange(33))
    session.prefill(np.arange(3))  # and it stays usable


def test_a_cuda_python_for_a_newer_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip brings where nothing bounds it, on JetPack 6."""
    stand_in = CudaRuntime()
    monkeypatch.setattr(stand_in, "cudaSetDevice", lambda device: (trt_standin.Status.cudaErrorInsufficientDriver,))
    with pytest.raises(BackendError, match=r"cudaSetDevice failed \(cudaErrorInsufficientDriver\); .*'cuda-python<13'"):
        CudaPython(stand_in)


def test_no_driver_no_gpu(plain_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine, unless it has one: what is missing, in one sentence."""
    assert cuda_module.devices("libthereisnone.so.1") == "there is no NVIDIA driver (libthereisnone.so.1 is not found)"
    monkeypatch.setattr(cuda_module, "devices", lambda: "there is no NVIDIA driver")
    with pytest.raises(BackendError, match="no usable NVIDIA GPU: there is no NVIDIA driver; run `trol-edge doctor`"):
        cuda_module.open_cuda()
    folder = tmp_path / "bundle"
    shutil.copytree(plain_bundle, folder)
    with pytest.raises(BundleError, match="no engines for target tensorrt"):
        Runtime(folder)
    add_engines(folder, Key("tensorrt", "TensorRT 10.3.0", "", "", ""))
    with pytest.raises(BackendError, match=r"tensorrt is not usable here .*it comes with JetPack"):
        Runtime(folder)


# -- the stand-in itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def context(machine: Machine) -> Iterator[tuple[Any, CudaRuntime, Library]]:
    """The step's execution context, bare, with good addresses."""
    runtime = machine.open()
    state = backend(runtime).new_state()
    yield state.execution.contexts["step"].raw, machine.cuda, backend(runtime).library
    del runtime  # until here: with it goes the memory


@pytest.mark.parametrize("machine", ["10.3.0"], indirect=True)
def test_the_stand_in_refuses(context: tuple[Any, CudaRuntime, Library]) -> None:
    """Each rule, broken: False and a logged error, or a status at the next wait."""
    step, cuda, library = context
    good = dict(step.addresses)

    def said(refused: bool) -> str:
        assert refused is False
        return library.messages.pop()

    assert "shape not set for ['slots']" in said(step.execute_async_v3(7))
    assert "not within profile" in said(step.set_input_shape("slots", (0,)))
    assert step.set_input_shape("slots", (256,)) is True
    assert step.execute_async_v3(7) is True
    assert cuda.cudaStreamSynchronize(7) == (trt_standin.OK,)
    assert "not aligned" in said(step.set_tensor_address("logits", good["logits"] + 8))
    assert "is no tensor" in said(step.set_tensor_address("unknown", good["logits"]))
    assert "not within profile" in said(step.set_input_shape("position_ids", (1, 2)))
    assert "does not exist" in said(step.set_optimization_profile_async(1, 7))
    assert "stream 8 does not exist" in said(step.execute_async_v3(8))
    assert not [name for name in good if name.startswith("present_")]
    step.addresses = good | {"inputs_embeds": good["logits"]}
    assert "share an address" in said(step.execute_async_v3(7))
    step.addresses = {n: p for n, p in good.items() if n != "logits"}
    assert "address not set for logits" in said(step.execute_async_v3(7))
    step.addresses = dict(good)
    freed = cuda.memory.pop(good["past_key_0"])  # use after free
    assert step.execute_async_v3(7) is True
    assert cuda.cudaStreamSynchronize(7) == (trt_standin.Status.cudaErrorIllegalAddress,)
    cuda.memory[good["past_key_0"]] = freed


def test_the_stand_ins_stream_is_late() -> None:
    """Work is done at the wait, in order; what is not awaited is not there; pageable memory is no part of a graph."""
    stand_in = CudaRuntime()
    cuda = CudaPython(stand_in)
    pointer = cuda.allocate(8, "a test")
    up, down = cuda.pinned((2,), np.float32), cuda.pinned((2,), np.float32)
    up[:] = 1, 2
    cuda.upload(pointer, up)
    cuda.download(down, pointer)
    assert down.tolist() == [0, 0]
    up[:] = 3, 4  # too early: the copy has not been made
    cuda.wait()
    assert down.tolist() == [3, 4]
    with pytest.raises(BackendError, match=r"cudaMemcpyAsync failed \(cudaErrorStreamCaptureInvalidated\)"):
        cuda.capture(lambda: cuda.upload(pointer, np.zeros(2, np.float32)))
    with pytest.raises(BackendError, match="cudaStreamSynchronize"):
        cuda.capture(cuda.wait)
    with pytest.raises(BackendError, match="cudaMalloc failed"):
        cuda.capture(lambda: cuda.free(cuda.allocate(8, "a test")))

    def copies() -> None:
        cuda.upload(pointer, up)
        cuda.download(down, pointer)

    graph = cuda.capture(copies)
    up[:] = 5, 6
    cuda.launch(graph)
    cuda.wait()
    assert down.tolist() == [5, 6]
    cuda.drop(graph)
    cuda.copy_rows((pointer + 4, 4), (pointer, 4), 4, 1)
    cuda.download(down, pointer)
    cuda.wait()
    assert down.tolist() == [5, 5]
    with pytest.raises(BackendError, match=r"cudaMemcpy2DAsync failed \(cudaErrorInvalidPitchValue\)"):
        cuda.copy_rows((pointer, 2), (pointer, 4), 4, 2)
    cuda.free(pointer)
    with pytest.raises(BackendError, match="cudaFree failed"):
        cuda.free(pointer)
    cuda.upload(pointer, up)
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        cuda.wait()


@pytest.mark.parametrize("version", [*bindings.VERSIONS, RTX])
def test_the_stand_ins_signatures_are_the_real_ones(version: str) -> None:
    """Every method that it has exists in the real class, with these parameter names in this order."""
    classes = described(version)["classes"]
    later = {"IRuntimeConfig", "IRuntimeCache", "is_stream_capturable", "create_runtime_config"}  # of RTX alone
    if version.startswith(("10.3.", "10.13.")):
        later.add("get_aliased_input_tensor")  # since 10.15
    seen = 0
    for name in ("ILogger", "Runtime", "ICudaEngine", "IRuntimeConfig", "IRuntimeCache", "IExecutionContext"):
        if version != RTX and name in later:
            continue
        for method, function in vars(getattr(trt_standin, name)).items():
            if method.startswith("_") or not inspect.isfunction(function) or (version != RTX and method in later):
                continue
            ours = list(inspect.signature(function).parameters)[1:]
            real = [
                re.findall(r"(\w+): ", re.sub("<[^>]*>", "", line))[1:] for line in classes[name]["methods"][method]
            ]
            assert ours in real, (name, method, ours, real)
            seen += 1
    for name in ("TensorIOMode", "DataType"):
        assert {m.name for m in getattr(trt_standin, name)} <= set(classes[name]["members"])
    assert {m.name for m in trt_standin.ILogger.Severity} <= set(classes["ILogger"]["classes"]["Severity"]["members"])
    assert {"device_memory_size_v2", "num_io_tensors", "num_optimization_profiles"} <= set(
        classes["ICudaEngine"]["properties"]
    )
    assert seen >= 12


def test_the_stand_ins_cuda_is_cuda_pythons() -> None:
    """Functions, their number of arguments, statuses and kinds, against cuda-python where it is installed."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed (make test-rtx has it)")
    functions = [n for n in vars(CudaRuntime) if n.startswith("cuda") and inspect.isfunction(getattr(CudaRuntime, n))]
    assert len(functions) > 14
    for name in functions:
        real = getattr(runtime, name)
        signature = (real.__doc__ or "").strip().splitlines()[0]
        match = re.fullmatch(rf"{name}\((.*)\)", signature)
        assert match, signature
        theirs = [part.split(" ")[-1].split("=")[0] for part in match[1].split(", ") if part]
        ours = list(inspect.signature(getattr(CudaRuntime, name)).parameters)[1:]
        assert len(ours) == len(theirs), (name, ours, theirs)
    for kind in (trt_standin.Status, trt_standin.Kind, trt_standin.Mode):
        real = getattr(
            runtime, {"Status": "cudaError_t", "Kind": "cudaMemcpyKind", "Mode": "cudaStreamCaptureMode"}[kind.__name__]
        )
        assert {m.name: m.value for m in kind}.items() <= {m.name: m.value for m in real}.items()
